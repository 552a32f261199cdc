"""Sessions and sources.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_IS_OPEN = sa.text("closed_at_unix_ns = 0")


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.String(26), nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("model_name", sa.String(256), nullable=False),
        sa.Column("model_type", sa.String(128), nullable=False),
        sa.Column("created_at_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("last_seen_at_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("closed_at_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("close_reason", sa.String(256), nullable=False),
        sa.PrimaryKeyConstraint("session_id", name="pk_sessions"),
    )
    op.create_index(
        "uq_sessions_open_name",
        "sessions",
        ["tenant", "name"],
        unique=True,
        sqlite_where=_IS_OPEN,
        postgresql_where=_IS_OPEN,
    )
    op.create_index("ix_sessions_tenant_created", "sessions", ["tenant", "created_at_unix_ns"])
    op.create_table(
        "sources",
        sa.Column("source_id", sa.String(26), nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("session_id", sa.String(26), nullable=False),
        sa.Column("manifest", sa.LargeBinary, nullable=False),
        sa.Column("started_at_unix_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("source_id", name="pk_sources"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name="fk_sources_session_id_sessions", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_sources_tenant_session", "sources", ["tenant", "session_id"])


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("sources")
    op.drop_table("sessions")
