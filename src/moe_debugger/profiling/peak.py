"""Measures what the machine can do, with the library that runs the model: one matrix product, one pass over memory."""

import time
from collections.abc import Callable
from typing import Any

from .roofline import Peak

__all__ = ["measure_peak"]

_REPEATS = 5
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
# Well beyond the caches of the machines of today.
_READ_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def measure_peak(device: Any = "cpu", dtype: Any = None) -> Peak:
    """Measure the peak of `device`: it waits for the device, so call it before the model runs, never amid a forward.

    Args:
        device: of torch.
        dtype: of the weights; default: torch's default dtype.

    Returns:
        The best of five: a product of two square matrices (1024 on a CPU with the threads that torch has, 8192 on
        CUDA), and a sum over an array of 256 MiB (1 GiB on CUDA), which reads each byte once.
    """
    import torch

    where = torch.device(device)
    kind = dtype or torch.get_default_dtype()
    size, num_bytes = _GEMM_SIZE.get(where.type, 1024), _READ_BYTES.get(where.type, 256 << 20)
    with torch.no_grad():
        a = torch.ones(size, size, dtype=kind, device=where)
        gemm_s = _best_s(lambda: a @ a, where)
        # As float32 whatever the dtype: what is measured is the reading.
        memory = torch.ones(num_bytes // 4, dtype=torch.float32, device=where)
        read_s = _best_s(lambda: memory.sum(), where)
    threads = f" with {torch.get_num_threads()} thread(s)" if where.type == "cpu" else ""
    return Peak(
        gflops=2 * size**3 / gemm_s / 1e9,
        gbps=num_bytes / read_s / 1e9,
        source=f"measured on {where}{threads}: a {size} x {size} {str(kind).rpartition('.')[2]} matrix product, "
        f"and a sum over {num_bytes >> 20} MiB",
    )


def _best_s(work: Callable[[], Any], device: Any) -> float:
    import torch

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    finish()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)
