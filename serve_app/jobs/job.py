"""What a job is: its states, what was fixed at acceptance, and its record. No SQL here."""

from collections.abc import Mapping
from enum import StrEnum

from pydantic import JsonValue

from serve_app.tasks import AnnotationInfo, GenerationTask, JsonScalar, MapsTask, OutputOptions, Value


class JobStatus(StrEnum):
    QUEUED = "queued"
    PROCESSING = "processing"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in {JobStatus.SUCCESS, JobStatus.FAILED, JobStatus.CANCELLED}


class InputRef(Value):
    """Where one picture of a job comes from: a link, or bytes stored before the job was accepted."""

    field: str
    """``init_image``, ``mask_image``, or ``control_image.<n>``."""
    url: str | None = None
    key: str | None = None
    """Object store key ``inputs/<sha256>`` of bytes that came inline."""


class JobSpec(Value):
    """Everything fixed at acceptance; a second run of the same spec draws the same pictures."""

    endpoint: str
    """Name of the route, e.g. ``controlnet``."""
    task: GenerationTask | MapsTask
    inputs: tuple[InputRef, ...] = ()
    control_sources: tuple[str, ...] = ()
    """Per control of the task: the input field its map is made from."""
    output: OutputOptions
    meta: Mapping[str, JsonValue]
    """The echo of the request in wire names; facts known only after the run are added by ``jobs.answers``."""
    return_maps: bool = False
    """Keep the control maps beside the pictures."""
    temp: bool = False
    webhook: str | None = None
    track_id: JsonScalar = None

    @property
    def output_names(self) -> tuple[str, ...]:
        """File names of what the job makes, in order."""
        count = len(self.task.controls) if isinstance(self.task, MapsTask) else self.task.samples
        return tuple(map(self.output.file_name, range(count)))

    @property
    def map_names(self) -> tuple[str, ...]:
        """File names of the control maps that are kept beside the pictures, one per control."""
        kept = self.return_maps and isinstance(self.task, GenerationTask)
        return tuple(map(self.output.map_name, range(len(self.task.controls)))) if kept else ()


class JobResult(Value):
    """What a successful job left behind."""

    keys: tuple[str, ...]
    """Object store keys of the files in ``JobSpec.output_names``, in order; one object may serve several."""
    map_keys: tuple[str, ...] = ()
    """The same for ``JobSpec.map_names``."""
    size: tuple[int, int] | None = None
    """Width and height, where they followed from the picture."""
    annotators: tuple[AnnotationInfo, ...] = ()
    model_hash: str | None = None
    """None where nothing was drawn."""
    net_hashes: tuple[str, ...] = ()
    run_s: float
    """Wall time of the successful attempt, fetching and annotating included."""


class Job(Value):
    """A job's record as last read."""

    id: int
    tenant: str
    key_id: str
    status: JobStatus
    spec: JobSpec
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempt: int = 0
    charged: int = 0
    suspect: bool = False
    progress: float | None = None
    """Of the attempt that runs: the share of its model evaluations that was done when its lease was last renewed."""
    cancel_requested: bool = False
    result: JobResult | None = None
    error: str | None = None
    webhook_status: str | None = None
