"""MapIndex: which control maps are in the object store, and who makes one right now. Every statement on control_maps.

A row is *held* (somebody makes the map, or deletes it, for the length of a lease) or *ready*. What a row claims in
bytes is in the store at most: bytes are reserved before an object is put and given back after it was deleted, so that
a crash in between leaves a held row, whose lease runs out, and never an object that nobody counts.
"""

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from serve_app.database import Database, control_maps

_MAPS_LOCK: Final = 4
_AT_ONCE: Final = 100
_ROOM: Final = 16
"""When there is no room, this part of the budget is made free."""


@dataclass(frozen=True, slots=True)
class ReadyMap:
    """A map in the store."""

    info: str
    """AnnotationInfo as JSON."""
    digest: str
    """SHA-256 of the object's bytes, hex."""


class MapIndex:
    """Every method blocks and is safe to use from many threads and processes. ``holder``: unique for every claim."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, key: str) -> ReadyMap | None:
        """The map, if it is ready; that counts as a use."""
        if not self._exists(control_maps.c.key == key, control_maps.c.info.is_not(None)):
            return None  # without a write: whoever waits for a map asks often
        used = (
            sa.update(control_maps)
            .where(control_maps.c.key == key)
            .values(used_at=self._database.now_sql())
            .returning(control_maps.c.info, control_maps.c.digest)
        )
        with self._database.transaction() as connection:
            row = connection.execute(used).one_or_none()
        return ReadyMap(row.info, row.digest) if row is not None and row.info is not None else None

    def claim(self, key: str, holder: str, lease_s: float) -> bool:
        """Become the one who makes the map, for ``lease_s``. False: it is ready, or another makes it."""
        now = self._database.now_sql()
        blocked = sa.or_(control_maps.c.holder.is_(None), control_maps.c.lease_until >= now)
        if self._exists(control_maps.c.key == key, blocked):
            return False
        row = {"key": key, "size_bytes": 0, "used_at": now, "holder": holder, "lease_until": now + lease_s}
        lapsed = sa.and_(control_maps.c.key == key, control_maps.c.lease_until < now)
        # Its bytes stay reserved: the object of whoever crashed may be there, and will be overwritten.
        taken = sa.update(control_maps).where(lapsed).values(holder=holder, lease_until=now + lease_s)
        with self._database.transaction() as connection:
            if self._database.insert_if_new(connection, control_maps, row):
                return True
            return connection.execute(taken).rowcount == 1

    def renew(self, key: str, holder: str, lease_s: float) -> bool:
        """Prolong the lease. False: it was lost."""
        until = self._database.now_sql() + lease_s
        with self._database.transaction() as connection:
            renewed = sa.update(control_maps).where(_held_by(holder, key)).values(lease_until=until)
            return connection.execute(renewed).rowcount == 1

    def reserve(
        self, key: str, holder: str, size_bytes: int, budget_bytes: int, lease_s: float
    ) -> tuple[str, ...] | None:
        """Reserve bytes for a map that ``holder`` makes. Returns None when that is done.

        Otherwise what is returned has to go first: these maps, the least recently used, are held by ``holder`` now.
        Delete their objects, ``drop`` them and ask again.

        Raises:
            KeyError: the lease was lost, or there is no room that could be made.
        """
        now = self._database.now_sql()
        others = control_maps.c.key != key
        lapsed = control_maps.c.lease_until < now
        free = sa.or_(control_maps.c.holder.is_(None), lapsed)
        total = sa.select(sa.func.coalesce(sa.func.sum(control_maps.c.size_bytes), 0)).where(others)
        with self._database.transaction() as connection:
            self._database.lock(connection, _MAPS_LOCK)
            excess = int(connection.execute(total).scalar_one()) + size_bytes - budget_bytes
            if excess <= 0:
                reserved = sa.update(control_maps).where(_held_by(holder, key)).values(size_bytes=size_bytes)
                if connection.execute(reserved).rowcount != 1:
                    raise KeyError(key)
                return None
            excess += budget_bytes // _ROOM  # so that not every map has to make room for itself
            # Whoever crashed before a reservation left no object.
            connection.execute(sa.delete(control_maps).where(others, lapsed, control_maps.c.size_bytes == 0))
            oldest = sa.select(control_maps.c.key, control_maps.c.size_bytes).where(others, free)
            going = []
            for row in connection.execute(oldest.order_by(control_maps.c.used_at, control_maps.c.key)):
                going.append(row.key)
                excess -= row.size_bytes
                if excess <= 0:
                    break
            if excess > budget_bytes // _ROOM:
                raise KeyError(key)
            held = {"info": None, "digest": None, "holder": holder, "lease_until": now + lease_s}
            # The condition again: one of them may have been taken meanwhile.
            taken = sa.update(control_maps).where(control_maps.c.key.in_(going), free).values(held)
            return tuple(connection.scalars(taken.returning(control_maps.c.key)))

    def take_old(self, holder: str, age_s: float, lease_s: float) -> tuple[str, ...]:
        """Some of the maps that nobody has used for ``age_s``: ``holder`` holds them now, to ``drop`` them."""
        now = self._database.now_sql()
        free = sa.or_(control_maps.c.holder.is_(None), control_maps.c.lease_until < now)
        old = sa.and_(control_maps.c.used_at < now - age_s, free)
        some = sa.select(control_maps.c.key).where(old).order_by(control_maps.c.key).limit(_AT_ONCE)
        held = {"info": None, "digest": None, "holder": holder, "lease_until": now + lease_s}
        with self._database.transaction() as connection:
            self._database.lock(connection, _MAPS_LOCK)
            keys = connection.scalars(some).all()
            taken = sa.update(control_maps).where(control_maps.c.key.in_(keys), free).values(held)
            return tuple(connection.scalars(taken.returning(control_maps.c.key))) if keys else ()

    def publish(self, key: str, holder: str, ready: ReadyMap) -> bool:
        """The object is there: everybody may use it. False: the lease was lost."""
        values = {"info": ready.info, "digest": ready.digest, "holder": None, "lease_until": None}
        with self._database.transaction() as connection:
            done = sa.update(control_maps).where(_held_by(holder, key)).values(values)
            return connection.execute(done).rowcount == 1

    def hold(self, key: str, holder: str, ready: ReadyMap, lease_s: float) -> bool:
        """Take a map back whose object is not what ``ready`` says, to ``drop`` it. False: somebody else did."""
        until = self._database.now_sql() + lease_s
        same = sa.and_(
            control_maps.c.key == key, control_maps.c.digest == ready.digest, control_maps.c.holder.is_(None)
        )
        values = {"info": None, "digest": None, "holder": holder, "lease_until": until}
        with self._database.transaction() as connection:
            return connection.execute(sa.update(control_maps).where(same).values(values)).rowcount == 1

    def drop(self, holder: str, *keys: str) -> None:
        """Forget maps that ``holder`` holds; their objects are gone."""
        with self._database.transaction() as connection:
            connection.execute(sa.delete(control_maps).where(_held_by(holder, *keys)))

    def known(self, key: str) -> bool:
        """Whether there is a row, in whatever state."""
        return self._exists(control_maps.c.key == key)

    def total_bytes(self) -> int:
        """Bytes in the store, at most."""
        with self._database.read() as connection:
            return int(connection.scalar(sa.select(sa.func.sum(control_maps.c.size_bytes))) or 0)

    def _exists(self, *conditions: sa.ColumnElement[bool]) -> bool:
        with self._database.read() as connection:
            return connection.scalar(sa.select(control_maps.c.key).where(*conditions)) is not None


def _held_by(holder: str, *keys: str) -> sa.ColumnElement[bool]:
    return sa.and_(control_maps.c.key.in_(keys), control_maps.c.holder == holder)
