"""Threads for the statements that keep jobs alive."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 4  # fewer than the connections of a pool: others need one too


class StoreThreads:
    """A pool of their own: a renewal must not queue behind decoding and fetching in the loop's default pool."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="jobs-store")

    async def run(self, statement: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``asyncio.to_thread`` in this pool."""
        return await asyncio.wrap_future(self._pool.submit(statement, *args, **kwargs))

    def close(self) -> None:
        """Take no more statements. Those that run end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)
