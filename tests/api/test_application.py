"""The application as a whole: paths, bodies of every kind, preferences, CORS, health, errors, OpenAPI."""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from datetime import UTC, datetime
from typing import Any

import pytest

from serve_app.api.application import OPERATIONS
from serve_app.api.operations import PREFIXES
from serve_app.schedulers import available_schedulers
from support.gateway import ADMIN_ONLY_KEY, API, KEY, Open, Server, as_base64, picture, wish


async def test_every_operation_answers_under_every_path(server: Server) -> None:
    """A call without a key is refused by the operation itself: so the path leads there."""
    for operation in OPERATIONS:
        for prefix in operation.prefixes:
            path = f"{prefix}/{operation.path}".replace("{request_id}", "5")
            response = await server.http.request(operation.method, path)
            assert response.status_code == 200, path
            message = "Request not found" if operation.keyless else "Invalid Api Key"
            assert response.json()["message"] == message, path


async def test_controlnet_works_under_every_prefix(server: Server) -> None:
    for prefix in (*PREFIXES, "/api/v6/images"):
        response = await server.http.post(f"{prefix}/controlnet", json=wish())
        assert response.json()["status"] == "success"


async def test_bodies_of_every_kind(server: Server) -> None:
    url = f"{API}/controlnet"
    fields = {name: str(value) for name, value in wish().items()}
    kinds: list[dict[str, Any]] = [
        {"json": wish()},
        {"content": json.dumps(wish()).encode()},
        {"content": json.dumps(wish()).encode(), "headers": {"Content-Type": "text/plain"}},
        {
            "content": json.dumps(wish()).encode(),
            "headers": {"Content-Type": "application/x-www-form-urlencoded"},
        },
        {"content": b"\xef\xbb\xbf" + json.dumps(wish()).encode()},
        {"data": fields},
        {"data": {name: text for name, text in fields.items() if name != "init_image"},
         "files": {"init_image": ("a.png", picture(), "image/png")}},
        {"json": {name: value for name, value in wish().items() if name != "key"},
         "headers": {"Authorization": f"Bearer {KEY}"}},
    ]  # fmt: skip
    for kind in kinds:
        answer = (await server.http.post(url, **kind)).json()
        assert answer["status"] == "success", (kind.get("headers"), answer)


async def test_repeated_form_fields_are_a_list(server: Server) -> None:
    image = as_base64(picture())
    fields = {name: str(value) for name, value in wish(controlnet_model="canny,tile").items()}
    answer = await server.http.post(f"{API}/controlnet", data={**fields, "control_image[]": [image, image]})
    assert len(answer.json()["meta"]["control_image"]) == 2


async def test_unknown_and_duplicate_keys_do_no_harm(server: Server) -> None:
    body = json.dumps({**wish(), "panorama": "no", "": 1, "\ud800": 2}).encode()
    answer = await server.http.post(f"{API}/controlnet", content=b'{"prompt": "first", ' + body[1:])
    assert answer.json()["meta"]["prompt"] == "a lighthouse"


async def test_codes_are_for_those_who_prefer_them(server: Server) -> None:
    cases: list[tuple[str, object, int]] = [
        ("controlnet", {"key": KEY}, 400),
        ("controlnet", [], 400),
        ("controlnet", {}, 401),
        ("controlnet", {"key": ADMIN_ONLY_KEY}, 403),
        ("fetch", {"key": KEY, "request_id": 1}, 404),
        ("verify_model", {"key": KEY, "model_id": "none"}, 404),
        ("schedulers_list", {"key": KEY}, 200),
    ]
    for path, body, status in cases:
        plain = await server.http.post(f"{API}/{path}", json=body)
        coded = await server.http.post(f"{API}/{path}", json=body, headers={"Prefer": "wait=5, HTTP-Status"})
        assert (plain.status_code, coded.status_code) == (200, status)
        assert plain.json() == coded.json()


async def test_management(server: Server) -> None:
    assert await server.post("schedulers_list", {"key": KEY}) == {"schedulers": list(available_schedulers())}
    models = await server.post("get_all_models", {"key": KEY})
    assert [model["type"] for model in models["models"]][:3] == ["base", "base", "controlnet"]
    tiny = next(model for model in models["models"] if model["model_id"] == "tiny")
    published = datetime.strptime(tiny["load_data"], "%m/%d/%Y %H:%M:%S").replace(tzinfo=UTC)
    assert published.timestamp() == int(server.resources.catalog.get("tiny").created_at)
    assert (tiny["family"], tiny["hash"][:4]) == ("sd15", "tiny")
    assert await server.post("verify_model", {"key": KEY, "model_id": "tiny"}) == {
        "status": "success",
        "message": "Model exists on server",
    }
    absent = await server.post("verify_model", {"key": KEY, "model_id": "none"})
    assert (absent["status"], absent["message"]) == ("error", "Model not found")
    assert "model_id" in (await server.post("verify_model", {"key": KEY}))["message"]
    details = await server.post("system_details", {"key": KEY})
    assert (details["status"], details["model_count"], details["gpus"]) == ("ok", 8, 1)
    assert details["nodes"] == ["node-a", "node-b"]
    assert details["queue_time"] == 0
    assert details["denoisers"][0]["replica"] == "d1"


