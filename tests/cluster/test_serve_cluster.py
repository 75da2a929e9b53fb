"""The promises about processes, on a real cluster: spread, shared steps, hang-ups, dead replicas, lost nodes.

The tests run in the order of the file; the last one takes a node away.
"""

import io
import os
import signal
import time
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from serve_app.backend import AnnotatorStats
from support.cluster import API, KEY, Served

pytestmark = pytest.mark.cluster

SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def photo() -> str:
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(buffer, "JPEG")
    return b64encode(buffer.getvalue()).decode()


def request(seed: int, **fields: object) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model_id": "demo",
        "controlnet_model": "canny",
        "prompt": "an astronaut",
        "init_image": photo(),
        "width": "64",
        "height": "64",
        "num_inference_steps": "20",
        "seed": str(seed),
    }
    return body | fields


def pixels(data: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)


def test_a_request_answers_with_its_picture(served: Served) -> None:
    answer = served.post("controlnet", request(1, width="128", height="192"))
    assert answer["status"] == "success", answer
    data = served.picture(answer)
    assert data.startswith(b"\x89PNG")
    assert pixels(data).shape == (192, 128, 3)
    assert served.http.get("/readyz").status_code == 200


def test_unlike_requests_share_unet_steps(served: Served) -> None:
    before = served.wait_for_denoisers(2)
    ids = [
        served.submit(
            **request(n, prompt=f"prompt {n}", num_inference_steps=30 + n, scheduler=SCHEDULERS[n % len(SCHEDULERS)])
        )
        for n in range(16)
    ]
    for job_id in ids:
        assert served.result(job_id)["status"] == "success"
    after = served.stats()
    forwards = sum(d.unet_forwards for d in after.denoisers) - sum(d.unet_forwards for d in before.denoisers)
    rows = sum(d.unet_rows for d in after.denoisers) - sum(d.unet_rows for d in before.denoisers)
    # Every evaluation has two rows; alone, each forward would have exactly two.
    assert rows == 2 * sum(30 + n for n in range(16))
    assert rows / forwards > 4


def test_annotators_make_maps_once_and_may_die(served: Served) -> None:
    def annotate(low: int) -> bytes:
        answer = served.post(
            "annotate", {"init_image": photo(), "controlnet_type": "canny", "annotator_params": {"low_threshold": low}}
        )
        assert answer["status"] == "success", answer
        return served.picture(answer)

    def state() -> AnnotatorStats:
        (annotator,) = served.stats().annotators
        return AnnotatorStats.model_validate(annotator)

    before = state()
    with ThreadPoolExecutor(3) as pool:
        maps = set(pool.map(annotate, (33,) * 3))
    after = state()
    assert len(maps) == 1
    assert (after.annotate_calls, after.annotator_runs) == (before.annotate_calls + 3, before.annotator_runs + 1)
    os.kill(after.pid, signal.SIGKILL)
    drawn = served.post("controlnet", request(3, return_control_maps="yes"))
    assert drawn["status"] == "success", drawn
    assert pixels(served.http.get(drawn["control_maps"][0]).content).shape == (64, 64, 3)
    assert {annotate(33)} == maps
    assert state().pid != after.pid


def test_a_hang_up_does_not_cancel_the_job(served: Served) -> None:
    body = {"key": KEY, **request(7, samples="4", num_inference_steps="50", width="256", height="256", track_id="gone")}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{served.url}{API}/controlnet", json=body, timeout=httpx2.Timeout(30, read=2))
    listed = served.http.get(f"{API}/jobs?limit=1", headers={"Authorization": f"Bearer {KEY}"}).json()
    job_id = listed["jobs"][0]["id"]
    assert served.result(job_id)["track_id"] == "gone"
    assert served.job(job_id).attempt == 1


def test_jobs_survive_the_death_of_their_denoiser(served: Served) -> None:
    bodies = [request(100 + n, num_inference_steps="50", samples="2", width="128", height="128") for n in range(4)]
    undisturbed = [served.result(served.submit(**body)) for body in bodies]
    ids = [served.submit(**body) for body in bodies]
    victim = busy_denoiser(served)
    os.kill(victim, signal.SIGKILL)
    answers = [served.result(job_id) for job_id in ids]
    assert [answer["status"] for answer in answers] == ["success"] * 4
    assert any(served.job(job_id).attempt > 1 for job_id in ids), "the kill hit nobody"
    for answer, reference in zip(answers, undisturbed, strict=True):
        for n in range(2):
            difference = pixels(served.picture(answer, n)) - pixels(served.picture(reference, n))
            assert np.abs(difference).max() <= 1
    assert victim not in {denoiser.pid for denoiser in served.wait_for_denoisers(2).denoisers}


def busy_denoiser(served: Served) -> int:
    """Pid of a denoiser that is running a request."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for denoiser in served.stats().denoisers:
            if denoiser.running:
                return denoiser.pid
    raise AssertionError("no denoiser became busy")


def test_jobs_spread_and_survive_the_loss_of_a_node(served: Served) -> None:
    before = {d.replica: d.generate_calls for d in served.wait_for_denoisers(2).denoisers}
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda n: served.submit(**request(200 + n, num_inference_steps="50")), range(24)))
    calls = calls_since(served, before, 24)
    assert max(calls.values()) <= 2 * min(calls.values()), calls
    assert not all(served.job(job_id).status.ended for job_id in ids), "everything ended before the node was lost"

    served.cluster.remove_node(served.workers.pop(), allow_graceful=False)
    assert Counter(served.result(job_id, 150)["status"] for job_id in ids) == {"success": 24}


def calls_since(served: Served, before: dict[str, int], expected: int) -> Counter[str]:
    """``generate`` calls per replica since ``before``, once there were ``expected``."""
    deadline = time.monotonic() + 30
    while True:
        calls = Counter({d.replica: d.generate_calls - before[d.replica] for d in served.stats().denoisers})
        if calls.total() >= expected:
            return calls
        assert time.monotonic() < deadline, calls
        time.sleep(0.1)
