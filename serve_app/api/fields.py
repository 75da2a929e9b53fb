"""Lenient wire types: what clients send for a number, a flag, a list, and what it means.

The vendor's SDKs disagree on types: ``"512"`` or ``512``, ``"yes"`` or ``true``, ``null`` or ``"None"``. Each type here
reads all spellings of one meaning and refuses the rest with a sentence that completes "The <field> field ...".
Knows nothing of any endpoint.
"""

import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    model_validator,
)
from pydantic import ValidationError as PydanticError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from serve_app.errors import ValidationFailed

MAX_NAME_CHARS = 256
"""Of a model id, a scheduler name and the like."""
MAX_TRACK_ID_CHARS = 1024
MAX_ITEMS = 1000
"""Of one list in a request: the event loop reads them, and text of 20 MB holds millions."""
MAX_MESSAGES = 20
"""About one field in one answer."""

_ABSENT_WORDS = frozenset({"", "null", "None"})
_TRUE = frozenset({"yes", "true", "1", "on"})
_FALSE = frozenset({"no", "false", "0", "off"})
_WHOLE = re.compile(r"[+-]?[0-9]{1,20}(\.0{0,20})?")
_REAL = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlong = 40
_short.maxlevel = 2


def show(value: object) -> str:
    """``value`` as a message quotes it: short, printable, without unpaired surrogates."""
    return _short.repr(value)


def absent(value: JsonValue) -> bool:
    """Whether ``value`` is one of the spellings of 'not given'."""
    if isinstance(value, str):
        return value.strip() in _ABSENT_WORDS
    return value is None or value == []


def text_problem(value: str) -> str | None:
    """Why a string can't be stored and sent on: NUL and unpaired surrogates are valid JSON and nothing else."""
    if "\0" in value:
        return "must not hold NUL characters"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "must not hold unpaired surrogates"
    return None


def read_flag(value: JsonValue) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, (str, int, float)) else ""
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"must be yes or no, got {show(value)}")


def read_text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, got {show(value)}")  # noqa: TRY004  - pydantic collects ValueError only
    if problem := text_problem(value):
        raise ValueError(problem)
    return value


def read_picture(value: JsonValue) -> str:
    """A link, base64 or a data URI; white space around it comes from copying."""
    return read_text(value).strip()


def read_name(value: JsonValue) -> str:
    name = read_text(value).strip()
    if len(name) > MAX_NAME_CHARS:
        raise ValueError(f"must not be longer than {MAX_NAME_CHARS} characters")
    return name


def read_items(value: JsonValue) -> Sequence[JsonValue]:
    """A list as it is, or one string in parts, at its commas. Counted before it is taken apart."""
    items = value if isinstance(value, list) else read_text(value)
    count = items.count(",") + 1 if isinstance(items, str) else len(items)
    if count > MAX_ITEMS:
        raise ValueError(f"must not have more than {MAX_ITEMS} values, got {count}")
    return items.split(",") if isinstance(items, str) else items


def read_names(value: JsonValue) -> tuple[str, ...]:
    """A list of names, or one string with commas; empty parts are dropped."""
    return tuple(name for name in (read_name(part) for part in read_items(value)) if name)


