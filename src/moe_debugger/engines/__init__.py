"""Routes of engines where hooks cannot fire: they push what they know, and nothing is guessed.

`arrays` checks an engine's arrays and turns them into columns, `vllm` and `sglang` read what those engines return with
a request, `dumps` reads files of SGLang's expert distribution recorder. The door itself is `moe_debugger.open_source`.
"""

from .arrays import CheckedRoutes, RouteChecker, engine_layers
from .dumps import ExpertDistribution, read_expert_distribution

__all__ = [
    "CheckedRoutes",
    "ExpertDistribution",
    "RouteChecker",
    "engine_layers",
    "read_expert_distribution",
]
