"""What every process of the cluster opens from the configuration: database, object store, and the tables on them."""

from dataclasses import dataclass

from serve_app.config import AppConfig, secret
from serve_app.database import Database
from serve_app.jobs.store import JobStore
from serve_app.keys import KeyStore
from serve_app.models.catalog import Catalog
from serve_app.storage import ObjectStore, open_store
from serve_app.storage.shared import check_shared


@dataclass(frozen=True, slots=True)
class Resources:
    config: AppConfig
    database: Database
    objects: ObjectStore
    jobs: JobStore
    keys: KeyStore
    catalog: Catalog


def open_resources(config: AppConfig) -> Resources:
    """Open everything, bring the schema up to date, and prove that all processes see the same database and store.

    Blocks; safe to call from several processes at once.

    Raises:
        ConfigError: a secret is missing, or database and object store do not belong together.
    """
    if config.database.url is None or config.storage.url is None:
        config.data_folder.mkdir(parents=True, exist_ok=True)
    database = Database(config.database_url, secret(config.database.password_env), config.database.pool_size)
    database.migrate()
    objects = open_store(config.storage_url)
    check_shared(database, objects)
    return Resources(
        config=config,
        database=database,
        objects=objects,
        jobs=JobStore(database, config.limits),
        keys=KeyStore(database),
        catalog=Catalog(database),
    )
