"""Other families than SD 1.5 draw what diffusers' pipelines draw: SD 2 with v-prediction, SDXL, ControlNet-Union."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging

from serve_app.config import ModelSource
from serve_app.database import Database
from serve_app.errors import JobError
from serve_app.models.catalog import Catalog
from serve_app.models.loading import load_base, load_net
from serve_app.models.publish import publish
from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import ControlInput, GenerationTask, Mode
from support.folders import save_base, save_net
from support.reference import TOLERANCE, assert_parity
from support.tiny import Zoo, controls, drawn_alone, latents, picture, relative_error, request, run, task, tiny_engine

MODES = tuple(Mode)
STRENGTH = {Mode.TEXT: 1.0, Mode.IMAGE: 0.7, Mode.MASKED: 0.8}
FAMILIES = {"sd2": "sd21", "xl": "sdxl", "xl-inpaint": "sdxl"}
REFERENCED = tuple(name for name, spec in SCHEDULERS.items() if spec.sampler == "steps")
"""Schedulers that diffusers' own pipelines can drive."""
TYPES = (("canny",), ("canny", "depth"))


@pytest.fixture(autouse=True)
def quiet_diffusers() -> Iterator[None]:
    """Pipelines without a safety checker say so every time."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    yield
    diffusers_logging.set_verbosity(before)


def of(model: str, mode: Mode = Mode.TEXT, **changes: Any) -> GenerationTask:
    values = {"model": model, "family": FAMILIES[model], "mode": mode, "strength": STRENGTH[mode], "steps": 3}
    return task(**values | changes)


def union(*types: str, net: str = "xl-promax", **options: Any) -> tuple[ControlInput, ...]:
    return tuple(ControlInput(net=net, control_type=each, **{"scale": 0.8} | options) for each in types)


def nets_of(model: str) -> tuple[tuple[ControlInput, ...], ...]:
    prefix = model.removesuffix("-inpaint")
    return (), controls(f"{prefix}-canny"), controls(f"{prefix}-canny", f"{prefix}-depth")


@pytest.mark.parametrize("scheduler", REFERENCED)
@pytest.mark.parametrize("model", ["sd2", "xl"])
def test_every_scheduler(zoo: Zoo, model: str, scheduler: str) -> None:
    """One net in every case; mode, guess mode and Karras alternate over the table, differently for each family."""
    turn = REFERENCED.index(scheduler) + (model == "xl")
    wanted = of(
        model,
        MODES[turn % 3],
        scheduler=scheduler,
        controls=nets_of(model)[1],
        guess_mode=turn % 2 == 1,
        use_karras_sigmas=turn % 2 == 0,
    )
    assert_parity(request(zoo, wanted))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("types", TYPES, ids="+".join)
def test_union_nets(zoo: Zoo, types: tuple[str, ...], mode: Mode) -> None:
    """Guess mode alternates."""
    guess = (len(types) + MODES.index(mode)) % 2 == 1
    assert_parity(request(zoo, of("xl", mode, controls=union(*types), guess_mode=guess)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("scheduler", "model", "mode", "nets", "guess", "karras"),
    [
        case
        for model in FAMILIES
        for case in itertools.product(REFERENCED, (model,), MODES, nets_of(model), (False, True), (False, True))
        if (case[3] or not case[4]) and (SCHEDULERS[case[0]].karras or not case[5])
        if model != "xl-inpaint" or case[2] is Mode.MASKED
    ],
)
def test_whole_matrix(
    zoo: Zoo, scheduler: str, model: str, mode: Mode, nets: tuple[ControlInput, ...], guess: bool, karras: bool
) -> None:
    wanted = of(model, mode, scheduler=scheduler, steps=8, controls=nets, guess_mode=guess, use_karras_sigmas=karras)
    assert_parity(request(zoo, wanted))


@pytest.mark.full
@pytest.mark.parametrize("scheduler", REFERENCED)
@pytest.mark.parametrize("net", ["xl-union", "xl-promax"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("types", TYPES, ids="+".join)
@pytest.mark.parametrize("guess", [False, True])
def test_whole_matrix_of_union_nets(
    zoo: Zoo, scheduler: str, net: str, mode: Mode, types: tuple[str, ...], guess: bool
) -> None:
    wanted = of("xl", mode, scheduler=scheduler, steps=8, controls=union(*types, net=net), guess_mode=guess)
    assert_parity(request(zoo, wanted))


WINDOWED = (
    ControlInput(net="xl-promax", control_type="canny", scale=1.3, start=0.0, end=0.8),
    ControlInput(net="xl-promax", control_type="tile", scale=0.4, start=0.3, end=1.0),
)


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(of("sd2", clip_skip=1), id="SD 2: clip_skip"),
        pytest.param(of("xl", clip_skip=2, negative_prompt=""), id="clip_skip beside an empty negative prompt"),
        pytest.param(of("xl", prompt="", negative_prompt=""), id="no prompt"),
        pytest.param(of("xl", guidance_scale=1.0, controls=controls("xl-canny")), id="no guidance"),
        pytest.param(of("xl", width=96, height=48, controls=controls("xl-canny", "xl-depth")), id="not square"),
        pytest.param(of("xl", samples=2, controls=controls("xl-canny")), id="samples"),
        pytest.param(of("xl-inpaint", Mode.MASKED, controls=controls("xl-canny")), id="inpaint UNet"),
        pytest.param(of("xl-inpaint", Mode.MASKED, strength=1.0), id="inpaint UNet at strength 1"),
        pytest.param(of("xl", controls=WINDOWED), id="union: windows and scales"),
        pytest.param(of("xl", Mode.IMAGE, controls=WINDOWED, guess_mode=True), id="union: windows, image, guess"),
        pytest.param(of("xl", controls=union("canny", "lineart")), id="union: two types of one index"),
        pytest.param(of("xl", controls=union("openpose", net="xl-union")), id="union: six types"),
        pytest.param(of("xl", controls=union("canny"), guidance_scale=1.0), id="union: no guidance"),
        pytest.param(
            of("xl", controls=(*union("canny"), *union("depth", net="xl-union"))), id="union: two nets, one type each"
        ),
    ],
)
def test_one_feature_at_a_time(zoo: Zoo, wanted: GenerationTask) -> None:
    assert_parity(request(zoo, wanted))


def changed(zoo: Zoo, one: GenerationTask, other: GenerationTask) -> float:
    """How far apart two tasks end on the same control maps."""
    return relative_error(latents(drawn_alone(request(zoo, one))), latents(drawn_alone(request(zoo, other))))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(of("xl", controls=union("canny")), of("xl", controls=union("depth")), id="type"),
        pytest.param(
            of("xl", controls=(*union("canny", scale=1.4), *union("tile", scale=0.2))),
            of("xl", controls=(*union("tile", scale=1.4), *union("canny", scale=0.2))),
            id="which type is of which map",
        ),
        pytest.param(of("xl", negative_prompt=""), of("xl", negative_prompt="!"), id="empty negative prompt"),
    ],
)
def test_what_is_asked_shows(zoo: Zoo, one: GenerationTask, other: GenerationTask) -> None:
    """Else the equalities above would say nothing of it."""
    assert changed(zoo, one, other) > 100 * TOLERANCE


def test_an_empty_negative_prompt_is_text_where_the_model_does_not_ask_for_zeros(zoo: Zoo) -> None:
    base = replace(zoo.families["xl"], id="xl-text", hash="hash-of-xl-text", zero_empty_negative=False)
    other = replace(zoo, families={**zoo.families, "xl": base})
    wanted = of("xl", negative_prompt="")
    assert_parity(request(other, wanted))
    ours = latents(drawn_alone(request(other, wanted)))
    assert relative_error(ours, latents(drawn_alone(request(zoo, wanted)))) > 100 * TOLERANCE


def test_unlike_families_side_by_side(zoo: Zoo) -> None:
    """Union nets are where rows might see each other: diffusers' attend over the whole batch."""
    tasks = [
        of("xl", controls=union("canny"), seed=1, steps=5),
        of("xl", controls=union("depth", "tile"), seed=2),
        of("xl", controls=union("canny"), seed=3, guess_mode=True),
        of("xl", controls=controls("xl-canny"), seed=4, guidance_scale=1.0),
        of("xl", Mode.IMAGE, controls=(*union("canny"), *controls("xl-depth")), seed=5, samples=2),
        of("sd2", controls=controls("sd2-canny"), seed=6),
        task(seed=7, steps=4, controls=controls("canny")),
    ]
    asked = [request(zoo, wanted) for wanted in tasks]
    together = run(tiny_engine(), [(min(n, 3), each) for n, each in enumerate(asked)])
    for each in asked:
        outcome = together[each]
        assert not isinstance(outcome, Exception)
        assert relative_error(latents(outcome), latents(drawn_alone(each))) < TOLERANCE


