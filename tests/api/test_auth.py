"""The rate of one key: a sliding minute."""

import pytest

from serve_app.api.auth import RateWindow
from serve_app.errors import RateLimited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_window_slides() -> None:
    clock = Clock()
    rates = RateWindow(2, clock)
    rates.take("a")
    clock.now += 40
    rates.take("a")
    with pytest.raises(RateLimited) as caught:
        rates.take("a")
    assert caught.value.retry_after_s == 20
    assert "2 requests per minute" in caught.value.tip
    clock.now += 20
    rates.take("a")
    with pytest.raises(RateLimited):
        rates.take("a")


def test_a_refused_request_does_not_prolong_the_wait() -> None:
    clock = Clock()
    rates = RateWindow(1, clock)
    rates.take("a")
    for _ in range(5):
        clock.now += 10
        with pytest.raises(RateLimited):
            rates.take("a")
    clock.now += 10
    rates.take("a")


def test_keys_have_windows_of_their_own() -> None:
    rates = RateWindow(1, Clock())
    rates.take("a")
    rates.take("b")


def test_no_limit() -> None:
    rates = RateWindow(None, Clock())
    for _ in range(1000):
        rates.take("a")
