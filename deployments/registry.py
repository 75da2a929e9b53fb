"""The model registry: publishes the configured models to the catalogue when it starts.

A lock, not the number of replicas, makes it the single writer; `controlnet-serve models add` takes the same way.
"""

from serve_app.config import AppConfig


class Registry:
    def __init__(self, config: AppConfig) -> None:
        from serve_app.models.publish import publish_all
        from serve_app.resources import open_resources

        resources = open_resources(config)
        publish_all(config, resources.catalog)
        resources.database.close()
