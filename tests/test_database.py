"""Connections, transactions and migrations, on both databases."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from serve_app.database import OUTAGES, Database, facts, job_inputs, jobs, metadata
from serve_app.errors import ConfigError
from support.postgres import new_database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/folder/100%.sqlite3"
    return new_database(request.getfixturevalue("postgres_url"))


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    database.migrate()
    yield database
    database.close()


def values(database: Database) -> dict[str, str]:
    with database.read() as connection:
        return {row.name: row.value for row in connection.execute(sa.select(facts))}


def test_migrations_make_exactly_the_declared_tables(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        found = sa.inspect(connection)
        assert found.get_pk_constraint("job_inputs")["name"] == job_inputs.primary_key.name
        assert {index["name"] for index in found.get_indexes("jobs")} >= {index.name for index in jobs.indexes}


def test_an_old_schema_is_refused_until_migrated(url: str) -> None:
    database = Database(url)
    with pytest.raises(ConfigError, match="revision none"):
        database.check_revision()
    database.migrate()
    database.migrate()
    database.check_revision()
    with database.transaction() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'other'"))
    with pytest.raises(ConfigError, match="revision other"):
        database.check_revision()
    with pytest.raises(ConfigError, match="revision other"):
        database.migrate()
    database.close()


def _migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.check_revision()
    database.close()


def test_processes_may_migrate_at_once(url: str) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_migrate, args=(url,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_a_block_that_raises_changes_nothing(database: Database) -> None:
    def insert_twice() -> None:
        with database.transaction() as connection:
            for value in ("first", "again"):
                connection.execute(sa.insert(facts).values(name="a", value=value))

    with pytest.raises(sa.exc.IntegrityError):
        insert_twice()
    assert values(database) == {}


def test_insert_if_new_says_whether_it_did(database: Database) -> None:
    with database.transaction() as connection:
        assert database.insert_if_new(connection, facts, {"name": "a", "value": "first"})
        assert not database.insert_if_new(connection, facts, {"name": "a", "value": "second"})
    assert values(database) == {"a": "first"}


def test_the_clock_is_the_wall_clock_in_seconds(database: Database) -> None:
    with database.read() as connection:
        before = time.time()
        now = connection.scalar(sa.select(database.now_sql()))
    assert now == pytest.approx(before, abs=1.0)
    assert now != int(now or 0)


def test_foreign_keys_hold(database: Database) -> None:
    orphan = sa.insert(job_inputs).values(job_id=1, field="init_image", object_key="inputs/x")
    with pytest.raises(sa.exc.IntegrityError), database.transaction() as connection:
        connection.execute(orphan)


def test_counting_up_from_many_threads_loses_nothing(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(sa.insert(facts).values(name="n", value="0"))

    def count() -> None:
        for _ in range(10):
            with database.transaction() as connection:
                database.lock(connection, 99)
                value = connection.execute(sa.select(facts.c.value)).scalar_one()
                connection.execute(sa.update(facts).values(value=str(int(value) + 1)))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values(database) == {"n": "40"}


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(sa.insert(facts).values(name="a", value="b"))
        assert values(database) == {}
    assert values(database) == {"a": "b"}


def test_a_connection_that_the_server_cut_is_replaced(postgres_url: str) -> None:
    database = Database(new_database(postgres_url), pool_size=1)
    with database.read() as connection:
        pid = connection.execute(sa.select(sa.func.pg_backend_pid())).scalar_one()
    os.kill(pid, signal.SIGTERM)
    with database.read() as connection:
        assert connection.execute(sa.select(sa.func.pg_backend_pid())).scalar_one() != pid
    database.close()


def test_a_server_that_only_reads_counts_as_an_outage(postgres_url: str) -> None:
    database = Database(new_database(postgres_url))
    database.migrate()
    name = database.engine.url.database
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    database.close()
    with pytest.raises(OUTAGES), database.transaction() as connection:
        connection.execute(sa.insert(facts).values(name="a", value="b"))
    database.close()


def test_sqlite_is_durable_and_writes_ahead(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/a.sqlite3")
    database.migrate()
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    database.close()


def test_the_password_is_put_into_the_url_and_not_shown() -> None:
    database = Database("postgresql+psycopg://me@127.0.0.1:1/db", password="p@ss:word")
    assert database.engine.url.password == "p@ss:word"
    assert "p@ss" not in repr(database.engine)


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://h/d", "postgresql://h/d", "sqlite://", "sqlite:///:memory:", "sqlite:////proc/x/y"]
)
def test_an_unusable_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match="database"):
        Database(url)
