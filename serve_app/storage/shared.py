"""Proof at start that this process sees the same database and the same object store as all others."""

import secrets

import sqlalchemy as sa

from serve_app.database import Database, facts
from serve_app.errors import ConfigError
from serve_app.storage import ObjectStore

MARKER = "store-id"
"""Object that holds the name of the store; the database holds the same name as fact ``store_id``."""


def check_shared(database: Database, store: ObjectStore) -> None:
    """Name the store at the very first start; at every later one compare the names.

    Raises:
        ConfigError: this database and this store do not belong together.
    """
    name = secrets.token_hex(16)
    with database.transaction() as connection:
        # Waits for another process that is naming the store; the object is there before the fact can be read.
        if database.insert_if_new(connection, facts, {"name": "store_id", "value": name}):
            if store.info(MARKER) is not None:
                raise ConfigError(
                    f"the object store already belongs to another database; if that one is gone, delete {MARKER!r}"
                )
            store.put(MARKER, name.encode(), "text/plain")
            return
        expected = connection.scalar(sa.select(facts.c.value).where(facts.c.name == "store_id"))
    try:
        found = store.get(MARKER).decode()
    except KeyError:
        found = None
    if found != expected:
        raise ConfigError(
            "this process sees another object store than the one the database knows: check storage.url and that the "
            "folder is really shared"
        )
