"""Recordings.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_IS_RUNNING = sa.text("ended_at_unix_ns = 0")
_NUMBERS = (
    "started_at_unix_ns",
    "ended_at_unix_ns",
    "heartbeat_at_unix_ns",
    "stop_at_sequence",
    "max_bytes",
    "num_rows",
    "size_bytes",
    "num_sources",
    "num_missing_messages",
    "num_decisions_dropped",
)


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "recordings",
        sa.Column("recording_id", sa.String(26), nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("session_id", sa.String(26), nullable=False),
        sa.Column("session_name", sa.String(128), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _NUMBERS),
        sa.Column("not_written", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("recording_id", name="pk_recordings"),
    )
    op.create_index(
        "uq_recordings_running_session",
        "recordings",
        ["session_id"],
        unique=True,
        sqlite_where=_IS_RUNNING,
        postgresql_where=_IS_RUNNING,
    )
    op.create_index("ix_recordings_tenant_started", "recordings", ["tenant", "started_at_unix_ns"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("recordings")
