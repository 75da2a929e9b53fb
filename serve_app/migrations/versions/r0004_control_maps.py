"""Control maps that annotator replicas share."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "control_maps",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("info", sa.Text),
        sa.Column("digest", sa.String(64)),
        sa.Column("used_at", sa.Double, nullable=False),
        sa.Column("holder", sa.String(32)),
        sa.Column("lease_until", sa.Double),
        sa.PrimaryKeyConstraint("key", name="pk_control_maps"),
    )
    op.create_index("ix_control_maps_used_at", "control_maps", ["used_at"])
