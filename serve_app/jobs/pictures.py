"""JobPictures: which pictures have had their time. All about ``jobs.delete_at`` but the statement that sets it."""

import sqlalchemy as sa

from serve_app.database import Database, jobs
from serve_app.jobs.expressions import AttemptKey


class JobPictures:
    def __init__(self, database: Database) -> None:
        self._database = database

    def expired(self) -> tuple[AttemptKey, ...]:
        """Some of the attempts whose pictures are to be deleted now."""
        due = jobs.c.delete_at < self._database.now_sql()
        with self._database.read() as connection:
            rows = connection.execute(sa.select(jobs.c.id, jobs.c.attempt).where(due).limit(100))
            return tuple((row.id, row.attempt) for row in rows)

    def deleted(self, job_id: int) -> None:
        """The pictures are gone: nobody needs to delete them again."""
        with self._database.transaction() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(delete_at=None))
