"""Healthy routing of known kinds, seeded: what no finding above info may come from, but for the stated rate.

Every generator returns decisions for `moe_debugger.analyze`. Scores are a preference plus Gumbel noise, and the k
largest are the experts: k draws without replacement from the softmax of the preference.

    iid         every token for itself.
    documents   a preference of its own for each document, of a strength that gives the wanted design effect.
    sticky      a token keeps the experts of the one before with some probability (a Markov chain).
    skewed      a fixed log-normal preference, whose long-run shares lie inside the floors of hot and cold.
    demo        whole requests drawn again and again from a pool that went through the shipped model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis import LayerState, Severity, analyze, intervals

__all__ = [
    "Healthy",
    "demo_pool",
    "documents",
    "healthy_conditions",
    "iid",
    "in_steps",
    "num_alarms",
    "resampled",
    "skewed",
    "sticky",
]

Columns = dict[str, Any]
_Floats = npt.NDArray[np.float64]
NUM_LAYERS = 2


@dataclass(frozen=True)
class Healthy:
    """One condition: a name, the layer's sizes, and how to draw a run of it."""

    name: str
    num_experts: int
    top_k: int
    draw: Callable[[np.random.Generator], Columns]

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
def topic_strength(num_experts: int, top_k: int, length: int, design_effect: float) -> float:
    """Return the standard deviation of documents' preferences that gives a design effect, by bisection."""
    low, high = 0.0, 4.0
    for _ in range(12):
        middle = (low + high) / 2
        rng = np.random.default_rng(0)
        rows = documents(rng, num_experts, top_k, 400, length, strength=middle, num_layers=1)
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
    is_skewed: bool = False,
    num_layers: int = NUM_LAYERS,
) -> Columns:
    """Return documents with a topic each, over a preference that all share."""
    request = np.repeat(np.arange(num_documents), length)
    layers = []
    for layer in range(num_layers):
        fixed = inside_the_floors(num_experts, top_k, layer, strength) if is_skewed else np.zeros(num_experts)
        topics = rng.normal(0, strength, (num_documents, num_experts)) if strength else np.zeros((1, num_experts))
        preference = fixed + topics[request if strength else np.zeros_like(request)]
        layers.append(_top_k(preference + rng.gumbel(size=preference.shape), top_k))
    return _decisions(layers, request)


# The long-run shares of a skewed preference, in multiples of the fair share: inside 0.2..3, and near its ends.
HOTTEST, COLDEST = 2.85, 0.22


@cache
def _inside(num_experts: int, top_k: int, seed: int, strength: float) -> tuple[float, ...]:
    """Return a log-normal preference, cut where experts would be cold, whose hottest expert is near the floor."""
    normal = np.random.default_rng(1000 + seed).normal(0, 1, num_experts)
    rng = np.random.default_rng(7)
    noise = rng.gumbel(size=(12_000, num_experts)) + rng.normal(0, strength, (12_000, num_experts))

    def ratios(preference: _Floats) -> _Floats:
        ids = _top_k(preference + noise, top_k)
        return np.bincount(ids.ravel(), minlength=num_experts) * num_experts / ids.size

    low, high, preference = 0.0, 3.0 + 2 * strength, normal
    for _ in range(9):
        scale = (low + high) / 2
        preference = scale * normal
        for _ in range(10):
            too_cold = ratios(preference) < COLDEST
            if not too_cold.any():
                break
            preference = preference + np.where(too_cold, 0.1 * scale, 0.0)
        low, high = (scale, high) if ratios(preference).max() < HOTTEST else (low, scale)
    return tuple(preference.tolist())


def inside_the_floors(num_experts: int, top_k: int, seed: int, strength: float) -> _Floats:
    """Return a fixed log-normal preference, [E], that is skewed but neither hot nor cold, with topics of a strength."""
    return np.array(_inside(num_experts, top_k, seed, strength))


def skewed(rng: np.random.Generator, *, num_experts: int, top_k: int, num_tokens: int) -> Columns:
    """Return independent tokens of a router with natural skew."""
    return documents(rng, num_experts, top_k, max(1, num_tokens // 64), 64, strength=0.0, is_skewed=True)


def in_steps(rows: Columns, per_step: int) -> Columns:
    """Return the rows with `per_step` requests in each step."""
    _, request = np.unique(rows["request_id"], return_inverse=True)
    return {**rows, "step": request // per_step}


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
            session = debugger.session
            assert session is not None
            rows = session.decisions()
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


def _iid_conditions() -> Iterator[Healthy]:
    for e, k in ((8, 2), (64, 8), (256, 8)):
        for n in (16, 256, 4096):
            yield Healthy(f"iid {e}/{k}, {n} tokens", e, k, partial(iid, num_experts=e, top_k=k, num_tokens=n))


def _document_conditions(e: int, k: int) -> Iterator[Healthy]:
    for effect in (4.0, 10.0, 25.0):
        for is_skewed in (False, True):

            def draw(rng: np.random.Generator, effect: float = effect, is_skewed: bool = is_skewed) -> Columns:
                strength = topic_strength(e, k, 64, effect)
                # Few documents and many layers: where a wrong variance shows.
                return documents(rng, e, k, 20, 64, strength=strength, is_skewed=is_skewed, num_layers=8)

            name = f"documents {e}/{k}, design effect {effect:.0f}" + (", skewed to the floors" if is_skewed else "")
            yield Healthy(name, e, k, draw)


def healthy_conditions() -> list[Healthy]:
    """Return all conditions of the stated rate."""
    conditions = list(_iid_conditions())
    for e, k in ((8, 2), (64, 8)):
        conditions += _document_conditions(e, k)
        draw = partial(sticky, num_experts=e, top_k=k, num_requests=32, length=128, stay=0.9)
        conditions.append(Healthy(f"sticky {e}/{k}, stays with 0.9", e, k, draw))
        draw = partial(skewed, num_experts=e, top_k=k, num_tokens=4096)
        conditions.append(Healthy(f"independent {e}/{k}, skewed to the floors", e, k, draw))

    def stepwise(rng: np.random.Generator) -> Columns:
        strength = topic_strength(8, 2, 16, 4.0)
        return in_steps(documents(rng, 8, 2, 800, 16, strength=strength, num_layers=1), 4)

    conditions.append(Healthy("documents 8/2, design effect 4, 200 steps of four", 8, 2, stepwise))
    conditions.append(Healthy("demo model, mixed", 8, 2, partial(resampled, num_requests=40)))
    for kind in ("code", "prose", "numbers", "structured"):
        conditions.append(Healthy(f"demo model, {kind}", 8, 2, partial(resampled, num_requests=40, kind=kind)))
    return conditions


def num_alarms(condition: Healthy, seeds: range) -> int:
    """Return in how many runs any finding above info came."""
    count = 0
    for seed in seeds:
        found = analyze(condition(seed), num_experts=condition.num_experts, top_k=condition.top_k)
        count += any(finding.severity is not Severity.INFO for finding in found.findings)
    return count


def as_if_independent(state: LayerState, **options: object) -> intervals.Blocks:
    """Return blocks that differ as independent tokens would: what takes the place of `variance_blocks` in a mutant."""
    # Slots dealt to 64 blocks at random.
    rng = np.random.default_rng(int(state.num_assignments))
    counts = state.counts.astype(np.int64)
    table = np.stack([rng.multinomial(count, [1 / 64] * 64) for count in counts.tolist()], axis=1)
    return intervals.Blocks(table.astype(np.float64), intervals.BlockKind.REQUESTS)
