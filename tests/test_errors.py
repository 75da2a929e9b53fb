"""The error tree: every error survives the way between processes."""

import pickle

import pytest

from serve_app import errors
from serve_app.errors import ServeError


def tree(root: type[ServeError]) -> list[type[ServeError]]:
    return [root, *(error for child in root.__subclasses__() for error in tree(child))]


@pytest.mark.parametrize("kind", tree(ServeError), ids=lambda kind: kind.__name__)
def test_every_error_is_drawn_named_and_travels(kind: type[ServeError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
    error = kind({"field": ["message"]}) if issubclass(kind, errors.ValidationFailed) else kind()
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  - our own bytes
    assert type(again) is kind
    assert (again.message, again.code, again.status) == (error.message, error.code, error.status)
    assert error.message


def test_a_limit_says_when_to_come_back() -> None:
    error = pickle.loads(pickle.dumps(errors.RateLimited(retry_after_s=9, tip="queue_max allows 3")))  # noqa: S301
    assert (error.message, error.retry_after_s, error.tip) == ("Rate limit exceeded", 9, "queue_max allows 3")
