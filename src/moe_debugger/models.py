"""Load a causal language model and its tokenizer from this machine's disk, and from nowhere else.

A model folder is data: only safetensors weights are read (a pickle can run code), code that comes with a checkpoint
(`auto_map`) is never run, and nothing is fetched from a network.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from moe_debugger.errors import DependencyMissingError, InvalidInputError, ModelNotSupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["BYTE_TOKENIZER_CLASS", "DEMO_MODEL_DIR", "ByteTokenizer", "LoadedModel", "TextTokenizer", "load_model"]

DEMO_MODEL_DIR = Path(__file__).parent / "demo" / "model"

BYTE_TOKENIZER_CLASS = "moe_debugger_byte"
"""`tokenizer_class` in tokenizer_config.json of a model whose tokens are the bytes of UTF-8 text."""

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

_DEVICES = ("auto", "cpu", "cuda")
_PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextTokenizer(Protocol):
    """What the rest of the product needs of a tokenizer."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, or None where the model has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with the special tokens that the model expects."""
        ...

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for; they need not be whole UTF-8 characters."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: the `PreTrainedModel`, in eval mode, on its device.
        tokenizer: the model's tokenizer.
        name: "demo", or the folder's name.
        model_type: transformers' name of the architecture, such as "mixtral".
    """

    model: Any
    tokenizer: TextTokenizer
    name: str
    model_type: str


class ByteTokenizer:
    """One token for each byte of the UTF-8 text; no special tokens."""

    eos_token_id: int | None = None

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text, 0 to 255."""
        # A lone surrogate (from a JSON escape, say) has no UTF-8 form; "replace" sends a question mark.
        return list(text.encode("utf-8", errors="replace"))

    def piece(self, token_id: int) -> bytes:
        """Return the one byte that the token is."""
        return bytes((token_id,)) if 0 <= token_id < 256 else b""


class _HubTokenizer:
    """A transformers tokenizer, with the bytes of each single token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        self.eos_token_id: int | None = eos if isinstance(eos, int) else None
        self._special_ids = frozenset(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        self._is_byte_level = "ByteLevel" in json.dumps(decoder)

    def encode(self, text: str) -> list[int]:
        return [int(token_id) for token_id in self._tokenizer(text)["input_ids"]]

    def piece(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(int(token_id))
        # Embedding tables are often padded beyond the vocabulary; those ids stand for nothing.
        if token is None:
            return b""
        if token_id in self._special_ids:
            return cast(bytes, token.encode())
        if self._is_byte_level:
            return b"".join(_byte_level_bytes(character) for character in token)
        fallback = _BYTE_FALLBACK.fullmatch(token)
        if fallback:
            return bytes.fromhex(fallback[1])
        return cast(bytes, token.replace("▁", " ").encode())


def load_model(source: str = "demo", *, device: str = "auto", precision: str = "auto") -> LoadedModel:
    """Load the shipped demo model or a local folder.

    Args:
        source: "demo", or the path of a folder with config.json, *.safetensors and tokenizer files
            (a folder that is itself called demo: "./demo").
        device: "cpu", "cuda", or "auto": cuda where there is one.
        precision: "float32", "bfloat16", "float16", or "auto": float32 on the CPU, the checkpoint's own on a GPU.

    Raises:
        InvalidInputError: the folder is not there or not complete, or an argument has no such value.
        ModelNotSupportedError: the folder holds a model that is not loaded: pickled weights, code of its own,
            an architecture that transformers does not know or that is no causal language model.
        DependencyMissingError: torch or transformers is not installed.
    """
    if device not in _DEVICES:
        raise InvalidInputError(f"device {device!r}: expected one of {', '.join(_DEVICES)}")
    if precision not in _PRECISIONS:
        raise InvalidInputError(f"precision {precision!r}: expected one of {', '.join(_PRECISIONS)}")
    folder = DEMO_MODEL_DIR if source == "demo" else Path(source).expanduser()
    config_values = _check_folder(folder)
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DependencyMissingError(
            f"{error.name} is not installed, and it is needed to run a model: pip install 'moe-debugger[collector]'"
        ) from error

    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError("device 'cuda': torch finds no CUDA device here; use device 'cpu' or 'auto'")
    target = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    model = _load_weights(transformers, folder, _torch_dtype(precision, target))
    model.to(torch.device(target))
    model.eval()
    return LoadedModel(
        model=model,
        tokenizer=_load_tokenizer(transformers, folder),
        name="demo" if source == "demo" else folder.resolve().name,
        model_type=str(config_values.get("model_type") or model.config.model_type),
    )


def _check_folder(folder: Path) -> dict[str, Any]:
    """Return config.json's values of a folder that is safe and complete enough to load."""
    if not folder.exists():
        raise InvalidInputError(
            f"model {str(folder)!r}: there is no such folder; give 'demo' or a local folder "
            "(models are not downloaded: fetch the folder first)"
        )
    if not folder.is_dir():
        raise InvalidInputError(f"model {str(folder)!r} is a file; give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise InvalidInputError(
            f"model {str(folder)!r}: there is no config.json in it; give a transformers model folder"
        )
    config_values = _read_json(folder / "config.json")
    tokenizer_path = folder / "tokenizer_config.json"
    for name, values in (
        ("config.json", config_values),
        ("tokenizer_config.json", _read_json(tokenizer_path) if tokenizer_path.is_file() else {}),
    ):
        if values.get("auto_map"):
            raise ModelNotSupportedError(
                f"model {str(folder)!r}: {name} has auto_map, so the model needs Python code that comes with it, and "
                "such code is never run here; use a checkpoint whose architecture is part of transformers"
            )
    _check_weight_files(folder)
    return config_values


