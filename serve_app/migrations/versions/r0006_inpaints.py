"""Which base models can only repaint, so that a request without a mask is refused before it is a job."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("models", sa.Column("inpaints", sa.Boolean))
