"""Healthy routing of known kinds, seeded: what no finding above info may come from, but for the stated rate.

Every generator returns decisions for `moe_debugger.analyze`. Scores are a preference plus Gumbel noise, and the k
largest are the experts: k draws without replacement from the softmax of the preference.

    iid         every token for itself.
    documents   a preference of its own for each document, of a strength that gives the wanted design effect.
    sticky      a token keeps the experts of the one before with some probability (a Markov chain).
    skewed      a fixed log-normal preference, whose long-run shares lie inside the floors of hot and cold.
    demo        whole requests drawn again and again from a pool that went through the shipped model.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Healthy", "demo_pool", "documents", "healthy_conditions", "iid", "resampled", "skewed", "sticky"]

Columns = dict[str, Any]
_Floats = npt.NDArray[np.float64]
NUM_LAYERS = 2


@dataclass(frozen=True)
class Healthy:
    """One condition: a name, the layer's sizes, and how to draw a run of it."""

    name: str
    num_experts: int
    top_k: int
    draw: Any

    def __call__(self, seed: int) -> Columns:
        return self.draw(np.random.default_rng(seed))


def _top_k(scores: _Floats, top_k: int) -> npt.NDArray[np.int32]:
    return np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k].astype(np.int32)


def _decisions(layers: list[npt.NDArray[np.int32]], request: npt.NDArray[np.int64]) -> Columns:
    names = np.array([f"r{index}" for index in range(int(request.max(initial=0)) + 1)])
    return {
        "layer_index": np.repeat(np.arange(len(layers)), len(request)),
        "expert_ids": np.concatenate(layers),
        "request_id": np.tile(names[request], len(layers)),
    }


