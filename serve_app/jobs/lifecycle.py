"""The story of one job: accepted (``submit``), awaited (``JobWaiter``), tried (``run_attempt``).

What a job needs is fixed and stored before it is accepted, or at its first attempt, so that every later attempt draws
the same pictures.

Memory: no more than ``DECODES_AT_ONCE`` pictures of all attempts are at their own size at a time. Each is brought to
the output's size at once, with the resampling that its user would apply, and only that is kept while the attempt runs.
"""

import asyncio
import errno
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from serve_app.backend import Backend
from serve_app.config import ImageLimits
from serve_app.controls import CONTROL_TYPES
from serve_app.errors import FetchFailed, ImageRejected, JobError, NotFound, RetryableError, WorkerBusy
from serve_app.images import decode_image, decode_mask, fitting_size, resize_map
from serve_app.jobs.gather import gather
from serve_app.jobs.job import InputRef, Job, JobResult, JobSpec
from serve_app.jobs.maps import Use, control_uses, make_maps
from serve_app.jobs.store import JobStore
from serve_app.keys import Principal
from serve_app.storage import ObjectStore
from serve_app.tasks import AttemptRef, GenerationTask, ImageArray, MapsTask, Mode

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""Width and height in pixels."""

DECODES_AT_ONCE = 2
"""A picture at the pixel limit takes some hundred MB while it is decoded."""

_BYTES = "application/octet-stream"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class Fetcher(Protocol):
    """The fetching side of ``serve_app.fetching.GuardedClient``."""

    async def get(self, url: str, max_bytes: int) -> bytes:
        """Raises FetchFailed."""
        ...


def input_key(data: bytes) -> str:
    """Object store key of an input picture: named by its content, so that a repetition takes no space."""
    return f"inputs/{hashlib.sha256(data).hexdigest()}"


async def submit(
    store: JobStore, objects: ObjectStore, principal: Principal, spec: JobSpec, inline: Mapping[str, bytes]
) -> Job:
    """Accept a job. ``inline`` holds the pictures that came with the request, by input field.

    A caller that is cancelled meanwhile changes nothing: the job is accepted whole or not at all.

    Raises:
        QueueFull: a queue limit is met.
        WorkerBusy: the pictures cannot be stored, e.g. because the disk is full.
    """
    return await asyncio.to_thread(_accept, store, objects, principal, spec, inline)


def _accept(
    store: JobStore, objects: ObjectStore, principal: Principal, spec: JobSpec, inline: Mapping[str, bytes]
) -> Job:
    store.check_limits(principal.tenant)
    data = {input_key(item): item for item in inline.values()}
    stored = tuple(InputRef(field=field, key=input_key(item)) for field, item in inline.items())
    others = tuple(ref for ref in spec.inputs if ref.field not in inline)
    accepted = spec.model_copy(update={"inputs": others + stored})

    def confirm() -> None:
        # Another job with the same picture may have ended, and deleted it, since it was stored above.
        for key, item in data.items():
            if objects.info(key) is None:
                objects.put(key, item, _BYTES)

    try:
        for key, item in data.items():
            objects.put(key, item, _BYTES)
        return store.submit(principal, accepted, confirm if data else None)
    except BaseException as error:
        if data:
            _forget(store, objects, tuple(data))
        if isinstance(error, OSError):
            raise WorkerBusy(f"The server cannot store the request right now: {error.strerror or error}.") from error
        raise


def _forget(store: JobStore, objects: ObjectStore, keys: tuple[str, ...]) -> None:
    """Best effort: the request has failed already, its own error matters more."""
    try:
        store.inputs.drop_unclaimed(keys, objects.delete)
    except (OSError, SQLAlchemyError):
        logger.warning("inputs of a refused request stay in the store: %s", ", ".join(keys), exc_info=True)


class JobWaiter:
    """Waits for jobs to end. One per event loop: thousands of waiters share one query per tick."""

    def __init__(self, store: JobStore, tick_s: float = 0.05) -> None:
        self._store = store
        self._tick_s = tick_s
        self._waiting: dict[int, set[asyncio.Future[Job]]] = {}
        self._poller: asyncio.Task[None] | None = None

    async def wait(self, job_id: int, timeout_s: float) -> Job:
        """The job when it has ended, or as it is after ``timeout_s``.

        Raises:
            NotFound: there is no such job.
        """
        if timeout_s > 0:
            future: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(job_id, set()).add(future)
            if self._poller is None:
                self._poller = asyncio.create_task(self._poll(), name="job-waiter")
            try:
                async with asyncio.timeout(timeout_s):
                    return await future
            except TimeoutError:
                pass  # not ended yet: answered as it is
            finally:
                self._leave(job_id, future)
        job = await asyncio.to_thread(self._store.get, job_id)
        if job is None:
            raise NotFound
        return job

    def _leave(self, job_id: int, future: asyncio.Future[Job]) -> None:
        futures = self._waiting.get(job_id, set())
        futures.discard(future)
        if not futures:
            self._waiting.pop(job_id, None)

    async def _poll(self) -> None:
        pause_s = self._tick_s
        try:
            while True:
                await asyncio.sleep(pause_s)
                if not self._waiting:
                    return
                started = time.monotonic()
                await self._tick()
                # However slow the database is, this poller takes no more than a third of a connection's time.
                pause_s = max(self._tick_s, 2 * (time.monotonic() - started))
        finally:
            self._poller = None

    async def _tick(self) -> None:
        try:
            ended = await asyncio.to_thread(self._store.ended, tuple(self._waiting))
        except SQLAlchemyError:
            logger.warning("waiting jobs could not be looked up; trying again", exc_info=True)
            return
        for job_id, job in ended.items():
            for future in self._waiting.get(job_id, ()):
                if not future.done():
                    future.set_result(job)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What an attempt works with."""

    store: JobStore
    objects: ObjectStore
    backend: Backend
    fetcher: Fetcher
    limits: ImageLimits
    decoders: Executor = field(default_factory=lambda: ThreadPoolExecutor(DECODES_AT_ONCE, "decode"))
    """Where pictures are decoded. Not a semaphore: a cancelled attempt would let go of it while its thread decodes."""


