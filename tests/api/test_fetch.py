"""``fetch`` and jobs by name: who may see what, and the states."""

import asyncio
from typing import Any

from serve_app.api.envelopes import FailedAnswer, ProcessingAnswer, SuccessAnswer
from support.gateway import API, COLLEAGUE_KEY, KEY, STRANGER_KEY, Open, Server, wish


async def submitted(server: Server) -> int:
    return int((await server.post("controlnet", wish(instant_response="yes")))["id"])


async def test_every_way_to_fetch(server: Server) -> None:
    job_id = await submitted(server)
    await server.status(job_id, "success")
    ways = [
        await server.post("fetch", {"key": KEY, "request_id": job_id}),
        await server.post("fetch", {"key": COLLEAGUE_KEY, "request_id": str(job_id)}),
        await server.post(f"fetch/{job_id}", {"key": KEY}),
        await server.post(f"fetch/{job_id}", {}, Authorization=f"Bearer {KEY}"),
        (await server.get(f"{API}/fetch/{job_id}")).json(),
        (await server.get(f"{API}/fetch/{job_id}", Authorization=f"Bearer {KEY}")).json(),
        (await server.get(f"/api/v6/images/fetch/{job_id}")).json(),
    ]
    for answer in ways:
        SuccessAnswer.model_validate(answer)
        assert answer == ways[0]
    assert ways[0]["id"] == job_id


async def test_an_unknown_id_is_never_success(server: Server) -> None:
    for request_id in ("", "abc", 0, -5, 123, 2**53, 2**70, 1.5, None, "null", {"a": 1}, "\ud800"):
        answer = await server.post("fetch", {"key": KEY, "request_id": request_id})
        FailedAnswer.model_validate(answer)
        assert (answer["status"], answer["id"], answer["message"], answer["output"]) == (
            "failed", "", "Request not found", "",
        )  # fmt: skip


async def test_another_tenants_job_does_not_exist(server: Server) -> None:
    job_id = await submitted(server)
    unknown = await server.post("fetch", {"key": STRANGER_KEY, "request_id": 2**50})
    assert await server.post("fetch", {"key": STRANGER_KEY, "request_id": job_id}) == unknown
    answer = await server.get(f"{API}/fetch/{job_id}", Authorization=f"Bearer {STRANGER_KEY}")
    assert answer.json() == unknown
    answer = await server.get(f"{API}/fetch/1", Prefer="http-status")
    assert (answer.status_code, answer.json()) == (404, unknown)


async def test_posting_needs_a_key_and_a_sent_key_must_be_good(server: Server) -> None:
    job_id = await submitted(server)
    assert (await server.post("fetch", {"request_id": job_id}))["message"] == "Invalid Api Key"
    answer = await server.get(f"{API}/fetch/{job_id}", Authorization="Bearer wrong")
    assert answer.json()["message"] == "Invalid Api Key"


async def test_a_waiting_job_tells_its_place(open_server: Open) -> None:
    async with open_server(dispatcher={"max_jobs": 1}) as server:
        server.backend.gate.clear()
        first = await submitted(server)
        await server.started()
        second = await submitted(server)
        running = await server.post("fetch", {"key": KEY, "request_id": first})
        waiting = await server.post("fetch", {"key": KEY, "request_id": second})
        for answer in (running, waiting):
            ProcessingAnswer.model_validate(answer)
            assert (answer["status"], answer["output"]) == ("processing", "")
            assert answer["message"] == answer["messege"]
            assert isinstance(answer["eta"], int)
        assert (running["queue_position"], waiting["queue_position"]) == (0, 1)
        assert waiting["progress"] == 0.0

        cancelled = (
            await server.http.delete(f"{API}/jobs/{second}", headers={"Authorization": f"Bearer {KEY}"})
        ).json()
        assert (cancelled["message"], cancelled["job"]["state"]) == ("The job is cancelled.", "cancelled")
        assert (await server.post("fetch", {"key": KEY, "request_id": second}))["status"] == "failed"
        again = (await server.http.delete(f"{API}/jobs/{second}", headers={"Authorization": f"Bearer {KEY}"})).json()
        assert again["message"] == "The job had already ended."


async def test_a_running_job_tells_its_progress(open_server: Open) -> None:
    async with open_server(dispatcher={"lease_s": 0.6}) as server:
        server.backend.gate.clear()
        job_id = await submitted(server)
        headers = {"Authorization": f"Bearer {KEY}"}
        for _ in range(500):
            running = await server.post("fetch", {"key": KEY, "request_id": job_id})
            if running["progress"]:
                break
            await asyncio.sleep(0.01)
        assert (running["status"], running["progress"]) == ("processing", 0.25)
        assert (await server.http.get(f"{API}/jobs/{job_id}", headers=headers)).json()["job"]["progress"] == 0.25
        server.backend.gate.set()
        await server.status(job_id, "success")
        assert (await server.http.get(f"{API}/jobs/{job_id}", headers=headers)).json()["job"]["progress"] == 1.0


async def test_jobs_are_listed_page_by_page(server: Server) -> None:
    made = [await submitted(server) for _ in range(5)]
    headers = {"Authorization": f"Bearer {KEY}"}
    seen: list[int] = []
    cursor: Any = ""
    for _ in range(3):
        page = (await server.http.get(f"{API}/jobs", params={"limit": 2, "cursor": cursor}, headers=headers)).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert seen == made[::-1]
    one = (await server.http.get(f"{API}/jobs/{made[0]}", headers=headers)).json()
    assert one["job"]["endpoint"] == "controlnet"
    bad = (await server.http.get(f"{API}/jobs", params={"limit": 0, "cursor": "x"}, headers=headers)).json()
    assert set(bad["message"]) == {"limit", "cursor"}


async def test_jobs_of_others_are_hidden(server: Server) -> None:
    job_id = await submitted(server)
    headers = {"Authorization": f"Bearer {STRANGER_KEY}", "Prefer": "http-status"}
    assert (await server.http.get(f"{API}/jobs", headers=headers)).json()["jobs"] == []
    assert (await server.http.get(f"{API}/jobs/{job_id}", headers=headers)).status_code == 404
    assert (await server.http.delete(f"{API}/jobs/{job_id}", headers=headers)).status_code == 404
    assert (await server.http.get(f"{API}/jobs", headers={"Prefer": "http-status"})).status_code == 401
