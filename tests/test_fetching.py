"""The guarded client against real sockets on loopback: hostile servers are written byte by byte."""

import asyncio
import gzip
import ipaddress
import logging
import ssl
import subprocess
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import FetchConfig
from serve_app.errors import ConfigError, FetchFailed
from serve_app.fetching import GuardedClient, _embedded, is_public, system_resolver, url_problem

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


class TestAddresses:
    @settings(deadline=None)
    @given(st.ip_addresses())
    def test_public_only_where_the_standard_library_agrees(
        self, address: ipaddress.IPv4Address | ipaddress.IPv6Address
    ) -> None:
        if is_public(address) and not _embedded(address):
            assert address.is_global
            assert not address.is_multicast

    @settings(deadline=None)
    @given(st.ip_addresses(v=4))
    def test_transition_forms_are_as_public_as_what_they_hold(self, inner: ipaddress.IPv4Address) -> None:
        number = int(inner)
        mapped = ipaddress.IPv6Address((0xFFFF << 32) | number)
        nat64 = ipaddress.IPv6Address((0x64FF9B << 96) | number)
        sixtofour = ipaddress.IPv6Address((0x2002 << 112) | (number << 80))
        teredo_of_public_server = ipaddress.IPv6Address(
            (0x20010000 << 96) | (int(ipaddress.IPv4Address("8.8.8.8")) << 64) | (number ^ 0xFFFFFFFF)
        )
        for outer in (mapped, nat64, sixtofour, teredo_of_public_server):
            assert is_public(outer) == is_public(inner), outer

    @pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "2a00:1450::1"])
    def test_public_addresses_are_reached(self, text: str) -> None:
        assert is_public(ipaddress.ip_address(text))

    @pytest.mark.parametrize("text", ["64:ff9b:1::1", "5f00::1", "3fff::1", "192.88.99.1", "fec0::1", "::8.8.8.8"])
    def test_special_purpose_networks_are_not_public(self, text: str) -> None:
        assert not is_public(ipaddress.ip_address(text))


class TestUrlProblem:
    @pytest.mark.parametrize("host", LOOPBACK + INSIDE)
    def test_private_literals_are_refused_in_every_spelling(self, host: str) -> None:
        assert url_problem(f"http://{host}/x.png", FetchConfig())
        assert url_problem(f"https://{host}:443/x.png", FetchConfig())

    @pytest.mark.parametrize("url", MALFORMED)
    def test_what_is_no_plain_link_is_refused(self, url: str) -> None:
        assert url_problem(url, FetchConfig())

    @pytest.mark.parametrize(
        "url",
        [
            "http://example.com/x.png",
            "https://example.com/x.png?a=b&c=%20",
            "HTTP://EXAMPLE.COM:80/",
            "https://sub_domain.example.co.uk./x",
            "https://münchen.example/ü.png",
            "https://8.8.8.8/x",
            "https://[2606:4700::1111]/x",
        ],
    )
    def test_plain_links_pass(self, url: str) -> None:
        assert url_problem(url, FetchConfig()) is None

    def test_an_allowed_host_may_be_private_and_use_any_port(self) -> None:
        config = FetchConfig(allow_hosts=("Store.internal", "127.0.0.1", "[::1]"))
        for url in ("http://store.internal:9000/x", "http://127.1:1/x", "http://[0::1]:8080/x"):
            assert url_problem(url, config) is None
        assert url_problem("http://127.0.0.2/x", config)
        assert url_problem("http://127.0.0.1:0/x", config)
        assert url_problem("http://127.0.0.1:70000/x", config)

    def test_ports_stay_closed_on_allowed_hosts_when_told_so(self) -> None:
        config = FetchConfig(allow_hosts=("127.0.0.1",), allow_any_port_on_allowed_hosts=False, ports=(80, 8080))
        assert url_problem("http://127.0.0.1:8080/x", config) is None
        assert url_problem("http://127.0.0.1:8081/x", config) == "Port 8081 is not allowed."

    def test_an_allowed_network_opens_its_addresses_only(self) -> None:
        config = FetchConfig(allow_cidrs=("10.1.0.0/16",))
        assert url_problem("http://10.1.2.3/x", config) is None
        assert url_problem("http://[::ffff:10.1.2.3]/x", config) is None
        assert url_problem("http://10.2.0.1/x", config)
        assert url_problem("http://10.1.2.3:8080/x", config)

    def test_a_malformed_network_is_the_operators_error(self) -> None:
        with pytest.raises(ConfigError, match="allow_cidrs"):
            url_problem("http://example.com/", FetchConfig(allow_cidrs=("10.0.0.0/99",)))

    @settings(deadline=None)
    @given(st.text())
    def test_every_text_has_an_answer(self, text: str) -> None:
        url_problem(text, FetchConfig())
        url_problem("http://" + text, FetchConfig())


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
