"""Hooks that see what the experts were really called with. torch is imported inside functions only."""

from .assemble import Assembler, is_sampled
from .context import RequestScope
from .discovery import Discovery, LayerInfo, Site, find_sites
from .hooks import Capture, detach
from .intake import Intake, IntakeStatistics
from .raw import PHASES, RawForward, RawLayer, phase_number
from .transfer import HostTransfer

__all__ = [
    "PHASES",
    "Assembler",
    "Capture",
    "Discovery",
    "HostTransfer",
    "Intake",
    "IntakeStatistics",
    "LayerInfo",
    "RawForward",
    "RawLayer",
    "RequestScope",
    "Site",
    "detach",
    "find_sites",
    "is_sampled",
    "phase_number",
]
