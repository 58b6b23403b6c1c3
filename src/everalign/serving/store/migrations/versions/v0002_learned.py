"""Which feedback was learned, and in which task."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table."""
    exchange = sa.ForeignKey("everalign_exchanges.id", ondelete="CASCADE")
    op.create_table(
        "everalign_learned",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("exchange", sa.String(256), exchange, nullable=False),
        sa.Column("task", sa.String(256), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("everalign_learned_exchange", "everalign_learned", ["exchange"])
