"""Denoiser replicas: one engine each, on one GPU or on the CPU."""

from deployments.observability import RayMeter
from deployments.process import node_name, on_its_device, replica_name
from serve_app.backend import DenoiserStats
from serve_app.config import AppConfig
from serve_app.tasks import AttemptRef, ControlMap, GenerationResult, GenerationTask, ImageArray, OutputOptions


class Denoiser:
    def __init__(self, config: AppConfig, name: str) -> None:
        """``name``: which of ``config.denoisers`` this replica is one of."""
        import torch

        from serve_app.engine.generator import ImageGenerator
        from serve_app.models.cache import open_cache
        from serve_app.resources import open_resources

        own = on_its_device(next(denoiser for denoiser in config.denoisers if denoiser.name == name))
        torch.set_num_threads(own.threads)
        resources = open_resources(config)
        self._cache = open_cache(own, resources.catalog)
        self._generator = ImageGenerator(own, self._cache, resources.objects, RayMeter(), replica_name(), node_name())

    async def generate(
        self,
        ref: AttemptRef,
        task: GenerationTask,
        output: OutputOptions,
        init_image: ImageArray | None,
        mask: ImageArray | None,
        *maps: ControlMap,
    ) -> GenerationResult:
        """See ``serve_app.backend.Backend.generate``; Ray has turned the references into arrays, read-only views."""
        return await self._generator.generate(ref, task, output, init_image, mask, maps)

    async def progress(self, refs: tuple[AttemptRef, ...]) -> dict[AttemptRef, float]:
        return self._generator.progress(refs)

    async def stats(self) -> DenoiserStats:
        return self._generator.stats()

    async def check_health(self) -> None:
        self._generator.check_health()

    async def __del__(self) -> None:
        await self._generator.close()
        self._cache.close()