async def test_a_browser_may_call(server: Server) -> None:
    headers = {"Origin": "https://app.test", "Access-Control-Request-Method": "POST"}
    preflight = await server.http.options(
        f"{API}/controlnet", headers={**headers, "Access-Control-Request-Headers": "content-type,authorization,prefer"}
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "prefer" in preflight.headers["access-control-allow-headers"]
    answer = await server.http.post(f"{API}/schedulers_list", json={"key": KEY}, headers={"Origin": "https://app.test"})
    assert answer.headers["access-control-allow-origin"] == "*"
    plain = await server.http.options(f"{API}/controlnet")
    assert (plain.status_code, plain.headers["allow"]) == (204, "POST")


async def test_origins_can_be_limited(open_server: Open) -> None:
    async with open_server(server={"cors_origins": ["https://app.test"]}) as server:
        for origin, allowed in (("https://app.test", "https://app.test"), ("https://evil.test", None)):
            answer = await server.get("/livez", Origin=origin)
            assert answer.headers.get("access-control-allow-origin") == allowed


async def test_no_such_route_is_json_with_its_code(server: Server) -> None:
    response = await server.http.post(f"{API}/no_such_thing", json={"key": KEY})
    assert (response.status_code, response.json()["message"]) == (404, "Not Found")
    response = await server.http.get(f"{API}/controlnet")
    assert (response.status_code, response.json()["status"], response.headers["allow"]) == (405, "error", "POST")


async def test_an_unexpected_error_is_json_without_a_traceback(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody expects a store whose database was taken apart."""
    with server.resources.database.transaction() as connection:
        connection.exec_driver_sql("UPDATE models SET type = 'nonsense'")
    for headers, status in (({}, 200), ({"Prefer": "http-status"}, 500)):
        response = await server.http.post(
            f"{API}/get_all_models", json={"key": KEY}, headers={"Origin": "https://app.test", **headers}
        )
        assert response.status_code == status
        assert response.json()["message"] == "Internal server error"
        assert "nonsense" not in response.text
        assert response.headers["access-control-allow-origin"] == "*"
    assert "nonsense" in caplog.text


async def test_a_database_that_is_away_is_a_503_to_come_back_to(server: Server) -> None:
    with server.resources.database.transaction() as connection:
        connection.exec_driver_sql("DROP TABLE models")
    response = await server.http.post(f"{API}/controlnet", json=wish(), headers={"Prefer": "http-status"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) == response.json()["retry_after"]
    assert (await server.get("/readyz")).json()["problems"] == ["the database cannot be reached"]
    with server.resources.database.transaction() as connection:
        connection.exec_driver_sql("DROP TABLE job_inputs")
        connection.exec_driver_sql("DROP TABLE jobs")
    file = await server.get("/generations/00000000-0000-0000-0000-000000000000-0.png")
    assert file.status_code == 503  # a file is never an error with the code 200


async def test_a_client_that_hangs_up_while_sending_is_no_failure(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    messages: Iterator[dict[str, object]] = iter(
        [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    )
    sent: list[object] = []

    async def receive() -> dict[str, object]:
        return next(messages)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    path = f"{API}/controlnet"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    with caplog.at_level("INFO", "serve_app"):
        await server.app(scope, receive, send)
    assert sent == []
    assert "hung up" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_the_openapi_document_describes_requests_and_answers(server: Server) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = (await server.get("/openapi.json")).json()
    controlnet = document["paths"][f"{API}/controlnet"]["post"]
    schema = controlnet["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["key", "model_id", "controlnet_model"]
    assert schema["properties"]["samples"]["maximum"] == 4
    assert "one for all" in schema["properties"]["control_image"]["description"]
    answers = controlnet["responses"]["200"]["content"]["application/json"]["schema"]["anyOf"]
    assert {answer["$ref"].rsplit("/", 1)[1] for answer in answers} == {
        "SuccessAnswer", "ProcessingAnswer", "FailedAnswer", "ErrorAnswer",
    }  # fmt: skip
    assert set(controlnet["responses"]) >= {"200", "400", "401", "403", "404", "413", "429", "500", "503"}
    identifiers = [item["operationId"] for path in document["paths"].values() for item in path.values()]
    assert len(set(identifiers)) == len(identifiers)
    assert not [path for path in document["paths"] if "community" in path]


def test_a_gateway_starts_without_heavy_libraries() -> None:
    heavy = ("torch", "diffusers", "transformers", "cv2", "ray", "controlnet_aux", "scipy")
    code = f"import sys, serve_app.api.application; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
