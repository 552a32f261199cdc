"""All columns of the table: the matrix's, and those of every file of modes."""

from oracle import modes_compiled, modes_decoding, modes_running, modes_sharded, modes_training
from oracle.matrix import matrix_cell, matrix_columns
from oracle.registry import FAMILIES, MODES, builds_of, key_of, mode_cell

__all__ = [
    "FAMILIES",
    "MODES",
    "MODE_FILES",
    "builds_of",
    "key_of",
    "matrix_cell",
    "matrix_columns",
    "mode_cell",
]

# Importing them is what registers their modes.
MODE_FILES = (modes_decoding, modes_training, modes_compiled, modes_running, modes_sharded)
