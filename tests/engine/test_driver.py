import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait

import pytest
import torch

from serve_app.engine.driver import Drawn, EngineDriver
from serve_app.errors import Cancelled, JobError, WorkerBusy, WorkerLost
from serve_app.tasks import AttemptRef
from support.tiny import Zoo, controls, request, task, tiny_engine

SOON_S = 30


@pytest.fixture
def driver() -> Iterator[EngineDriver]:
    driver = EngineDriver(tiny_engine())
    yield driver
    driver.close()


def test_requests_of_many_threads_end_with_pictures(zoo: Zoo, driver: EngineDriver) -> None:
    futures: list[Future[Drawn]] = []
    threads = [
        threading.Thread(target=lambda n=n: futures.append(driver.submit(request(zoo, task(seed=n, samples=2)))))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for drawn in (future.result(SOON_S) for future in futures):
        assert [picture.shape for picture in drawn.pictures] == [(64, 64, 3)] * 2
        assert drawn.unet_forwards >= 5
        assert drawn.mean_rows >= 4


def test_cancelling_ends_a_future_with_cancelled(zoo: Zoo, driver: EngineDriver) -> None:
    long, other = request(zoo, task(steps=500)), request(zoo, task())
    future, neighbour = driver.submit(long), driver.submit(other)
    driver.cancel(long.ref)
    with pytest.raises(Cancelled):
        future.result(SOON_S)
    assert neighbour.result(SOON_S).pictures


def test_a_refused_request_ends_its_own_future(zoo: Zoo) -> None:
    driver = EngineDriver(tiny_engine(max_latent_area=1000))
    with pytest.raises(JobError, match="too large"):
        driver.submit(request(zoo, task())).result(SOON_S)
    assert driver.alive
    driver.close()


def test_an_idle_driver_holds_no_request(zoo: Zoo, driver: EngineDriver) -> None:
    """It would hold the model with it, which the cache counts as free."""
    good, bad = (request(zoo, task(controls=controls("canny"), **changes)) for changes in ({}, {"clip_skip": 12}))
    held = [weakref.ref(one.maps[0]) for one in (good, bad)]
    futures = [driver.submit(one) for one in (good, bad)]
    wait(futures, SOON_S)
    assert isinstance(futures[1].exception(), JobError)
    del good, bad, futures
    deadline = time.monotonic() + SOON_S
    while any(reference() is not None for reference in held) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert [reference() for reference in held] == [None, None]


def test_the_heart_beats_while_idle_and_while_busy(zoo: Zoo, driver: EngineDriver) -> None:
    def next_beat() -> float:
        before, deadline = driver.heartbeat, time.monotonic() + SOON_S
        while driver.heartbeat == before and time.monotonic() < deadline:
            time.sleep(0.01)
        return driver.heartbeat - before

    assert 0.5 < next_beat() < SOON_S
    future = driver.submit(request(zoo, task(steps=200)))
    next_beat()
    assert 0 < next_beat() < 0.5
    driver.cancel(AttemptRef(job_id=0, attempt=0))
    assert not future.done()


def test_the_heart_beats_inside_a_step(zoo: Zoo, driver: EngineDriver) -> None:
    """Between the nets and before the UNet: a step of many nets is not taken for a stuck one."""
    beats: list[float] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: beats.append(driver.heartbeat))
        for module in (zoo.nets["canny"].net.conv_in, zoo.nets["depth"].net.conv_in, zoo.base.unet.conv_in)
    ]
    driver.submit(request(zoo, task(steps=1, controls=controls("canny", "depth")))).result(SOON_S)
    for hook in hooks:
        hook.remove()
    assert len(beats) == 3
    assert beats == sorted(set(beats))


def test_closing_ends_what_runs_and_what_waits(zoo: Zoo) -> None:
    driver = EngineDriver(tiny_engine(max_running=1))
    futures = [driver.submit(request(zoo, task(steps=900))) for _ in range(3)]
    driver.close()
    driver.close()
    assert not driver.alive
    assert [type(future.exception(SOON_S)) for future in futures] == [WorkerBusy] * 3
    with pytest.raises(WorkerBusy):
        driver.submit(request(zoo, task()))


def test_a_dead_device_ends_the_thread_and_every_future(zoo: Zoo, caplog: pytest.LogCaptureFixture) -> None:
    """After an error of the accelerator nothing on it works again: the replica has to be replaced."""
    driver = EngineDriver(tiny_engine())

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("illegal memory access")

    hook = zoo.base.unet.conv_in.register_forward_pre_hook(fail)
    futures = [driver.submit(request(zoo, task())) for _ in range(3)]
    wait(futures, SOON_S)
    hook.remove()
    assert [type(future.exception(SOON_S)) for future in futures] == [WorkerLost] * 3
    driver.close()
    assert isinstance(driver.death, torch.AcceleratorError)
    assert "thread died" in caplog.text
    with pytest.raises(WorkerBusy):
        driver.submit(request(zoo, task()))
