"""Which annotator makes each control map, with which parameters: fields and checks of all endpoints that make maps."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Final

from pydantic import BeforeValidator, JsonValue, WithJsonSchema

from serve_app.annotators import ANNOTATORS, Param, Switch, chosen_annotator
from serve_app.api.fields import Problems, absent, read_flag, read_name, read_real, show
from serve_app.api.services import Services
from serve_app.controls import annotator_problem
from serve_app.errors import one_of
from serve_app.tasks import JsonScalar, MapInput

MAX_NAMES: Final = 64
"""Of parameters in one request; annotators have a few each."""

_Given = Mapping[str, JsonValue]


def _choices(value: JsonValue) -> tuple[str, ...]:
    """A name or a list; an empty place means the default of that control type."""
    parts: Sequence[JsonValue] = (
        value.split(",") if isinstance(value, str) else value if isinstance(value, list) else ()
    )
    if not parts:
        raise ValueError(f"must be a name or a list of names, got {show(value)}")
    return tuple("" if absent(part) else read_name(part) for part in parts)


def _params(value: JsonValue) -> tuple[_Given, ...]:
    """An object or a list of objects, null for an empty one; as JSON text from forms."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    parts = value if isinstance(value, list) else [value]
    found = tuple({} if absent(part) and isinstance(value, list) else part for part in parts)
    objects = tuple(part for part in found if isinstance(part, dict))
    if len(objects) != len(found) or sum(map(len, objects)) > MAX_NAMES:
        raise ValueError("must be an object of parameter names and values, or a list of such objects")
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
    """What is given for each map, by name. Maps that are not made need no parameters and ignore them."""
    objects = [params[index if len(params) > 1 else 0] if params else {} for index in range(len(kinds))]
    found: list[dict[str, object]] = []
    for kind, maker, given in zip(kinds, makers, objects, strict=True):
        for_all = {name: value for name, value in given.items() if not isinstance(value, dict)}
        for_type = given.get(kind)
        if len(params) == 1:
            allowed = {name for other in makers for name in _params_of(other)}
            _refuse_unknown(for_all, allowed, makers, problems)
            for_all = {name: value for name, value in for_all.items() if name in _params_of(maker)}
        strangers = [name for name, value in given.items() if isinstance(value, dict) and name not in kinds]
        for name in strangers:
            problems.add("annotator_params", one_of("control type in annotator_params", name, tuple(kinds)))
        own = for_all | (for_type if isinstance(for_type, dict) else {})
        _refuse_unknown(own, set(_params_of(maker)), [maker], problems)
        found.append(own)
    return found


def _refuse_unknown(
    given: Mapping[str, object], allowed: set[str], makers: Sequence[str | None], problems: Problems
) -> None:
    if None in makers:
        return  # nothing is made of it
    for name in given:
        if name not in allowed:
            of = " and ".join(dict.fromkeys(str(maker) for maker in makers))
            known = ", ".join(sorted(allowed)) or "none"
            problems.add(
                "annotator_params", f"The annotator parameter {show(name)} of {of} is unknown. Allowed: {known}."
            )


def _params_of(maker: str | None) -> dict[str, Param | Switch]:
    return {param.name: param for param in ANNOTATORS[maker].params} if maker is not None else {}


def _effective(maker: str | None, given: Mapping[str, object], problems: Problems) -> dict[str, JsonScalar]:
    """Every parameter of the annotator, as given or by default."""
    values: dict[str, JsonScalar] = {}
    if maker is None:
        return values
    for name, param in _params_of(maker).items():
        try:
            values[name] = _read(param, given[name]) if name in given and not _absent(given[name]) else param.default
        except ValueError as error:
            problems.add("annotator_params", f"The annotator parameter {name} of {maker} {error}.")
    for problem in ANNOTATORS[maker].contradictions(values):
        problems.add("annotator_params", f"{problem}.")
    return values


def _absent(value: object) -> bool:
    """Whether a parameter is sent as one of the spellings of 'not given'."""
    return value is None or (isinstance(value, str) and absent(value))


def _read(param: Param | Switch, value: object) -> JsonScalar:
    scalar = value if isinstance(value, str | int | float) else None
    if isinstance(param, Switch):
        return read_flag(scalar)
    number = read_real(scalar)
    if number is None or not param.accepts(number):
        raise ValueError(f"must be {param.expects} (step {param.step:g}), got {show(value)}")
    return param.effective(number)


async def check_ready(maps: Sequence[MapInput], services: Services, problems: Problems) -> None:
    """An annotator that is known to lack its weights is a problem of the request: it would fail every time."""
    if not any(one.annotator is not None and ANNOTATORS[one.annotator].networks for one in maps):
        return
    state = await services.annotators.state(services.backend_stats)
    for one in maps:
        if one.annotator is not None and (lacks := state.lacks(one.annotator)) is not None:
            problems.add(
                "annotator",
                f"The annotator {one.annotator!r} of {one.control_type!r} is not available: {lacks}. "
                "Or send the control map itself with auto_hint: no.",
            )
