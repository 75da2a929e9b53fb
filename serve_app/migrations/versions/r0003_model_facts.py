"""What a ControlNet-Union and a text encoder can do, so that requests are checked without a look into the files."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("models", sa.Column("union_types", sa.Integer))
    op.add_column("models", sa.Column("max_clip_skip", sa.Integer))
