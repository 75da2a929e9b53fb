"""Who is asking: key -> principal, scopes, and the rate of one key."""

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable

from serve_app.errors import InvalidKey, NotPermitted, RateLimited
from serve_app.keys import KeyStore, Principal

WINDOW_S = 60.0


async def authenticate(keys: KeyStore, key: str | None, scope: str) -> Principal:
    """The owner of ``key``.

    Raises:
        InvalidKey: no key, an unknown one or a revoked one; the three are told apart nowhere.
        NotPermitted: the key lacks ``scope``.
    """
    if key is None:
        raise InvalidKey
    principal = await asyncio.to_thread(keys.authenticate, key)
    if scope and scope not in principal.scopes:
        raise NotPermitted(f"This key is not allowed to do that: it lacks the scope {scope!r}.")
    return principal


class RateWindow:
    """A sliding window of one minute per key.

    Counts what this process has seen: with n gateways a key can reach n times the limit, which bounds a runaway client
    without a round trip per request.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._taken: defaultdict[str, deque[float]] = defaultdict(deque)

    def take(self, key_id: str) -> None:
        """Count one request of a key.

        Raises:
            RateLimited: the key has used up its minute; says when the next request fits.
        """
        if self._per_minute is None:
            return
        now = self._clock()
        taken = self._taken[key_id]
        while taken and taken[0] <= now - WINDOW_S:
            taken.popleft()
        if len(taken) >= self._per_minute:
            wait_s = max(1, math.ceil(taken[0] + WINDOW_S - now))
            raise RateLimited(retry_after_s=wait_s, tip=f"This key may send {self._per_minute} requests per minute.")
        taken.append(now)