async def run_attempt(shop: Workshop, job: Job) -> JobResult:
    """Try a claimed job once: fetch and decode its pictures, make the control maps, draw.

    Raises:
        JobError: the job can't be done; the message is for its owner.
        Cancelled: the backend was told to stop.
        RetryableError: another attempt may succeed.
    """
    started = time.monotonic()
    task = job.spec.task
    ref = attempt_ref(job)
    pictures = await _pictures(shop, job)
    maps = await make_maps(shop.backend, job.spec, ref, pictures)
    annotators = tuple(annotation.info for annotation in maps.annotations)
    if isinstance(task, MapsTask):
        height, width = next(iter(pictures.values())).shape[:2]
        run_s = time.monotonic() - started
        return JobResult(keys=maps.keys, size=(width, height), annotators=annotators, run_s=run_s)
    result = await shop.backend.generate(
        ref,
        task,
        job.spec.output,
        pictures["init_image", False] if task.mode is not Mode.TEXT else None,
        pictures["mask_image", False] if task.mode is Mode.MASKED else None,
        maps.annotations,
    )
    return JobResult(
        keys=result.keys,
        map_keys=maps.keys,
        annotators=annotators,
        model_hash=result.model_hash,
        net_hashes=result.net_hashes,
        run_s=time.monotonic() - started,
    )


def attempt_ref(job: Job) -> AttemptRef:
    """The attempt that a claimed job is in."""
    return AttemptRef(job_id=job.id, attempt=job.attempt, alone=job.suspect)


async def _pictures(shop: Workshop, job: Job) -> dict[Use, ImageArray]:
    """Every picture that the job uses, at the size it works in."""
    needed = _needed(job.spec)
    task = job.spec.task
    pictures: dict[Use, ImageArray] = {}
    if isinstance(task, MapsTask):  # whose size may follow from the picture

        def own(shape: tuple[int, ...]) -> Size:
            return fitting_size(shape, task.width, task.height, task.max_width, task.max_height)

        pictures |= await _load(shop, job, "init_image", needed.pop("init_image"), own)
        height, width = next(iter(pictures.values())).shape[:2]
    else:
        width, height = task.width, task.height
    loaded = await gather(_load(shop, job, name, ways, lambda _: (width, height)) for name, ways in needed.items())
    for uses in loaded:
        pictures |= uses
    return pictures


def _needed(spec: JobSpec) -> dict[str, set[bool]]:
    """The input fields that the job uses, each with the ways in which it is resized."""
    uses = control_uses(spec)
    mode = spec.task.mode if isinstance(spec.task, GenerationTask) else Mode.TEXT
    if mode is not Mode.TEXT:
        uses.append(("init_image", False))
    if mode is Mode.MASKED or any(CONTROL_TYPES[item.control_type].needs_mask for item in spec.task.controls):
        uses.append(("mask_image", False))
    needed: dict[str, set[bool]] = {}
    for name, lines in uses:
        needed.setdefault(name, set()).add(lines)
    return needed


async def _load(
    shop: Workshop, job: Job, name: str, ways: set[bool], size: Callable[[tuple[int, ...]], Size]
) -> dict[Use, ImageArray]:
    """The picture of an input field, once per way of resizing; every trouble names the field.

    ``size``: shape of the picture -> width and height to bring it to.
    """
    decode = decode_mask if name == "mask_image" else decode_image

    def fitted(key: str) -> dict[Use, ImageArray]:
        try:
            data = shop.objects.get(key)
        except KeyError as error:
            raise JobError(f"The stored picture of {name} is missing.") from error
        pixels = decode(data, shop.limits)
        width, height = size(pixels.shape)
        return {(name, lines): resize_map(pixels, width, height, lines=lines) for lines in ways}

    try:
        key = await _stored(shop, job, name)
        return await asyncio.get_running_loop().run_in_executor(shop.decoders, fitted, key)
    except (FetchFailed, ImageRejected) as error:
        raise type(error)(f"{error.message} ({name})") from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise JobError(f"The server has no space left to store {name}.") from error
        raise RetryableError(f"The object store cannot be used: {error}") from error


async def _stored(shop: Workshop, job: Job, name: str) -> str:
    """Key of an input's bytes. What only a link leads to is fetched and stored first, for all later attempts."""
    kept = await asyncio.to_thread(shop.store.inputs.of, job.id)
    if name in kept:
        return kept[name]
    link = next((ref.url for ref in job.spec.inputs if ref.field == name), None)
    if link is None:
        raise JobError(f"The job names no picture for {name}.")
    data = await shop.fetcher.get(link, shop.limits.max_bytes)
    if not await asyncio.to_thread(_keep, shop, job, name, data):
        raise RetryableError("the job was given to another attempt")
    return input_key(data)


def _keep(shop: Workshop, job: Job, name: str, data: bytes) -> bool:
    key = input_key(data)

    def confirm() -> None:
        if shop.objects.info(key) is None:
            shop.objects.put(key, data, _BYTES)

    shop.objects.put(key, data, _BYTES)
    kept = shop.store.inputs.keep(job.id, job.attempt, name, key, confirm)
    if not kept:
        shop.store.inputs.drop_unclaimed((key,), shop.objects.delete)
    return kept
