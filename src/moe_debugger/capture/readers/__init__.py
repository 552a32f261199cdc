"""The readers: one for each way in which a library calls its experts, told apart by structure."""

from .base import Model, Reading
from .dense_scores import read_dense_scores
from .fixed_choice import read_fixed_choice
from .module_list import read_module_list
from .one_hot import read_one_hot
from .product_keys import read_product_keys
from .sorted_lists import read_sorted_lists
from .standard import read_standard
from .user import read_by_adapter

__all__ = ["READERS", "Model", "Reading", "read_by_adapter"]

# Asked in this order; the first one that knows a module reads it.
READERS = (
    read_sorted_lists,
    read_product_keys,
    read_fixed_choice,
    read_one_hot,
    read_module_list,
    read_dense_scores,
    read_standard,
)
