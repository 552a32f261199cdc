"""Measure the demo model on held-out text: does the routing tell the kinds apart, and is it healthy?

Only the routers' outputs and the bytes are used. The classifiers are fitted on the training split and scored on the
held-out one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from moe_debugger.demo.corpus import KINDS, Corpus, Kind
from moe_debugger.demo.training import effective_experts, next_byte_loss

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

__all__ = ["Evaluation", "evaluate", "fit_softmax", "nearest_centroid", "sample_windows", "window_loads"]

WINDOW_TOKENS: Final = 64


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        regression_accuracy: softmax regression on the layer loads of 64 tokens, held-out share right.
        centroid_accuracy: nearest centroid on the same loads.
        bigram_accuracy: a byte-bigram table for each kind on the same 64 bytes.
        kind_effective_experts: for each kind, each layer's effective experts over many prompts of that kind.
        prompt_effective_experts: for each kind, each layer's 5th percentile over single prompts of 256 tokens.
        smallest_share: for each layer, the least busy expert's share of the slots on mixed text (uniform: 1/8).
        loss: for each kind, next-byte cross entropy in nats.
        loss_by_length: for each row length, the cross entropy of the last 64 bytes.
    """

    num_windows: int
    regression_accuracy: float
    centroid_accuracy: float
    bigram_accuracy: float
    kind_effective_experts: Mapping[Kind, tuple[float, ...]]
    prompt_effective_experts: Mapping[Kind, tuple[float, ...]]
    smallest_share: tuple[float, ...]
    loss: Mapping[Kind, float]
    loss_by_length: Mapping[int, float]


def evaluate(model: Any, train: Corpus, held_out: Corpus, *, num_windows: int = 250, seed: int = 1) -> Evaluation:
    """Measure a model; `num_windows` windows of each kind for each of the two splits."""
    fit_windows = sample_windows(train, WINDOW_TOKENS, num_windows, seed=seed)
    test_windows = sample_windows(held_out, WINDOW_TOKENS, num_windows, seed=seed + 1)
    labels = np.repeat(np.arange(len(KINDS)), num_windows)
    fit_loads, test_loads = (
        np.concatenate([window_loads(model, windows[kind]) for kind in KINDS])
        for windows in (fit_windows, test_windows)
    )
    fit_features, test_features = (loads.reshape(len(loads), -1) / WINDOW_TOKENS for loads in (fit_loads, test_loads))
    regression = fit_softmax(fit_features, labels)(test_features)
    centroid = nearest_centroid(fit_features, labels)(test_features)
    bigram = _bigram_classify(train, [window for kind in KINDS for window in test_windows[kind]])

    prompts = sample_windows(held_out, 256, 60, seed=seed + 2)
    prompt_loads: dict[Kind, Any] = {kind: window_loads(model, prompts[kind]) for kind in KINDS}
    mixed = np.sum([loads.sum(axis=0) for loads in prompt_loads.values()], axis=0)
    return Evaluation(
        num_windows=num_windows,
        regression_accuracy=float((regression == labels).mean()),
        centroid_accuracy=float((centroid == labels).mean()),
        bigram_accuracy=float((bigram == labels).mean()),
        kind_effective_experts={
            kind: tuple(effective_experts(layer) for layer in loads.sum(axis=0).tolist())
            for kind, loads in prompt_loads.items()
        },
        prompt_effective_experts={
            kind: tuple(
                float(np.percentile([effective_experts(layer) for layer in loads[:, index].tolist()], 5))
                for index in range(loads.shape[1])
            )
            for kind, loads in prompt_loads.items()
        },
        smallest_share=tuple(float(layer.min() / layer.sum()) for layer in mixed),
        loss={kind: _loss(model, prompts[kind]) for kind in KINDS},
        loss_by_length={length: _loss_at(model, held_out, length, seed=seed) for length in (128, 512, 1024, 2048)},
    )


def sample_windows(corpus: Corpus, num_bytes: int, num_windows: int, *, seed: int) -> dict[Kind, list[bytes]]:
    """Return that many windows of each kind."""
    rng = random.Random(f"{seed}/windows")  # noqa: S311
    return {kind: [corpus.window(kind, num_bytes, rng) for _ in range(num_windows)] for kind in KINDS}


