"""Which endpoint a job came by, so that how long jobs take is told apart."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # Until now there were two endpoints, and a spec begins with its own.
    op.add_column("jobs", sa.Column("endpoint", sa.String(32), nullable=False, server_default="controlnet"))
    op.execute("""UPDATE jobs SET endpoint = 'annotate' WHERE spec LIKE '{"endpoint":"annotate"%'""")
