"""What a gateway believes of the annotators: nothing old, nothing that nobody said."""

import asyncio
import contextvars
import logging
from dataclasses import dataclass, field

import pytest

from serve_app.api.readiness import AnnotatorReadiness, ReadinessReport
from serve_app.backend import AnnotatorStats, BackendStats
from support.gateway import API, KEY, Server, as_base64, picture

REASON = "the weights; run: controlnet-serve weights fetch zoe"
UNKNOWN = ReadinessReport(None)
request = contextvars.ContextVar("request", default="none")


def said(*missing: dict[str, str]) -> BackendStats:
    """One replica for each."""
    return BackendStats(
        annotators=tuple(
            AnnotatorStats(replica=str(index), node="n", pid=1, annotate_calls=0, missing=one)
            for index, one in enumerate(missing)
        )
    )


@dataclass
class Replicas:
    answer: BackendStats = field(default_factory=lambda: said({"zoe": REASON}))
    failure: BaseException | None = None
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0
    asked_in: str = ""
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.hold.set()

    async def stats(self) -> BackendStats:
        self.asked += 1
        self.asked_in = request.get()
        await self.hold.wait()
        if self.failure is not None:
            raise self.failure
        return self.answer

    def readiness(self, patience_s: float = 30.0) -> AnnotatorReadiness:
        return AnnotatorReadiness(clock=lambda: self.now, patience_s=patience_s)


async def test_an_answer_is_used_for_ten_seconds_and_then_asked_for_again() -> None:
    replicas = Replicas()
    readiness = replicas.readiness()
    assert (await readiness.state(replicas.stats)).lacks("zoe") == REASON
    replicas.answer = said({})  # the weights were fetched
    replicas.now += 9.9
    assert (await readiness.state(replicas.stats)).ready("zoe") is False
    assert replicas.asked == 1
    replicas.now += 0.2
    assert (await readiness.state(replicas.stats)).ready("zoe") is True
    assert replicas.asked == 2


async def test_those_who_ask_at_once_are_one_question() -> None:
    replicas = Replicas(answer=said({}, {"zoe": REASON}, {}))
    replicas.hold.clear()
    readiness = replicas.readiness()
    asking = [asyncio.create_task(readiness.state(replicas.stats)) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()  # whoever asked first goes
    await asyncio.sleep(0)
    replicas.hold.set()
    states = await asyncio.gather(*asking[1:])
    assert replicas.asked == 1
    assert {state.lacks("zoe") for state in states} == {REASON}


async def test_replicas_are_asked_outside_the_request_that_wants_to_know() -> None:
    replicas = Replicas()
    request.set("a client that may hang up")
    await replicas.readiness().state(replicas.stats)
    assert replicas.asked_in == "none"


async def test_silence_is_neither_ready_nor_what_was_said_long_ago() -> None:
    replicas = Replicas()
    readiness = replicas.readiness(patience_s=0.01)
    await readiness.state(replicas.stats)
    replicas.hold.clear()
    replicas.now += 11
    assert await readiness.state(replicas.stats) == UNKNOWN
    assert (UNKNOWN.ready("zoe"), UNKNOWN.lacks("zoe")) == (None, None)
    replicas.hold.set()
    await asyncio.sleep(0.01)
    assert (await readiness.state(replicas.stats)).lacks("zoe") == REASON
    replicas.now += 11
    replicas.answer = said()
    assert await readiness.state(replicas.stats) == UNKNOWN
    assert readiness.learn(said()) == UNKNOWN
    assert readiness.learn(said({"midas": "x"})).missing == {"midas": "x"}
    assert readiness.learn(said()).missing == {"midas": "x"}


async def test_a_failure_is_logged_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    replicas = Replicas(failure=RuntimeError("the handle is gone"))
    readiness = replicas.readiness()
    with caplog.at_level(logging.WARNING):
        assert await readiness.state(replicas.stats) == UNKNOWN
        await asyncio.sleep(0)
    assert "the handle is gone" in caplog.text
    replicas.failure = asyncio.CancelledError()
    assert await readiness.state(replicas.stats) == UNKNOWN
    replicas.failure = None
    assert (await readiness.state(replicas.stats)).lacks("zoe") == REASON


async def test_what_nobody_knows_is_said_so_and_requests_are_accepted(server: Server) -> None:
    server.backend.silent = True
    listed = (await server.http.get(f"{API}/annotators", headers={"Authorization": f"Bearer {KEY}"})).json()
    assert {row["ready"] for row in listed["control_types"]} == {None}
    assert {one["ready"] for row in listed["control_types"] for one in row["annotators"]} == {None}
    assert (await server.post("system_details", {"key": KEY}))["control_types_ready"] is None
    wanted = {"key": KEY, "init_image": as_base64(picture()), "controlnet_type": "depth"}
    assert (await server.post("annotate", wanted))["status"] == "success"
