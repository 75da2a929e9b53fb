"""The sections of the deployments: how many replicas, how large, on which device, and what each may hold."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, model_validator

from serve_app.config.sections import Count, Seconds, Section


class AutoscalingConfig(Section):
    """Handed to Ray Serve as it is; see its documentation of ``autoscaling_config``."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Count = 1
    initial_replicas: Annotated[int, Field(ge=0)] | None = None
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    """Calls per replica, running and waiting, that Serve keeps to by adding replicas; None: half of those that a
    replica takes at once, and 2 for annotators."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 0.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ReplicaConfig(Section):
    """Size and number of the replicas of one deployment."""

    replicas: Count = 1
    autoscaling_config: AutoscalingConfig | None = None
    """Given: overrides ``replicas``."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.1
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Count = 1
    """Threads of torch and OpenMP in one replica."""
    graceful_shutdown_timeout_s: Seconds = 120.0

    @property
    def calls_at_once(self) -> int:
        """Calls that one replica takes before others wait: Serve's ``max_ongoing_requests``."""
        return 1

    @property
    def scaling(self) -> AutoscalingConfig | None:
        """``autoscaling_config`` with its target filled in."""
        own = self.autoscaling_config
        if own is None or own.target_ongoing_requests is not None:
            return own
        return own.model_copy(update={"target_ongoing_requests": self.target_calls})

    @property
    def target_calls(self) -> float:
        """The target of scaling where none is configured."""
        return self.calls_at_once / 2

    @model_validator(mode="after")
    def _scales_in_time(self) -> Self:
        """Serve compares the target with running and waiting calls together, and runs no more than a replica takes."""
        target = self.scaling.target_ongoing_requests if self.scaling else None
        if target is not None and target >= self.calls_at_once:
            raise ValueError(
                f"autoscaling_config.target_ongoing_requests {target:g} must be below {self.calls_at_once}, the calls "
                "that one replica takes at once: a replica would be added only when calls wait already"
            )
        return self


class DenoiserConfig(ReplicaConfig):
    """One deployment of engine replicas."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")] = "Denoiser"
    families: tuple[str, ...] = ()
    """Base families served here; empty: every family that no other denoiser names."""
    device: str = "auto"
    """``auto``: cuda where torch sees a GPU, else cpu; on Ray with ``num_gpus: 0`` the CPU."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """``auto``: float16 on cuda, float32 on cpu."""
    max_rows: Annotated[int, Field(ge=2)] = 16
    """Rows of one UNet forward at most."""
    max_latent_area: Count = 16 * 128 * 128
    """Rows x latent height x latent width of one UNet forward at most."""
    deterministic: StrictBool | Annotated[int, Field(ge=2)] = False
    """Draw pictures that are equal byte for byte whatever else is drawn beside them; else they may differ by 1/255 a
    channel, because libraries pick their kernels by the number of rows. Every forward then runs in one number of rows
    for its latent size, filled up where there are fewer: ``true`` picks it by the size (4 at 512x512, 2 at 1024x1024;
    see ``engine.batching.Budget.pinned_rows``), a number sets it. A request alone takes up to twice as long with
    ``true``, and full forwards are smaller. Equality is per device type and library versions, and needs the same
    number on every replica."""
    max_running: Count = 16
    """Requests that hold engine state at once. The oldest finish first and one that guides fills two rows, so that
    ``max_rows / 2`` requests fill a forward; twice that covers those that encode or decode, more would only hold
    memory."""
    waiting_room: Annotated[int, Field(ge=0)] = 4
    """Requests a replica takes beyond that, so that it never runs dry."""
    model_memory_bytes: Count = 16 * 1024**3
    """Budget of the component cache; the least recently used component that no request holds goes first."""
    encode_workers: Count = 2
    """Threads that encode and store PNGs."""

    @property
    def max_ongoing(self) -> int:
        """Requests one replica holds, running and waiting."""
        return self.max_running + self.waiting_room

    @property
    def calls_at_once(self) -> int:
        return self.max_ongoing

    @property
    def capacity(self) -> int:
        """Requests all replicas hold at their largest number; more than that is kept in the database."""
        scaling = self.autoscaling_config
        return self.max_ongoing * (scaling.max_replicas if scaling else self.replicas)


class AnnotatorConfig(ReplicaConfig):
    max_ongoing: Count = 32
    """Calls that one replica takes at once. Networks run one at a time; the other calls wait for them with their
    picture, some 3 MB each, or make a map without a network meanwhile, so there must be more places than waiters."""
    map_store_bytes: Annotated[int, Field(ge=0)] = 1024**3
    """Control maps of detectors with weights that all replicas together keep in the object store; 0: none."""
    weights_folder: Path | None = None
    """Where the detectors' weights lie, see ``controlnet-serve weights``; None: ``annotators`` in the data folder."""
    device: str = "auto"
    """As ``DenoiserConfig.device``, for detectors with weights."""
    detector_memory_bytes: Count = 4 * 1024**3
    """Budget of the loaded detectors; the least recently used one that no request holds goes first."""

    @property
    def calls_at_once(self) -> int:
        return self.max_ongoing

    @property
    def target_calls(self) -> float:
        """One that runs and one that waits for it; the places beyond are no measure of what a replica can do."""
        return min(2.0, self.max_ongoing / 2)


class GatewayConfig(ReplicaConfig):
    max_ongoing_requests: Count = 4000

    @property
    def calls_at_once(self) -> int:
        return self.max_ongoing_requests


class DispatcherConfig(ReplicaConfig):
    lease_s: Seconds = 20.0
    """A claimed job whose lease is not renewed for this long goes back to the queue."""
    poll_s: Seconds = 0.5
    """How often a dispatcher looks for work when nobody nudges it."""
    max_jobs: Count = 512
    """Jobs one dispatcher drives at once."""
    max_attempts: Count = 5
    attempt_timeout_s: Seconds = 21_600.0
    """A last resort against a call that was lost without a word. An attempt's time covers waiting for a replica and
    for the engine, however long the queue there is; a replica that hangs is found by its own health check."""

    @property
    def calls_at_once(self) -> int:
        """Nudges; the jobs it drives are no calls of Serve."""
        return 1000
