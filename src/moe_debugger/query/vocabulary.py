"""Texts of tokens, by a tokenizer that the caller has, or of models whose tokens are bytes."""

from typing import Any, Protocol

from moe_debugger.query.table import Labels

__all__ = ["ByteVocabulary", "TokenTexts", "Vocabulary", "vocabulary_of"]

# A larger id is none of any tokenizer; it would make a list of that length.
_MAX_VOCABULARY = 4_000_000


class Vocabulary(Protocol):
    """What is needed of a tokenizer; `moe_debugger.load_model(...).tokenizer` is one."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of one token."""
        ...


class ByteVocabulary:
    """Token ids 0 to 255 are bytes, as of the demo model."""

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text."""
        return list(text.encode("utf-8", errors="replace"))

    def piece(self, token_id: int) -> bytes:
        """Return the byte."""
        return bytes((token_id,)) if 0 <= token_id < 256 else b""


class _Transformers:
    """A transformers tokenizer; its own conversion of single tokens to text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return [int(each) for each in self._tokenizer.encode(text, add_special_tokens=False)]

    def piece(self, token_id: int) -> bytes:
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return text.encode("utf-8", errors="replace")


def vocabulary_of(tokenizer: Any, model_name: str = "") -> Vocabulary | None:
    """Return a vocabulary of what the caller gave; None where token texts are not known.

    Args:
        tokenizer: one with `piece` and `encode`, or one of transformers; None = by the model's name.
        model_name: "demo" has bytes as tokens.
    """
    if tokenizer is None:
        return ByteVocabulary() if model_name == "demo" else None
    if hasattr(tokenizer, "piece"):
        vocabulary: Vocabulary = tokenizer
        return vocabulary
    return _Transformers(tokenizer)


class TokenTexts:
    """Labels of token ids: the text of id i is at place i; read from the tokenizer as far as ids were seen."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._texts: list[str] = []
        self.labels = Labels(self._texts)

    def upto(self, token_id: int) -> Labels:
        """Return labels that have the texts of all ids to `token_id`."""
        last = min(token_id, _MAX_VOCABULARY)
        while len(self._texts) <= last:
            piece = self._vocabulary.piece(len(self._texts))
            self._texts.append(piece.decode("utf-8", errors="backslashreplace"))
        return self.labels
