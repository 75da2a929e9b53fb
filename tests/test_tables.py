"""The tables that people add rows to: every row is complete and refers only to what exists."""

import importlib

import diffusers
import pytest
from prometheus_client import generate_latest

from deployments.observability import RayMeter
from serve_app.annotators import ANNOTATORS, Param
from serve_app.controls import CONTROL_TYPES, annotator_problem, control_type_problem
from serve_app.engine.samplers import SAMPLERS
from serve_app.engine.samplers.steps import build_scheduler
from serve_app.metrics import METRICS, Meter, PrometheusMeter
from serve_app.schedulers import (
    ALGORITHM_TYPES,
    DEFAULT_SCHEDULER,
    SCHEDULERS,
    available_schedulers,
    needs_image_problem,
    scheduler_problem,
)
from serve_app.storage import STORAGES, open_store
from serve_app.tasks import GenerationTask


@pytest.mark.parametrize("name", CONTROL_TYPES)
def test_control_types(name: str) -> None:
    row = CONTROL_TYPES[name]
    assert row.nets, "no family has a ControlNet for it"
    assert control_type_problem(name) is None
    assert row.annotators[0] == row.annotator
    assert set(row.annotators) <= {*ANNOTATORS, "none"}
    assert all(annotator_problem(name, choice) is None for choice in (None, *row.annotators))
    assert all(choice in str(annotator_problem(name, "nonsense")) for choice in row.annotators)


SD15 = "lllyasviel/control_"
SD21 = "thibaud/controlnet-sd21-"
XINSIR = "xinsir/controlnet-"
UNION_NET = "xinsir/controlnet-union-sdxl-1.0"

CONTROLS: dict[str, tuple[str, bool, int | None, dict[str, str]]] = {
    "canny": ("canny", True, 3, {
        "sd15": SD15 + "v11p_sd15_canny", "sd21": SD21 + "canny-diffusers", "sdxl": XINSIR + "canny-sdxl-1.0"}),
    "depth": ("depth_anything_v2", False, 1, {
        "sd15": SD15 + "v11f1p_sd15_depth", "sd21": SD21 + "depth-diffusers", "sdxl": XINSIR + "depth-sdxl-1.0"}),
    "hed": ("hed", False, 2, {
        "sd15": SD15 + "v11p_sd15_softedge", "sd21": SD21 + "hed-diffusers", "sdxl": UNION_NET}),
    "mlsd": ("mlsd", True, 3, {"sd15": SD15 + "v11p_sd15_mlsd", "sdxl": UNION_NET}),
    "normal": ("normal_bae", False, 4, {
        "sd15": SD15 + "v11p_sd15_normalbae", "sd21": SD21 + "normalbae-diffusers", "sdxl": UNION_NET}),
    "openpose": ("openpose_body", True, 0, {
        "sd15": SD15 + "v11p_sd15_openpose", "sd21": SD21 + "openposev2-diffusers",
        "sdxl": XINSIR + "openpose-sdxl-1.0"}),
    "scribble": ("xdog", True, 2, {
        "sd15": SD15 + "v11p_sd15_scribble", "sd21": SD21 + "scribble-diffusers",
        "sdxl": XINSIR + "scribble-sdxl-1.0"}),
    "segmentation": ("upernet", True, 5, {
        "sd15": SD15 + "v11p_sd15_seg", "sd21": SD21 + "ade20k-diffusers", "sdxl": UNION_NET}),
    "aesthetic-controlnet": ("canny", True, None, {"sd21": "krea/aesthetic-controlnet"}),
    "inpaint": ("inpaint", False, 7, {
        "sd15": SD15 + "v11p_sd15_inpaint", "sdxl": UNION_NET + " (its promax version)"}),
    "softedge": ("pidinet", False, 2, {
        "sd15": SD15 + "v11p_sd15_softedge", "sd21": SD21 + "hed-diffusers", "sdxl": UNION_NET}),
    "lineart": ("lineart_standard", True, 3, {"sd15": SD15 + "v11p_sd15_lineart", "sdxl": UNION_NET}),
    "shuffle": ("shuffle", False, None, {"sd15": SD15 + "v11e_sd15_shuffle"}),
    "tile": ("tile", False, 6, {"sd15": SD15 + "v11f1e_sd15_tile", "sdxl": XINSIR + "tile-sdxl-1.0"}),
    "face_detector": ("mediapipe_face", True, None, {
        "sd15": "CrucibleAI/ControlNetMediaPipeFace (subfolder diffusion_sd15)",
        "sd21": "CrucibleAI/ControlNetMediaPipeFace"}),
    "qrcode": ("tile", True, None, {"sd15": "monster-labs/control_v1p_sd15_qrcode_monster"}),
    "lineart_anime": ("lineart_anime", True, 3, {"sd15": SD15 + "v11p_sd15s2_lineart_anime", "sdxl": UNION_NET}),
}  # fmt: skip
"""Default annotator; whether maps hold lines; index in the union net; usual nets. From the nets' model cards.
Union: 0 openpose, 1 depth, 2 hed/pidi/scribble/ted, 3 canny/lineart/anime_lineart/mlsd, 4 normal, 5 segment, its
promax version: 6 tile, 7 repaint."""

