"""Annotators over HTTP: the list, the choice in a request, maps beside pictures, maps alone."""

import base64
import io
import json
from typing import Any

from PIL import Image

from serve_app.controls import CONTROL_TYPES
from serve_app.errors import FetchFailed
from serve_app.jobs.job import JobSpec
from serve_app.tasks import MapsTask
from support.gateway import API, KEY, PUBLIC_URL, STRANGER_KEY, Open, Server, as_base64, picture, wish
from support.web import web_server


def body(**changes: object) -> dict[str, Any]:
    """A good body of ``POST annotate``."""
    fields: dict[str, Any] = {"key": KEY, "init_image": as_base64(picture()), "controlnet_type": "canny", **changes}
    return {name: value for name, value in fields.items() if value is not None}


def size(data: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(data)).size


async def spec_of(server: Server, answer: dict[str, Any]) -> JobSpec:
    job = server.resources.jobs.get(int(answer["id"]))
    assert job is not None
    return job.spec


class TestTheList:
    async def test_has_every_type_with_its_annotators_and_parameters(self, server: Server) -> None:
        response = await server.http.get(f"{API}/annotators", headers={"Authorization": f"Bearer {KEY}"})
        answer = response.json()
        assert answer["status"] == "success"
        found = {row["control_type"]: row for row in answer["control_types"]}
        assert list(found) == list(CONTROL_TYPES)
        for name, row in found.items():
            assert [one["name"] for one in row["annotators"]] == list(CONTROL_TYPES[name].annotators)
            assert row["annotator"] == row["annotators"][0]["name"]
        (low, high) = found["canny"]["annotators"][0]["parameters"]
        assert (low["name"], high["name"]) == ("low_threshold", "high_threshold")
        assert {key: value for key, value in low.items() if key not in {"name", "help"}} == {
            "type": "integer", "default": 100, "min": 0, "max": 255, "step": 1, "also": [], "below": "high_threshold",
        }  # fmt: skip
        assert high["below"] is None
        (xdog,) = next(one for one in found["scribble"]["annotators"] if one["name"] == "xdog")["parameters"]
        assert xdog["type"] == "number"
        resolution = found["depth"]["annotators"][0]["parameters"][0]
        assert (resolution["default"], resolution["min"], resolution["also"]) == (0, 64, [0])
        assert low["help"]
        safe = next(one for one in found["hed"]["annotators"][0]["parameters"] if one["name"] == "safe")
        assert (safe["type"], safe["default"], safe["min"]) == ("boolean", False, None)
        assert (await server.http.get(f"{API}/annotators")).json()["message"] == "Invalid Api Key"

    async def test_tells_what_is_missing(self, server: Server) -> None:
        server.backend.missing = {"zoe": "the weights model.safetensors; run: controlnet-serve weights fetch zoe"}
        answer = (await server.http.get(f"{API}/annotators", headers={"Authorization": f"Bearer {KEY}"})).json()
        depth = next(row for row in answer["control_types"] if row["control_type"] == "depth")
        states = {one["name"]: (one["ready"], one["missing"]) for one in depth["annotators"]}
        assert states["zoe"] == (False, server.backend.missing["zoe"])
        assert states["midas"] == (True, None)
        assert depth["ready"]
        server.backend.missing = {"pidinet": "weights"}
        answer = await server.post("system_details", {"key": KEY})
        assert set(CONTROL_TYPES) - set(answer["control_types_ready"]) == {"softedge"}


class TestMapsBesidePictures:
    async def test_are_asked_for(self, server: Server) -> None:
        answer = await server.post(
            "controlnet", wish(controlnet_model="canny,tile,canny", return_control_maps="yes", samples=2)
        )
        assert len(answer["output"]) == 2
        assert len(answer["control_maps"]) == 3
        maps = [await server.get(url) for url in answer["control_maps"]]
        assert [one.status_code for one in maps] == [200] * 3
        assert [size(one.content) for one in maps] == [(64, 64)] * 3
        assert maps[0].content == maps[2].content != maps[1].content  # made once, kept once
        assert answer["meta"]["return_control_maps"] == "yes"
        (job,) = server.resources.jobs.list("studio", 10)
        assert job.result is not None
        assert job.result.map_keys[0] == job.result.map_keys[2]

        answer = await server.post("controlnet", wish())
        assert "control_maps" not in answer
        url = answer["output"][0].replace("-0.png", "-control-0.png")
        assert (await server.get(url)).status_code == 404

    async def test_have_their_final_address_before_they_are_there(self, server: Server) -> None:
        server.backend.gate.clear()
        answer = await server.post("controlnet", wish(return_control_maps="yes", instant_response="yes"))
        (url,) = answer["future_control_maps"]
        assert url.startswith(f"{PUBLIC_URL}/generations/")
        early = await server.get(url)
        assert early.status_code == 404
        assert int(early.headers["retry-after"]) >= 1
        await server.started()
        server.backend.gate.set()
        done = await server.status(answer["id"], "success")
        assert done["control_maps"] == [url]
        assert (await server.get(url)).headers["content-type"] == "image/png"

    async def test_are_base64_text_and_in_the_webhook(self, open_server: Open) -> None:
        async with web_server() as web, open_server(fetch={"allow_hosts": ["127.0.0.1"]}) as server:
            answer = await server.post(
                "controlnet", wish(return_control_maps="yes", base64="yes", webhook=f"{web.url}/done")
            )
            text = (await server.get(answer["control_maps"][0])).text
            assert size(base64.b64decode(text)) == (64, 64)
            while not web.requests:
                await server.status(answer["id"], "success")
            assert json.loads(web.requests[0][2])["control_maps"] == answer["control_maps"]

    async def test_go_with_a_failure(self, server: Server) -> None:
        server.backend.failure = FetchFailed("no luck")
        answer = await server.post("controlnet", wish(return_control_maps="yes", instant_response="yes"))
        await server.status(answer["id"], "failed")
        await server.file(answer["future_control_maps"][0], 410)


