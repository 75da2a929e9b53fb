"""The database: tables, connections, transactions, migrations. SQLite on one machine, PostgreSQL for clusters.

Statements live with the modules that own a table (jobs/store.py, models/catalog.py, keys.py); this one knows only
the schema. Times are seconds since the epoch by the *database's* clock (``Database.now_sql``), so that leases do not
depend on the clocks of the nodes.
"""

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),  # random, 53 bits
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("key_id", sa.String(32), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("spec", sa.Text, nullable=False),  # JobSpec as JSON
    sa.Column("file_prefix", sa.String(36), nullable=False, unique=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("not_before", sa.Double, nullable=False),  # a retry waits until then
    sa.Column("attempt", sa.Integer, nullable=False),  # fencing token: grows with every claim
    sa.Column("charged", sa.Integer, nullable=False),  # attempts that count against the job
    sa.Column("suspect", sa.Boolean, nullable=False),  # was on a worker that died: runs alone next
    sa.Column("dispatcher", sa.String(64)),  # who holds the lease
    sa.Column("lease_until", sa.Double),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("result", sa.Text),  # JobResult as JSON
    sa.Column("error", sa.Text),
    sa.Column("webhook_status", sa.String(200)),
    sa.Index("ix_jobs_status_not_before", "status", "not_before", "created_at"),
    sa.Index("ix_jobs_tenant_status", "tenant", "status"),
)

job_inputs = sa.Table(
    "job_inputs",
    metadata,
    sa.Column("job_id", sa.BigInteger, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("field", sa.String(32), primary_key=True),
    sa.Column("object_key", sa.String(128), nullable=False),  # the bytes of a link, kept at its first fetch
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),  # SHA-256 of the key, hex
    sa.Column("scopes", sa.String(64), nullable=False),  # space-separated
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("family", sa.String(32), nullable=False),
    sa.Column("control_type", sa.String(32)),
    sa.Column("location", sa.Text, nullable=False),  # folder in diffusers layout
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

facts = sa.Table(
    "facts",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),  # e.g. store_id: the marker that the shared store must hold
    sa.Column("value", sa.Text, nullable=False),
)