DEFAULTS: dict[str, dict[str, float]] = {
    "canny": {"low_threshold": 100, "high_threshold": 200},  # the ControlNet model cards
    "xdog": {"threshold": 32},  # sd-webui-controlnet's scribble_xdog
    "lineart_standard": {"sigma": 6.0, "threshold": 8},
    "invert": {},
    "shuffle": {"scale": 256},
    "tile": {},
    "inpaint": {},
    "depth_anything_v2": {"resolution": 0},
    "midas": {"resolution": 0},
    "zoe": {"resolution": 0},
    "leres": {"remove_near": 0, "remove_background": 0, "resolution": 0},
    "normal_bae": {"resolution": 0},
    "hed": {"safe": False, "resolution": 0},
    "pidinet": {"safe": False, "resolution": 0},
    "scribble_hed": {"safe": False, "resolution": 0},
    "scribble_pidinet": {"safe": False, "resolution": 0},
    "lineart_realistic": {"resolution": 0},
    "lineart_coarse": {"resolution": 0},
    "lineart_anime": {"resolution": 0},
    "mlsd": {"value_threshold": 0.1, "distance_threshold": 0.1, "resolution": 0},
    "openpose_body": {"resolution": 512},
    "openpose_hand": {"resolution": 512},
    "openpose_face": {"resolution": 512},
    "openpose_full": {"resolution": 512},
    "upernet": {"resolution": 0},
    "mediapipe_face": {"max_faces": 1, "min_confidence": 0.5, "resolution": 0},
}
"""Where no other source is named: the detectors of controlnet-aux 0.0.10, save the resolution 0, which is the output's
own. OpenPose's 512 is the detect_resolution there."""


def test_control_types_are_what_their_nets_were_trained_with() -> None:
    found = {name: (row.annotator, row.lines, row.union, dict(row.nets)) for name, row in CONTROL_TYPES.items()}
    assert found == CONTROLS
    assert [name for name, row in CONTROL_TYPES.items() if row.needs_mask] == ["inpaint"]


def test_annotators_default_to_what_nets_were_trained_with() -> None:
    assert {name: row.read({}) for name, row in ANNOTATORS.items()} == DEFAULTS
    assert [name for name, row in ANNOTATORS.items() if row.pixelwise] == ["invert", "tile"]


def test_no_parameter_is_named_like_a_control_type() -> None:
    """``annotator_params`` holds both under one roof."""
    assert not {param.name for row in ANNOTATORS.values() for param in row.params} & set(CONTROL_TYPES)


@pytest.mark.parametrize("name", ANNOTATORS)
def test_annotators_can_be_imported_and_say_what_their_parameters_mean(name: str) -> None:
    row = ANNOTATORS[name]
    module, _, function = row.target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    for param in row.params:
        assert param.read(param.default) == param.default
        assert param.help
        if isinstance(param, Param):
            assert not param.below or param.below in {other.name for other in row.params} - {param.name}
            numbers = (param.default, param.minimum, param.maximum, param.step)
            assert not param.whole or all(isinstance(number, int) for number in numbers)
    assert row.read({}) == {param.name: param.default for param in row.params}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    row = SCHEDULERS[name]
    assert scheduler_problem(name) is None
    assert row.sampler in SAMPLERS
    assert row.needs_image == (needs_image_problem(name) is not None)
    scheduler = getattr(diffusers, row.class_name).from_config({}, **row.options)
    accepted = set(scheduler.config)
    assert set(row.options) <= accepted
    assert row.karras == ("use_karras_sigmas" in accepted)
    assert set(row.algorithm_types) <= set(ALGORITHM_TYPES)
    for algorithm_type in row.algorithm_types:
        task = GenerationTask(
            model="", family="", width=8, height=8, seed=0, scheduler=name, steps=2, algorithm_type=algorithm_type
        )
        assert build_scheduler({"algorithm_type": "sde-dpmsolver++"}, task, 0).config.algorithm_type == "dpmsolver++"


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    assert DEFAULT_SCHEDULER in available_schedulers()
    assert all(name in str(scheduler_problem("Nonsense")) for name in available_schedulers())
    assert all(name in str(control_type_problem("nonsense")) for name in CONTROL_TYPES)


@pytest.mark.parametrize("scheme", STORAGES)
def test_storages_keep_what_they_are_given(scheme: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = open_store(f"{scheme}://{tmp_path_factory.mktemp(scheme)}")
    store.put("a/b-1/c.png", b"0123456789", "image/png")
    assert store.get("a/b-1/c.png") == b"0123456789"
    assert store.get_range("a/b-1/c.png", 2, 4) == b"234"
    info = store.info("a/b-1/c.png")
    assert info is not None
    assert (info.size_bytes, info.content_type) == (10, "image/png")
    store.delete_prefix("a/b-1")
    assert store.info("a/b-1/c.png") is None
    store.delete("a/b-1/c.png")
    with pytest.raises(KeyError):
        store.get("a/b-1/c.png")


def record(meter: Meter, name: str) -> None:
    spec = METRICS[name]
    labels = dict.fromkeys(spec.labels, "x")
    if spec.kind == "counter":
        meter.count(name, 2, **labels)
    elif spec.kind == "gauge":
        meter.set(name, 2, **labels)
    else:
        meter.observe(name, 2, **labels)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_recorded_by_both_meters(name: str) -> None:
    meter = PrometheusMeter()
    record(meter, name)
    assert f"controlnet_{name}" in generate_latest(meter.registry).decode()
    record(RayMeter(), name)  # refuses labels that are not declared
