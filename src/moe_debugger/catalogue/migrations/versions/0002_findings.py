"""Findings: their history and people's marks.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "findings",
        sa.Column("session_id", sa.String(26), nullable=False),
        sa.Column("rule_id", sa.Text, nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.Column("evaluated_at_unix_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("session_id", "rule_id", name="pk_findings"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name="fk_findings_session_id_sessions", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "finding_marks",
        sa.Column("session_id", sa.String(26), nullable=False),
        sa.Column("rule_id", sa.Text, nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("acknowledged_at_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("acknowledged_by", sa.String(128), nullable=False),
        sa.Column("acknowledged_opened_at_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("silenced_until_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("silenced_by", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "rule_id", name="pk_finding_marks"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name="fk_finding_marks_session_id_sessions", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("finding_marks")
    op.drop_table("findings")