def iid(rng: np.random.Generator, *, num_experts: int, top_k: int, num_tokens: int) -> Columns:
    """Return balanced, independent tokens in requests of 64."""
    layers = [_top_k(rng.random((num_tokens, num_experts)), top_k) for _ in range(NUM_LAYERS)]
    return _decisions(layers, np.arange(num_tokens) // 64)


@cache
def topic_strength(num_experts: int, top_k: int, length: int, design_effect: float, skew: float) -> float:
    """Return the standard deviation of documents' preferences that gives a design effect, by bisection."""
    low, high = 0.0, 4.0
    for _ in range(12):
        middle = (low + high) / 2
        rng = np.random.default_rng(0)
        rows = documents(rng, num_experts, top_k, 400, length, strength=middle, skew=skew, num_layers=1)
        counts = np.zeros((400, num_experts))
        np.add.at(counts, (np.repeat(np.arange(400), length * top_k), rows["expert_ids"].ravel()), 1)
        share = counts.sum(0) / counts.sum()
        per_token = np.clip(share * top_k, 0, 1)
        variance = ((counts / (length * top_k) - share) ** 2).sum() / 399
        independent = (per_token * (1 - per_token)).sum() / (top_k**2 * length)
        low, high = (middle, high) if variance / independent < design_effect else (low, middle)
    return (low + high) / 2


def documents(
    rng: np.random.Generator,
    num_experts: int,
    top_k: int,
    num_documents: int,
    length: int,
    *,
    strength: float,
    skew: float = 0.0,
    num_layers: int = NUM_LAYERS,
) -> Columns:
    """Return documents with a topic each, over a preference that all share."""
    request = np.repeat(np.arange(num_documents), length)
    layers = []
    for layer in range(num_layers):
        fixed = inside_the_floors(num_experts, top_k, skew, layer) if skew else np.zeros(num_experts)
        topics = rng.normal(0, strength, (num_documents, num_experts)) if strength else np.zeros((1, num_experts))
        preference = fixed + topics[request if strength else np.zeros_like(request)]
        layers.append(_top_k(preference + rng.gumbel(size=preference.shape), top_k))
    return _decisions(layers, request)


@cache
def _inside(num_experts: int, top_k: int, skew: float, seed: int) -> tuple[float, ...]:
    """Return a log-normal preference whose long-run shares lie in 0.25..2.6 of the fair share, by redrawing."""
    rng = np.random.default_rng(1000 + seed)
    for _ in range(200):
        preference = rng.normal(0, skew, num_experts)
        ids = _top_k(preference + rng.gumbel(size=(40_000, num_experts)), top_k)
        ratio = np.bincount(ids.ravel(), minlength=num_experts) * num_experts / ids.size
        if ratio.min() > 0.25 and ratio.max() < 2.6:
            return tuple(preference.tolist())
        skew *= 0.97
    raise AssertionError("no preference inside the floors was found")


def inside_the_floors(num_experts: int, top_k: int, skew: float, seed: int) -> _Floats:
    """Return a fixed log-normal preference, [E], that is skewed but neither hot nor cold."""
    return np.array(_inside(num_experts, top_k, skew, seed))


def skewed(rng: np.random.Generator, *, num_experts: int, top_k: int, num_tokens: int, skew: float = 0.6) -> Columns:
    """Return independent tokens of a router with natural skew."""
    return documents(rng, num_experts, top_k, max(1, num_tokens // 64), 64, strength=0.0, skew=skew)


def sticky(
    rng: np.random.Generator, *, num_experts: int, top_k: int, num_requests: int, length: int, stay: float
) -> Columns:
    """Return requests in which a token repeats the experts of the one before with probability `stay`."""
    num_tokens = num_requests * length
    layers = []
    for _ in range(NUM_LAYERS):
        fresh = _top_k(rng.random((num_tokens, num_experts)), top_k)
        is_new = rng.random(num_tokens) >= stay
        is_new[::length] = True
        source = np.maximum.accumulate(np.where(is_new, np.arange(num_tokens), 0))
        layers.append(fresh[source])
    return _decisions(layers, np.repeat(np.arange(num_requests), length))


@cache
def demo_pool(num_requests: int = 48, length: int = 96) -> dict[str, npt.NDArray[np.int32]]:
    """Return for each kind of held-out text the routes of requests through the shipped model, [r, length, layer, k]."""
    import random

    import torch

    from moe_debugger import MoEDebugger
    from moe_debugger.demo.corpus import KINDS, build_corpus
    from moe_debugger.models import load_model

    model, corpus = load_model("demo", device="cpu").model, build_corpus("held_out")
    pool = {}
    for kind in KINDS:
        rng = random.Random(kind)
        texts = torch.tensor([list(corpus.window(kind, length, rng)) for _ in range(num_requests)])
        with MoEDebugger(model, level="routes") as debugger, torch.no_grad():
            model(input_ids=texts)
            rows = debugger.session.decisions()
        num_layers = int(rows.layer_index.max()) + 1
        # A forward's rows stand layer by layer, and in a layer as the tokens stand in the batch.
        ids = rows.expert_ids.reshape(num_layers, num_requests, length, -1)
        pool[str(kind)] = np.ascontiguousarray(ids.transpose(1, 2, 0, 3))
    return pool


def resampled(rng: np.random.Generator, *, num_requests: int, kind: str | None = None) -> Columns:
    """Return requests drawn with replacement from the pool of the shipped model: of all kinds, or of one."""
    pool = demo_pool()
    kinds = [kind] if kind else sorted(pool)
    of_kind = rng.integers(0, len(kinds), num_requests)
    chosen = np.stack([pool[kinds[of]][rng.integers(0, len(pool[kinds[of]]))] for of in of_kind.tolist()])
    length = chosen.shape[1]
    layers = [chosen[:, :, layer].reshape(-1, chosen.shape[3]) for layer in range(chosen.shape[2])]
    return _decisions(layers, np.repeat(np.arange(num_requests), length))


def healthy_conditions() -> list[Healthy]:
    """Return all conditions of the stated rate."""
    conditions = []
    for experts, top_k in ((8, 2), (64, 8), (256, 8)):
        for num_tokens in (16, 256, 4096):
            conditions.append(
                Healthy(
                    f"iid {experts}/{top_k}, {num_tokens} tokens",
                    experts,
                    top_k,
                    lambda rng, e=experts, k=top_k, n=num_tokens: iid(rng, num_experts=e, top_k=k, num_tokens=n),
                )
            )
    for experts, top_k in ((8, 2), (64, 8)):
        for effect in (4.0, 10.0):
            for skew in (0.0, 0.6):

                def draw(
                    rng: np.random.Generator, e: int = experts, k: int = top_k, d: float = effect, s: float = skew
                ) -> Columns:
                    strength = topic_strength(e, k, 64, d, s)
                    return documents(rng, e, k, 40, 64, strength=strength, skew=s)

                name = f"documents {experts}/{top_k}, design effect {effect:.0f}" + (", skewed" if skew else "")
                conditions.append(Healthy(name, experts, top_k, draw))
        conditions.append(
            Healthy(
                f"sticky {experts}/{top_k}, 0.9",
                experts,
                top_k,
                lambda rng, e=experts, k=top_k: sticky(
                    rng, num_experts=e, top_k=k, num_requests=32, length=128, stay=0.9
                ),
            )
        )
        conditions.append(
            Healthy(
                f"log-normal skew {experts}/{top_k}",
                experts,
                top_k,
                lambda rng, e=experts, k=top_k: skewed(rng, num_experts=e, top_k=k, num_tokens=4096),
            )
        )
    conditions.append(Healthy("demo model, mixed", 8, 2, lambda rng: resampled(rng, num_requests=40)))
    for kind in ("code", "prose", "numbers", "structured"):
        conditions.append(
            Healthy(f"demo model, {kind}", 8, 2, lambda rng, of=kind: resampled(rng, num_requests=40, kind=of))
        )
    return conditions