def window_loads(model: Any, windows: Sequence[bytes]) -> Ints:
    """Return the routed slots of each window: [num_windows, num_layers, num_experts] int64."""
    import torch

    top_k = model.config.num_experts_per_tok
    loads = []
    for start in range(0, len(windows), 50):
        part = windows[start : start + 50]
        with torch.inference_mode():
            output = model(input_ids=_as_ids(part), use_cache=False, output_router_logits=True)
        layers = [logits.view(len(part), len(part[0]), -1) for logits in output.router_logits]
        chosen = torch.stack([torch.topk(layer.softmax(dim=-1), top_k).indices for layer in layers], dim=1)
        loads.append(torch.nn.functional.one_hot(chosen, layers[0].shape[-1]).sum(dim=(2, 3)).numpy())
    return np.concatenate(loads).astype(np.int64)


class _LinearClassifier:
    def __init__(self, weights: Floats, bias: Floats) -> None:
        self._weights = weights
        self._bias = bias

    def __call__(self, features: Floats) -> Ints:
        return np.asarray((features @ self._weights + self._bias).argmax(axis=1), dtype=np.int64)


def fit_softmax(features: Floats, labels: Ints, *, num_steps: int = 400, decay: float = 1e-3) -> _LinearClassifier:
    """Fit softmax regression by gradient descent on standardised features (no randomness)."""
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    inputs = (features - mean) / scale
    targets = np.eye(int(labels.max()) + 1)[labels]
    weights, bias = np.zeros((inputs.shape[1], targets.shape[1])), np.zeros(targets.shape[1])
    for _ in range(num_steps):
        scores = inputs @ weights + bias
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        error = (odds / odds.sum(axis=1, keepdims=True) - targets) / len(inputs)
        weights -= 0.5 * (inputs.T @ error + decay * weights)
        bias -= 0.5 * error.sum(axis=0)
    weights = weights / scale[:, None]
    return _LinearClassifier(weights, bias - mean @ weights)


def nearest_centroid(features: Floats, labels: Ints) -> _LinearClassifier:
    """Return the classifier by Euclidean distance to each label's mean (`|x - c|^2` without `|x|^2` is linear)."""
    centroids = np.stack([features[labels == label].mean(axis=0) for label in range(int(labels.max()) + 1)])
    return _LinearClassifier(2 * centroids.T, -(centroids**2).sum(axis=1))


def _bigram_classify(train: Corpus, windows: Sequence[bytes]) -> Ints:
    tables = []
    for kind in KINDS:
        text = np.frombuffer(train.texts[kind], dtype=np.uint8).astype(np.int64)
        counts = np.bincount(text[:-1] * 256 + text[1:], minlength=256 * 256).reshape(256, 256) + 1.0
        tables.append(np.log(counts / counts.sum(axis=1, keepdims=True)))
    stacked = np.stack(tables)
    texts = np.stack([np.frombuffer(window, dtype=np.uint8).astype(np.int64) for window in windows])
    return np.asarray(stacked[:, texts[:, :-1], texts[:, 1:]].sum(axis=-1).argmax(axis=0), dtype=np.int64)


def _as_ids(windows: Sequence[bytes]) -> torch.Tensor:
    import torch

    return torch.tensor([list(window) for window in windows])


def _loss(model: Any, windows: Sequence[bytes]) -> float:
    import torch

    input_ids = _as_ids(windows)
    with torch.inference_mode():
        return float(next_byte_loss(model(input_ids=input_ids, use_cache=False).logits, input_ids))


def _loss_at(model: Any, corpus: Corpus, length: int, *, seed: int) -> float:
    import torch

    windows = sample_windows(corpus, length, max(1, 4096 // length), seed=seed)
    losses = []
    for kind in KINDS:
        input_ids = _as_ids(windows[kind])
        with torch.inference_mode():
            logits = model(input_ids=input_ids, use_cache=False).logits
        losses.append(float(next_byte_loss(logits[:, -65:], input_ids[:, -65:])))
    return float(np.mean(losses))
