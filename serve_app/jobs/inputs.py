"""JobInputs: which stored objects hold the input pictures of which job. Every statement on ``job_inputs``.

Objects are named by their content, so jobs may share one. An object is deleted only under a cluster-wide lock and when
no job names it; whoever adds a job's claim on an object holds the same lock while it looks that the object is there.
"""

from collections.abc import Callable, Collection, Mapping

import sqlalchemy as sa

from serve_app.database import Database, job_inputs, jobs
from serve_app.jobs.expressions import ENDED, held_by

_INPUTS_LOCK = 3


class JobInputs:
    def __init__(self, database: Database) -> None:
        self._database = database

    def lock(self, connection: sa.Connection) -> None:
        """Until the transaction ends, no input object is deleted."""
        self._database.lock(connection, _INPUTS_LOCK)

    def add(self, connection: sa.Connection, job_id: int, keys: Mapping[str, str]) -> None:
        """Claim the objects of a new job: input field -> object key. The caller holds the lock."""
        rows = [{"job_id": job_id, "field": field, "object_key": key} for field, key in keys.items()]
        connection.execute(sa.insert(job_inputs), rows)

    def keep(self, job_id: int, attempt: int, field: str, key: str, confirm: Callable[[], None]) -> bool:
        """Remember that the bytes of a link are stored under ``key``, for all later attempts.

        ``confirm`` is called before the commit, while nobody can delete the object. False: the attempt no longer
        holds the job.
        """
        with self._database.transaction() as connection:
            self.lock(connection)
            if connection.scalar(sa.select(jobs.c.id).where(held_by((job_id, attempt)))) is None:
                return False
            row = {"job_id": job_id, "field": field, "object_key": key}
            self._database.insert_if_new(connection, job_inputs, row)
            confirm()
            return True

    def of(self, job_id: int) -> dict[str, str]:
        """Input field -> object key, for inline inputs and for links that were fetched."""
        query = sa.select(job_inputs.c.field, job_inputs.c.object_key).where(job_inputs.c.job_id == job_id)
        with self._database.read() as connection:
            return {row.field: row.object_key for row in connection.execute(query)}

    def drop(self, job_id: int, delete: Callable[[str], None]) -> None:
        """Forget the inputs of a job that has ended and ``delete`` the objects that no other job uses."""
        ended = sa.select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.status.in_(ENDED))
        own = sa.delete(job_inputs).where(job_inputs.c.job_id == job_id, job_inputs.c.job_id.in_(ended))
        with self._database.transaction() as connection:
            self.lock(connection)
            dropped = set(connection.scalars(own.returning(job_inputs.c.object_key)))
            self._delete_unused(connection, dropped, delete)

    def drop_unclaimed(self, keys: Collection[str], delete: Callable[[str], None]) -> None:
        """``delete`` those of ``keys`` that no job uses: they were stored for a job that was then refused."""
        with self._database.transaction() as connection:
            self.lock(connection)
            self._delete_unused(connection, keys, delete)

    def left_over(self) -> tuple[int, ...]:
        """Some of the ended jobs whose inputs nobody has dropped yet."""
        query = sa.select(job_inputs.c.job_id).distinct().join(jobs).where(jobs.c.status.in_(ENDED)).limit(100)
        with self._database.read() as connection:
            return tuple(connection.scalars(query))

    @staticmethod
    def _delete_unused(connection: sa.Connection, keys: Collection[str], delete: Callable[[str], None]) -> None:
        for key in keys:
            claimed = sa.select(job_inputs.c.job_id).where(job_inputs.c.object_key == key).limit(1)
            if connection.scalar(claimed) is None:
                delete(key)
