"""Annotators over HTTP: the list, the choice in a request, maps beside pictures, maps alone."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from serve_app.annotators import ANNOTATORS, Param
from serve_app.api.endpoints.hints import AnnotatorParams, choose_annotators
from serve_app.api.fields import Problems, WireModel, parse
from serve_app.controls import CONTROL_TYPES
from serve_app.errors import FetchFailed, ValidationFailed
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


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"annotator": "cany"}, "annotator", "'cany' is unknown. Allowed: canny, invert, none."),
    ({"annotator": "canny,canny"}, "annotator", "has 2 values for 1 maps"),
    ({"annotator": {"a": 1}}, "annotator", "must be a name or a list of names"),
    (
        {"annotator_params": {"low_threshold": 256}},
        "annotator_params",
        "low_threshold of canny must be a whole number from 0 to 255 (step 1), got 256",
    ),
    ({"annotator_params": {"low_threshold": "x" * 5000}}, "annotator_params", "must be a whole number"),
    ({"annotator_params": {"low_threshold": True}}, "annotator_params", "must be a whole number"),
    ({"annotator_params": {"low_threshold": [1]}}, "annotator_params", "must be a whole number"),
    ({"annotator_params": {"low_threshold": 1.5}}, "annotator_params", "must be a whole number"),
    ({"annotator_params": {"low_threshold": "1.5"}}, "annotator_params", "must be a whole number"),
    (
        {"annotator_params": {"low_threshold": 200}},
        "annotator_params",
        "low_threshold must be below high_threshold, got 200 and 200",
    ),
    (
        {"annotator_params": {"low_threshold": 30, "high_threshold": "20.0"}},
        "annotator_params",
        "low_threshold must be below high_threshold, got 30 and 20",
    ),
    (
        {"annotator_params": {"low": 1}},
        "annotator_params",
        "'low' of canny is unknown. Allowed: high_threshold, low_threshold.",
    ),
    (
        {"annotator_params": {"depth": {"safe": True}}},
        "annotator_params",
        "The control type in annotator_params 'depth' is unknown. Allowed: canny.",
    ),
    ({"annotator_params": {"canny": {"safe": True}}}, "annotator_params", "'safe' of canny is unknown"),
    ({"annotator_params": [{}, {}]}, "annotator_params", "has 2 values for 1 maps"),
    ({"annotator_params": "{"}, "annotator_params", "must be an object"),
    ({"annotator_params": [1]}, "annotator_params", "must be an object"),
    ({"annotator_params": {str(n): 1 for n in range(100)}}, "annotator_params", "must be an object"),
]


class TestTheChoice:
    async def test_defaults_are_fixed_at_acceptance_and_echoed(self, server: Server) -> None:
        answer = await server.post("controlnet", wish())
        assert answer["meta"]["annotators"] == [
            {
                "control_type": "canny",
                "annotator": "canny",
                "params": {"low_threshold": 100, "high_threshold": 200},
                "empty": False,
            }
        ]
        (control,) = (await spec_of(server, answer)).task.controls
        assert (control.annotator, control.params) == ("canny", {"low_threshold": 100, "high_threshold": 200})

    async def test_parameters_in_every_form(self, server: Server) -> None:
        for sent, (low, high) in (
            ({"low_threshold": "50"}, (50, 200)),
            ([{"low_threshold": 50.0}, {}], (50, 200)),
            ([{"low_threshold": 50}, None], (50, 200)),
            ({"canny": {"low_threshold": 50}}, (50, 200)),
            ({"high_threshold": 99, "canny": {"low_threshold": 50}, "tile": {}}, (50, 99)),
            (json.dumps({"low_threshold": 50}), (50, 200)),
            ({"low_threshold": None, "high_threshold": "null"}, (100, 200)),
        ):
            answer = await server.post("controlnet", wish(controlnet_model="canny,tile", annotator_params=sent))
            found = [info["params"] for info in answer["meta"]["annotators"]]
            assert found == [{"low_threshold": low, "high_threshold": high}, {}], sent
            assert all(isinstance(value, int) for value in found[0].values())

    async def test_other_annotators(self, server: Server) -> None:
        for kinds, sent, annotators in (
            ("canny", "invert", ["invert"]),
            ("canny", ["invert"], ["invert"]),
            ("canny,tile", "invert,", ["invert", "tile"]),
            ("canny", "none", ["canny"]),  # as the painted backend calls a map that was not made
        ):
            answer = await server.post("controlnet", wish(controlnet_model=kinds, annotator=sent))
            assert [info["annotator"] for info in answer["meta"]["annotators"]] == annotators
            assert server.backend.annotated[-1].auto_hint == (sent != "none")

    async def test_a_sent_map_needs_no_parameters(self, server: Server) -> None:
        answer = await server.post(
            "controlnet", wish(controlnet_model="depth", auto_hint="no", annotator_params={"whatever": 1})
        )
        assert answer["status"] == "success"
        (task,) = server.backend.annotated
        assert (task.annotator, task.params, task.auto_hint) == (None, {}, False)

    async def test_refusals(self, server: Server) -> None:
        for fields, field, message in REFUSALS:
            for path, good in (("controlnet", wish()), ("annotate", body())):
                answer = await server.post(path, good | fields)
                assert answer["status"] == "error", fields
                assert message in " ".join(answer["message"][field]), answer
                assert len(json.dumps(answer)) < 2000
        assert server.backend.touched == 0

    async def test_an_annotator_without_weights_is_refused_with_the_remedy(self, server: Server) -> None:
        server.backend.missing = {"depth_anything_v2": "the weights; run: controlnet-serve weights fetch x"}
        for path, fields in (
            ("controlnet", wish(controlnet_model="depth")),
            ("annotate", body(controlnet_type="depth")),
        ):
            answer = await server.post(path, fields)
            assert "run: controlnet-serve weights fetch x" in answer["message"]["annotator"][0]
        answer = await server.post("controlnet", wish(controlnet_model="depth", auto_hint="no"))
        assert answer["status"] == "success"


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


class Body(WireModel):
    annotator_params: AnnotatorParams = ()


def chosen(kinds: list[str], params: object, *annotators: str) -> list[dict[str, Any]]:
    """Effective parameters, or ValidationFailed."""
    found, problems = parse(Body, {"annotator_params": params})  # type: ignore[dict-item]  # anything at all
    maps = choose_annotators(kinds, annotators, found.annotator_params, auto_hint=True, problems=problems)
    problems.raise_if_any()
    return [dict(one.params) for one in maps]


def params_of(annotator: str, params: object) -> list[dict[str, Any]]:
    """The same for one annotator by its name."""
    kind = next(name for name, row in CONTROL_TYPES.items() if annotator in row.annotators)
    return chosen([kind], params, annotator)


KINDS = st.lists(st.sampled_from(list(CONTROL_TYPES)), min_size=1, max_size=4)
NAMES = sorted({param.name for row in ANNOTATORS.values() for param in row.params})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "canny", "x"]), inner),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kinds=KINDS, params=JSON)
def test_any_parameters_are_effective_in_range_or_refused(kinds: list[str], params: object) -> None:
    try:
        found = chosen(kinds, params)
    except ValidationFailed as error:
        fields = set(error.fields)
    else:
        fields = {"annotator_params"}
        check_effective(kinds, found)
    assert fields == {"annotator_params"}


def check_effective(kinds: list[str], found: list[dict[str, Any]]) -> None:
    for kind, values in zip(kinds, found, strict=True):
        row = ANNOTATORS[CONTROL_TYPES[kind].annotator]
        assert set(values) == {param.name for param in row.params}
        assert row.read(values) == values


@settings(deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(ANNOTATORS)), spelled=st.booleans())
def test_every_number_in_range_is_taken_and_none_outside(data: st.DataObject, name: str, spelled: bool) -> None:
    for param in ANNOTATORS[name].params:
        if not isinstance(param, Param):
            continue
        smaller = [one.name for one in ANNOTATORS[name].params if isinstance(one, Param) and one.below == param.name]
        least, most = param.minimum + len(smaller), param.maximum - bool(param.below)
        numbers = st.integers(int(least), int(most)) if param.whole else st.floats(least, most)
        inside = float(data.draw(numbers | st.just(0 if param.or_zero else least)))
        beside = dict.fromkeys(smaller, least - 1) | ({param.below: most + 1} if param.below else {})
        (values,) = params_of(name, {param.name: str(inside) if spelled else inside, **beside})
        assert values[param.name] == pytest.approx(inside)
        assert isinstance(values[param.name], int) or not param.whole
        outside = st.floats(param.maximum, exclude_min=True) | st.sampled_from([np.nan, param.minimum - 1])
        if param.whole:
            outside |= st.sampled_from([param.minimum + 0.5, param.maximum - 0.01])
        wrong = data.draw(outside)
        with pytest.raises(ValidationFailed, match=f"{'whole' * param.whole} number .*to {param.maximum:g}"):
            params_of(name, {param.name: str(wrong) if spelled else wrong})


def test_problems_do_not_stop_at_the_first() -> None:
    problems = Problems()
    choose_annotators(["canny"], (), ({"low_threshold": -1, "high_threshold": 300},), True, problems)
    with pytest.raises(ValidationFailed) as caught:
        problems.raise_if_any()
    assert len(caught.value.fields["annotator_params"]) == 2