def read_integer(value: JsonValue) -> int | None:
    """The integer that ``value`` spells, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    return None


def read_real(value: JsonValue) -> float | None:
    """The finite number that ``value`` spells, or None."""
    if isinstance(value, str) and _REAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def read_track_id(value: JsonValue) -> str | int | float | bool | None:
    """Any scalar, echoed unchanged."""
    if isinstance(value, (list, dict)):
        raise ValueError(f"must be a string, a number or null, got {show(value)}")  # noqa: TRY004  - as in read_text
    if isinstance(value, str):
        read_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    if value is not None and len(str(value)) > MAX_TRACK_ID_CHARS:
        raise ValueError(f"must not be longer than {MAX_TRACK_ID_CHARS} characters")
    return value


class _Numeric:
    """Pydantic metadata: reads a wire value by ``read`` and documents the bounds in the JSON schema."""

    low: float
    high: float

    def read(self, value: JsonValue) -> object:
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Whole(_Numeric):
    """An integer from ``low`` to ``high``."""

    low: int
    high: int
    multiple_of: int = 1

    @property
    def rule(self) -> str:
        multiple = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"must be a whole number from {self.low} to {self.high}{multiple}"

    def read(self, value: JsonValue) -> int:
        number = read_integer(value)
        if number is None or not self.low <= number <= self.high or number % self.multiple_of:
            raise ValueError(f"{self.rule}, got {show(value)}")
        return number


@dataclass(frozen=True, slots=True)
class Real(_Numeric):
    """A finite number from ``low`` (left out when ``above``) to ``high``."""

    low: float
    high: float
    above: bool = False

    @property
    def rule(self) -> str:
        if self.above:
            return f"must be a number above {self.low:g}, up to {self.high:g}"
        return f"must be a number from {self.low:g} to {self.high:g}"

    def read(self, value: JsonValue) -> float:
        number = read_real(value)
        if number is None or not self.low <= number <= self.high or (self.above and number == self.low):
            raise ValueError(f"{self.rule}, got {show(value)}")
        return number


@dataclass(frozen=True, slots=True)
class Reals(_Numeric):
    """One finite number, a list of them, or a comma list."""

    low: float
    high: float

    def read(self, value: JsonValue) -> tuple[float, ...]:
        one = Real(self.low, self.high)
        return tuple(one.read(part) for part in (read_items(value) if isinstance(value, list | str) else (value,)))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        number = {"type": "number", "minimum": self.low, "maximum": self.high}
        return {"anyOf": [number, {"type": "array", "items": number}]}


Flag = Annotated[bool, BeforeValidator(read_flag)]
Text = Annotated[str, BeforeValidator(read_text)]
Picture = Annotated[str, BeforeValidator(read_picture)]
Name = Annotated[str, BeforeValidator(read_name)]
Names = Annotated[tuple[str, ...], BeforeValidator(read_names)]
TrackId = Annotated[str | int | float | bool | None, BeforeValidator(read_track_id)]
Ignored = Annotated[object, BeforeValidator(lambda _value: None)]
"""Accepted whatever it is, and without effect."""


def one_of_words(*words: str) -> BeforeValidator:
    """A validator for a string out of a fixed few."""

    def read(value: JsonValue) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}, got {show(value)}")
        return str(value)

    return BeforeValidator(read)


class WireModel(BaseModel):
    """A request body. Unknown keys are ignored; every spelling of 'not given' leaves the default in place."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    verbatim: ClassVar[frozenset[str]] = frozenset()
    """Fields that keep ``""`` and ``"null"`` as they are."""

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, body: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        return {
            name: body[name]
            for name in cls.model_fields
            if name in body and (name in cls.verbatim or not absent(body[name]))
        }


class KeyOnlyRequest(WireModel):
    """A body with nothing but the key."""

    model_config = ConfigDict(json_schema_extra={"required": ["key"]})

    key: Ignored = None
    """Your API key; or send it as ``Authorization: Bearer``."""


class Problems:
    """Bad fields and why, collected so that one answer names all of them, each with ``MAX_MESSAGES`` at most."""

    def __init__(self) -> None:
        self._messages: dict[str, dict[str, None]] = {}  # as sets that keep their order
        self._left_out: Counter[str] = Counter()

    def add(self, field: str, message: str) -> None:
        messages = self._messages.setdefault(field, {})
        if message in messages:
            return
        if len(messages) < MAX_MESSAGES:
            messages[message] = None
        else:
            self._left_out[field] += 1

    def missing(self, field: str) -> None:
        self.add(field, f"The {field} field is required.")

    def __contains__(self, field: object) -> bool:
        return field in self._messages

    def raise_if_any(self) -> None:
        """Raises ValidationFailed with everything collected."""
        if self._messages:
            rest = {field: (f"And {count} more.",) for field, count in self._left_out.items()}
            raise ValidationFailed({field: (*found, *rest.get(field, ())) for field, found in self._messages.items()})


Model = TypeVar("Model", bound=WireModel)


def parse(model: type[Model], body: Mapping[str, JsonValue]) -> tuple[Model, Problems]:
    """Read ``body``; a field that can't be read keeps its default and is named in the problems.

    So checks that need several fields can still run on the good ones. Every field of ``model`` has a default; what is
    required is checked by the endpoint.
    """
    problems = Problems()
    try:
        return model.model_validate(body), problems
    except PydanticError as error:
        for item in error.errors(include_url=False, include_input=False):
            field = str(item["loc"][0])
            problems.add(field, f"The {field} field {_reason(item.get('ctx', {}), item['msg'])}.")
    return model.model_validate({name: value for name, value in body.items() if name not in problems}), problems


def _reason(context: Mapping[str, Any], fallback: str) -> str:
    return str(context["error"]) if "error" in context else fallback


def per_item(
    values: Sequence[float], count: int, default: float, name: str, complain: Callable[[str, str], None]
) -> tuple[float, ...]:
    """One value for each of ``count`` items: a single value holds for all, any other length is complained about."""
    if not values:
        return (default,) * count
    if len(values) == 1:
        return tuple(values) * count
    if len(values) != count:
        complain(name, f"The {name} field has {len(values)} values for {count} ControlNets; send one for each or one.")
        return (default,) * count
    return tuple(values)
