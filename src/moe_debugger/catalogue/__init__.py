"""The durable catalogue: sessions, sources, findings. SQLite embedded, PostgreSQL in production. Extra: [sql]."""

from moe_debugger.catalogue.findings import FindingMarks, FindingStore
from moe_debugger.catalogue.migrate import upgrade
from moe_debugger.catalogue.models import Base, SessionRow, SourceRow
from moe_debugger.catalogue.repository import Catalogue, OpenedSession

__all__ = [
    "Base",
    "Catalogue",
    "FindingMarks",
    "FindingStore",
    "OpenedSession",
    "SessionRow",
    "SourceRow",
    "upgrade",
]
