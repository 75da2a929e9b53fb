"""Which annotator makes each control map, with which parameters: fields and checks of all endpoints that make maps."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, cast

from pydantic import BeforeValidator, JsonValue, WithJsonSchema

from serve_app.annotators import ANNOTATORS, Param, Switch, chosen_annotator
from serve_app.annotators.source import unknown_parameter
from serve_app.api.fields import MAX_ITEMS, Problems, absent, read_flag, read_items, read_name, read_real, show
from serve_app.api.services import Services
from serve_app.controls import CONTROL_TYPES, annotator_problem
from serve_app.tasks import JsonScalar, MapInput

MAX_NAMES: Final = 64
"""Of parameters in one request, those for one control type counted too; annotators have a few each."""
MAX_PARAMS_CHARS: Final = 16_384
"""Of parameters sent as text, which the event loop parses."""

_PARAMETERS: Final = frozenset(param.name for row in ANNOTATORS.values() for param in row.params)

_Given = Mapping[str, JsonValue]


def _choices(value: JsonValue) -> tuple[str, ...]:
    """A name or a list; an empty place means the default of that control type."""
    if not isinstance(value, str | list):
        raise ValueError(f"must be a name or a list of names, got {show(value)}")  # noqa: TRY004  - as in read_text
    return tuple("" if absent(part) else read_name(part) for part in read_items(value))


def _params(value: JsonValue) -> tuple[_Given, ...]:
    """An object or a list of objects, null for an empty one; as JSON text from forms."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if len(value) <= MAX_PARAMS_CHARS else None
        except (ValueError, RecursionError):
            value = None
    parts = value if isinstance(value, list) else [value]
    found = tuple({} if absent(part) and isinstance(value, list) else part for part in parts[: MAX_ITEMS + 1])
    objects = tuple(part for part in found if isinstance(part, dict))
    if len(objects) != len(parts):
        raise ValueError(
            "must be an object of parameter names and values, or a list of such objects, at most "
            f"{MAX_PARAMS_CHARS} characters as text"
        )
    inner = (value for one in objects for value in one.values() if isinstance(value, dict))
    if sum(map(len, (*objects, *inner))) > MAX_NAMES:
        raise ValueError(f"must not have more than {MAX_NAMES} names in all")
    return objects


_OBJECT: Final = {"type": "object", "additionalProperties": True}
_OBJECT_OR_NULL: Final = {"anyOf": [_OBJECT, {"type": "null"}]}

AnnotatorNames = Annotated[tuple[str, ...], BeforeValidator(_choices)]
AnnotatorParams = Annotated[
    tuple[Mapping[str, object], ...],
    BeforeValidator(_params),
    WithJsonSchema({"anyOf": [_OBJECT, {"type": "array", "items": _OBJECT_OR_NULL}]}),
]


def choose_annotators(
    kinds: Sequence[str],
    names: Sequence[str],
    params: Sequence[Mapping[str, object]],
    auto_hint: bool,
    problems: Problems,
) -> tuple[MapInput, ...]:
    """How each map is made, with every parameter at its effective value.

    ``kinds``: control types, known ones. ``names`` and ``params``: one for each of them, or one for all; none: the
    defaults. One object of parameters for several control types gives each annotator what it knows; a member that is
    named like a control type holds parameters for that type alone.
    """
    count = len(kinds)
    for name, given in (("annotator", names), ("annotator_params", params)):
        if len(given) not in {0, 1, count}:
            problems.add(name, f"The {name} field has {len(given)} values for {count} maps; send one for each or one.")
            return ()
    wanted = [names[index if len(names) > 1 else 0] or None if names else None for index in range(count)]
    for kind, choice in zip(kinds, wanted, strict=True):
        if problem := annotator_problem(kind, choice):
            problems.add("annotator", f"For the control type {kind!r}: {problem}")
    if "annotator" in problems:
        return ()
    # The map of an inpaint net marks masked pixels by -1, which no picture can hold: it is always made here.
    makers = [chosen_annotator(kind, name, auto_hint) for kind, name in zip(kinds, wanted, strict=True)]
    for kind, choice, maker in zip(kinds, wanted, makers, strict=True):
        if maker is None and choice not in {None, "none"}:
            problems.add(
                "annotator",
                f"For the control type {kind!r}: the annotator {choice!r} would not run, because auto_hint: no says "
                "that the picture is the control map. Leave one of the two out.",
            )
    values = _given(kinds, makers, params, problems)
    return tuple(
        MapInput(
            control_type=kind, annotator=maker, params=_effective(maker, own, problems), auto_hint=maker is not None
        )
        for kind, maker, own in zip(kinds, makers, values, strict=True)
    )


