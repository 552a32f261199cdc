"""The durable catalogue: sessions, sources, findings, recordings (SQLite, or PostgreSQL). Extra: [sql]."""

from moe_debugger.catalogue.findings import FindingMarks, FindingStore
from moe_debugger.catalogue.migrate import upgrade
from moe_debugger.catalogue.models import Base, RecordingRow, SessionRow, SourceRow
from moe_debugger.catalogue.recordings import RecordingStore
from moe_debugger.catalogue.repository import Catalogue, OpenedSession

__all__ = [
    "Base",
    "Catalogue",
    "FindingMarks",
    "FindingStore",
    "OpenedSession",
    "RecordingRow",
    "RecordingStore",
    "SessionRow",
    "SourceRow",
    "upgrade",
]
