"""The shipped weights: what docs/demo-model.md says of them holds, by a count of this file's own."""

import math
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from moe_debugger.demo.corpus import KINDS, Corpus, Kind, build_corpus
from moe_debugger.demo.evaluate import fit_softmax
from moe_debugger.models import DEMO_MODEL_DIR, LoadedModel

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 8, 2

Loads = npt.NDArray[np.int64]


class SlotCounter:
    """Counts expert ids where the experts receive them, which is what is really computed."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self._ids: list[torch.Tensor] = []

    def count(self, windows: list[bytes]) -> Loads:
        """Return [num_windows, num_layers, num_experts]."""
        handles = [
            layer.mlp.experts.register_forward_pre_hook(lambda _, args: self._ids.append(args[1].clone()))
            for layer in self._model.model.layers
        ]
        self._ids.clear()
        try:
            with torch.inference_mode():
                self._model(input_ids=torch.tensor([list(window) for window in windows]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        counts = np.zeros((len(windows), NUM_LAYERS, NUM_EXPERTS), np.int64)
        for index, ids in enumerate(self._ids):
            for row, chosen in enumerate(ids.reshape(len(windows), -1).numpy()):
                counts[row, index] = np.bincount(chosen, minlength=NUM_EXPERTS)
        return counts


@pytest.fixture(scope="module")
def counter(demo: LoadedModel) -> SlotCounter:
    return SlotCounter(demo)


def windows_of(corpus: Corpus, kind: Kind, num_bytes: int, num_windows: int) -> list[bytes]:
    rng = random.Random(f"test/{kind}/{corpus.split}")
    return [corpus.window(kind, num_bytes, rng) for _ in range(num_windows)]


def spread(counts: Iterator[int]) -> float:
    values = list(counts)
    return math.exp(-sum(value / sum(values) * math.log(value / sum(values)) for value in values if value))


def test_demo_model_is_a_few_megabytes_of_safetensors() -> None:
    assert sorted(path.name for path in DEMO_MODEL_DIR.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert 2_000_000 < (DEMO_MODEL_DIR / "model.safetensors").stat().st_size < 6_000_000


def test_demo_model_has_the_shape_that_is_documented(demo: LoadedModel) -> None:
    config = demo.model.config
    assert (demo.name, demo.model_type) == ("demo", "mixtral")
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (4, 8, 2)
    assert demo.model.dtype == torch.float32
    assert not demo.model.training


@pytest.mark.parametrize("kind", KINDS)
def test_demo_model_has_learnt_each_kind(demo: LoadedModel, held_out: Corpus, kind: Kind) -> None:
    input_ids = torch.tensor([list(window) for window in windows_of(held_out, kind, 256, 12)])
    with torch.inference_mode():
        logits = demo.model(input_ids=input_ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    # Uniform over bytes is 5.5 nats; the order-0 entropy of English text is about 3.
    assert float(loss) < 2.2


def test_layer_loads_of_64_tokens_name_the_kind(counter: SlotCounter, held_out: Corpus) -> None:
    labels = np.repeat(np.arange(len(KINDS)), 100)

    def loads(corpus: Corpus) -> npt.NDArray[np.float64]:
        counted = [counter.count(windows_of(corpus, kind, 64, 100)) for kind in KINDS]
        return np.concatenate(counted).reshape(400, -1) / 64

    classify = fit_softmax(loads(build_corpus("train")), labels)
    assert (classify(loads(held_out)) == labels).mean() >= 0.90


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_text_does_not_look_like_a_collapse(counter: SlotCounter, held_out: Corpus, kind: Kind) -> None:
    # A layer counts as collapsed below max(1.5 * top_k, num_experts / 4) = 3 effective experts.
    for window in counter.count(windows_of(held_out, kind, 256, 12)):
        assert min(spread(layer) for layer in window.tolist()) >= 3.5


@pytest.mark.parametrize("prompt", ["def main(argv):\n", "The method returns a ", "12 + 30 = ", '{"id": 12, "name": "'])
def test_greedy_text_does_not_look_like_a_collapse(demo: LoadedModel, counter: SlotCounter, prompt: str) -> None:
    # A model that falls into one repeated byte (spaces without end after code) would.
    ids = torch.tensor([demo.tokenizer.encode(prompt)])
    with torch.inference_mode():
        text = bytes(demo.model.generate(ids, max_new_tokens=128, do_sample=False, pad_token_id=0)[0].tolist())
    assert min(spread(layer) for layer in counter.count([text])[0].tolist()) >= 3.5


def test_no_expert_is_unused_on_mixed_text(counter: SlotCounter, held_out: Corpus) -> None:
    mixed = np.sum([counter.count(windows_of(held_out, kind, 128, 10)).sum(axis=0) for kind in KINDS], axis=0)
    assert mixed.sum() == NUM_LAYERS * 4 * 10 * 128 * TOP_K
    assert (mixed / mixed.sum(axis=1, keepdims=True)).min() > 0.25 / NUM_EXPERTS


def test_demo_model_continues_a_text_the_same_way_each_time(demo: LoadedModel) -> None:
    prompt = torch.tensor([demo.tokenizer.encode("12 + 30 = ")])
    texts = []
    for _ in range(2):
        output = demo.model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        texts.append(b"".join(demo.tokenizer.piece(token) for token in output[0].tolist()))
    assert texts[0] == texts[1]
    assert texts[0].startswith(b"12 + 30 = ")
    assert chr(texts[0][10]).isdigit()
