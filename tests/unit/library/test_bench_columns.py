"""The rows that the bench of the analysis makes up have the form of those of a session."""

import numpy as np
import tiny_moe
import torch
from bench.bench_analysis import bare_bincount, make_decisions

from moe_debugger import MoEDebugger
from moe_debugger.analysis import fold_decisions


def test_columns_of_the_bench_are_those_of_a_session() -> None:
    model = tiny_moe.build("mixtral")
    with MoEDebugger(model, level="routes+tokens") as debugger:
        model(torch.arange(24).reshape(2, 12))
        assert debugger.session is not None
        real = debugger.session.decisions()
        made = make_decisions(8, 2, 5_000)
        for name, column in made.items():
            assert column.dtype == real[name].dtype, name
            assert column.ndim == real[name].ndim, name


def test_rows_of_the_bench_have_distinct_experts_and_the_counts_of_a_bare_count() -> None:
    made = make_decisions(64, 8, 5_000)
    ids = np.sort(made["expert_ids"], axis=1)
    assert (ids[:, 1:] > ids[:, :-1]).all()
    assert (ids.min(), ids.max()) >= (0, 50)
    assert ids.max() < 64
    state = fold_decisions(made, num_experts=64, top_k=8)
    counts = np.concatenate([layer.counts for layer in state.layers.values()])
    assert counts.tolist() == bare_bincount(made, 64).tolist()
