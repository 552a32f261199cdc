"""Hooks that see what the experts were really called with. torch is imported inside functions only."""

from .adapter import Adapter, Call, LayerShape, Routing, register_adapter, registered_adapters, unregister_adapter
from .assemble import Assembled, Assembler, is_sampled
from .context import RequestScope
from .discovery import Discovery, find_sites
from .hooks import Capture, detach
from .intake import Intake, IntakeStatistics
from .raw import PHASES, RawForward, RawLayer, TokenFrame, phase_number
from .sites import LayerInfo, Site, Tap
from .transfer import HostTransfer

__all__ = [
    "PHASES",
    "Adapter",
    "Assembled",
    "Assembler",
    "Call",
    "Capture",
    "Discovery",
    "HostTransfer",
    "Intake",
    "IntakeStatistics",
    "LayerInfo",
    "LayerShape",
    "RawForward",
    "RawLayer",
    "RequestScope",
    "Routing",
    "Site",
    "Tap",
    "TokenFrame",
    "detach",
    "find_sites",
    "is_sampled",
    "phase_number",
    "register_adapter",
    "registered_adapters",
    "unregister_adapter",
]
