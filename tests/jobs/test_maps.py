"""Control maps as a job's result: kept under the attempt's names, shared where they are the same, gone with it."""

from collections.abc import Callable

import numpy as np
import pytest

from serve_app.errors import JobError, WorkerLost
from serve_app.images import encode_png
from serve_app.jobs.job import JobSpec, JobStatus
from serve_app.jobs.lifecycle import submit
from serve_app.jobs.maps import control_uses
from serve_app.jobs.store import JobStore
from serve_app.storage.local import LocalStore
from serve_app.tasks import MapInput, MapsTask
from support.backend import ScriptedBackend
from support.dispatch import Start, end_of
from support.jobs import ALICE, make_spec

PHOTO = encode_png(np.full((90, 150, 3), 128, np.uint8))
CANNY = MapInput(control_type="canny", annotator="canny", params={"low_threshold": 9})


def maps_spec(*controls: MapInput, **size: int) -> JobSpec:
    task = MapsTask(controls=controls, max_width=1024, max_height=1024, **size)
    return make_spec().model_copy(update={"task": task, "control_sources": ("init_image",) * len(controls)})


async def test_maps_alone_end_a_job_without_a_denoiser(
    store: JobStore, objects: LocalStore, backend: ScriptedBackend, start: Start
) -> None:
    other = CANNY.model_copy(update={"params": {"low_threshold": 10}})
    spec = maps_spec(CANNY, other, CANNY)
    async with start():
        job = await end_of(store, await submit(store, objects, ALICE, spec, {"init_image": PHOTO}))
    assert job.status is JobStatus.SUCCESS
    assert job.result is not None
    assert job.result.size == (152, 88)
    first, second, third = job.result.keys
    assert first == third == f"attempts/{job.id}/1/{spec.output.file_name(0)}"
    assert second == f"attempts/{job.id}/1/{spec.output.file_name(1)}"
    assert [objects.get(key) for key in job.result.keys] == [b"map"] * 3
    assert backend.attempts == []
    assert [(task.width, task.height, image.shape) for task, image, _ in backend.annotated] == [
        (152, 88, (88, 152, 3))
    ] * 2
    assert [dict(task.params) for task, _, _ in backend.annotated] == [{"low_threshold": 9}, {"low_threshold": 10}]


async def test_a_lost_annotator_is_asked_again(
    store: JobStore, objects: LocalStore, backend: ScriptedBackend, start: Start, stored: Callable[[], set[str]]
) -> None:
    backend.annotate_script = [WorkerLost(), WorkerLost()]
    async with start():
        job = await end_of(store, await submit(store, objects, ALICE, maps_spec(CANNY), {"init_image": PHOTO}))
    assert (job.status, job.attempt) == (JobStatus.SUCCESS, 3)
    assert job.result is not None
    assert stored() == set(job.result.keys) == {f"attempts/{job.id}/3/{job.spec.output.file_name(0)}"}


async def test_an_annotator_that_refuses_ends_the_job(
    store: JobStore, objects: LocalStore, backend: ScriptedBackend, start: Start
) -> None:
    backend.annotate_script = [JobError("no weights")]
    async with start():
        job = await end_of(store, await submit(store, objects, ALICE, maps_spec(CANNY), {"init_image": PHOTO}))
    assert (job.status, job.error, job.attempt) == (JobStatus.FAILED, "no weights", 1)


@pytest.mark.parametrize("kept", [True, False])
async def test_maps_beside_pictures_are_those_of_the_attempt_that_drew(
    store: JobStore,
    objects: LocalStore,
    backend: ScriptedBackend,
    start: Start,
    stored: Callable[[], set[str]],
    kept: bool,
) -> None:
    backend.script = [WorkerLost()]
    spec = make_spec(controls=(("canny", "init_image"), ("tile", "init_image"), ("canny", "init_image")))
    spec = spec.model_copy(update={"return_maps": kept})
    async with start():
        job = await end_of(store, await submit(store, objects, ALICE, spec, {"init_image": PHOTO}))
    assert job.result is not None
    names = [spec.output.map_name(index) for index in (0, 1, 0)]
    assert list(job.result.map_keys) == ([f"attempts/{job.id}/2/{name}" for name in names] if kept else [])
    partial = f"attempts/{job.id}/2/partial"
    assert stored() == {*job.result.keys, *job.result.map_keys, partial}


async def test_a_job_of_maps_survives_its_record(store: JobStore, objects: LocalStore) -> None:
    spec = maps_spec(CANNY, width=64)
    job = await submit(store, objects, ALICE, spec, {"init_image": PHOTO})
    found = store.get(job.id)
    assert found is not None
    assert found.spec.task == spec.task
    assert found.spec.output_names == (spec.output.file_name(0),)


def test_a_drawing_that_an_annotator_passes_on_is_brought_to_size_as_one() -> None:
    spec = maps_spec(CANNY, CANNY.model_copy(update={"annotator": "invert", "params": {}}))
    assert control_uses(spec) == [("init_image", False), ("init_image", True)]
