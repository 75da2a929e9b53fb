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
