"""Made-up jobs."""

import uuid

from serve_app.jobs.job import InputRef, JobResult, JobSpec
from serve_app.keys import Principal
from serve_app.tasks import ControlInput, GenerationTask, Mode, OutputOptions

ALICE = Principal("key-a", "alice", frozenset({"generate"}))
BOB = Principal("key-b", "bob", frozenset({"generate"}))
RESULT = JobResult(keys=("attempts/1/1/a-0.png",), model_hash="hash", run_s=0.5)


def make_spec(
    *,
    inputs: tuple[InputRef, ...] = (),
    controls: tuple[tuple[str, str], ...] = (),
    mode: Mode = Mode.TEXT,
    webhook: str | None = None,
    samples: int = 1,
    temp: bool = False,
) -> JobSpec:
    """``controls``: pairs of control type and input field."""
    task = GenerationTask(
        model="tiny",
        family="sd15",
        prompt="a house",
        width=64,
        height=64,
        samples=samples,
        seed=7,
        scheduler="DDIMScheduler",
        steps=2,
        controls=tuple(ControlInput(net=f"net-{kind}", control_type=kind) for kind, _ in controls),
        mode=mode,
    )
    return JobSpec(
        endpoint="controlnet",
        task=task,
        inputs=inputs,
        control_sources=tuple(source for _, source in controls),
        output=OutputOptions(file_prefix=str(uuid.uuid4())),
        meta={"prompt": "a house", "seed": 7, "safetychecker": "yes"},
        webhook=webhook,
        temp=temp,
        track_id="order-1",
    )
