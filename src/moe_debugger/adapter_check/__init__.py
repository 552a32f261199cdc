"""Proves an adapter by experiment: silence one expert of a layer, and see which tokens' outputs move.

Read in order: `check` (what is done), `recording` (one real forward), `silencing` and `replay` (the experiment),
`claims` (what the adapter said), `comparison` (where the two differ, and what that looks like).
"""

from .check import check_adapter
from .result import AdapterCheck, LayerCheck

__all__ = ["AdapterCheck", "LayerCheck", "check_adapter"]
