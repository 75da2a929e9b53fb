"""``/livez`` and ``/readyz``: what they tell, and that asking costs little."""

import asyncio
from collections.abc import Callable

import sqlalchemy as sa

from serve_app.api.endpoints.health import KEPT_S
from support.gateway import Open, Server, wish


def looks(server: Server) -> Callable[[], int]:
    """Counts from now on how often the catalogue is listed, which only a look at readiness does here."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "FROM models" in statement:
            seen.append(statement)

    sa.event.listen(server.resources.database.engine, "before_cursor_execute", note)
    return lambda: len(seen)


async def test_health(server: Server) -> None:
    live = await server.get("/livez")
    ready = await server.get("/readyz")
    assert (live.status_code, live.json()) == (200, {"status": "ok", "problems": []})
    assert (ready.status_code, ready.json()) == (200, {"status": "ok", "problems": []})


async def test_a_cluster_that_cannot_draw_is_not_ready(server: Server) -> None:
    server.backend.replicas = 0
    assert (await server.get("/readyz")).json() == {"status": "unavailable", "problems": ["no denoiser answers"]}
    for model in ("tiny", "other"):
        server.resources.catalog.delete(model)
    await asyncio.sleep(KEPT_S)
    ready = await server.get("/readyz")
    assert ready.status_code == 503
    assert "no base model is published" in ready.json()["problems"]
    assert (await server.get("/livez")).status_code == 200


async def test_replicas_that_start_on_demand_are_ready(open_server: Open) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 2}
    async with open_server(denoisers=[{"autoscaling_config": scaling}]) as server:
        server.backend.replicas = 0
        assert (await server.get("/readyz")).status_code == 200


async def test_a_full_queue_is_not_ready(open_server: Open) -> None:
    async with open_server(limits={"queue_max": 1}, dispatcher={"max_jobs": 1}) as server:
        server.backend.gate.clear()
        await server.post("controlnet", wish(instant_response="yes"))
        await server.started()
        await server.post("controlnet", wish(instant_response="yes"))
        ready = await server.get("/readyz")
        assert (ready.status_code, ready.json()["problems"]) == (503, ["the queue is full"])


async def test_many_who_ask_share_one_look(server: Server) -> None:
    count = looks(server)
    ready = await asyncio.gather(*(server.get("/readyz") for _ in range(20)))
    assert {answer.status_code for answer in ready} == {200}
    assert (await server.get("/readyz")).status_code == 200
    assert count() == 1
    await asyncio.sleep(KEPT_S)
    assert (await server.get("/readyz")).status_code == 200
    assert count() == 2


async def test_who_hangs_up_ends_the_look_for_nobody_else(server: Server) -> None:
    count = looks(server)
    leaving, staying = (asyncio.create_task(server.get("/readyz")) for _ in range(2))
    while not count():  # noqa: ASYNC110  - what is waited for happens in a database
        await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).status_code == 200
    assert count() == 1
