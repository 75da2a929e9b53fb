"""Servers on loopback that answer byte by byte what a test wants, and the guarded client before them."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from serve_app.config import FetchConfig
from serve_app.errors import FetchFailed
from serve_app.fetching import GuardedClient

Handler = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
LOCAL = FetchConfig(allow_hosts=("127.0.0.1",))
MIB = 2**20


# fmt: off
LOOPBACK = [
    "127.0.0.1", "127.1", "127.0.0.1.", "0x7f.1", "0x7f000001", "2130706433", "017700000001", "0", "[::1]", "[::]",
    "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::FFFF:7f00:1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]", "127。0。0。1", "localhost", "LOCALHOST", "localhost.", "a.localhost", "%6cocalhost",
    "127.0.0.1%2f",
]
INSIDE = [
    "169.254.169.254", "[fd00:ec2::254]", "[fe80::1]", "[fe80::1%25lo]", "100.64.0.1", "100.100.100.200",
    "168.63.129.16", "192.0.0.192", "10.0.0.1", "172.16.0.1", "192.168.1.1", "0.0.0.1", "224.0.0.1",
    "255.255.255.255", "[ff02::1]", "[2001:0:7f00:1::]", "[64:ff9b::a9fe:a9fe]",
]
# fmt: on
MALFORMED = [
    "",
    "x.png",
    "//example.com/x",
    "http:example.com",
    "http:///x",
    "http://",
    "http://./",
    "http://[::1/",
    "http://[v1.x]/",
    "http://exa mple.com/",
    "http://user@example.com/",
    "http://user:secret@example.com/",
    "http://example.com\\@127.0.0.1/",
    "http://127.0.0.1\\.example.com/",
    "http:\\\\example.com/",
    "http://example.com/\n",
    "http://example.com/\x00",
    " http://example.com/",
    "http://example.com/\u2028",
    "http://\ud800.com/",
    "http://example.com:22/",
    "http://example.com:0/",
    "http://example.com:99999/",
    "http://example.com:x/",
    "http://exa$mple.com/",
    "file:///etc/passwd",
    "ftp://example.com/x",
    "gopher://example.com/x",
    "data:image/png;base64,AAAA",
    "http://example.com/" + "a" * 2048,
]


@asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server on a free port of 127.0.0.1; ``handler`` gets the request's head and writes what it likes."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler((await reader.readuntil(b"\r\n\r\n")).decode("ascii"), writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client hung up first, which is what some of these tests are about
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def answering(body: bytes, *headers: str, status: str = "200 OK") -> Handler:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""])

    async def handler(request: str, writer: asyncio.StreamWriter) -> None:
        del request
        writer.write(head.encode("ascii") + body)

    return handler


def writing(*parts: bytes, pause_s: float = 0.0, forever: bool = False) -> Handler:
    async def handler(request: str, writer: asyncio.StreamWriter) -> None:
        del request
        for part in parts:
            writer.write(part)
        while forever:
            await writer.drain()
            writer.write(parts[-1])
            await asyncio.sleep(pause_s)

    return handler


def to(*addresses: str) -> Callable[[str], Awaitable[Sequence[str]]]:
    async def resolve(host: str) -> Sequence[str]:
        del host
        return addresses

    return resolve


async def fetch(url: str, config: FetchConfig = LOCAL, max_bytes: int = MIB) -> bytes:
    async with GuardedClient(config) as client:
        return await client.get(url, max_bytes)


async def refused(url: str, config: FetchConfig = LOCAL, max_bytes: int = MIB) -> None:
    with pytest.raises(FetchFailed) as caught:
        await fetch(url, config, max_bytes)
    assert caught.value.message == "Unable to fetch image from provided URL"