def test_a_type_that_the_union_net_does_not_know_is_refused(zoo: Zoo) -> None:
    with pytest.raises(JobError, match="shuffle"):
        request(zoo, of("xl", controls=union("shuffle")))
    with pytest.raises(JobError, match="tile"):
        request(zoo, of("xl", controls=union("tile", net="xl-union")))


def test_what_is_masked_is_black_to_a_union_net(zoo: Zoo) -> None:
    """Annotators mark it by -1, as the inpaint net of SD 1.5 wants it."""
    wanted = of("xl", Mode.MASKED, controls=union("inpaint"))
    marked = picture(64, 64, seed=3).astype(np.float32) / 255
    marked[16:48, 16:48] = -1
    black = marked.clip(min=0)
    ours, expected = (latents(drawn_alone(request(zoo, wanted, maps=[drawn]))) for drawn in (marked, black))
    assert torch.equal(ours, expected)


def test_byte_equal_in_the_deterministic_mode(zoo: Zoo) -> None:
    tasks = [
        of("xl", controls=union("canny"), seed=1, steps=2),
        of("xl", controls=(*union("depth", "tile"), *controls("xl-canny")), seed=2, steps=2),
        of("xl", guidance_scale=1.0, seed=3, steps=2),
    ]
    asked = [request(zoo, wanted) for wanted in tasks]
    together = run(tiny_engine(deterministic=4), [(n // 2, each) for n, each in enumerate(asked)])
    for each in asked:
        crowded, alone = together[each], run(tiny_engine(deterministic=4), [(0, each)])[each]
        assert not isinstance(crowded, Exception)
        assert not isinstance(alone, Exception)
        assert torch.equal(latents(crowded), latents(alone))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.03)], ids=str)
