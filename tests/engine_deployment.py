"""A Ray Serve deployment of stand-in engines that push their routes into a fleet, with a ledger of their own.

`python -m engine_deployment NATS_URL` starts its own Ray cluster, as the worker does, sends requests to two replicas,
stops them in order, and prints one JSON line with what the engines routed. An engine here has what matters of a real
one: a prefix cache, a sequence whose last token is never fed back, and arrays in the documented shapes of vLLM and
SGLang.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from servers import free_port
from unit.engines.stand_ins import Completion, Output, sglang_response

from moe_collector._guard import TEMP_DIR_VARIABLE, run_guarded
from moe_collector._temp_dir import make_temp_dir
from moe_collector.deployment import APPLICATION, RayServe
from moe_collector.settings import CollectorSettings

__all__ = ["EXPERTS", "MOE_LAYERS", "NUM_MODEL_LAYERS", "TOP_K", "EngineReplica", "StandInEngine", "requests"]

EXPERTS, TOP_K = 32, 4
# The first layer of the model is dense.
MOE_LAYERS, NUM_MODEL_LAYERS = [1, 2, 3], 4
_BLOCK_TOKENS = 4


class StandInEngine:
    """Routes by a fixed function of token, position and layer; keeps blocks of prompts as a prefix cache does."""

    def __init__(self) -> None:
        self.load: Counter[tuple[int, int]] = Counter()
        self.num_routed = 0
        self.num_cached = 0
        self._cache: set[tuple[int, ...]] = set()

    def run(self, prompt: list[int], num_generated: int) -> tuple["np.ndarray[Any, Any]", list[int], int]:
        """Return routes [prompt + generated - 1, MoE layers, k], the generated tokens, and the cached tokens."""
        generated = [(sum(prompt) + place) % 997 for place in range(num_generated)]
        tokens = [*prompt, *generated][:-1]
        cached = 0
        while tuple(prompt[: cached + _BLOCK_TOKENS]) in self._cache and cached + _BLOCK_TOKENS < len(prompt):
            cached += _BLOCK_TOKENS
        for end in range(_BLOCK_TOKENS, len(prompt) + 1, _BLOCK_TOKENS):
            self._cache.add(tuple(prompt[:end]))
        routes = np.zeros((len(tokens), len(MOE_LAYERS), TOP_K), np.int32)
        for position, token in enumerate(tokens):
            for layer in range(len(MOE_LAYERS)):
                chosen = np.random.default_rng([token, position, layer]).permutation(EXPERTS)[:TOP_K]
                routes[position, layer] = chosen
                if position >= cached:
                    self.load.update((layer, int(expert)) for expert in chosen)
        self.num_routed += len(tokens) - cached
        self.num_cached += cached
        return routes, generated, cached


class EngineReplica:
    """What a user's deployment does: runs an engine, and pushes what it returns with each request."""

    def __init__(self, nats_url: str) -> None:
        import moe_debugger

        self._sources = {
            kind: moe_debugger.open_source(
                num_experts=EXPERTS,
                top_k=TOP_K,
                model_layer_indices=MOE_LAYERS,
                num_model_layers=NUM_MODEL_LAYERS,
                fleet=nats_url,
                session_name=f"engines-{kind}",
                model_name=f"{kind}-model",
                wait_s=30,
            )
            for kind in ("vllm", "sglang")
        }

    def generate(self, kind: str, prompts: list[list[int]], num_generated: int) -> dict[str, Any]:
        """Run the prompts; return the ledger of this call."""
        from moe_debugger.engines import sglang, vllm

        engine, source = StandInEngine(), self._sources[kind]
        for prompt in prompts:
            routes, generated, cached = engine.run(prompt, num_generated)
            if kind == "vllm":
                output = Output(prompt, [Completion(generated, routes.astype(np.uint8))], num_cached_tokens=cached)
                vllm.publish_output(source, output)
            else:
                whole = np.zeros((len(routes), NUM_MODEL_LAYERS, TOP_K), np.int32)
                whole[:, MOE_LAYERS] = routes
                response = sglang_response(whole, num_prompt=len(prompt), output_ids=generated, cached_tokens=cached)
                sglang.publish_response(source, response)
        assert source.flush(30), source.publisher_statistics()
        return {
            "kind": kind,
            "session_id": source.session_id,
            "source_id": source.source_id,
            "num_routed": engine.num_routed,
            "num_cached": engine.num_cached,
            "load": [[layer, expert, number] for (layer, expert), number in engine.load.items()],
            "problems": dict(source.account().problems),
        }

    def __del__(self) -> None:
        for source in self._sources.values():
            source.close(ends_session=False, reason="the replica stops")


def requests(seed: int) -> list[list[int]]:
    """Return prompts, of which some begin alike."""
    random = np.random.default_rng(seed)
    shared = random.integers(0, 500, 12).tolist()
    return [
        [*(shared[: int(random.integers(0, 13))]), *random.integers(0, 500, int(random.integers(1, 20))).tolist()]
        for _ in range(10)
    ]


class _EngineServe(RayServe):
    """The worker's cluster with engines in place of the worker."""

    def __init__(self, settings: CollectorSettings, temp_dir: Path) -> None:
        super().__init__(settings, temp_dir)
        self._nats_url = settings.nats_url.get_secret_value()

    def _application(self, ray: Any, serve: Any) -> Any:
        deployment = serve.deployment(
            EngineReplica, num_replicas=2, max_ongoing_requests=1, ray_actor_options={"num_cpus": 0.5}
        )
        return deployment.bind(self._nats_url)

    def serve_all(self) -> list[dict[str, Any]]:
        """Return the ledgers of many calls, which run two at a time."""
        calls = [
            self._handle.generate.remote(kind, requests(seed), 6) for seed in range(6) for kind in ("vllm", "sglang")
        ]
        return [call.result(timeout_s=60) for call in calls]

    def end_replicas(self) -> None:
        """Let Serve end the replicas in order: each says goodbye."""
        from ray import serve

        serve.delete(APPLICATION)


def main() -> None:
    """Run everything and print the ledgers."""
    if TEMP_DIR_VARIABLE not in os.environ:
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        raise SystemExit(run_guarded([sys.executable, "-m", "engine_deployment", *sys.argv[1:]], make_temp_dir()))
    settings = CollectorSettings.from_environment(
        {
            "MOE_COLLECTOR_NATS_URL": sys.argv[1],
            "MOE_COLLECTOR_INGRESS_PORT": str(free_port()),
            "MOE_COLLECTOR_FLEET_TOKEN": "of-this-test-0123456789",
        }
    )
    cluster = _EngineServe(settings, Path(os.environ[TEMP_DIR_VARIABLE]))
    cluster.start()
    ledgers = cluster.serve_all()
    cluster.end_replicas()
    print(json.dumps(ledgers), flush=True)
    cluster.stop()
    sys.stdout.flush()
    # Ray leaves threads that would keep the interpreter waiting.
    os._exit(0)


if __name__ == "__main__":
    main()
