"""Signatures and outcomes of webhook deliveries."""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping

import pytest

from serve_app.errors import ConfigError, FetchFailed
from serve_app.webhooks import deliver, encode_body, headers, secret_bytes, signature

# The worked example of the Standard Webhooks specification's reference implementations.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MESSAGE = "msg_p5jXN8AQM9LWM0D4loKWxJek"
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_published_example_is_signed_alike() -> None:
    assert signature(secret_bytes(SECRET), MESSAGE, 1614265330, BODY) == SIGNATURE


def test_a_receiver_can_check_what_was_sent() -> None:
    key = secret_bytes(SECRET)
    body = encode_body({"status": "success", "note": "Grüße", "output": []})
    fields = headers("msg_1", 1700000000, body, key)
    content = f"{fields['webhook-id']}.{fields['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    assert fields["webhook-signature"] == f"v1,{expected}"
    assert json.loads(body) == {"status": "success", "note": "Grüße", "output": []}


def test_without_a_secret_nothing_is_signed() -> None:
    assert headers("msg_1", 5, b"", None) == {
        "content-type": "application/json",
        "webhook-id": "msg_1",
        "webhook-timestamp": "5",
    }


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_not base64!", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_ü"])
def test_a_malformed_secret_is_a_configuration_error(secret: str) -> None:
    with pytest.raises(ConfigError, match="whsec_"):
        secret_bytes(secret)


class Receiver:
    """Answers every POST in one way."""

    def __init__(self, answer: int | FetchFailed) -> None:
        self.answer = answer
        self.seen: list[tuple[str, bytes, Mapping[str, str], float]] = []

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        self.seen.append((url, body, headers, timeout_s))
        if isinstance(self.answer, FetchFailed):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (200, "delivered"),
        (204, "delivered"),
        (301, "failed: HTTP 301"),
        (500, "failed: HTTP 500"),
        (FetchFailed("10.0.0.1 refused"), "failed: the address could not be reached"),
    ],
)
async def test_the_outcome_is_told_in_words(answer: int | FetchFailed, outcome: str) -> None:
    receiver = Receiver(answer)
    assert await deliver(receiver, "https://h/w", b"{}", {"webhook-id": "msg_1"}, 10.0) == outcome
    assert receiver.seen == [("https://h/w", b"{}", {"webhook-id": "msg_1"}, 10.0)]
