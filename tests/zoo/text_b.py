"""The architectures from laguna to zaya, as the census of MoE architectures lists them."""

from zoo.build import Build
from zoo.text_b_decoders import BUILDS as _DECODERS
from zoo.text_b_encoders import BUILDS as _ENCODERS
from zoo.text_b_multimodal import BUILDS as _MULTIMODAL
from zoo.text_b_qwen import BUILDS as _QWEN

__all__ = ["BUILDS"]

BUILDS: tuple[Build, ...] = tuple(sorted((*_DECODERS, *_ENCODERS, *_MULTIMODAL, *_QWEN), key=lambda build: build.name))
