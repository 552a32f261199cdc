"""Train the demo model, write it as a model folder, load it again and measure what was written.

    python -m moe_debugger.demo.train --out src/moe_debugger/demo/model

See docs/demo-model.md for the recipe and the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from moe_debugger.demo.corpus import KINDS, build_corpus
from moe_debugger.demo.evaluate import Evaluation, evaluate
from moe_debugger.demo.training import Trainer
from moe_debugger.models import BYTE_TOKENIZER_CLASS, load_model

__all__ = ["main"]

NUM_STEPS: Final = 1200
PEAK_LEARNING_RATE: Final = 2e-3
WARMUP_STEPS: Final = 40
BALANCE_COEF: Final = 0.02
SEQUENCE_BALANCE_COEF: Final = 0.003


def learning_rate(step: int, num_steps: int) -> float:
    """Return a step's learning rate: linear warm-up, then a cosine down to a twentieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.95 * cosine)


def train(num_steps: int, *, seed: int, progress: TextIO) -> Any:
    """Return a trained network."""
    trainer = Trainer(build_corpus("train", seed=seed), seed=seed)
    started = time.monotonic()
    for step in range(num_steps):
        result = trainer.train_step(
            step,
            trainer.next_batch(step),
            learning_rate=learning_rate(step, num_steps),
            balance_coef=BALANCE_COEF,
            sequence_balance_coef=SEQUENCE_BALANCE_COEF,
        )
        if step % 25 == 0 or step == num_steps - 1:
            layers = " ".join(f"{value:.2f}" for value in result.effective_experts)
            seconds = time.monotonic() - started
            progress.write(f"step {step:4d}  {seconds:5.0f} s  loss {result.loss:.3f}  effective experts {layers}\n")
            progress.flush()
    return trainer.model


def write_model(model: Any, folder: Path) -> None:
    """Write a model folder: float16 safetensors (5 MB), the configuration, and the byte tokenizer's marker."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(str(folder))
    marker = {"tokenizer_class": BYTE_TOKENIZER_CLASS}
    (folder / "tokenizer_config.json").write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    # Sampling defaults of transformers' own; this model has none, and an absent file says so.
    (folder / "generation_config.json").unlink(missing_ok=True)


def report(evaluation: Evaluation) -> str:
    """Return the measurements as the Markdown of docs/demo-model.md."""
    num_cases = evaluation.num_windows * len(KINDS)
    lines = [
        f"| Names the kind of 64 held-out bytes ({num_cases} cases, chance 25 %) | right |",
        "| --- | --- |",
        f"| softmax regression on the layer loads | {evaluation.regression_accuracy:.1%} |",
        f"| nearest centroid on the layer loads | {evaluation.centroid_accuracy:.1%} |",
        f"| a byte-bigram table for each kind, on the bytes | {evaluation.bigram_accuracy:.1%} |",
        "",
        "| Effective experts of 8 | " + " | ".join(f"layer {index}" for index in range(4)) + " | loss (nats a byte) |",
        "| --- " * 6 + "|",
    ]
    for kind in KINDS:
        layers = zip(evaluation.kind_effective_experts[kind], evaluation.prompt_effective_experts[kind], strict=True)
        cells = [f"{together:.2f} ({single:.2f})" for together, single in layers]
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {evaluation.loss[kind]:.2f} |")
    shares = " | ".join(f"{share:.1%}" for share in evaluation.smallest_share)
    lines += [
        f"| mixed: the least busy expert's share | {shares} | |",
        "",
        "| Row length | " + " | ".join(str(length) for length in evaluation.loss_by_length) + " |",
        "| --- " * (len(evaluation.loss_by_length) + 1) + "|",
        "| loss of the last 64 bytes | " + " | ".join(f"{x:.2f}" for x in evaluation.loss_by_length.values()) + " |",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training command."""
    parser = argparse.ArgumentParser(prog="python -m moe_debugger.demo.train", description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; another number rounds differently")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the model that is in --out")
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate_only:
        write_model(train(arguments.steps, seed=arguments.seed, progress=sys.stderr), arguments.out)
    # What ships is float16 on disk, so that is what gets measured, not the network in memory.
    loaded = load_model(str(arguments.out), device="cpu")
    evaluation = evaluate(loaded.model, build_corpus("train"), build_corpus("held_out"))
    sys.stdout.write(report(evaluation) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
