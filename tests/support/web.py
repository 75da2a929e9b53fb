"""A small HTTP server on 127.0.0.1 for pictures and webhooks, and a client that may reach it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve_app.config import FetchConfig

LOCAL = FetchConfig(allow_hosts=("127.0.0.1",), total_timeout_s=5.0)
"""Lets the guarded client reach this server."""


@dataclass
class WebServer:
    """Answers every request with ``status`` and ``body``, after ``delay_s``; remembers what it was sent."""

    url: str = ""
    status: int = 200
    body: bytes = b""
    delay_s: float = 0.0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Request line, headers with lower-case names, body."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        sent = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append((head[0], headers, sent))
        await asyncio.sleep(self.delay_s)
        answer = f"HTTP/1.1 {self.status} X\r\ncontent-length: {len(self.body)}\r\nconnection: close\r\n\r\n"
        writer.write(answer.encode() + self.body)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def web_server() -> AsyncIterator[WebServer]:
    web = WebServer()
    server = await asyncio.start_server(web.handle, "127.0.0.1", 0)
    web.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield web
    finally:
        server.close()
        await server.wait_closed()
