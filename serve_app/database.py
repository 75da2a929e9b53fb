"""The database: tables, connections, transactions, migrations. SQLite on one machine, PostgreSQL for clusters.

Statements live with the modules that own a table (jobs/store.py, models/catalog.py, keys.py); this one knows only
the schema. Times are seconds since the epoch by the *database's* clock (``Database.now_sql``), so that leases do not
depend on the clocks of the nodes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import alembic.command
import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from serve_app.errors import ConfigError, one_of

OUTAGES = (OperationalError, InterfaceError, InternalError, PoolTimeout)
"""What SQLAlchemy raises while the database is away, restarts, has no connection to spare, or is a standby that has not
been promoted yet (InternalError, for PostgreSQL's ``read_only_sql_transaction``). Anything else is a fault of ours."""

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
    sa.Column("endpoint", sa.String(32), nullable=False),  # of the spec: jobs of one take about the same time
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
    sa.Column("progress", sa.Double),  # of this attempt, 0 to 1, as of the last renewal
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("result", sa.Text),  # JobResult as JSON
    sa.Column("error", sa.Text),
    sa.Column("webhook_status", sa.String(200)),
    sa.Column("delete_at", sa.Double),  # when the pictures are to go; NULL: never, or they are gone
    sa.Index("ix_jobs_status_not_before", "status", "not_before", "created_at"),
    sa.Index("ix_jobs_tenant_status", "tenant", "status"),
    sa.Index("ix_jobs_webhook_status", "webhook_status"),
    sa.Index("ix_jobs_delete_at", "delete_at"),
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
    sa.Column("union_types", sa.Integer),
    sa.Column("max_clip_skip", sa.Integer),
    sa.Column("inpaints", sa.Boolean),
    sa.Column("location", sa.Text, nullable=False),  # folder in diffusers layout
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

control_maps = sa.Table(
    "control_maps",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),  # hash of everything that the map follows from
    sa.Column("size_bytes", sa.BigInteger, nullable=False),  # reserved in the object store
    sa.Column("info", sa.Text),  # AnnotationInfo as JSON; NULL: not there yet, or going
    sa.Column("digest", sa.String(64)),  # SHA-256 of the object's bytes, hex
    sa.Column("used_at", sa.Double, nullable=False),
    sa.Column("holder", sa.String(32)),  # who makes the map or deletes it
    sa.Column("lease_until", sa.Double),
    sa.Index("ix_control_maps_used_at", "used_at"),
)

facts = sa.Table(
    "facts",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),  # e.g. store_id: the marker that the shared store must hold
    sa.Column("value", sa.Text, nullable=False),
)


_BUSY_TIMEOUT_MS = 20_000
_LOCKS = 0x636E73  # any constant: the class of our advisory locks in PostgreSQL
_MIGRATION_LOCK = 0
_POSTGRES_OPTIONS = {
    # A server that vanished without a word must not hold a thread for the kernel's two hours.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


class Database:
    """Connections to one database. Every method blocks: callers on an event loop use a thread.

    Made once per process; safe to use from many threads. ``url`` is a SQLAlchemy URL of scheme ``sqlite`` (a file)
    or ``postgresql+psycopg``, ``password`` is put into it.

    Raises:
        ConfigError: the URL is not one of these, or the folder of the file can't be made.
    """

    def __init__(self, url: str, password: str | None = None, pool_size: int = 5) -> None:
        parsed = _parse(url)
        self.dialect = parsed.get_backend_name()
        if password is not None:
            parsed = parsed.set(password=password)
        self._file = _sqlite_file(parsed) if self.dialect == "sqlite" else None
        options: dict[str, Any] = {} if self._file else {"connect_args": _POSTGRES_OPTIONS}
        # A connection that broke while it was idle is replaced before anybody gets it (pool_pre_ping).
        self.engine = sa.create_engine(parsed, pool_size=pool_size, max_overflow=0, pool_pre_ping=True, **options)
        self._reader = self.engine.execution_options(begin="BEGIN")
        if self._file:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """A write transaction: committed at the end of the block, rolled back when it raises.

        SQLite takes its write lock at the start, so that a transaction that reads first can't fail half way.
        """
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction for reading only; never waits for writers."""
        with self._reader.connect() as connection:
            yield connection

    def now_sql(self) -> sa.ColumnElement[float]:
        """The database's clock: seconds since the epoch, at the start of the statement. Milliseconds are exact."""
        if self.dialect == "sqlite":
            return (sa.func.julianday("now", type_=sa.Double) - sa.literal(2440587.5)) * sa.literal(86400.0)
        return sa.cast(sa.extract("epoch", sa.func.statement_timestamp()), sa.Double)

    def insert_if_new(self, connection: sa.Connection, table: sa.Table, values: Mapping[str, object]) -> bool:
        """Insert a row unless one with its primary or unique key exists; whether it was inserted.

        Waits for another transaction that is inserting the same key.
        """
        insert = sqlite.insert(table) if self.dialect == "sqlite" else postgresql.insert(table)
        statement = insert.values(values).on_conflict_do_nothing().returning(sa.literal(1))
        return connection.scalar(statement) is not None

    def lock(self, connection: sa.Connection, name: int) -> None:
        """Hold the cluster-wide lock ``name`` until the transaction ends; SQLite allows one writer anyway."""
        if self.dialect == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCKS, name)))

    def migrate(self) -> None:
        """Bring the schema to the revision of this code. Safe to call from many processes at once, and again.

        Raises:
            ConfigError: a newer version of this code has been here.
        """
        if self._file:
            with FileLock(f"{self._file}.lock"):
                # WAL is a lasting property of the file. Switching needs the file to itself and can't wait for it.
                self._set_wal()
                self._upgrade()
        else:
            self._upgrade()

    def check_revision(self) -> None:
        """Raises ConfigError when the schema is not the one this code was written for."""
        with self.read() as connection:
            found = MigrationContext.configure(connection).get_current_heads()
        wanted = ScriptDirectory.from_config(_alembic_config()).get_heads()
        if set(found) != set(wanted):
            raise ConfigError(
                f"the database is at schema revision {', '.join(found) or 'none'}, this version needs "
                f"{', '.join(wanted)}; run the migrate command of the newer version"
            )

    def close(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()

    def _upgrade(self) -> None:
        try:
            with self.transaction() as connection:
                self.lock(connection, _MIGRATION_LOCK)
                config = _alembic_config()
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, "head")
        except CommandError:
            self.check_revision()  # a newer version was here: say so in our words
            raise

    def _set_wal(self) -> None:
        connection = self.engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA journal_mode=WAL").close()
        finally:
            connection.close()


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise ConfigError("database.url is not an SQLAlchemy URL") from error
    known = ("sqlite", "postgresql+psycopg")
    if parsed.drivername not in known:
        raise ConfigError(one_of("database scheme", parsed.drivername, known))
    return parsed


def _sqlite_file(url: sa.URL) -> Path:
    if not url.database or url.database == ":memory:":
        raise ConfigError("database.url: SQLite needs a file, threads do not share a database in memory")
    path = Path(url.database).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"database.url: {error}") from error
    return path


def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver starts no transactions of its own; _begin_sqlite does
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={_BUSY_TIMEOUT_MS}", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN IMMEDIATE"))


def _alembic_config() -> Config:
    config = Config()
    # Alembic expands "%" in option values.
    config.set_main_option("script_location", str(files("serve_app") / "migrations").replace("%", "%%"))
    return config
