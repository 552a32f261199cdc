"""docs/training.md: its code runs as written, and it defines every series."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_moe
import torch
from transformers import Trainer, TrainingArguments

from moe_debugger.training import SERIES_NAMES

_PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")


def _code() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", _PAGE, re.MULTILINE | re.DOTALL)


def test_every_series_is_defined() -> None:
    rows = re.findall(r"^\| (`.+?) \|", _PAGE, re.MULTILINE)
    defined = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert defined == {*SERIES_NAMES, "eval_loss"}


def test_the_plain_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_moe.build("mixtral").train()
    ids = torch.randint(3, tiny_moe.VOCABULARY, (2, 8))
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [{"input_ids": ids, "labels": ids}] * 3,
    }
    exec(_code()[0], names)
    assert names["series"].names() == (
        "expert_gradient_norm", "loss", "lr", "router_gradient_norm", "router_weight_norm"
    )  # fmt: skip
    assert set(names["series"].step.tolist()) == {1, 2, 3}
    assert "router_gradient_norm" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.randint(3, tiny_moe.VOCABULARY, (8, 8))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True
    )
    names: dict[str, Any] = {
        "Trainer": Trainer,
        "arguments": arguments,
        "model": tiny_moe.build("mixtral", output_router_logits=True),
        "rows": [{"input_ids": row, "labels": row} for row in ids],
    }
    exec(_code()[1], names)
    printed = capsys.readouterr().out
    assert "router_gradient_norm" in printed
    assert "lr" in printed
    assert names["callback"].session.is_closed
