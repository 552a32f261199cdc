"""What watching costs: time of forwards with the capture over time without it, in ABBA order.

    python tests/bench/bench_capture.py [--pairs 30] [--threads 1] [--workloads prefill decode_1 decode_8]

The last line is JSON; docs/cost.md says what each field is. The model has the proportions of a real one at a size for
CPUs: OLMoE-1B-7B at a quarter of its width (hidden 512, experts of 256, 12,576 tokens), with half of its layers (8) and
all of its 64 experts, of which 8 are chosen. `prefill` runs 8 texts of 256 tokens, `decode_1` and `decode_8` steps with
a KV cache for 1 and 8 texts. A run with the capture ends when everything that was captured has been counted, so the
ratio is what watching costs in all and not only what the hooks do.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

from moe_debugger import MoEDebugger
from moe_debugger._debugger import CaptureLevelName

_BOOTSTRAPS = 4000
_VOCABULARY = 12_576
_PROMPT_LENGTH = 64
# What is measured against the bare model, beside the bare model itself ("aa", the noise of the machine).
_LEVELS: tuple[CaptureLevelName, ...] = ("counts", "routes")
_PEERS = ("output_router_logits", "tolist_hook")
# A public library of the kind, run where it is installed: `pip install --target DIR moewatch`, PYTHONPATH=DIR.
_HAS_MOEWATCH = importlib.util.find_spec("moewatch") is not None


def build_model(num_layers: int = 8, num_experts: int = 64, top_k: int = 8) -> Any:
    """Return a Mixtral with random weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=1024,
    )
    return MixtralForCausalLM(config).eval()


class Prefill:
    """Forwards over whole texts."""

    def __init__(self, model: Any, num_texts: int, length: int, repeats: int) -> None:
        self._model = model
        self._ids = torch.randint(0, _VOCABULARY, (num_texts, length))
        self.num_forwards = repeats

    def __call__(self, **options: Any) -> Any:
        output = None
        for _ in range(self.num_forwards):
            output = self._model(self._ids, **options)
        return output


class Decode:
    """Steps of one token for each text, after a prompt whose cache is cut back to its length before each run."""

    def __init__(self, model: Any, num_texts: int, steps: int) -> None:
        self._model = model
        self._step = torch.randint(0, _VOCABULARY, (num_texts, 1))
        self._cache = DynamicCache(config=model.config)
        model(torch.randint(0, _VOCABULARY, (num_texts, _PROMPT_LENGTH)), past_key_values=self._cache)
        self.num_forwards = steps

    def __call__(self, **options: Any) -> Any:
        output = None
        for _ in range(self.num_forwards):
            output = self._model(self._step, past_key_values=self._cache, **options)
        return output

    def rewind(self) -> None:
        """Forget the steps."""
        self._cache.crop(-self.num_forwards)


