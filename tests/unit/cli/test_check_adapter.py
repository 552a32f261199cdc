"""`moe-debugger check-adapter` on the GLaM of the examples, copied to a folder of its own."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

GLAM_FOLDER = Path(__file__).parents[3] / "examples" / "glam"
MINE = """
import torch
from glam_adapter import GlamAdapter
from modeling_glam import GlamConfig, GlamForCausalLM

MADE = GlamAdapter()


class OffByOne(GlamAdapter):
    def expert_output_weights(self, module, expert_id):
        return [module.experts.w_out[(expert_id + 1) % 64]]

    def expert_output(self, module, expert_id, hidden):
        return super().expert_output(module, (expert_id + 1) % 64, hidden)


def small():
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return GlamForCausalLM(GlamConfig(num_experts=64, **sizes))


def with_inputs():
    return small(), {"input_ids": torch.arange(30).view(3, 10)}


def fails():
    raise OSError("no disk")
"""


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def check(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Run `moe-debugger check-adapter` in a folder with the example and `mine.py`."""
    torch.set_num_threads(1)
    for name in ("modeling_glam.py", "glam_adapter.py"):
        shutil.copy(GLAM_FOLDER / name, tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), {name: sys.modules.pop(name, None) for name in ("modeling_glam", "glam_adapter")}

    yield partial(run, "check-adapter")
    sys.path[:] = path
    for name in ("mine", *modules):
        sys.modules.pop(name, None)
    sys.modules.update({name: module for name, module in modules.items() if module is not None})


def test_an_adapter_that_is_right_ends_with_0_and_a_table(check: Run) -> None:
    out, err = check("glam_adapter:GlamAdapter", "--model", "modeling_glam:tiny_model", "--max-experts", "16")
    assert "layers.1.feed_forward" in out
    assert "adapter 'glam' agrees with the experiment" in out
    assert "48 experts beyond max_experts" in out
    assert not err


def test_an_adapter_that_is_wrong_ends_with_1_and_says_how(check: Run) -> None:
    out, err = check("mine:OffByOne", "--model", "mine:small", code=1)
    assert not out
    assert "adapter 'glam' is refused, 1 problem(s):" in err
    assert "layers.1.feed_forward: the experts of" in err
    assert "the adapter said experts" in err
    assert "Every id is 1 too high" in err


def test_the_result_as_json(check: Run) -> None:
    out, _ = check("mine:MADE", "--model", "mine:with_inputs", "--max-experts", "8", "--json")
    result = json.loads(out)
    assert result["agrees"]
    assert [layer["num_tokens"] for layer in result["layers"]] == [30]
    out, _ = check("mine:OffByOne", "--model", "mine:small", "--json", code=1)
    assert json.loads(out)["problems"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("glam_adapter", "--model", "mine:small"), "expected MODULE:NAME, such as glam_adapter:GlamAdapter"),
        (("nowhere:GlamAdapter", "--model", "mine:small"), "No module named 'nowhere'; it is looked for in"),
        (("glam_adapter:Missing", "--model", "mine:small"), "has no attribute 'Missing'"),
        (("mine:small", "--model", "mine:small"), "expected a subclass of moe_debugger.Adapter"),
        (("mine:MADE", "--model", "mine:fails"), "--model mine:fails raised OSError: no disk"),
        (("mine:MADE", "--model", "mine:MADE"), "expected a function without arguments"),
        (("mine:MADE", "--model", "no-such-folder"), "no-such-folder"),
        (("mine:MADE", "--model", "demo"), "adapter 'glam' matches none of the"),
    ],
)
def test_what_cannot_be_checked_ends_with_1_and_the_reason(
    check: Run, arguments: tuple[str, ...], expected: str
) -> None:
    out, err = check(*arguments, code=1)
    assert not out
    assert err.startswith("moe-debugger: ")
    assert expected in err
