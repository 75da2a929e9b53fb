"""Which annotator makes each map, with which parameters: fields and checks of all endpoints that make maps."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.annotators import ANNOTATORS, Param
from serve_app.api.endpoints.hints import AnnotatorParams, choose_annotators
from serve_app.api.fields import Problems, WireModel, parse
from serve_app.controls import CONTROL_TYPES
from serve_app.errors import ValidationFailed
from support.gateway import Server, wish

REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"annotator": "cany"}, "annotator", "'cany' is unknown. Allowed: canny, invert, none."),
    ({"annotator": "canny,canny"}, "annotator", "has 2 values for 1 maps"),
    ({"annotator": {"a": 1}}, "annotator", "must be a name or a list of names"),
    (
        {"annotator_params": {"low_threshold": 256}},
        "annotator_params",
        "low_threshold of canny must be a whole number from 0 to 255, got 256",
    ),
    ({"annotator_params": {"low_threshold": "x" * 5000}}, "annotator_params", "must be a whole number"),
    ({"annotator_params": {"low_threshold": True}}, "annotator_params", "must be a whole number"),
    ({"annotator_params": {"low_threshold": [1]}}, "annotator_params", "must be a whole number"),
    ({"annotator_params": {"low_threshold": 1.5}}, "annotator_params", "must be a whole number"),
    ({"annotator_params": {"low_threshold": "1.5"}}, "annotator_params", "must be a whole number"),
    (
        {"annotator_params": {"low_threshold": 200}},
        "annotator_params",
        "low_threshold of canny must be below high_threshold, got 200 and 200",
    ),
    (
        {"annotator_params": {"low_threshold": 30, "high_threshold": "20.0"}},
        "annotator_params",
        "low_threshold of canny must be below high_threshold, got 30 and 20",
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
    ({"annotator_params": {str(n): 1 for n in range(100)}}, "annotator_params", "more than 64 names in all"),
    (
        {"annotator_params": {"canny": {str(n): 1 for n in range(50_000)}}},
        "annotator_params",
        "more than 64 names in all",
    ),
    (
        {"annotator_params": [{"canny": {str(n): 1 for n in range(30)}}] * 3},
        "annotator_params",
        "more than 64 names in all",
    ),
    ({"annotator_params": [{}] * 1002}, "annotator_params", "must be an object"),
    ({"annotator_params": json.dumps({"canny": {}}) + " " * 20_000}, "annotator_params", "at most 16384 characters"),
    ({"annotator": "," * 1000}, "annotator", "must not have more than 1000 values, got 1001"),
    ({"annotator": ["canny"] * 1001}, "annotator", "must not have more than 1000 values, got 1001"),
    (
        {"annotator_params": {"low_threshold": {"a": 1}}},
        "annotator_params",
        "low_threshold of canny must be a whole number from 0 to 255, got {'a': 1}",
    ),
    (
        {"annotator_params": {"canny": 5}},
        "annotator_params",
        "'canny' in annotator_params must have an object of parameter names and values, got 5",
    ),
    (
        {"annotator_params": {"depth": None}},
        "annotator_params",
        "The control type in annotator_params 'depth' is unknown. Allowed: canny.",
    ),
    ({"annotator_params": {"x" * 5000: 1}}, "annotator_params", "of canny is unknown"),
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
        job = server.resources.jobs.get(int(answer["id"]))
        assert job is not None
        (control,) = job.spec.task.controls
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
            ({"canny": None, "tile": "null", "low_threshold": 50}, (50, 200)),
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

    async def test_a_parameter_that_no_running_annotator_has_is_refused_beside_a_sent_map(self, server: Server) -> None:
        two = wish(controlnet_model="canny,tile", annotator="none,tile")
        answer = await server.post("controlnet", two | {"annotator_params": {"treshold": 5}})
        assert "'treshold' of tile is unknown. Allowed: none." in answer["message"]["annotator_params"][0]
        two["annotator"] = "canny,none"
        answer = await server.post("controlnet", two | {"annotator_params": {"treshold": 5}})
        assert "Allowed: high_threshold, low_threshold." in answer["message"]["annotator_params"][0]
        assert server.backend.touched == 0
        answer = await server.post("controlnet", two | {"annotator_params": {"low_threshold": 5}})
        assert answer["status"] == "success"
        answer = await server.post(
            "controlnet", two | {"annotator": "none", "annotator_params": {"treshold": 5, "x": {"y": 1}}}
        )
        assert answer["status"] == "success"

    async def test_an_annotator_that_auto_hint_switches_off_is_refused(self, server: Server) -> None:
        for annotator in ("invert", "canny"):
            sent = wish(auto_hint="no", annotator=annotator, annotator_params={"x": 1})
            answer = await server.post("controlnet", sent)
            assert list(answer["message"]) == ["annotator"]
            assert f"{annotator!r} would not run, because auto_hint: no" in answer["message"]["annotator"][0]
        assert server.backend.touched == 0
        assert (await server.post("controlnet", wish(auto_hint="no", annotator="none")))["status"] == "success"

    async def test_refusals(self, server: Server) -> None:
        for fields, field, message in REFUSALS:
            for path in ("controlnet", "annotate"):
                answer = await server.post(path, wish() | fields)
                assert answer["status"] == "error", fields
                assert message in " ".join(answer["message"][field]), answer
                assert len(json.dumps(answer)) < 2000
        assert server.backend.touched == 0

    async def test_an_annotator_without_weights_is_refused_with_the_remedy(self, server: Server) -> None:
        server.backend.missing = {"depth_anything_v2": "the weights; run: controlnet-serve weights fetch x"}
        for path, remedy in (
            ("controlnet", "Or send the control map itself with auto_hint: no."),
            ("annotate", "Or choose another annotator of this control type"),
        ):
            answer = await server.post(path, wish(controlnet_model="depth"))
            (message,) = answer["message"]["annotator"]
            assert "run: controlnet-serve weights fetch x" in message
            assert remedy in message
            assert ("auto_hint" in message) == (path == "controlnet")
        answer = await server.post("controlnet", wish(controlnet_model="depth", auto_hint="no"))
        assert answer["status"] == "success"


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
