"""The one SQL schema. The tenant stands in every row; times are Unix nanoseconds, as on the wire."""

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, MetaData, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["Base", "FindingMarkRow", "FindingRow", "RecordingRow", "SessionRow", "SourceRow"]

_IS_OPEN = text("closed_at_unix_ns = 0")
_IS_RUNNING = text("ended_at_unix_ns = 0")


class Base(DeclarativeBase):
    """All tables; constraints have names, so that migrations can speak of them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class SessionRow(Base):
    """A session. Open while `closed_at_unix_ns` is 0; one open session of a name in a tenant."""

    __tablename__ = "sessions"
    __table_args__ = (
        Index("uq_sessions_open_name", "tenant", "name", unique=True, sqlite_where=_IS_OPEN, postgresql_where=_IS_OPEN),
        Index("ix_sessions_tenant_created", "tenant", "created_at_unix_ns"),
    )

    session_id: Mapped[str] = mapped_column(String(26), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32))
    name: Mapped[str] = mapped_column(String(128))
    model_name: Mapped[str] = mapped_column(String(256), default="")
    model_type: Mapped[str] = mapped_column(String(128), default="")
    created_at_unix_ns: Mapped[int] = mapped_column(BigInteger)
    last_seen_at_unix_ns: Mapped[int] = mapped_column(BigInteger)
    closed_at_unix_ns: Mapped[int] = mapped_column(BigInteger, default=0)
    close_reason: Mapped[str] = mapped_column(String(256), default="")


class SourceRow(Base):
    """A source with its manifest, as it was sent: a batch can be read even where the stream has lost the manifest."""

    __tablename__ = "sources"
    __table_args__ = (Index("ix_sources_tenant_session", "tenant", "session_id"),)

    source_id: Mapped[str] = mapped_column(String(26), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32))
    session_id: Mapped[str] = mapped_column(String(26), ForeignKey("sessions.session_id", ondelete="CASCADE"))
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    started_at_unix_ns: Mapped[int] = mapped_column(BigInteger)


class FindingRow(Base):
    """A finding (`moe_debugger.v1.Finding`) as of the last time that it opened or closed; without marks."""

    __tablename__ = "findings"

    session_id: Mapped[str] = mapped_column(
        String(26), ForeignKey("sessions.session_id", ondelete="CASCADE"), primary_key=True
    )
    rule_id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32))
    message: Mapped[bytes] = mapped_column(LargeBinary)
    evaluated_at_unix_ns: Mapped[int] = mapped_column(BigInteger)


class FindingMarkRow(Base):
    """What people said about a finding; a row of its own, because it outlives the finding's history."""

    __tablename__ = "finding_marks"

    session_id: Mapped[str] = mapped_column(
        String(26), ForeignKey("sessions.session_id", ondelete="CASCADE"), primary_key=True
    )
    rule_id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32))
    acknowledged_at_unix_ns: Mapped[int] = mapped_column(BigInteger, default=0)
    acknowledged_by: Mapped[str] = mapped_column(String(128), default="")
    acknowledged_opened_at_unix_ns: Mapped[int] = mapped_column(BigInteger, default=0)
    silenced_until_unix_ns: Mapped[int] = mapped_column(BigInteger, default=0)
    silenced_by: Mapped[str] = mapped_column(String(128), default="")


class RecordingRow(Base):
    """A recording that an analyzer writes, or wrote. It runs while `ended_at_unix_ns` is 0; one of a session at a time.

    Attributes:
        state: "recording", "stopping", "finished", "failed" or "interrupted".
        owner: the replica that writes it.
        heartbeat_at_unix_ns: when the owner last said so.
        stop_at_sequence: of the event stream: what was stored up to it belongs to the recording; 0 = goes on.
        not_written: rows that came and are in no file, by reason, as JSON.
    """

    __tablename__ = "recordings"
    __table_args__ = (
        Index(
            "uq_recordings_running_session",
            "session_id",
            unique=True,
            sqlite_where=_IS_RUNNING,
            postgresql_where=_IS_RUNNING,
        ),
        Index("ix_recordings_tenant_started", "tenant", "started_at_unix_ns"),
    )

    recording_id: Mapped[str] = mapped_column(String(26), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32))
    session_id: Mapped[str] = mapped_column(String(26))
    session_name: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(128), default="")
    state: Mapped[str] = mapped_column(String(16), default="recording")
    owner: Mapped[str] = mapped_column(String(256))
    path: Mapped[str] = mapped_column(Text)
    started_at_unix_ns: Mapped[int] = mapped_column(BigInteger)
    ended_at_unix_ns: Mapped[int] = mapped_column(BigInteger, default=0)
    heartbeat_at_unix_ns: Mapped[int] = mapped_column(BigInteger)
    stop_at_sequence: Mapped[int] = mapped_column(BigInteger, default=0)
    max_bytes: Mapped[int] = mapped_column(BigInteger)
    num_rows: Mapped[int] = mapped_column(BigInteger, default=0)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    num_sources: Mapped[int] = mapped_column(BigInteger, default=0)
    num_missing_messages: Mapped[int] = mapped_column(BigInteger, default=0)
    num_decisions_dropped: Mapped[int] = mapped_column(BigInteger, default=0)
    not_written: Mapped[str] = mapped_column(Text, default="{}")
    detail: Mapped[str] = mapped_column(Text, default="")
