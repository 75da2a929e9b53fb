"""Requests that must be refused: the right answer, no work for annotators and GPUs, and the next good request works."""

import json
import struct
import zlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.api.endpoints.controlnet import ControlNetRequest
from serve_app.api.envelopes import ErrorAnswer
from support.gateway import ADMIN_ONLY_KEY, API, KEY, Open, Server, as_base64, picture, wish


def bomb() -> bytes:
    """A PNG header that declares 60000 x 60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "The prompt field is required."),
    ({"prompt": "  "}, "prompt", "The prompt field is required."),
    ({"prompt": 5}, "prompt", "must be a string"),
    ({"prompt": ["a"]}, "prompt", "must be a string"),
    ({"prompt": "a\0b"}, "prompt", "NUL"),
    ({"prompt": "\ud83d"}, "prompt", "surrogates"),
    ({"prompt": "x" * 10_001}, "prompt", "longer than 10000 bytes"),
    ({"prompt": "\N{CJK UNIFIED IDEOGRAPH-5B57}" * 3_334}, "prompt", "longer than 10000 bytes"),
    ({"negative_prompt": "x" * 10_001}, "negative_prompt", "longer than 10000 bytes"),
    ({"model_id": None}, "model_id", "The model_id field is required."),
    ({"model_id": "null"}, "model_id", "The model_id field is required."),
    ({"model_id": "midjourney"}, "model_id", "'midjourney' is unknown. Allowed: tiny, other."),
    ({"model_id": "net-canny"}, "model_id", "unknown"),
    ({"model_id": {"id": "tiny"}}, "model_id", "must be a string"),
    ({"controlnet_model": None}, "controlnet_model", "The controlnet_model field is required."),
    ({"controlnet_model": ","}, "controlnet_model", "The controlnet_model field is required."),
    ({"controlnet_model": "cany"}, "controlnet_model", "'cany' is unknown. Allowed: canny, depth"),
    ({"controlnet_model": "tiny"}, "controlnet_model", "unknown"),
    ({"controlnet_model": "shuffle"}, "controlnet_model", "No ControlNet for 'shuffle' is loaded"),
    ({"controlnet_model": "xl-canny"}, "controlnet_model", "of the family 'sdxl', the model_id 'tiny' of 'sd15'"),
    ({"controlnet_model": ["canny"] * 9}, "controlnet_model", "9 ids; at most 8"),
    ({"controlnet_model": "mine"}, "controlnet_type", "The controlnet_type field is required with 'mine'"),
    ({"controlnet_model": "mine", "controlnet_type": "cany"}, "controlnet_type", "'cany' is unknown"),
    ({"controlnet_model": "mine", "controlnet_type": "tile,canny"}, "controlnet_type", "2 types for 1"),
    ({"controlnet_model": "inpaint"}, "mask_image", "The mask_image field is required with controlnet_model 'inpaint'"),
    ({"init_image": None}, "init_image", "required unless control_image is given"),
    ({"init_image": None, "mask_image": as_base64(picture())}, "init_image", "required with mask_image"),
    ({"init_image": 5}, "init_image", "must be a string"),
    ({"init_image": "hello"}, "init_image", "not an image"),
    ({"init_image": as_base64(b"GIF89a" + bytes(100))}, "init_image", "not a PNG, JPEG or WEBP"),
    ({"init_image": as_base64(picture()[:60])}, "init_image", "not an image"),
    ({"init_image": as_base64(bomb())}, "init_image", "60000 x 60000"),
    ({"init_image": "data:text/html,<b>"}, "init_image", "not an image"),
    ({"init_image": "ftp://example.com/a.png"}, "init_image", "must start with http"),
    ({"init_image": "file:///etc/passwd"}, "init_image", "refused"),
    ({"init_image": "http://127.0.0.1/a.png"}, "init_image", "public host"),
    ({"init_image": "http://169.254.169.254/latest/meta-data"}, "init_image", "public host"),
    ({"init_image": "http://u:p@example.com/a.png"}, "init_image", "user name"),
    ({"mask_image": "http://[::1]/m.png"}, "mask_image", "public host"),
    ({"mask_image": as_base64(b"no picture")}, "mask_image", "not an image"),
    ({"control_image": [as_base64(picture())] * 2}, "control_image", "2 pictures for 1 ControlNets"),
    ({"control_image": [5]}, "control_image", "must be a string"),
    ({"control_image": "data:" + "," * 1000}, "control_image", "must not have more than 1000 values, got 1001"),
    ({"control_image": ["x"] * 1001}, "control_image", "must not have more than 1000 values, got 1001"),
    ({"controlnet_model": "canny," * 1000}, "controlnet_model", "must not have more than 1000 values, got 1001"),
    ({"control_image": "http://localhost/c.png"}, "control_image", "public host"),
    ({"strength": 0}, "strength", "above 0, up to 1, got 0"),
    ({"strength": "1.01"}, "strength", "above 0, up to 1, got '1.01'"),
    ({"strength": "NaN"}, "strength", "above 0"),
    ({"controlnet_conditioning_scale": 21}, "controlnet_conditioning_scale", "from 0 to 20"),
    ({"controlnet_conditioning_scale": [1, 1]}, "controlnet_conditioning_scale", "2 values for 1 ControlNets"),
    ({"control_guidance_start": 1}, "control_guidance_start", "must be below"),
    ({"control_guidance_end": -1}, "control_guidance_end", "from 0 to 1"),
    ({"width": 56}, "width", "from 64 to 1024, a multiple of 8, got 56"),
    ({"width": "1032"}, "width", "from 64 to 1024"),
    ({"height": 100}, "height", "a multiple of 8, got 100"),
    ({"height": 10**400}, "height", "whole number"),
    ({"width": True}, "width", "whole number"),
    ({"samples": 5}, "samples", "from 1 to 4"),
    ({"samples": 0}, "samples", "from 1 to 4"),
    ({"num_inference_steps": 51}, "num_inference_steps", "from 1 to 50"),
    ({"num_inference_steps": "many"}, "num_inference_steps", "got 'many'"),
    ({"guidance_scale": 0.5}, "guidance_scale", "from 1 to 20"),
    ({"seed": -1}, "seed", "from 0 to 4294967295"),
    ({"seed": 2**32}, "seed", "from 0 to 4294967295"),
    ({"scheduler": "EulerScheduler"}, "scheduler", "'EulerScheduler' is unknown. Allowed: "),
    ({"algorithm_type": "sde"}, "algorithm_type", "one of none, dpmsolver++"),
    ({"guess_mode": "perhaps"}, "guess_mode", "yes or no"),
    ({"auto_hint": {"a": 1}}, "auto_hint", "yes or no"),
    ({"enhance_style": "ugly"}, "enhance_style", "'ugly' is unknown"),
    ({"safety_checker_type": "delete"}, "safety_checker_type", "one of blur"),
    ({"lora_model": "x"}, "lora_model", "not available yet"),
    ({"embeddings_model": "x,y"}, "embeddings_model", "not available yet"),
    ({"vae": "x"}, "vae", "not available yet"),
    ({"upscale": "yes"}, "upscale", "not available yet"),
    ({"upscale": 5}, "upscale", "from 0 to 4"),
    ({"ip_adapter_id": "x"}, "ip_adapter_id", "not available yet"),
    ({"ip_adapter_image": "x"}, "ip_adapter_image", "not available yet"),
    ({"clip_skip": 9}, "clip_skip", "from 1 to 8"),
    ({"track_id": {"a": 1}}, "track_id", "a string, a number or null"),
]  # fmt: skip


async def test_bad_fields_are_refused_by_name_before_any_work(server: Server) -> None:
    for changes, field, part in BAD_FIELDS:
        answer = await server.post("controlnet", wish(**changes))
        ErrorAnswer.model_validate(answer)
        assert answer["status"] == "error", (changes, answer)
        assert list(answer["message"]) == [field], (changes, answer)
        assert part in answer["message"][field][0], (changes, answer)
        assert answer["messege"] == answer["message"]
    assert server.backend.touched == 0
    assert server.resources.jobs.list("studio", 1) == ()
    assert (await server.post("controlnet", wish()))["status"] == "success"


async def test_all_bad_fields_are_in_one_answer(server: Server) -> None:
    answer = await server.post(
        "controlnet",
        wish(width=1, samples=9, model_id="x", controlnet_model="y", scheduler="z", init_image="w", prompt=None),
    )
    assert set(answer["message"]) == {
        "width", "samples", "model_id", "controlnet_model", "scheduler", "init_image", "prompt",
    }  # fmt: skip


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"{", "application/json"),
    (b'{"key": "' + KEY.encode() + b'", "seed": NaN}', "application/json"),
    (b"[1, 2]", "application/json"),
    (b'"text"', "application/json"),
    (b"null", "application/json"),
    (b"5", "text/plain"),
    (b"\xff\xfe\x00{", "application/json"),
    (b'{"a":' * 90_000, "application/json"),
    (b"[" * 90_000 + b"]" * 90_000, "application/json"),
    (b'{"a": [' + b"[]," * 100_000 + b"[]]}", "application/json"),
    (b"nonsense", "multipart/form-data; boundary=x"),
    (b"--x\r\n", "multipart/form-data"),
    (b"a=%ff&b" + b"\xff", "application/x-www-form-urlencoded"),
    (b"&".join(b"a%d=1" % n for n in range(500)), "application/x-www-form-urlencoded"),
]


async def test_what_is_no_object_is_an_invalid_request(server: Server) -> None:
    for content, kind in BAD_BODIES:
        response = await server.http.post(f"{API}/controlnet", content=content, headers={"content-type": kind})
        assert response.status_code == 200
        assert (response.json()["status"], response.json()["message"]) == ("error", "Invalid API Request"), content[:40]


async def test_a_large_body_is_refused_without_reading_the_rest(open_server: Open) -> None:
    async with open_server(server={"max_body_bytes": 100_000}) as server:
        read = 0

        async def chunks() -> Any:
            nonlocal read
            for _ in range(1000):
                read += 10_000
                yield b"x" * 10_000

        url = f"{API}/controlnet"
        for headers in ({}, {"Content-Length": "30000000"}):
            response = await server.http.post(url, content=chunks(), headers={"Prefer": "http-status", **headers})
            assert response.status_code == 413
            assert "larger than 100000 bytes" in response.json()["message"]
        assert read <= 130_000
        assert (await server.post("controlnet", wish()))["status"] == "success"


async def test_a_body_of_30_mb_is_refused_by_default(server: Server) -> None:
    content = json.dumps(wish(init_image="A" * 30_000_000)).encode()
    response = await server.http.post(f"{API}/controlnet", content=content)
    assert (response.status_code, response.json()["status"]) == (200, "error")
    assert "larger than" in response.json()["message"]
    assert server.backend.touched == 0


async def test_an_image_over_its_limit_is_refused(open_server: Open) -> None:
    async with open_server(images={"max_bytes": 50}) as server:
        response = await server.http.post(f"{API}/controlnet", json=wish(), headers={"Prefer": "http-status"})
        assert response.status_code == 413
        assert response.json()["message"] == "The init_image picture is larger than 50 bytes."
        assert server.backend.touched == 0


async def test_a_bad_key_is_one_uniform_answer(server: Server) -> None:
    for key in (None, "", "wrong", 5, {"a": 1}, "\ud800", "x" * 100_000):
        answer = await server.post("controlnet", {**wish(), "key": key})
        assert (answer["status"], answer["message"]) == ("error", "Invalid Api Key"), key
        assert "tip" in answer
    assert server.backend.touched == 0


async def test_a_revoked_key_and_a_missing_scope(server: Server) -> None:
    answer = await server.post("controlnet", wish(key=ADMIN_ONLY_KEY))
    assert "scope 'generate'" in answer["message"]
    key, principal = server.resources.keys.create("short", "studio", ("generate",))
    server.resources.keys.revoke(principal.key_id)
    assert (await server.post("controlnet", wish(key=key)))["message"] == "Invalid Api Key"


async def test_a_full_queue_is_a_rate_limit_that_names_it(open_server: Open) -> None:
    async with open_server(limits={"queue_max_per_tenant": 1}, dispatcher={"max_jobs": 1}) as server:
        server.backend.gate.clear()
        for _ in range(2):  # one runs, one waits
            assert (await server.post("controlnet", wish(instant_response="yes")))["status"] == "processing"
            await server.started()
        response = await server.http.post(f"{API}/controlnet", json=wish(), headers={"Prefer": "http-status"})
        body = response.json()
        assert (response.status_code, body["message"]) == (429, "Rate limit exceeded")
        assert "queue_max_per_tenant allows 1" in body["tips"]
        assert int(response.headers["retry-after"]) == body["retry_after"] >= 1


async def test_the_rate_of_a_key(open_server: Open) -> None:
    async with open_server(limits={"requests_per_minute": 1}) as server:
        assert (await server.post("controlnet", wish()))["status"] == "success"
        response = await server.http.post(f"{API}/controlnet", json=wish())
        assert (response.status_code, response.json()["message"]) == (200, "Rate limit exceeded")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert (await server.post("schedulers_list", {"key": KEY}))["schedulers"]


async def test_required_safety_refuses_what_cannot_be_checked(open_server: Open) -> None:
    async with open_server(safety={"required": True}) as server:
        assert "no safety model" in (await server.post("controlnet", wish()))["message"]["safety_checker"][0]
        assert (await server.post("controlnet", wish(safety_checker="no")))["status"] == "success"


async def test_a_family_that_no_denoiser_serves(open_server: Open) -> None:
    async with open_server(denoisers=[{"families": ["sdxl"]}]) as server:
        assert "cannot be served here" in (await server.post("controlnet", wish()))["message"]["model_id"][0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [name for name in ControlNetRequest.model_fields if name not in {"key", "webhook"}]


async def _check_no_failure(open_server: Open, examples: int) -> None:
    """No body is answered by an unexpected error."""
    async with open_server(limits={"queue_max": 1_000_000}, server={"sync_wait_s": 0}) as server:
        bodies: list[dict[str, Any]] = []

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6))
        def collect(changes: dict[str, Any]) -> None:
            bodies.append(changes)

        collect()
        for changes in bodies:
            content = json.dumps({**wish(), **changes}).encode()
            response = await server.http.post(f"{API}/controlnet", content=content)
            assert response.status_code == 200
            assert response.json()["message"] != "Internal server error", changes


async def test_no_body_is_an_unexpected_error(open_server: Open) -> None:
    await _check_no_failure(open_server, 60)


@pytest.mark.full
async def test_no_body_is_an_unexpected_error_at_length(open_server: Open) -> None:
    await _check_no_failure(open_server, 2000)
