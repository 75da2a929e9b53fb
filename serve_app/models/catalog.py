"""The catalogue: which models can be used, and where their files are. Every statement on the table ``models``.

A row appears after the last file of a model is in place, so what is listed can be loaded. Knows nothing of torch.
"""

import math
from enum import StrEnum

import sqlalchemy as sa

from serve_app.controls import union_control_types
from serve_app.database import Database, models
from serve_app.errors import ConfigError, UnknownModel, one_of
from serve_app.tasks import Value


class ModelType(StrEnum):
    """In the order in which models are listed."""

    BASE = "base"
    CONTROLNET = "controlnet"
    LORA = "lora"
    VAE = "vae"
    EMBEDDING = "embedding"


class ModelEntry(Value):
    """One published model."""

    id: str
    type: ModelType
    family: str
    """A ControlNet works with base models of its own family only."""
    control_type: str | None = None
    """For a ControlNet: the built-in id (``canny`` ...) it answers to, if any; ``union`` for a ControlNet-Union."""
    union_types: int | None = None
    """For a ControlNet-Union: how many control types it knows."""
    max_clip_skip: int | None = None
    """For a base model: how many layers of its text encoders can be skipped."""
    inpaints: bool | None = None
    """For a base model: whether its UNet takes mask and masked image beside the latent, and can do nothing else."""
    location: str
    """Absolute folder in diffusers layout, the same on every node."""
    hash: str
    """SHA-256 over weights and configuration, hex; see ``sources.ResolvedSource.hash``."""
    size_bytes: int
    """Of the files that are loaded."""
    created_at: float = 0.0
    """Seconds since the epoch; the catalogue sets it when an id is first published."""

    @property
    def control_types(self) -> tuple[str, ...]:
        """For a ControlNet: the built-in ids it can stand for."""
        if self.union_types is not None:
            return union_control_types(self.union_types)
        return () if self.control_type is None else (self.control_type,)


class Catalog:
    """Methods block on the database; safe to use from many threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, entry: ModelEntry) -> ModelEntry:
        """List a model, and return what is listed now.

        An id that is there with another hash, folder or family gets the new values: the model was published again.
        ``created_at`` is the database's time of the first publication; the given one is ignored.

        Raises:
            ConfigError: the id belongs to a model of another type. Clients that use it would break.
        """
        values = entry.model_dump(exclude={"created_at"}, mode="json")
        with self._database.transaction() as connection:
            self._database.insert_if_new(connection, models, {**values, "created_at": self._next_time(connection)})
            known = _entry(connection.execute(sa.select(models).where(models.c.id == entry.id)).one())
            if known.type is not entry.type:
                raise ConfigError(
                    f"the model id {entry.id!r} is taken by a model of type {known.type}, it can't become one of type "
                    f"{entry.type}; publish under another id, or delete the old model first"
                )
            published = entry.model_copy(update={"created_at": known.created_at})
            if published != known:
                connection.execute(sa.update(models).where(models.c.id == entry.id).values(values))
        return published

    def _next_time(self, connection: sa.Connection) -> float:
        """The database's time, but later than every entry's: who came first must not depend on a clock's ticks."""
        now, newest = connection.execute(sa.select(self._database.now_sql(), sa.func.max(models.c.created_at))).one()
        return float(now) if newest is None else max(float(now), math.nextafter(newest, math.inf))

    def find(self, id: str) -> ModelEntry | None:  # noqa: A002  - the column's name
        with self._database.read() as connection:
            row = connection.execute(sa.select(models).where(models.c.id == id)).one_or_none()
        return None if row is None else _entry(row)

    def get(self, id: str, kind: ModelType | None = None) -> ModelEntry:  # noqa: A002  - the column's name
        """The model of this id, which must be of type ``kind`` if that is given.

        Raises:
            UnknownModel: there is none; the message lists the ids that there are, of that kind.
        """
        entry = self.find(id)
        if entry is None or (kind is not None and entry.type is not kind):
            known = [other.id for other in self.list() if kind is None or other.type is kind]
            raise UnknownModel(one_of(f"{kind or ''} model".strip(), id, known or ["(none is published)"]))
        return entry

    def list(self) -> tuple[ModelEntry, ...]:
        """All models: base models first, then by type; oldest first within a type."""
        order = sa.case({kind.value: rank for rank, kind in enumerate(ModelType)}, value=models.c.type)
        with self._database.read() as connection:
            rows = connection.execute(sa.select(models).order_by(order, models.c.created_at, models.c.id)).all()
        return tuple(_entry(row) for row in rows)

    def delete(self, id: str) -> bool:  # noqa: A002  - the column's name
        """Take a model off the list; whether it was on it. Its files stay, and requests that hold it go on."""
        with self._database.transaction() as connection:
            return connection.execute(sa.delete(models).where(models.c.id == id)).rowcount == 1

    def nets(self, family: str) -> tuple[ModelEntry, ...]:
        """The ControlNets of a base family, oldest first."""
        wanted = (models.c.type == ModelType.CONTROLNET.value) & (models.c.family == family)
        with self._database.read() as connection:
            rows = connection.execute(sa.select(models).where(wanted).order_by(models.c.created_at, models.c.id)).all()
        return tuple(_entry(row) for row in rows)

    def net_for(self, control_type: str, family: str) -> ModelEntry | None:
        """The ControlNet that a built-in id (``canny`` ...) means with bases of ``family``.

        The oldest one made for it, else the oldest ControlNet-Union that knows it.
        """
        able = [net for net in self.nets(family) if control_type in net.control_types]
        return min(able, key=lambda net: net.union_types is not None, default=None)


def _entry(row: sa.Row[tuple[object, ...]]) -> ModelEntry:
    return ModelEntry.model_validate(dict(row._mapping))  # noqa: SLF001  - SQLAlchemy's public accessor
