"""The cells of the matrix: every architecture by experts implementation and dtype, a forward and a greedy generate."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from oracle.compare import Comparison
from oracle.expectations import forward_problems, generate_problems
from oracle.observe import MAX_UNSEEN, bare, observed
from oracle.outcome import Impossible, NotAccepted
from torch import nn
from transformers.integrations.moe import ExpertsInterface
from zoo.build import Build

__all__ = [
    "DTYPES",
    "IMPLEMENTATIONS",
    "NEW_TOKENS",
    "check_forward",
    "check_generate",
    "forward_of",
    "matrix_cell",
    "matrix_columns",
    "max_unseen",
    "merge",
]

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEW_TOKENS = 4
# NLLB-MoE's experts run for every token, at weight 0 where the router's gate is closed (and see its defect: only the
# first two experts ever run).
_MAX_UNSEEN = {"nllb_moe": 0.5}


def matrix_columns() -> list[str]:
    """Return the names of the matrix's columns, such as "grouped_mm bf16"."""
    return [f"{implementation} {dtype}" for implementation in IMPLEMENTATIONS for dtype in DTYPES]


def matrix_cell(build: Build, column: str) -> Comparison:
    """Check one cell: a forward, and generate where the build has one.

    Raises:
        Impossible: the bare model does not run.
        NotAccepted: its experts do not run by that implementation.
    """
    implementation, dtype = column.split()
    model = _made(build, implementation, DTYPES[dtype])
    if implementation != "eager":
        with _calls_of(implementation) as calls:
            bare(lambda model: forward_of(model, build.inputs(model)), model)
        if not calls:
            raise NotAccepted(f"the experts run by their own code whatever is asked, {implementation} is never called")
    result = check_forward(build, model)
    if build.generate_inputs is not None:
        merge(result, check_generate(build, model))
    return result


def check_forward(build: Build, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Comparison:
    """Return how far one forward's capture is from the truth, metadata included."""
    given = build.inputs(model) if inputs is None else inputs
    watched = observed(model, lambda model: forward_of(model, given), max_unseen=max_unseen(build))
    for problem in forward_problems(watched.decisions, given) if build.name != "diffusion_gemma" else ():
        watched.comparison.add_problem(problem)
    return watched.comparison


def check_generate(build: Build, model: nn.Module, **options: Any) -> Comparison:
    """Return how far the capture of a greedy generate is from the truth; metadata only where no options are given."""
    assert build.generate_inputs is not None
    given = build.generate_inputs(model)
    if build.name == "diffusion_gemma":
        # It denoises a whole canvas in each of its steps.
        options = {"max_new_tokens": NEW_TOKENS, **options}
        return observed(model, lambda model: _generate(model, given, **options)).comparison
    run_options = {"max_new_tokens": NEW_TOKENS, **options}
    watched = observed(model, lambda model: _generate(model, given, **run_options), max_unseen=max_unseen(build))
    if not options:
        is_encoder_decoder = build.kind == "encoder-decoder"
        problems = generate_problems(watched.decisions, given, watched.output, is_encoder_decoder=is_encoder_decoder)
        for problem in problems:
            watched.comparison.add_problem(problem)
    return watched.comparison


def max_unseen(build: Build) -> float:
    """Return the share of slots of weight 0 that is in a build's nature."""
    return _MAX_UNSEEN.get(build.name, MAX_UNSEEN)


def forward_of(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def _generate(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    return model.generate(**inputs, do_sample=False, **options)


def _made(build: Build, implementation: str, dtype: torch.dtype) -> nn.Module:
    refused = ""
    # Some wrappers offer no choice of their own, but their text model does.
    for choice in (implementation, {"text_config": implementation}):
        try:
            return build.make(dtype=dtype, experts_implementation=choice)
        except ValueError as error:
            if "experts implementation" not in str(error):
                raise Impossible(f"ValueError: {error}") from error
            refused = refused or str(error)
    raise NotAccepted(refused)


@contextmanager
def _calls_of(implementation: str) -> Iterator[list[int]]:
    """Count the calls of an experts implementation of the library."""
    calls: list[int] = []
    known: Any = ExpertsInterface._global_mapping
    original = known[implementation]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    with patch.dict(known, {implementation: counted}):
        yield calls


def merge(into: Comparison, other: Comparison) -> None:
    into.num_rows += other.num_rows
    into.num_slots += other.num_slots
    into.num_wrong_ids += other.num_wrong_ids
    into.max_weight_error = max(into.max_weight_error, other.max_weight_error)
    into.max_weight_excess = max(into.max_weight_excess, other.max_weight_excess)
    into.num_unseen_slots += other.num_unseen_slots
    into.num_rows_without_expert += other.num_rows_without_expert
    into.num_identity_rows += other.num_identity_rows
    for problem in other.problems:
        into.add_problem(problem)