def test_half_precision(zoo: Zoo, dtype: torch.dtype, tolerance: float) -> None:
    """The bounds of ``test_dtypes``."""

    def cast(module: torch.nn.Module) -> Any:
        return torch.nn.Module.to(copy.deepcopy(module), dtype=dtype)

    base, net = zoo.families["xl"], zoo.nets["xl-promax"]
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    half = replace(base, dtype=dtype, **{part: cast(getattr(base, part)) for part in parts})
    halved = replace(zoo, families={"xl": half}, nets={net.id: replace(net, net=cast(net.net))})
    wanted = of("xl", Mode.IMAGE, controls=union("canny", "depth"), prompt="a (fox:1.3)")
    drawn = latents(drawn_alone(request(halved, wanted)))
    assert relative_error(drawn.float(), latents(drawn_alone(request(zoo, wanted)))) < tolerance


def test_from_the_folder_to_the_picture(zoo: Zoo, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'models.sqlite3'}")
    database.migrate()
    catalog = Catalog(database)
    folders = {
        "xl": save_base(zoo.families["xl"], tmp_path / "xl"),
        "xl-canny": save_net(zoo.nets["xl-canny"], tmp_path / "xl-canny"),
        "xl-promax": save_net(zoo.nets["xl-promax"], tmp_path / "xl-promax"),
    }
    entries = [publish(catalog, ModelSource(id=name, path=path)) for name, path in folders.items()]
    base = load_base(entries[0], torch.device("cpu"), torch.float32)
    nets = {entry.id: load_net(entry, torch.device("cpu"), torch.float32) for entry in entries[1:]}
    database.close()
    wanted = of("xl", controls=(*controls("xl-canny"), *union("depth")))
    loaded = latents(drawn_alone(request(replace(zoo, families={"xl": base}, nets=nets), wanted)))
    # Weights lie elsewhere in memory, which changes the order of additions.
    assert relative_error(loaded, latents(drawn_alone(request(zoo, wanted)))) < 1e-5
