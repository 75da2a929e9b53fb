"""Publishing: verify a model, hash it, and only then write its row into the catalogue.

The files stay where they are: a model's folder has to be the same on every node. A ControlNet and a base model meet in
a request, so their families are compared there; here a family is only held against the model's own weights.
"""

import logging

from filelock import FileLock

from serve_app.config import AppConfig, ModelSource
from serve_app.controls import CONTROL_TYPES, UNION, union_control_types
from serve_app.errors import ConfigError, RetryableError, one_of
from serve_app.models.catalog import Catalog, ModelEntry, ModelType
from serve_app.models.demo import DEMO_CONTROL_TYPES, DEMO_FAMILY, DEMO_ID, demo_net_id, install_demo
from serve_app.models.sources import ResolvedSource, family_of, resolve

logger = logging.getLogger(__name__)


def publish(catalog: Catalog, source: ModelSource) -> ModelEntry:
    """Verify, hash and list one model; blocks while every byte of it is read.

    Publishing the same files under the same id again changes nothing; other files replace what the id means.

    Raises:
        ModelError: the folder is not a model that may be served (see ``sources.resolve``), or not of the family named.
        ConfigError: the id is taken by another type of model or by a control type, or the control type is wrong.
        RetryableError: the disk gives errors.
    """
    return _publish(catalog, source, trusting=False)


def _publish(catalog: Catalog, source: ModelSource, *, trusting: bool) -> ModelEntry:
    """``trusting``: take the hash from the catalogue where nothing speaks against it."""
    if source.id in CONTROL_TYPES:
        raise ConfigError(f"the model id {source.id!r} is the name of a control type; publish under another id")
    found = resolve(source.path)
    _check_control_type(source, found)
    listed = catalog.find(source.id) if trusting else None
    unhashed = ModelEntry(
        id=source.id,
        type=found.type,
        family=family_of(found.config, source.family),
        control_type=source.control_type if found.union_types is None else UNION,
        union_types=found.union_types,
        max_clip_skip=found.max_clip_skip,
        inpaints=found.inpaints,
        location=str(found.folder),
        hash="",
        size_bytes=found.size_bytes,
    )
    if listed is not None and _is_as_listed(unhashed, found, listed):
        return listed
    entry = catalog.add(unhashed.model_copy(update={"hash": found.hash()}))
    logger.info("published %s %s of family %s, hash %s", entry.type, entry.id, entry.family, entry.hash)
    return entry


def publish_all(config: AppConfig, catalog: Catalog) -> tuple[ModelEntry, ...]:
    """Publish the demo model, if it is wanted, and every model of the configuration. Returns their entries in order.

    Every process of a cluster may call this at its start: one works at a time, by a lock in the models folder, and
    those after it find everything done.

    A model that is listed as it is found is not hashed again: the same folder, type, family, control type and size, and
    no file that changed after the model was first published. Files replaced within the skew between the clocks of the
    database and of the disk are not noticed if their size is the same; ``publish`` always hashes. A model that was
    published again with other files is newer than its first publication, and hashed at every start.

    Raises:
        ModelError, ConfigError, RetryableError: as ``publish``, for the first model that fails.
    """
    folder = config.published_models
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".publish.lock"):
        sources = (*(_demo(config) if config.demo_model else ()), *config.models)
        return tuple(_publish(catalog, source, trusting=True) for source in sources)


def _is_as_listed(unhashed: ModelEntry, found: ResolvedSource, listed: ModelEntry) -> bool:
    as_found = unhashed.model_copy(update={"hash": listed.hash, "created_at": listed.created_at})
    return as_found == listed and found.changed_at <= listed.created_at


def _demo(config: AppConfig) -> tuple[ModelSource, ...]:
    folder = config.published_models / "demo"
    try:
        folders = install_demo(folder)
    except OSError as error:
        raise RetryableError(f"the demo model could not be written to {folder}: {error.strerror}") from error
    base = ModelSource(id=DEMO_ID, path=folders[DEMO_ID], family=DEMO_FAMILY)
    nets = (
        ModelSource(id=name, path=folders[name], family=DEMO_FAMILY, control_type=control_type)
        for control_type in DEMO_CONTROL_TYPES
        for name in (demo_net_id(control_type),)
    )
    return (base, *nets)


def _check_control_type(source: ModelSource, found: ResolvedSource) -> None:
    if source.control_type is None:
        return
    if found.type is not ModelType.CONTROLNET:
        raise ConfigError(f"the model {source.id!r} is of type {found.type}: only a ControlNet has a control_type")
    if found.union_types is not None:
        if source.control_type != UNION:
            known = ", ".join(union_control_types(found.union_types))
            raise ConfigError(
                f"the model {source.id!r} is a ControlNet-Union and answers to {known}; leave its control_type out"
            )
        return
    if source.control_type not in CONTROL_TYPES:
        raise ConfigError(f"model {source.id!r}: " + one_of("control_type", source.control_type, tuple(CONTROL_TYPES)))
