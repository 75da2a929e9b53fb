"""Deterministic mode: the same bytes whatever the load; without it, the same up to rounding."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from serve_app.config import DenoiserConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerationRequest, RunningRequest
from serve_app.errors import Cancelled
from serve_app.metrics import PrometheusMeter
from serve_app.tasks import ControlInput, GenerationTask, Mode
from support.crowds import Guest, Outcome, crowds, entertain, same_bits
from support.tiny import Zoo, controls, latents, relative_error, request, run, task

TOLERANCE = 1e-4
DETERMINISTIC = [DenoiserConfig(deterministic=True, max_rows=8), DenoiserConfig(deterministic=3)]
NORMAL = [DenoiserConfig(max_rows=12), DenoiserConfig(max_rows=2)]

any_crowd = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.reuse, Phase.generate],  # a crowd takes too long to be shrunk
)
short, long = settings(any_crowd, max_examples=5), settings(any_crowd, max_examples=150)


def engine(config: DenoiserConfig) -> Engine:
    return Engine(config, PrometheusMeter())


def alone(config: DenoiserConfig, wanted: GenerationRequest) -> Outcome:
    """How the request does with the engine to itself."""
    return run(engine(config), [(0, wanted)])[wanted]


def check(zoo: Zoo, guests: Sequence[Guest], config: DenoiserConfig) -> None:
    """Whoever is not cancelled gets what it gets alone: to the bit in the deterministic mode."""
    invited = [(guest, request(zoo, guest.task)) for guest in guests]
    together = entertain(engine(config), invited)
    for guest, one in invited:
        ours = together[one]
        if isinstance(ours, Cancelled):
            assert guest.cancelled is not None
            continue
        expected = alone(config, one)
        assert type(ours) is type(expected)
        if isinstance(ours, RunningRequest) and isinstance(expected, RunningRequest):
            if config.deterministic:
                assert same_bits(ours, expected)
            else:
                assert relative_error(latents(ours), latents(expected)) < TOLERANCE


@short
@given(crowds(4), st.sampled_from(DETERMINISTIC))
def test_any_crowd_draws_to_the_bit_what_each_draws_alone(
    zoo: Zoo, guests: list[Guest], config: DenoiserConfig
) -> None:
    check(zoo, guests, config)


@short
@given(crowds(4), st.sampled_from(NORMAL))
def test_any_crowd_draws_what_each_draws_alone(zoo: Zoo, guests: list[Guest], config: DenoiserConfig) -> None:
    check(zoo, guests, config)


@pytest.mark.full
@long
@given(crowds(8), st.sampled_from(DETERMINISTIC))
def test_any_large_crowd_draws_to_the_bit_what_each_draws_alone(
    zoo: Zoo, guests: list[Guest], config: DenoiserConfig
) -> None:
    check(zoo, guests, config)


@pytest.mark.full
@long
@given(crowds(8), st.sampled_from(NORMAL))
def test_any_large_crowd_draws_what_each_draws_alone(zoo: Zoo, guests: list[Guest], config: DenoiserConfig) -> None:
    check(zoo, guests, config)


SMALL = {"width": 32, "height": 32}
NEIGHBOURS = [
    Guest(0, 3, task(**SMALL, controls=controls("shuffle", "canny"), seed=3, steps=9)),
    Guest(1, None, task(**SMALL, guidance_scale=1.0, controls=controls("depth", "depth"), samples=2)),
    Guest(2, None, task(**SMALL, controls=controls("depth"), guess_mode=True, mode=Mode.IMAGE, strength=0.5)),
    Guest(2, None, task(**SMALL, scheduler="EulerAncestralDiscreteScheduler", steps=3)),
]


@pytest.mark.parametrize("config", DETERMINISTIC, ids=["by size", "three rows"])
@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(
            task(**SMALL, controls=controls("canny", "depth", "shuffle"), steps=6), id="nets in an order of their own"
        ),
        pytest.param(
            task(
                **SMALL, mode=Mode.IMAGE, strength=0.5, samples=3, guidance_scale=1.0, steps=8
            ),  # all of a forward of three
            id="latents in a layout of their own",
        ),
        pytest.param(
            task(
                **SMALL,
                controls=(ControlInput(net="canny", control_type="canny", start=0.5),),
                mode=Mode.MASKED,
                strength=0.9,
                steps=7,
            ),
            id="a net that comes late",
        ),
    ],
)
def test_unlike_neighbours_change_no_bit(zoo: Zoo, config: DenoiserConfig, subject: GenerationTask) -> None:
    """One is cancelled meanwhile, some have one row a picture."""
    one = request(zoo, subject)
    expected = alone(config, one)
    assert isinstance(expected, RunningRequest)
    others = [(guest, request(zoo, guest.task)) for guest in NEIGHBOURS]
    ours = entertain(engine(config), [(Guest(1, None, subject), one), *others])[one]
    assert isinstance(ours, RunningRequest)
    assert same_bits(ours, expected)
    if config.deterministic is True:
        assert ours.forward_rows / ours.forwards > expected.forward_rows / expected.forwards  # it did have neighbours


def xl(*nets: tuple[str, str], **changes: Any) -> GenerationTask:
    """``nets``: pairs of a net and a control type."""
    asked = tuple(ControlInput(net=net, control_type=kind, scale=0.7) for net, kind in nets)
    return task(**SMALL, model="xl", family="sdxl", controls=asked, **changes)


def test_unlike_neighbours_change_no_bit_of_sdxl(zoo: Zoo) -> None:
    """With a union net that is guided by two maps here and by one next door."""
    config = DenoiserConfig(deterministic=4)
    subject = request(zoo, xl(("xl-canny", "canny"), ("xl-union", "depth"), ("xl-union", "canny"), steps=5))
    expected = alone(config, subject)
    assert isinstance(expected, RunningRequest)
    others = [
        Guest(0, None, xl(("xl-union", "depth"), seed=3, guidance_scale=1.0, steps=6)),
        Guest(0, 4, xl(("xl-depth", "depth"), guess_mode=True, mode=Mode.IMAGE, strength=0.6, steps=8)),
        Guest(2, None, xl(prompt="", samples=2, steps=3)),
    ]
    invited = [(guest, request(zoo, guest.task)) for guest in others]
    ours = entertain(engine(config), [(Guest(1, None, subject.task), subject), *invited])[subject]
    assert isinstance(ours, RunningRequest)
    assert same_bits(ours, expected)
    assert ours.forward_rows > expected.forward_rows


def test_identical_requests_are_identical_in_any_place(zoo: Zoo) -> None:
    """They join at different steps, among a stranger, in forwards of three rows that hold one and a half of them."""
    config = DenoiserConfig(deterministic=3)
    twins = [request(zoo, task(**SMALL, steps=4, controls=controls("canny", "depth"))) for _ in range(3)]
    guests = [(Guest(n, None, one.task), one) for n, one in enumerate(twins)]
    stranger = request(zoo, task(**SMALL, guidance_scale=1.0, steps=9))
    outcomes = entertain(engine(config), [*guests, (Guest(1, None, stranger.task), stranger)])
    drawn = [outcomes[one] for one in twins]
    for one, other in pairwise(drawn):
        assert isinstance(one, RunningRequest)
        assert isinstance(other, RunningRequest)
        assert same_bits(one, other)


def test_every_forward_has_the_pinned_rows_and_the_count_says_what_was_asked_for(zoo: Zoo) -> None:
    widths: list[int] = []
    hook = zoo.base.unet.conv_out.register_forward_hook(lambda *call: widths.append(len(call[2])))
    drawn = alone(DenoiserConfig(deterministic=5), request(zoo, task(steps=3)))
    hook.remove()
    assert widths == [5, 5, 5]
    assert isinstance(drawn, RunningRequest)
    assert (drawn.forwards, drawn.forward_rows) == (3, 6)


@pytest.mark.parametrize("wrong", [1, 0, "yes", 2.5])
def test_what_is_no_number_of_rows_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="deterministic"):
        DenoiserConfig.model_validate({"deterministic": wrong})
    assert DenoiserConfig.model_validate({"deterministic": True}).deterministic is True
