"""Model folders: what is refused, with which words, and what a loaded tokenizer says of its tokens."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from moe_debugger.errors import InvalidInputError, ModelNotSupportedError
from moe_debugger.models import BYTE_TOKENIZER_CLASS, DEMO_MODEL_DIR, ByteTokenizer, load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo's folder, to damage."""
    return Path(shutil.copytree(DEMO_MODEL_DIR, tmp_path / "my-model"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_byte_tokenizer_gives_back_the_bytes_of_any_text() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("Ünïcode → ✓")
    assert b"".join(tokenizer.piece(token) for token in ids).decode() == "Ünïcode → ✓"
    assert max(ids) < 256
    assert tokenizer.piece(256) == b""
    assert tokenizer.encode("\ud800") == [ord("?")]


def test_local_folder_loads_without_a_socket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("load_model opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = load_model(str(folder), device="cpu", precision="bfloat16")
    assert (loaded.name, loaded.model_type, loaded.model.dtype) == ("my-model", "mixtral", torch.bfloat16)
    assert loaded.tokenizer.encode("ab") == [97, 98]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"device": "tpu"}, "device 'tpu': expected one of auto, cpu, cuda"), ({"precision": "int4"}, "precision 'int4'")],
)
def test_unknown_options_are_refused(options: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        load_model("demo", **options)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInputError, match="no CUDA device here"):
        load_model("demo", device="cuda")


def test_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"nowhere.*there is no such folder"):
        load_model(str(tmp_path / "nowhere"))


def test_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="is a file; give the folder"):
        load_model(str(folder / "config.json"))


def test_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"no config\.json"):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"config\.json: "):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_and_not_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelNotSupportedError, match=f"pickles .{name}.*convert them to safetensors"):
        load_model(str(folder))


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match="the weights are missing"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_checkpoint_is_refused(folder: Path, name: str) -> None:
    edit(folder / name, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ModelNotSupportedError, match=f"{name} has auto_map"):
        load_model(str(folder))


def test_index_that_leaves_the_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ModelNotSupportedError, match="outside the folder"):
        load_model(str(folder))


def test_unfinished_download_names_the_missing_file(folder: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidInputError, match=r"1 of 2 weight files are missing.*model-00002"):
        load_model(str(folder))


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InvalidInputError, match="weights cannot be read"):
        load_model(str(folder))


def test_weights_that_lack_a_layer_are_refused_and_not_made_up(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=5)
    with pytest.raises(InvalidInputError, match="they would be random numbers"):
        load_model(str(folder))


def test_architecture_that_transformers_does_not_know_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="no-such-architecture")
    with pytest.raises(ModelNotSupportedError, match="transformers cannot load it"):
        load_model(str(folder))


def test_model_that_is_no_causal_language_model_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="clip_vision_model")
    with pytest.raises(ModelNotSupportedError, match="transformers cannot load it"):
        load_model(str(folder))


def write_byte_level_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(str(folder))


def write_metaspace_tokenizer(folder: Path) -> None:
    vocabulary = {"<unk>": 0, "▁one": 1, "▁two": 2, "<0x0A>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(str(folder))


def test_pieces_of_a_byte_level_tokenizer_are_the_bytes_of_the_text(folder: Path) -> None:
    write_byte_level_tokenizer(folder)
    tokenizer = load_model(str(folder), device="cpu").tokenizer
    text = "naïve → two words\n"
    assert b"".join(tokenizer.piece(token) for token in tokenizer.encode(text)) == text.encode()
    assert tokenizer.eos_token_id is not None
    assert tokenizer.piece(tokenizer.eos_token_id) == b"<end>"
    assert tokenizer.piece(100_000) == b""


def test_pieces_of_a_sentencepiece_tokenizer_have_spaces_and_byte_fallback(folder: Path) -> None:
    write_metaspace_tokenizer(folder)
    tokenizer = load_model(str(folder), device="cpu").tokenizer
    assert [tokenizer.piece(token) for token in tokenizer.encode("one two")] == [b" one", b" two"]
    assert tokenizer.piece(3) == b"\n"
    assert tokenizer.eos_token_id is None


def test_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidInputError, match="its tokenizer cannot be loaded"):
        load_model(str(folder), device="cpu")


def test_saved_and_loaded_model_gives_the_same_logits(demo: Any, tmp_path: Path) -> None:
    model: MixtralForCausalLM = demo.model
    model.save_pretrained(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": BYTE_TOKENIZER_CLASS}))
    again = load_model(str(tmp_path), device="cpu").model
    prompt = torch.tensor([[100, 101, 102]])
    with torch.inference_mode():
        assert torch.equal(model(input_ids=prompt).logits, again(input_ids=prompt).logits)
