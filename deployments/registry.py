"""The model registry: publishes models to the catalogue. A lock, not the number of replicas, makes it the writer."""

import asyncio

from serve_app.models.catalog import ModelEntry

from serve_app.config import AppConfig, ModelSource


class Registry:
    def __init__(self, config: AppConfig) -> None:
        from serve_app.models.publish import publish_all

        from serve_app.resources import open_resources

        self._resources = open_resources(config)
        publish_all(config, self._resources.catalog)

    async def publish(self, source: ModelSource) -> ModelEntry:
        """Verify, hash and list one more model.

        Raises:
            ModelError: the folder is not a model that may be served.
        """
        from serve_app.models.publish import publish

        return await asyncio.to_thread(publish, self._resources.catalog, source)
