"""Each kind of mode once, on the build for which it is hardest; the full tier has all of them."""

import pytest
from oracle.columns import mode_cell

CASES = [
    # Masks that are prepared for each kind of layer, longer than the text.
    ("static cache", "gpt_oss"),
    ("right-padded generate", "mixtral"),
    # Images are requests, too.
    ("sampling", "vitpose_backbone"),
    ("sampling", "switch_transformers"),
    ("levels", "longcat_flash"),
    ("two threads", "llama4_text"),
    ("training with noise", "phimoe"),
    ("checkpointing, reentrant", "deepseek_v3"),
    ("gradient accumulation", "mixtral"),
    ("autocast bf16", "jetmoe"),
    ("inference mode", "mixtral"),
    ("moved to bf16", "mixtral"),
]


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_a_mode_is_captured_exactly(mode: str, name: str) -> None:
    comparison = mode_cell(name, mode)
    assert comparison.is_exact, comparison.summary()
