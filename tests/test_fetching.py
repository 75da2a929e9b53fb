"""The guarded client against real sockets on loopback: hostile servers are written byte by byte."""

import asyncio
import gzip
import logging
import ssl
import subprocess
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve_app.config import FetchConfig
from serve_app.errors import FetchFailed
from serve_app.fetching import GuardedClient, system_resolver
from support.hostile import (
    INSIDE,
    LOCAL,
    LOOPBACK,
    MALFORMED,
    MIB,
    Handler,
    answering,
    fetch,
    refused,
    serving,
    to,
    writing,
)


class TestReaching:
    async def test_an_allowed_host_is_fetched(self) -> None:
        async with serving(answering(b"picture")) as port:
            assert await fetch(f"http://127.0.0.1:{port}/x.png?size=1") == b"picture"

    @pytest.mark.parametrize("host", LOOPBACK + INSIDE)
    async def test_private_hosts_are_refused_in_every_spelling(self, host: str) -> None:
        async with serving(answering(b"secret")) as port:
            await refused(f"http://{host}:{port}/", FetchConfig(ports=(port,), connect_timeout_s=0.5))

    @pytest.mark.parametrize("url", MALFORMED)
    async def test_malformed_links_are_refused(self, url: str) -> None:
        await refused(url, FetchConfig())

    async def test_the_name_decides_nothing_its_addresses_do(self) -> None:
        async with serving(answering(b"secret")) as port:
            config = FetchConfig(ports=(port,))
            for addresses in (["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], ["fe80::1%lo"], []):
                async with GuardedClient(config, resolve=to(*addresses)) as client:
                    with pytest.raises(FetchFailed):
                        await client.get(f"http://public.example:{port}/", MIB)

    async def test_an_allowed_name_may_resolve_to_a_private_address(self) -> None:
        seen = []

        async def handler(request: str, writer: asyncio.StreamWriter) -> None:
            seen.append(request)
            await answering(b"mine")(request, writer)

        config = FetchConfig(allow_hosts=("store.example",))
        async with serving(handler) as port, GuardedClient(config, resolve=to("127.0.0.1")) as client:
            assert await client.get(f"http://Store.Example:{port}/a?b", MIB) == b"mine"
        assert seen[0].startswith("GET /a?b HTTP/1.1\r\n")
        assert f"Host: store.example:{port}\r\n" in seen[0]

    async def test_a_second_answer_of_the_resolver_is_never_asked_for(self) -> None:
        """DNS rebinding: the first answer is judged and used, so a changed second one has no effect."""
        asked: list[str] = []

        async def rebinding(host: str) -> Sequence[str]:
            asked.append(host)
            return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

        async with serving(answering(b"first", "Connection: close")) as port:
            config = FetchConfig(allow_cidrs=("127.0.0.0/8",), ports=(port,))
            async with GuardedClient(config, resolve=rebinding) as client:
                assert await client.get(f"http://rebind.example:{port}/", MIB) == b"first"
                assert asked == ["rebind.example"]
                with pytest.raises(FetchFailed):
                    await client.get(f"http://rebind.example:{port}/", MIB)

    async def test_the_next_address_is_tried_when_one_is_dead(self) -> None:
        async with serving(answering(b"alive")) as port:
            config = FetchConfig(allow_hosts=("store.example",))
            async with GuardedClient(config, resolve=to("127.0.0.99", "127.0.0.1")) as client:
                assert await client.get(f"http://store.example:{port}/", MIB) == b"alive"

    async def test_an_unknown_name_fails(self) -> None:
        async def unknown(host: str) -> Sequence[str]:
            raise OSError(f"{host}: no such name")

        async with GuardedClient(FetchConfig(), resolve=unknown) as client:
            with pytest.raises(FetchFailed):
                await client.get("http://nobody.example/", MIB)

    async def test_a_slow_resolver_meets_the_connect_deadline(self) -> None:
        async def slow(host: str) -> Sequence[str]:
            await asyncio.sleep(30)
            return [host]

        started = time.monotonic()
        async with GuardedClient(FetchConfig(connect_timeout_s=0.1), resolve=slow) as client:
            with pytest.raises(FetchFailed):
                await client.get("http://slow.example/", MIB)
        assert time.monotonic() - started < 5

    async def test_what_the_system_resolves_is_judged_too(self) -> None:
        async def system(host: str) -> Sequence[str]:
            del host
            return await system_resolver("localhost")

        async with serving(answering(b"secret")) as port:
            url = f"http://public.example:{port}/"
            async with GuardedClient(FetchConfig(ports=(port,)), resolve=system) as client:
                with pytest.raises(FetchFailed):
                    await client.get(url, MIB)
            async with GuardedClient(FetchConfig(allow_hosts=("public.example",)), resolve=system) as client:
                assert await client.get(url, MIB) == b"secret"

    async def test_proxies_of_the_environment_are_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with serving(answering(b"direct")) as port, serving(answering(b"proxied")) as proxy:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
            assert await fetch(f"http://127.0.0.1:{port}/") == b"direct"

    async def test_the_log_tells_the_reason_but_no_secrets(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "serve_app.fetching"):
            await refused("http://10.0.0.1/bucket/x?signature=abc", FetchConfig())
        assert "10.0.0.1" in caplog.text
        assert "public host" in caplog.text
        assert "signature" not in caplog.text


class TestRedirects:
    @staticmethod
    def redirecting(location: str, status: str = "302 Found") -> Handler:
        return answering(b"", f"Location: {location}", status=status)

    async def test_a_redirect_is_followed(self) -> None:
        async def handler(request: str, writer: asyncio.StreamWriter) -> None:
            if request.startswith("GET /dir/end?q=1 "):
                await answering(b"arrived")(request, writer)
            else:
                await self.redirecting("end?q=1#part", "308 Permanent Redirect")(request, writer)

        async with serving(handler) as port:
            assert await fetch(f"http://127.0.0.1:{port}/dir/start") == b"arrived"

    @pytest.mark.parametrize(
        "location",
        [
            "http://169.254.169.254/latest/meta-data/",
            "http://127.1:1/",
            "http://127.0.0.2/",
            "//localhost/",
            "/\\127.0.0.2/",
            "\\\\127.0.0.2\\x",
            "file:///etc/passwd",
            "http://u:p@127.0.0.1/",
            "http://[::1/",
            "",
        ],
    )
    async def test_each_target_is_checked(self, location: str) -> None:
        requests: list[str] = []

        async def handler(request: str, writer: asyncio.StreamWriter) -> None:
            requests.append(request)
            await self.redirecting(location)(request, writer)

        config = FetchConfig(allow_hosts=("127.0.0.1",), connect_timeout_s=0.5)
        async with serving(handler) as port:
            await refused(f"http://127.0.0.1:{port}/", config)
        assert len(requests) == 1

    async def test_only_so_many_are_followed(self) -> None:
        requests = 0

        async def handler(request: str, writer: asyncio.StreamWriter) -> None:
            nonlocal requests
            requests += 1
            await self.redirecting(f"/{requests}")(request, writer)

        async with serving(handler) as port:
            await refused(f"http://127.0.0.1:{port}/")
            assert requests == LOCAL.max_redirects + 1
            await refused(f"http://127.0.0.1:{port}/", FetchConfig(allow_hosts=("127.0.0.1",), max_redirects=0))
            assert requests == LOCAL.max_redirects + 2

    @pytest.mark.parametrize("status", ["204 No Content", "206 Partial Content", "304 Not Modified", "404 Not Found"])
    async def test_only_200_has_a_body(self, status: str) -> None:
        async with serving(answering(b"", status=status)) as port:
            await refused(f"http://127.0.0.1:{port}/")


class TestBodies:
    async def test_the_cap_is_exact(self) -> None:
        async with serving(answering(b"x" * 1000)) as port:
            assert len(await fetch(f"http://127.0.0.1:{port}/", max_bytes=1000)) == 1000
            await refused(f"http://127.0.0.1:{port}/", max_bytes=999)

    async def test_an_endless_body_is_dropped(self) -> None:
        head = b"HTTP/1.1 200 OK\r\n\r\n"
        async with serving(writing(head, b"x" * 65536, forever=True)) as port:
            await refused(f"http://127.0.0.1:{port}/")

    async def test_an_endless_chunked_body_is_dropped(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with serving(writing(head, b"1000\r\n" + b"x" * 4096 + b"\r\n", forever=True)) as port:
            await refused(f"http://127.0.0.1:{port}/")

    async def test_endless_headers_are_dropped(self) -> None:
        async with serving(writing(b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 4000 + b"\r\n", forever=True)) as port:
            await refused(f"http://127.0.0.1:{port}/")

    @pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n\r\n", b"", b"HTTP/1.1 100 Continue\r\n\r\n"])
    async def test_a_slow_drip_meets_the_total_deadline(self, start: bytes) -> None:
        drip = b"x" if start else b"H"
        config = FetchConfig(allow_hosts=("127.0.0.1",), total_timeout_s=0.4)
        started = time.monotonic()
        async with serving(writing(start, drip, pause_s=0.05, forever=True)) as port:
            await refused(f"http://127.0.0.1:{port}/", config)
        assert time.monotonic() - started < 5

    async def test_a_body_shorter_than_its_content_length_fails(self) -> None:
        async with serving(writing(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort")) as port:
            await refused(f"http://127.0.0.1:{port}/")

    async def test_a_content_length_over_the_cap_fails_unread(self, caplog: pytest.LogCaptureFixture) -> None:
        async with serving(writing(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", b"x", forever=True)) as port:
            await refused(f"http://127.0.0.1:{port}/", max_bytes=1000)
        assert "Content-Length 99999999 is over" in caplog.text

    @pytest.mark.parametrize("length", ["-1", "x", "5, 6", "5\r\nContent-Length: 6"])
    async def test_a_nonsense_content_length_fails(self, length: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nhello!"
        async with serving(writing(head.encode())) as port:
            await refused(f"http://127.0.0.1:{port}/")

    @pytest.mark.parametrize(
        ("coding", "packed"),
        [
            ("gzip", gzip.compress(b"picture")),
            ("X-GZIP", gzip.compress(b"picture")),
            ("deflate", zlib.compress(b"picture")),
            ("identity", b"picture"),
        ],
    )
    async def test_one_coding_is_undone(self, coding: str, packed: bytes) -> None:
        async with serving(answering(packed, f"Content-Encoding: {coding}")) as port:
            assert await fetch(f"http://127.0.0.1:{port}/") == b"picture"

    @pytest.mark.parametrize(
        ("coding", "packed", "reason"),
        [
            ("gzip", gzip.compress(bytes(64 * MIB), compresslevel=1), "the body is over"),
            ("gzip", gzip.compress(b"") + bytes(2 * MIB), "the body is over"),
            ("gzip", gzip.compress(b"picture")[:-3], "cut off"),
            ("gzip", b"no gzip at all", "incorrect header"),
            ("gzip, gzip", gzip.compress(gzip.compress(b"picture")), "Content-Encoding"),
            ("br", b"\x0b\x03\x80picture\x03", "Content-Encoding"),
        ],
        ids=["bomb", "endless after the end", "cut off", "not gzip", "twice", "unknown"],
    )
    async def test_hostile_codings_fail(
        self, coding: str, packed: bytes, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\n\r\n"
        async with serving(writing(head.encode(), packed)) as port:
            await refused(f"http://127.0.0.1:{port}/")
        assert reason in caplog.text


class TestPost:
    async def test_the_body_arrives_and_the_status_comes_back(self) -> None:
        seen: list[str] = []

        async def handler(request: str, writer: asyncio.StreamWriter) -> None:
            seen.append(request)
            await answering(b"thanks", status="202 Accepted")(request, writer)

        async with serving(handler) as port, GuardedClient(LOCAL) as client:
            url = f"http://127.0.0.1:{port}/hook"
            assert await client.post(url, b"{}", {"Content-Type": "application/json"}, timeout_s=5) == 202
        assert seen[0].startswith("POST /hook HTTP/1.1\r\n")
        assert "Content-Type: application/json\r\n" in seen[0]
        assert "Content-Length: 2\r\n" in seen[0]

    async def test_redirects_are_answers(self) -> None:
        async with serving(TestRedirects.redirecting("/elsewhere")) as port, GuardedClient(LOCAL) as client:
            assert await client.post(f"http://127.0.0.1:{port}/", b"", {}, timeout_s=5) == 302

    async def test_the_rules_hold(self) -> None:
        async with GuardedClient(FetchConfig()) as client:
            with pytest.raises(FetchFailed):
                await client.post("http://169.254.169.254/", b"", {}, timeout_s=5)

    async def test_silence_meets_the_deadline(self) -> None:
        async with serving(writing(b"", b"", pause_s=0.05, forever=True)) as port, GuardedClient(LOCAL) as client:
            started = time.monotonic()
            with pytest.raises(FetchFailed):
                await client.post(f"http://127.0.0.1:{port}/", b"", {}, timeout_s=0.3)
            assert time.monotonic() - started < 5


class TestTls:
    @pytest.fixture(scope="class")
    @staticmethod
    def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("tls")
        key, cert = folder / "key.pem", folder / "cert.pem"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
                *("-subj", "/CN=store.example", "-addext", "subjectAltName=DNS:store.example", "-days", "2"),
                *("-keyout", str(key), "-out", str(cert)),
            ],
            check=True,
            capture_output=True,
        )
        return key, cert

    @staticmethod
    def server_side(certificate: tuple[Path, Path], names: list[str | None]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate[1], certificate[0])
        context.sni_callback = lambda _socket, name, _context: names.append(name)
        return context

    async def test_the_server_name_is_kept_while_the_address_is_pinned(self, certificate: tuple[Path, Path]) -> None:
        names: list[str | None] = []
        trust = ssl.create_default_context(cafile=str(certificate[1]))
        config = FetchConfig(allow_hosts=("store.example",))
        async with (
            serving(answering(b"over tls"), self.server_side(certificate, names)) as port,
            GuardedClient(config, resolve=to("127.0.0.1"), tls=trust) as client,
        ):
            assert await client.get(f"https://store.example:{port}/", MIB) == b"over tls"
            assert await client.get(f"https://store.example.:{port}/", MIB) == b"over tls"
        assert set(names) == {"store.example"}

    async def test_an_unknown_issuer_and_another_name_are_refused(self, certificate: tuple[Path, Path]) -> None:
        config = FetchConfig(allow_hosts=("store.example", "other.example"))
        trust = ssl.create_default_context(cafile=str(certificate[1]))
        async with serving(answering(b"over tls"), self.server_side(certificate, [])) as port:
            async with GuardedClient(config, resolve=to("127.0.0.1")) as client:
                with pytest.raises(FetchFailed):
                    await client.get(f"https://store.example:{port}/", MIB)
            async with GuardedClient(config, resolve=to("127.0.0.1"), tls=trust) as client:
                with pytest.raises(FetchFailed):
                    await client.get(f"https://other.example:{port}/", MIB)

    async def test_no_redirect_from_https_to_http(
        self, certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        trust = ssl.create_default_context(cafile=str(certificate[1]))
        config = FetchConfig(allow_hosts=("store.example",))
        async with serving(answering(b"plain")) as plain:
            redirect = TestRedirects.redirecting(f"http://store.example:{plain}/")
            async with (
                serving(redirect, self.server_side(certificate, [])) as port,
                GuardedClient(config, resolve=to("127.0.0.1"), tls=trust) as client,
            ):
                with pytest.raises(FetchFailed):
                    await client.get(f"https://store.example:{port}/", MIB)
        assert "from https to http" in caplog.text
