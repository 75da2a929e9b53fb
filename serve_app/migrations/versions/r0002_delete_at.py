"""When the pictures of a job are to be deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("delete_at", sa.Double))
    op.create_index("ix_jobs_delete_at", "jobs", ["delete_at"])
