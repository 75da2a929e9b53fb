"""A real photo and a prompt go in over HTTP, a picture made by a ControlNet comes out: the whole story in one process.

The real application, dispatcher, annotators and engine on the demo model; a link is fetched from a server on loopback.
"""

import asyncio
import io
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import skimage
from numpy.typing import NDArray
from PIL import Image

from serve_app.config import AppConfig
from serve_app.local import LocalServer, local_server
from support.web import web_server
from support.wire import SEED_META, seed_page_body

KEY = "end-to-end-key-0123456789"
PHOTOS = Path(skimage.__file__).parent / "data"

SMALL = {"width": "128", "height": "64", "num_inference_steps": "4"}


def photo(name: str) -> bytes:
    return (PHOTOS / name).read_bytes()


def base64(data: bytes) -> str:
    return b64encode(data).decode()


def white_left_half() -> str:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, :50] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64(buffer.getvalue())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
async def server(tmp_path: Path, models: Path) -> AsyncIterator[LocalServer]:
    config = AppConfig.model_validate(
        {"data": tmp_path, "models_folder": models, "fetch": {"allow_hosts": ["127.0.0.1"]}}
    )
    async with local_server(config) as running:
        running.resources.keys.create("tests", "default", ["generate"], KEY)
        yield running


@pytest.fixture
async def client(server: LocalServer) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(server.application)
    async with httpx2.AsyncClient(
        transport=transport, base_url=server.resources.config.public_url, timeout=120
    ) as running:
        yield running


async def draw(client: httpx2.AsyncClient, **fields: object) -> dict[str, Any]:
    """Submit the seed page's body with ``fields`` changed and wait for success."""
    body = seed_page_body(KEY, "demo", "") | fields
    response = await client.post("/api/v1/enterprise/controlnet", json=body)
    answer: dict[str, Any] = response.json()
    while answer["status"] == "processing":
        answer = (await client.post(answer["fetch_result"], json={"key": KEY})).json()
    assert answer["status"] == "success", answer
    return answer


async def pictures(client: httpx2.AsyncClient, answer: dict[str, Any]) -> list[bytes]:
    found = []
    for url in answer["output"]:
        response = await client.get(url)
        assert response.headers["content-type"] == "image/png"
        found.append(response.content)
    return found