class Variant:
    """One way to run a workload: the bare model, with the capture, or as a peer does it."""

    def __init__(self, model: Any, level: CaptureLevelName | None = None, peer: str | None = None) -> None:
        self._model = model
        self._peer = peer
        self._debugger = self._session = self._watcher = None
        if peer == "moewatch":
            import moewatch  # type: ignore[import-not-found]

            # Every forward, as the capture does; its default is every tenth.
            config = moewatch.WatchConfig(sample_every=1, output=moewatch.OutputMode.SILENT)
            self._watcher = moewatch.MoEWatch(model, config=config)
        if level is not None:
            self._debugger = MoEDebugger(model, level=level)
            self._session = self._debugger.start_session()
            self._session._capture.detach()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Place the hooks of this variant, and remove them at the end."""
        handles = []
        if self._session is not None:
            self._session._capture.attach()
        elif self._peer == "tolist_hook":
            handles = [layer.mlp.gate.register_forward_hook(_tolist_hook) for layer in self._model.model.layers]
        elif self._watcher is not None:
            self._watcher.start()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self._watcher is not None:
                self._watcher.stop()
            if self._session is not None:
                self._session._capture.detach()

    def run(self, workload: Prefill | Decode) -> tuple[float, float]:
        """Return the wall time and the processor time of one run, all threads together, in seconds."""
        with self.active(), torch.no_grad():
            cpu, wall = time.process_time(), time.perf_counter()
            if self._peer == "output_router_logits":
                _count_router_logits(workload(output_router_logits=True), self._model.config.num_experts_per_tok)
            else:
                workload()
            if self._session is not None:
                self._session.flush()
            spent = time.perf_counter() - wall, time.process_time() - cpu
        if isinstance(workload, Decode):
            workload.rewind()
        return spent

    def performance(self) -> Any:
        """Return what the capture says about itself."""
        assert self._debugger is not None
        return self._debugger.get_performance_metrics()

    def close(self) -> None:
        """End the session."""
        if self._debugger is not None:
            self._debugger.close()


def _count_router_logits(output: Any, top_k: int) -> list[torch.Tensor]:
    """The plain way without hooks: the library returns all logits, and the caller finds the choices again."""
    counts = []
    for logits in output.router_logits:
        _, chosen = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1)
        counts.append(torch.bincount(chosen.reshape(-1), minlength=logits.shape[-1]))
    return counts


def _tolist_hook(module: Any, args: Any, output: Any) -> None:
    """The plain way with hooks: choices become Python lists at once."""
    chosen = output[-1] if isinstance(output, tuple) else output.topk(8, dim=-1).indices
    chosen.tolist()


def _measure(workload: Any, model: Any, pairs: int, peer_pairs: int, max_minutes: float) -> dict[str, Any]:
    """Return ratio and interval of each variant; a pair visits all of them, so that they share the machine's mood."""
    bare = Variant(model)
    variants: dict[str, Variant] = {level: Variant(model, level=level) for level in _LEVELS}
    variants |= {"aa": Variant(model)}
    peers = (*_PEERS, "moewatch") if _HAS_MOEWATCH else _PEERS
    variants |= {peer: Variant(model, peer=peer) for peer in peers}
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    seconds = []
    bare.run(workload)
    for variant in variants.values():
        variant.run(workload)
    started = time.monotonic()
    for pair in range(pairs):
        if time.monotonic() - started > max_minutes * 60:
            break
        for name, variant in variants.items():
            if name in peers and pair >= peer_pairs:
                continue
            spent = [one.run(workload) for one in (bare, variant, variant, bare)]
            wall, cpu = ([each[kind] for each in spent] for kind in (0, 1))
            ratios[name].append(((wall[1] + wall[2]) / (wall[0] + wall[3]), (cpu[1] + cpu[2]) / (cpu[0] + cpu[3])))
            seconds += [wall[0], wall[3]]
        sys.stderr.write(f"pair {pair + 1}: " + _progress(ratios) + "\n")
    result: dict[str, Any] = {"num_pairs": len(ratios["aa"])}
    result |= {"forward_ms": round(statistics.median(seconds) / workload.num_forwards * 1e3, 2)}
    for name, values in ratios.items():
        walls, cpus = [wall for wall, _ in values], [cpu for _, cpu in values]
        if not values:
            continue
        result[f"{name}_ratio"] = round(statistics.median(walls), 4)
        result[f"{name}_interval"] = _interval(walls)
        result[f"{name}_cpu_ratio"] = round(statistics.median(cpus), 4)
        result[f"{name}_cpu_interval"] = _interval(cpus)
    for level in _LEVELS:
        performance = variants[level].performance()
        num_forwards = max(1, performance.num_forwards)
        result[f"{level}_hook_us_per_forward"] = round(performance.hook_s / num_forwards * 1e6, 1)
        result[f"{level}_capture_us_per_forward"] = round(performance.capture_s / num_forwards * 1e6, 1)
        variants[level].close()
    return result


def _progress(ratios: dict[str, list[tuple[float, float]]]) -> str:
    return " ".join(f"{name} {statistics.median(w for w, _ in each):.4f}" for name, each in ratios.items() if each)