class TestMapsAlone:
    async def test_have_the_envelope_of_a_drawing(self, server: Server) -> None:
        answer = await server.post(
            "annotate", body(controlnet_type="canny,tile", annotator_params={"low_threshold": 9})
        )
        assert answer["status"] == "success"
        assert server.backend.generated == []
        assert len(answer["output"]) == 2
        assert answer["image_links"] == answer["proxy_links"] == answer["output"]
        assert "control_maps" not in answer
        meta = answer["meta"]
        assert [info["annotator"] for info in meta["annotators"]] == ["canny", "tile"]
        assert meta["annotators"][0]["params"]["low_threshold"] == 9
        assert meta["controlnet_type"] == "canny,tile"
        assert not {"seeds", "model_hash", "safetychecker"} & set(meta)
        for url in answer["output"]:
            assert size((await server.get(url)).content) == (meta["W"], meta["H"])
        answer = await server.post("annotate", wish())  # the body of a drawing works too
        assert (answer["status"], answer["meta"]["W"], answer["meta"]["H"]) == ("success", 64, 64)

    async def test_have_the_pictures_size_within_the_limits(self, server: Server) -> None:
        cases: list[tuple[tuple[int, int], dict[str, Any], tuple[int, int]]] = [
            ((24, 16), {}, (64, 64)),
            ((517, 333), {}, (520, 336)),
            ((3000, 1500), {}, (1024, 512)),
            ((4000, 10), {}, (1024, 64)),
            ((512, 256), {"width": "256"}, (256, 128)),
            ((512, 256), {"height": 512}, (1024, 512)),
            ((512, 256), {"width": 64, "height": 128}, (64, 128)),
        ]
        for own, asked, made in cases:
            answer = await server.post("annotate", body(init_image=as_base64(picture(*own)), **asked))
            assert (answer["meta"]["W"], answer["meta"]["H"]) == made
            assert size((await server.get(answer["output"][0])).content) == made

    async def test_a_link_whose_size_nobody_knows_yet(self, open_server: Open) -> None:
        async with web_server() as web, open_server(fetch={"allow_hosts": ["127.0.0.1"]}) as server:
            web.body = picture(200, 104)
            sent = body(init_image=None, image=web.url, controlnet_type=None, controlnet_model="canny")
            first = await server.post("annotate", {**sent, "instant_response": "yes", "track_id": "t-1"})
            assert (first["status"], first["meta"]["W"]) == ("processing", None)
            done = await server.status(first["id"], "success")
            assert done["output"] == first["future_links"]
            assert (done["meta"]["W"], done["meta"]["H"], done["track_id"]) == (200, 104, "t-1")
            assert done["meta"]["init_image"] == web.url

    async def test_inpaint_needs_a_mask_of_any_size(self, server: Server) -> None:
        refused = await server.post("annotate", body(controlnet_type="inpaint"))
        assert "mask_image" in refused["message"]
        mask = as_base64(picture(50, 50, 255))
        answer = await server.post("annotate", body(controlnet_type="inpaint", mask_image=mask))
        assert answer["status"] == "success"

    async def test_all_bad_fields_come_in_one_answer(self, server: Server) -> None:
        answer = await server.post(
            "annotate", {"key": KEY, "controlnet_type": "cany", "width": 63, "height": 5000, "base64": "maybe"}
        )
        assert set(answer["message"]) == {"init_image", "controlnet_type", "width", "height", "base64"}
        answer = await server.post("annotate", {"key": KEY})
        assert set(answer["message"]) == {"init_image", "controlnet_type"}
        answer = await server.post("annotate", body(controlnet_type=",".join(["canny"] * 9)))
        assert "at most 8" in answer["message"]["controlnet_type"][0]
        assert server.backend.touched == 0

    async def test_a_failure_is_a_failed_job(self, server: Server) -> None:
        server.backend.failure = FetchFailed("no luck")
        answer = await server.post("annotate", body())
        assert (answer["status"], answer["message"], answer["output"]) == ("failed", "no luck", "")

    async def test_belongs_to_its_owner_and_is_listed(self, server: Server) -> None:
        answer = await server.post("annotate", body(temp="yes"))
        stranger = await server.post("fetch", {"key": STRANGER_KEY, "request_id": answer["id"]})
        assert stranger["message"] == "Request not found"
        listed = await server.http.get(f"{API}/jobs", headers={"Authorization": f"Bearer {KEY}"})
        assert listed.json()["jobs"][0]["endpoint"] == "annotate"
        spec = await spec_of(server, answer)
        assert isinstance(spec.task, MapsTask)
        assert spec.temp
