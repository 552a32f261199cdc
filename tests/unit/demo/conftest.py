"""The held-out texts and the shipped model, loaded once."""

import pytest
import torch

from moe_debugger.demo.corpus import Corpus, build_corpus
from moe_debugger.models import LoadedModel, load_model


@pytest.fixture(scope="session")
def held_out() -> Corpus:
    return build_corpus("held_out")


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    torch.set_num_threads(1)
    return load_model("demo", device="cpu")
