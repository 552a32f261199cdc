"""One of two processes of a model whose second layer sums its output over them; rank 1 is the slower one.

python tests/profiled_ranks.py RANK PORT FOLDER
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from timed_moe import ListModel
from torch import distributed, nn

from moe_debugger.capture.discovery import find_sites
from moe_debugger.profiling import LayerProfile, LayerProfiler

__all__ = ["SLEEP_S"]

SLEEP_S = 0.05


class _Summed(nn.Module):
    """A block whose output is summed over the ranks, as expert parallelism does."""

    def __init__(self, block: Any, sleep_s: float) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = block.gate, block.experts, block.top_k
        self._run, self._sleep_s = block.forward, sleep_s

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        time.sleep(self._sleep_s)
        out: torch.Tensor = self._run(hidden)
        distributed.all_reduce(out)
        return out


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = ListModel(2)
    model.layers[1]["mlp"] = _Summed(model.layers[1]["mlp"], SLEEP_S * rank)  # type: ignore[index, operator]
    profiler = LayerProfiler(model, find_sites(model).sites)
    original = distributed.all_reduce
    profiler.attach()
    with torch.no_grad():
        for _ in range(8):
            model(torch.arange(8)[None])
    profile = LayerProfile(profiler)
    profiler.detach()
    assert distributed.all_reduce is original
    waits = [layer.parts["wait"] for layer in profile.layers]
    Path(folder, str(rank)).write_text(f"{waits[0].median_ms} {waits[1].median_ms} {profiler.wait_reason}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
