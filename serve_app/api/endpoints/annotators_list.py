"""``GET annotators``: which control types there are, what makes their maps, and with which parameters."""

from typing import Literal

from pydantic import BaseModel

from serve_app.annotators import ANNOTATORS, Param, Switch
from serve_app.api.envelopes import Answer
from serve_app.api.operations import Call
from serve_app.api.readiness import ReadinessReport
from serve_app.controls import CONTROL_TYPES, ControlType


class ParameterState(BaseModel):
    """A number with its bounds, or a yes or no."""

    name: str
    type: Literal["integer", "number", "boolean"]
    """integer: fractions are refused."""
    default: bool | int | float
    min: int | float | None
    max: int | float | None
    step: int | float | None
    """How finely a slider should move; values between are accepted."""
    also: list[int | float]
    """What is accepted beside ``min`` to ``max``; what it means, ``help`` says."""
    below: str | None
    """Another parameter that this one must be smaller than."""
    help: str


class AnnotatorState(BaseModel):
    """``none`` takes the picture as the map."""

    name: str
    parameters: list[ParameterState]
    ready: bool | None
    """null: no annotator replica has answered, so nobody knows; requests are accepted and tried."""
    missing: str | None
    """What it lacks: file, source, licence, and the command that gets it."""


class ControlTypeState(BaseModel):
    control_type: str
    annotator: str
    """The default."""
    ready: bool | None
    """Whether the default annotator is ready, as there."""
    needs_mask: bool
    annotators: list[AnnotatorState]
    nets: dict[str, str]
    """Base family -> the usual ControlNet."""


class AnnotatorsAnswer(BaseModel):
    status: Literal["success"] = "success"
    control_types: list[ControlTypeState]


async def annotators_list(call: Call) -> Answer:
    """List the control types, their annotators with parameters, and which of them are ready."""
    state = await call.services.annotators.state(call.services.backend_stats)
    types = [_type_state(name, row, state) for name, row in CONTROL_TYPES.items()]
    return Answer(AnnotatorsAnswer(control_types=types).model_dump(mode="json"))


def ready_types(state: ReadinessReport) -> list[str] | None:
    """Control types whose default annotator lacks nothing; None: not known."""
    if state.missing is None:
        return None
    return [name for name, row in CONTROL_TYPES.items() if state.ready(row.annotator)]


def _type_state(name: str, row: ControlType, state: ReadinessReport) -> ControlTypeState:
    return ControlTypeState(
        control_type=name,
        annotator=row.annotator,
        ready=state.ready(row.annotator),
        needs_mask=row.needs_mask,
        annotators=[_annotator_state(annotator, state) for annotator in row.annotators],
        nets=dict(row.nets),
    )


def _annotator_state(name: str, state: ReadinessReport) -> AnnotatorState:
    params = ANNOTATORS[name].params if name in ANNOTATORS else ()
    return AnnotatorState(
        name=name,
        parameters=[_parameter(param) for param in params],
        ready=state.ready(name),
        missing=state.lacks(name),
    )


def _parameter(param: Param | Switch) -> ParameterState:
    if isinstance(param, Switch):
        return ParameterState(
            name=param.name,
            type="boolean",
            default=param.default,
            min=None,
            max=None,
            step=None,
            also=[],
            below=None,
            help=param.help,
        )
    return ParameterState(
        name=param.name,
        type="integer" if param.whole else "number",
        default=param.default,
        min=param.minimum,
        max=param.maximum,
        step=param.step,
        also=[0] if param.or_zero else [],
        below=param.below or None,
        help=param.help,
    )
