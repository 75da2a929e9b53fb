"""Bodies of any size from anybody: read as sent, beside the event loop, and never many times their size in memory."""

import asyncio
import base64
import json
import random
import tracemalloc
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qsl, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue
from starlette.requests import Request

from serve_app.api.body import read_fields
from serve_app.errors import InvalidRequest

LIMIT = 20 * 1024 * 1024
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x"


async def read(body: bytes, kind: str) -> dict[str, JsonValue]:
    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", kind.encode())]}
    return await read_fields(Request(scope, receive), LIMIT)


def form(text: str) -> dict[str, JsonValue]:
    return asyncio.run(read(text.encode(), FORM))


@given(st.text(st.sampled_from("a=&+% é€\U0001f600"), max_size=30) | st.text(max_size=20).map(quote_plus))
def test_a_form_means_what_the_standard_library_reads(text: str) -> None:
    pairs = parse_qsl(text, keep_blank_values=True)
    names = [name for name, _ in pairs]
    expected = {name: [value for other, value in pairs if other == name] for name in names}
    assert form(f"a={text}&b") == form(f"b&a={text}")
    if text.strip() and not text.lstrip().startswith(("{", "[")):
        assert form(text) == {name: values[0] if len(values) == 1 else values for name, values in expected.items()}


@pytest.mark.parametrize("escapes", ["%C3%A9", "%c3%a9", "%ff", "%E2%82", "%zz", "%", "%4", "%41%", "é%C3é"])
def test_escapes_good_and_bad_mean_what_the_standard_library_reads(escapes: str) -> None:
    assert form(f"a={escapes}") == dict(parse_qsl(f"a={escapes}"))


async def test_the_largest_picture_passes_in_a_form() -> None:
    picture = base64.b64encode(random.Random(1).randbytes(10 * 1024 * 1024)).decode()
    fields = await read(f"key=k&init_image={quote_plus(picture)}".encode(), FORM)
    assert fields == {"key": "k", "init_image": picture}


HOSTILE = {
    "escapes": (b"a=" + b"%41" * 1_700_000, FORM, True),
    "pairs": (b"a&" * 2_500_000, FORM, True),
    "empty pairs": (b"&" * 5_000_000, FORM, True),
    "other letters": (("a=" + "éa" * 1_700_000).encode(), FORM, False),
    "line ends": (b'--x\r\nContent-Disposition: form-data; name="a"; filename="f"\r\n\r\n' + b"\r\n" * 2_500_000
                  + b"\r\n--x--\r\n", MULTIPART, False),
    "header": (b"--x\r\nContent-Disposition: " + b"a;" * 2_500_000, MULTIPART, True),
    "headers": (b"--x\r\n" + b"a: b\r\n" * 800_000, MULTIPART, True),
}  # fmt: skip


@pytest.mark.parametrize(("body", "kind", "refused"), HOSTILE.values(), ids=HOSTILE)
async def test_no_body_grows_many_times_in_memory(body: bytes, kind: str, refused: bool) -> None:
    tracemalloc.start()
    try:
        if refused:
            with pytest.raises(InvalidRequest):
                await read(body, kind)
        else:
            assert set(await read(body, kind)) == {"a"}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(body)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (json.dumps({"a": "b" * 100_000}).encode(), "application/json"),
        (b"a=" + b"%41" * 100_000, FORM),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"b" * 100_000 + b"\r\n--x--\r\n", MULTIPART),
    ],
    ids=["json", "form", "multipart"],
)
async def test_others_are_served_while_a_large_body_is_parsed(body: bytes, kind: str) -> None:
    reading = asyncio.create_task(read(body, kind))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(str((await reading)["a"])) == 100_000
    assert turns > 2  # one to start, one to see the end: more only where the loop is free meanwhile