def _interval(ratios: list[float]) -> list[float]:
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_BOOTSTRAPS))
    return [round(medians[int(_BOOTSTRAPS * share)], 4) for share in (0.025, 0.975)]


def hook_times(num_tokens: int = 1024, num_experts: int = 128, top_k: int = 8, calls: int = 2000) -> dict[str, float]:
    """Return what the hooks of one layer's call take of the model's thread, and a bare `bincount` of the same ids."""
    model = build_model(num_layers=1, num_experts=num_experts, top_k=top_k)
    block = model.model.layers[0].mlp
    result: dict[str, float] = {}
    given: dict[str, Any] = {}
    handles = [
        block.gate.register_forward_hook(lambda module, args, output: given.update(gate=(args, output))),
        block.experts.register_forward_pre_hook(lambda module, args: given.update(experts=args)),
    ]
    ids = torch.randint(0, _VOCABULARY, (1, num_tokens))
    with torch.no_grad():
        model(ids)
        for handle in handles:
            handle.remove()
        gate_args, gate_output = given["gate"]
        chosen = given["experts"][1]
        result["bincount_us"] = _best_us(lambda: torch.bincount(chosen.reshape(-1), minlength=num_experts), calls)
        for level in _LEVELS:
            with MoEDebugger(model, level=level, buffer_bytes=1 << 40) as debugger:
                session = debugger.start_session() if debugger.session is None else debugger.session
                times: list[float] = []

                def measure(module: Any, args: Any, capture: Any = session._capture, times: Any = times) -> None:
                    # Inside of a forward, where the hooks find its tokens; the layer's own hooks, as torch calls them,
                    # and what is left of them for the end of the forward.
                    after, before = _own(block.gate._forward_hooks), _own(block.experts._forward_pre_hooks)

                    def call() -> None:
                        after(block.gate, gate_args, {}, gate_output)
                        before(block.experts, given["experts"], {})
                        capture._settle(capture._local.forward)

                    times.append(_best_us(call, calls))

                handle = block.register_forward_pre_hook(measure)
                model(ids)
                handle.remove()
                session.flush()
                result[f"hook_us_{level}"] = times[0]
    return {name: round(value, 2) for name, value in result.items()}


def _own(hooks: dict[int, Any]) -> Any:
    return next(hook for hook in hooks.values() if type(hook).__module__.startswith("moe_debugger"))


def _best_us(call: Callable[[], Any], calls: int) -> float:
    """Return the median over batches of the time per call, in microseconds."""
    batch = 20
    times = []
    for _ in range(max(5, calls // batch)):
        started = time.perf_counter()
        for _ in range(batch):
            call()
        times.append((time.perf_counter() - started) / batch * 1e6)
    return statistics.median(times)


def main() -> None:
    """Measure, and print the result as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--peer-pairs", type=int, default=5, help="pairs of the plain ways, which cost much more")
    parser.add_argument("--max-minutes", type=float, default=60, help="end each workload after that, with fewer pairs")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="tokens of each text of the prefill")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a run")
    parser.add_argument("--workloads", nargs="*", default=["prefill", "decode_1", "decode_8"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load_before = os.getloadavg()
    result: dict[str, Any] = {"threads": arguments.threads, "num_cores": os.cpu_count()}
    result |= hook_times()
    model = build_model(arguments.layers)
    with torch.no_grad():
        for name in arguments.workloads:
            workload: Prefill | Decode
            if name == "prefill":
                workload = Prefill(model, 8, arguments.length, 1)
            else:
                workload = Decode(model, int(name.rpartition("_")[2]), arguments.steps)
            measured = _measure(workload, model, arguments.pairs, arguments.peer_pairs, arguments.max_minutes)
            # The prefill is the main result, and stands at the top.
            result |= measured if name == "prefill" else {name: measured}
    result["load_average"] = [round(load, 2) for load in (*load_before[:1], *os.getloadavg()[:2])]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
