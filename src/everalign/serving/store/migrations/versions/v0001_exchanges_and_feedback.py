"""Exchanges and feedback."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NAME = sa.String(256)
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "everalign_exchanges",
        sa.Column("id", _NAME, primary_key=True),
        sa.Column("created", _TIME, nullable=False),
        sa.Column("key_id", _NAME, nullable=False),
        sa.Column("upstream", _NAME, nullable=False),
        sa.Column("model", _NAME, nullable=False),
        sa.Column("messages", sa.JSON, nullable=False),
        sa.Column("original", sa.Text, nullable=False),
        sa.Column("returned", sa.Text, nullable=False),
        sa.Column("outcome", _NAME, nullable=False),
        sa.Column("reason", _NAME),
        sa.Column("mode", _NAME, nullable=False),
        sa.Column("corrector", _NAME),
        sa.Column("template", _NAME),
        sa.Column("usage", sa.JSON, nullable=False),
    )
    op.create_index("everalign_exchanges_created", "everalign_exchanges", ["created"])
    op.create_table(
        "everalign_feedback",
        sa.Column("exchange", _NAME, sa.ForeignKey("everalign_exchanges.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("key_id", _NAME, primary_key=True),
        sa.Column("user", _NAME, primary_key=True),
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("rating", sa.SmallInteger),
        sa.Column("preferred", _NAME),
        sa.Column("edited_text", sa.Text),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("created", _TIME, nullable=False),
    )
    op.create_index("everalign_feedback_id", "everalign_feedback", ["id"])
    op.create_index("everalign_feedback_created", "everalign_feedback", ["created"])