def pixels(data: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


@pytest.mark.parametrize(
    ("name", "how"), [("astronaut.png", "link"), ("coffee.png", "base64"), ("chelsea.png", "data URI")]
)
async def test_the_seed_pages_body_as_it_stands(client: httpx2.AsyncClient, name: str, how: str) -> None:
    async with web_server() as web:
        web.body = photo(name)
        sent = {
            "link": web.url,
            "base64": base64(web.body),
            "data URI": "data:image/png;base64," + base64(web.body),
        }[how]
        # Full size once; what differs otherwise is only how the picture arrives.
        answer = await draw(client, init_image=sent, **({} if how == "link" else SMALL))
        assert len(web.requests) == (how == "link")
    (data,) = await pictures(client, answer)
    meta = answer["meta"]
    assert pixels(data).shape == (meta["H"], meta["W"], 3)
    assert pixels(data).std() > 10
    assert set(SEED_META) <= set(meta)
    assert meta["strength"] == 0.55
    prompt = seed_page_body(KEY, "demo", "")["prompt"]
    assert meta["prompt"].startswith(prompt)
    assert meta["prompt"] != prompt  # enhanced
    if how == "link":
        assert (meta["W"], meta["H"], meta["steps"]) == (512, 512, 30)
        assert meta["init_image"] == sent


@pytest.mark.parametrize(
    "fields",
    [
        *({"controlnet_model": name} for name in ("scribble", "lineart", "shuffle", "tile")),
        {"controlnet_model": "inpaint", "mask_image": white_left_half()},
        {"controlnet_model": "canny,scribble", "controlnet_type": "canny,scribble"},
        {"mask_image": white_left_half(), "strength": 1.0},
        {"guess_mode": "yes", "prompt": "", "strength": 1.0},
        {"auto_hint": "no", "strength": 1.0},
    ],
    ids=lambda fields: ",".join(f"{name}={str(value)[:16]}" for name, value in fields.items()),
)
async def test_every_weight_free_type_and_mode(client: httpx2.AsyncClient, fields: dict[str, str]) -> None:
    answer = await draw(client, init_image=base64(photo("chelsea.png")), seed=5, **(SMALL | fields))
    (data,) = await pictures(client, answer)
    assert pixels(data).shape == (64, 128, 3)
    assert not any(info["empty"] for info in answer["meta"]["annotators"])
    assert len(answer["meta"]["annotators"]) == len(str(answer["meta"]["controlnet_model"]).split(","))


async def test_fetch_tells_how_far_the_engine_is(tmp_path: Path, models: Path) -> None:
    """From the sampler through engine, backend and the job's row to the client."""
    config = AppConfig.model_validate({"data": tmp_path, "models_folder": models, "dispatcher": {"lease_s": 1.5}})
    shares = []
    async with local_server(config) as server:
        server.resources.keys.create("tests", "default", ["generate"], KEY)
        transport = httpx2.ASGITransport(server.application)
        async with httpx2.AsyncClient(transport=transport, base_url=config.public_url) as client:
            body = seed_page_body(KEY, "demo", base64(photo("coffee.png"))) | SMALL
            body |= {"num_inference_steps": "50", "samples": "3", "strength": 1.0, "instant_response": "yes"}
            answer = (await client.post("/api/v1/enterprise/controlnet", json=body)).json()
            assert answer["status"] == "processing", answer
            fetch = answer["fetch_result"]
            while (answer := (await client.post(fetch, json={"key": KEY})).json())["status"] == "processing":
                shares.append(answer["progress"])
                await asyncio.sleep(0.1)
    assert answer["status"] == "success"
    assert shares == sorted(shares)
    assert any(0 < share < 1 for share in shares)


async def test_the_same_seed_gives_the_same_bytes(client: httpx2.AsyncClient) -> None:
    drawn = []
    for _ in range(2):
        answer = await draw(client, init_image=base64(photo("coffee.png")), seed=7, **SMALL)
        drawn += await pictures(client, answer)
    assert drawn[0] == drawn[1]


async def test_image_k_of_several_is_the_picture_of_seed_plus_k(client: httpx2.AsyncClient) -> None:
    fields = {"init_image": base64(photo("coffee.png")), "strength": 1.0, **SMALL}
    together = await pictures(client, await draw(client, seed=2**32 - 2, samples=3, **fields))
    for data, seed in zip(together, (2**32 - 2, 2**32 - 1, 0), strict=True):
        (alone,) = await pictures(client, await draw(client, seed=seed, **fields))
        assert np.abs(pixels(data) - pixels(alone)).max() <= 1


async def test_the_mask_keeps_what_it_does_not_cover(client: httpx2.AsyncClient) -> None:
    picture = base64(photo("coffee.png"))
    fields = {"init_image": picture, "mask_image": white_left_half(), "strength": 1.0, "seed": 3, **SMALL}
    (masked,) = await pictures(client, await draw(client, **fields))
    other = fields | {"seed": 4}
    (again,) = await pictures(client, await draw(client, **other))
    difference = np.abs(pixels(masked) - pixels(again))
    # Left of the middle each seed paints anew; the right edge is the photo, whatever the seed.
    assert difference[:, :40].mean() > 4 * difference[:, 88:].mean()


async def test_a_map_made_alone_guides_as_the_one_made_on_the_way(client: httpx2.AsyncClient) -> None:
    picture = base64(photo("coffee.png"))
    wish = {"init_image": picture, "seed": 7, "strength": 1.0, "annotator_params": {"low_threshold": 60}, **SMALL}
    drawn = await draw(client, return_control_maps="yes", **wish)
    (auto,) = await pictures(client, drawn)
    (beside,) = await pictures(client, {"output": drawn["control_maps"]})
    sent = {"key": KEY, "controlnet_type": "canny", **wish}
    answers = [(await client.post("/api/v1/enterprise/annotate", json=sent)).json() for _ in range(3)]
    alone = {content for answer in answers for content in await pictures(client, answer)}
    assert alone == {beside}
    assert drawn["meta"]["annotators"] == answers[0]["meta"]["annotators"]
    (by_hand,) = await pictures(client, await draw(client, control_image=base64(beside), auto_hint="no", **wish))
    assert by_hand == auto
    (replica,) = (await client.post("/api/v1/enterprise/system_details", json={"key": KEY})).json()["annotators"]
    assert (replica["annotate_calls"], replica["annotator_runs"]) == (5, 1)  # the sent map was not made
