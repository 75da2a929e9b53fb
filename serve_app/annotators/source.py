"""What an annotator gets, what it gives, and how it declares its parameters. No detector is imported here."""

import reprlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.errors import JobError
from serve_app.tasks import ControlMap, ImageArray, JsonScalar


@dataclass(frozen=True, slots=True)
class Param:
    """A number that callers may choose."""

    name: str
    default: float
    minimum: float
    maximum: float
    step: float
    """How finely a slider should move; values between are accepted."""
    help: str
    or_zero: bool = False
    """0 is accepted too, below ``minimum``; what it means, ``help`` says."""
    whole: bool = False
    """It counts something: fractions are refused."""
    below: str = ""
    """Another parameter of the same annotator that this one must be smaller than."""

    @property
    def expects(self) -> str:
        """The numbers that are accepted, in words."""
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'0 or ' * self.or_zero}from {self.minimum:g} to {self.maximum:g}"

    def accepts(self, number: float) -> bool:
        in_range = self.minimum <= number <= self.maximum or (self.or_zero and number == 0)
        return in_range and (not self.whole or number == int(number))

    def effective(self, number: float) -> float:
        """An accepted number as its default is written, so that 50 and 50.0 are one value, for the cache too."""
        return int(number) if isinstance(self.default, int) and number == int(number) else number

    def read(self, value: object) -> float:
        """``value``, checked.

        Raises:
            ValueError: not a number, or not one that is accepted; completes "The annotator parameter ...".
        """
        if isinstance(value, int | float) and not isinstance(value, bool) and self.accepts(value):
            return self.effective(value)
        raise ValueError(f"must be {self.expects}, got {reprlib.repr(value)}")


@dataclass(frozen=True, slots=True)
class Switch:
    """A yes or no that callers may choose."""

    name: str
    default: bool
    help: str

    def read(self, value: object) -> bool:
        """``value``, checked.

        Raises:
            ValueError: neither true nor false; completes "The annotator parameter ...".
        """
        if isinstance(value, bool):
            return value
        raise ValueError(f"must be yes or no, got {reprlib.repr(value)}")


@dataclass(frozen=True, slots=True)
class Source:
    """What an annotator looks at. Already at the output's size: a map of the same size lines up with the output."""

    image: ImageArray
    """(H, W, 3) uint8 RGB."""
    mask: ImageArray | None
    """(H, W) uint8, 255 = repaint."""
    seed: int
    params: Mapping[str, float]
    """Every declared parameter, defaults filled in; a switch is a bool."""
    networks: Mapping[str, Any] = field(default_factory=dict)
    """The networks that the annotator's row names, loaded."""


class Annotator(Protocol):
    def __call__(self, source: Source) -> ControlMap:
        """The control map, (H, W, 3). Pure, and safe in several threads at once."""
        ...


class Networks(Protocol):
    """Where annotators get loaded networks from; ``serve_app.annotators.detectors`` has the one with weights."""

    def lease(self, names: Sequence[str]) -> AbstractContextManager[Mapping[str, Any]]:
        """The networks of these names, loaded first where necessary, kept in memory until the context ends.

        Raises:
            AnnotatorUnavailable: weights or a package are missing.
        """
        ...


@dataclass(frozen=True, slots=True)
class AnnotatorRow:
    """One row of ANNOTATORS: where the function is, as ``module:name``, and what callers may choose."""

    target: str
    params: tuple[Param | Switch, ...] = ()
    networks: tuple[str, ...] = ()
    """Names in ``serve_app.annotators.weights.NETWORKS``; none: no weights are needed."""
    pixelwise: bool = False
    """Each pixel of the map follows from the picture's own pixel there. So a drawing stays one, and where the control
    type's maps hold lines, the picture is resized as such a map."""

    def read(self, given: Mapping[str, JsonScalar]) -> dict[str, float]:
        """The effective parameters.

        Raises:
            JobError: an unknown name, a bad value, or two that contradict each other.
        """
        values, problems = self.check(given)
        if problems:
            raise JobError(" ".join(problems))
        return values

    def check(self, given: Mapping[str, object], annotator: str = "") -> tuple[dict[str, float], list[str]]:
        """The effective parameters, without the bad ones, and what is wrong, in sentences that name ``annotator``."""
        of = f" of {annotator}" if annotator else ""
        names = [param.name for param in self.params]
        problems = [unknown_parameter(name, annotator, names) for name in given if name not in names]
        values: dict[str, float] = {}
        for param in self.params:
            try:
                values[param.name] = param.read(given.get(param.name, param.default))
            except ValueError as error:
                problems.append(f"The annotator parameter {param.name}{of} {error}.")
        for param in self.params:
            if isinstance(param, Param) and param.below and {param.name, param.below} <= set(values):
                value, bound = values[param.name], values[param.below]
                if value >= bound:
                    problems.append(
                        f"The annotator parameter {param.name}{of} must be below {param.below}, got {value:g} and "
                        f"{bound:g}."
                    )
        return values, problems


def unknown_parameter(name: str, annotator: str, allowed: Collection[str]) -> str:
    """The message for a parameter that ``annotator``, in words, does not have; "" leaves it out."""
    of = f" of {annotator}" if annotator else ""
    known = ", ".join(sorted(allowed)) or "none"
    return f"The annotator parameter {reprlib.repr(name)}{of} is unknown. Allowed: {known}."