def _given(
    kinds: Sequence[str],
    makers: Sequence[str | None],
    params: Sequence[Mapping[str, object]],
    problems: Problems,
) -> list[dict[str, object]]:
    """What is given for each map, by name; for a map that is not made, nothing."""
    running = tuple(dict.fromkeys(maker for maker in makers if maker is not None))
    if not params or not running:
        return [{} for _ in kinds]
    if len(params) > 1:
        found = [
            _for_all(given, (kind,), problems) | _for_type(given, kind, problems)
            for kind, given in zip(kinds, params, strict=True)
        ]
        return [own if maker is not None else {} for maker, own in zip(makers, found, strict=True)]
    (given,) = params
    for_all = _for_all(given, kinds, problems)
    allowed = {name for maker in running for name in _params_of(maker)}
    for name in for_all:
        if name not in allowed:
            problems.add("annotator_params", unknown_parameter(name, " and ".join(running), allowed))
    return [
        {name: value for name, value in for_all.items() if name in _params_of(maker)}
        | (_for_type(given, kind, problems) if maker is not None else {})
        for kind, maker in zip(kinds, makers, strict=True)
    ]


def _for_all(given: Mapping[str, object], kinds: Sequence[str], problems: Problems) -> dict[str, object]:
    """The parameters of one object that hold for every control type; a type that is none of ``kinds`` is a problem."""
    found = {name: value for name, value in given.items() if name not in kinds}
    for name, value in given.items():
        if name in found and (name in CONTROL_TYPES or (isinstance(value, dict) and name not in _PARAMETERS)):
            problems.add(
                "annotator_params",
                f"The control type in annotator_params {show(name)} is unknown. Allowed: {', '.join(kinds)}.",
            )
            del found[name]
    return found


def _for_type(given: Mapping[str, object], kind: str, problems: Problems) -> dict[str, object]:
    """The parameters of one object that hold for one control type, under its name; null: none."""
    own = given.get(kind)
    if isinstance(own, dict):
        return own
    if not _absent(own):
        problems.add(
            "annotator_params",
            f"The control type {kind!r} in annotator_params must have an object of parameter names and values, got "
            f"{show(own)}.",
        )
    return {}


def _params_of(maker: str | None) -> dict[str, Param | Switch]:
    return {param.name: param for param in ANNOTATORS[maker].params} if maker is not None else {}


def _effective(maker: str | None, given: Mapping[str, object], problems: Problems) -> dict[str, JsonScalar]:
    """Every parameter of the annotator, as given or by default."""
    if maker is None:
        return {}
    known = _params_of(maker)
    read = {name: _as_typed(known.get(name), value) for name, value in given.items()}
    values, wrong = ANNOTATORS[maker].check(
        {name: value for name, value in read.items() if name not in known or not _absent(value)}, maker
    )
    for problem in wrong:
        problems.add("annotator_params", problem)
    return dict(values)


def _absent(value: object) -> bool:
    """Whether a parameter is sent as one of the spellings of 'not given'."""
    return value is None or (isinstance(value, str) and absent(value))


def _as_typed(param: Param | Switch | None, value: object) -> object:
    """A number or a switch in any of its spellings as what it means; anything else as it is, to be refused."""
    if isinstance(param, Switch):
        try:
            return read_flag(cast("JsonValue", value))
        except ValueError:
            return value
    number = read_real(cast("JsonValue", value))
    return value if number is None else number


async def check_ready(maps: Sequence[MapInput], services: Services, problems: Problems, remedy: str) -> None:
    """An annotator that is known to lack its weights is a problem of the request: it would fail every time.

    ``remedy``: what else the caller of this endpoint can do, a sentence.
    """
    if not any(one.annotator is not None and ANNOTATORS[one.annotator].networks for one in maps):
        return
    state = await services.annotators.state(services.backend_stats)
    for one in maps:
        if one.annotator is not None and (lacks := state.lacks(one.annotator)) is not None:
            problems.add(
                "annotator",
                f"The annotator {one.annotator!r} of {one.control_type!r} is not available: {lacks}. {remedy}",
            )