def _check_weight_files(folder: Path) -> None:
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        names = {str(name) for name in dict(_read_json(index_path).get("weight_map", {})).values()}
        outside = sorted(name for name in names if Path(name).name != name)
        if outside:
            raise ModelNotSupportedError(f"model {str(folder)!r}: its index names {outside[0]!r}, outside the folder")
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise InvalidInputError(
                f"model {str(folder)!r}: {len(missing)} of {len(names)} weight files are missing, the first is "
                f"{missing[0]}; finish the download"
            )
        return
    if (folder / "model.safetensors").is_file():
        return
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise ModelNotSupportedError(
            f"model {str(folder)!r}: its weights are pickles ({pickles[0]}), which can run code when they are read; "
            "convert them to safetensors (model.save_pretrained on a machine where you trust the file)"
        )
    raise InvalidInputError(
        f"model {str(folder)!r}: there is no model.safetensors and no model.safetensors.index.json in it; "
        "the weights are missing"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise InvalidInputError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _torch_dtype(precision: str, target: str) -> torch.dtype | Literal["auto"]:
    import torch

    if precision == "auto":
        # Half-precision matrix products are slow on most CPUs, and float32 routing is the reference.
        return "auto" if target == "cuda" else torch.float32
    return cast("torch.dtype", getattr(torch, precision))


def _load_weights(transformers: Any, folder: Path, dtype: torch.dtype | Literal["auto"]) -> Any:
    from transformers.utils import logging as transformers_logging

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    # transformers 4.56 renamed the argument and warns of the old name.
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    dtype_argument = {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}
    # Its progress bar would stand between the lines of a service's JSON log.
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **local)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), config=config, use_safetensors=True, output_loading_info=True, **dtype_argument, **local
        )
    except (ValueError, KeyError, ImportError) as error:
        raise ModelNotSupportedError(f"model {str(folder)!r}: transformers cannot load it: {error}") from error
    except Exception as error:
        # safetensors, torch and the file system each have their own errors for a damaged file.
        raise InvalidInputError(f"model {str(folder)!r}: its weights cannot be read: {error}") from error
    finally:
        if had_progress_bar:
            transformers_logging.enable_progress_bar()
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InvalidInputError(
            f"model {str(folder)!r}: {len(missing)} tensors of the architecture are not in the weights, the first is "
            f"{missing[0]}; they would be random numbers, so the model is not used"
        )
    return model


def _load_tokenizer(transformers: Any, folder: Path) -> TextTokenizer:
    path = folder / "tokenizer_config.json"
    if path.is_file() and _read_json(path).get("tokenizer_class") == BYTE_TOKENIZER_CLASS:
        return ByteTokenizer()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:
        raise InvalidInputError(
            f"model {str(folder)!r}: its tokenizer cannot be loaded ({error}); "
            "tokenizer.json or the files of its tokenizer class have to be in the folder"
        ) from error
    return _HubTokenizer(tokenizer)


@functools.cache
def _byte_level_table() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE (Radford et al. 2019, GPT-2's `bytes_to_unicode`), reversed."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return table


def _byte_level_bytes(character: str) -> bytes:
    byte = _byte_level_table().get(character)
    return character.encode() if byte is None else bytes((byte,))
