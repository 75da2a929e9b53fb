"""The guarded HTTP client: whatever a user names (images, webhooks, model links, stores) is reached through it.

One parser decides: ``httpx2.URL`` splits the text once, the checks look at its parts, and the connection is made from
the same parts. A host name is resolved once, every address of the answer must be allowed, and the socket goes to one
of those addresses while the Host header and the TLS server name keep the name: a second answer of a hostile name
server has nobody to be given to. Proxies, cookies and credentials of the environment are never used.

Knows nothing of jobs or of pictures. Failures say little to the client; details are in this module's log, without
path and query, which may hold signatures.
"""

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Self

import httpcore2
import httpx2

from serve_app.config import FetchConfig
from serve_app.errors import ConfigError, FetchFailed

logger = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""Host name to address literals; raises OSError when the name is unknown."""

_FAILURES = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    OSError,
    zlib.error,
)
"""What the network may raise at us; all of it becomes FetchFailed."""

_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?\.?|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "controlnet-serve"}
_RESOLVER_THREADS = ThreadPoolExecutor(16, thread_name_prefix="resolve")

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NEVER_PUBLIC: tuple[Network, ...] = (
    # What `ipaddress` of some Python versions calls global although the IANA registries do not.
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),
    ipaddress.IPv6Network("2001:db8::/32"),
    ipaddress.IPv6Network("3fff::/20"),
    # Azure's metadata and DNS host: a public address that answers from inside the machine.
    ipaddress.IPv4Network("168.63.129.16/32"),
)


class _Refused(Exception):
    """A rule of this module was broken; the text says which, for the log and for ``url_problem``."""


def is_public(address: Address) -> bool:
    """Whether ``address`` is globally routable unicast, looking through IPv6 transition forms."""
    inner = _embedded(address)
    if inner:
        return all(is_public(one) for one in inner)
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_V6:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NEVER_PUBLIC)


def _embedded(address: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses that packets to an IPv6 transition address end up at."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    if address.ipv4_mapped:
        return (address.ipv4_mapped,)
    if address.sixtofour:
        return (address.sixtofour,)
    if address.teredo:
        return address.teredo  # server and client: both are sent packets
    if address in _NAT64:
        return (ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF),)
    return ()


def _literal(host: str) -> Address | None:
    """``host`` as an address if it spells one, in any way that the C library accepts (127.1, 0x7f.1, 2130706433)."""
    bare = host.rstrip(".")
    try:
        return ipaddress.ip_address(bare)
    except ValueError:
        pass  # not the usual spelling; the C library knows more
    try:
        return ipaddress.IPv4Address(socket.inet_aton(bare))
    except OSError:
        return None


def _canonical(host: str) -> str:
    literal = _literal(host)
    return str(literal) if literal else host.rstrip(".")


@dataclass(frozen=True, slots=True)
class _Policy:
    """FetchConfig, parsed."""

    config: FetchConfig
    hosts: frozenset[str]
    networks: tuple[Network, ...]

    def host_allowed(self, host: str) -> bool:
        return _canonical(host) in self.hosts

    def address_allowed(self, address: Address) -> bool:
        inner = _embedded(address)
        if inner:
            return all(self.address_allowed(one) for one in inner)
        return is_public(address) or any(address in network for network in self.networks)

    def check(self, text: str) -> httpx2.URL:
        """The parsed URL.

        Raises:
            _Refused: the text breaks a rule that can be judged without resolving a name.
        """
        if len(text) > self.config.max_url_length:
            raise _Refused(f"The URL is longer than {self.config.max_url_length} characters.")
        if "\\" in text or any(char.isspace() or not char.isprintable() for char in text):
            raise _Refused("The URL holds a backslash, a space or a control character.")
        try:
            url = httpx2.URL(text)
        except (httpx2.InvalidURL, ValueError) as error:
            raise _Refused("The URL is malformed.") from error
        if url.scheme not in _DEFAULT_PORTS:
            raise _Refused("The URL must start with http:// or https://.")
        if url.userinfo:
            raise _Refused("The URL must not hold a user name or password.")
        host = url.raw_host.decode("ascii")
        if not _HOST.fullmatch(host):
            raise _Refused("The URL has no valid host name.")
        self._check_target(host, _port(url))
        return url

    def _check_target(self, host: str, port: int) -> None:
        allowed = self.host_allowed(host)
        any_port = allowed and self.config.allow_any_port_on_allowed_hosts and 0 < port <= _MAX_PORT
        if not any_port and port not in self.config.ports:
            raise _Refused(f"Port {port} is not allowed.")
        if allowed:
            return
        literal = _literal(host)
        name = host.rstrip(".")
        local = name == "localhost" or name.endswith(".localhost")
        if local or (literal is not None and not self.address_allowed(literal)):
            raise _Refused("The URL must name a public host.")


@lru_cache(maxsize=64)
def _policy(config: FetchConfig) -> _Policy:
    try:
        networks = tuple(ipaddress.ip_network(cidr, strict=False) for cidr in config.allow_cidrs)
    except ValueError as error:
        raise ConfigError(f"fetch.allow_cidrs: {error}") from error
    hosts = frozenset(_canonical(host.strip("[]").lower()) for host in config.allow_hosts)
    return _Policy(config, hosts, networks)


def _port(url: httpx2.URL) -> int:
    return url.port if url.port is not None else _DEFAULT_PORTS[url.scheme]


def url_problem(url: str, config: FetchConfig) -> str | None:
    """Why ``url`` would never be fetched, as a sentence for its sender, or None. Resolves no name, does no I/O.

    Raises:
        ConfigError: ``allow_cidrs`` holds something that is not a network.
    """
    try:
        _policy(config).check(url)
    except _Refused as refusal:
        return str(refusal)
    return None


async def system_resolver(host: str) -> Sequence[str]:
    """What the C library's resolver answers, asked in threads of its own: hostile name servers are slow on purpose,
    and must not hold up whatever else this process does in threads.
    """
    # As bytes: text would go through Python's own IDNA encoding, a second opinion on what the name is.
    found = await asyncio.get_running_loop().run_in_executor(
        _RESOLVER_THREADS, lambda: socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
    )
    return [str(entry[4][0]) for entry in found]


class _GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Opens sockets for the connection pool, only to addresses that the policy allows."""

    def __init__(self, policy: _Policy, resolve: Resolver) -> None:
        self._policy = policy
        self._resolve = resolve
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  - the signature is httpcore2's
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        async with asyncio.timeout(timeout):
            addresses = await self._addresses(host)
        share = None if timeout is None else timeout / len(addresses)
        failure: Exception | None = None
        for address in addresses:
            try:
                return await self._sockets.connect_tcp(str(address), port, share, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise httpcore2.ConnectError(f"none of {len(addresses)} addresses answered") from failure

    async def _addresses(self, host: str) -> Sequence[Address]:
        literal = _literal(host)
        if literal is not None:
            addresses: Sequence[Address] = [literal]
        else:
            addresses = [ipaddress.ip_address(text) for text in dict.fromkeys(await self._resolve(host))]
        if not addresses:
            raise _Refused("the name has no address")
        if not self._policy.host_allowed(host):
            for address in addresses:
                if not self._policy.address_allowed(address):
                    raise _Refused(f"the name resolves to {address}, which is not public")
        return addresses


class GuardedClient:
    """Fetches and posts within the rules of FetchConfig. One per event loop; safe for many tasks at once.

    ``resolve`` replaces the system's resolver. ``tls`` replaces the default trust roots, e.g. for a private CA.
    """

    def __init__(
        self, config: FetchConfig, *, resolve: Resolver = system_resolver, tls: ssl.SSLContext | None = None
    ) -> None:
        self._config = config
        self._policy = _policy(config)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls or httpcore2.default_ssl_context(),
            max_connections=None,  # callers bound how much they fetch at once
            max_keepalive_connections=0,  # a server may close an idle connection just as it is used again
            network_backend=_GuardedBackend(self._policy, resolve),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._pool.aclose()

    async def get(self, url: str, max_bytes: int) -> bytes:
        """The body behind ``url``, at most ``max_bytes`` both on the wire and decoded.

        Raises:
            FetchFailed: for every reason, with one message; the log has the details.
        """
        try:
            async with asyncio.timeout(self._config.total_timeout_s):
                return await self._follow(self._policy.check(url), max_bytes)
        except (_Refused, *_FAILURES) as error:
            logger.warning("fetch from %s failed: %s: %s", _origin(url), type(error).__name__, error)
            raise FetchFailed from error

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        """Send ``body`` and return the status code, whatever it is. Redirects are not followed, the answer not read.

        Raises:
            FetchFailed: no answer came, or the URL is not allowed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                async with self._stream("POST", self._policy.check(url), headers, body) as response:
                    return response.status
        except (_Refused, *_FAILURES) as error:
            logger.warning("post to %s failed: %s: %s", _origin(url), type(error).__name__, error)
            raise FetchFailed("Unable to reach the provided URL") from error

    async def _follow(self, url: httpx2.URL, max_bytes: int) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            found = await self._get_once(url, max_bytes)
            if isinstance(found, bytes):
                return found
            url = found
        raise _Refused(f"more than {self._config.max_redirects} redirects")

    async def _get_once(self, url: httpx2.URL, max_bytes: int) -> bytes | httpx2.URL:
        """The body, or where the answer redirects to."""
        async with self._stream("GET", url, {}, None) as response:
            if response.status in _REDIRECTS:
                return self._next_hop(url, _header(response, b"location"))
            if response.status != httpx2.codes.OK:
                raise _Refused(f"status {response.status}")
            return await _read(response, max_bytes)

    def _next_hop(self, url: httpx2.URL, location: str) -> httpx2.URL:
        if not location:
            raise _Refused("a redirect without a Location")
        try:
            joined = str(url.join(location))
        except (httpx2.InvalidURL, ValueError) as error:
            raise _Refused("a redirect to a malformed URL") from error
        target = self._policy.check(joined)
        if url.scheme == "https" and target.scheme == "http":
            raise _Refused("a redirect from https to http")
        return target

    def _stream(
        self, method: str, url: httpx2.URL, headers: Mapping[str, str], body: bytes | None
    ) -> AbstractAsyncContextManager[httpcore2.Response]:
        return self._pool.stream(
            method,
            httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=_port(url), target=url.raw_path),
            headers=[
                (name, value) for name, value in {**_HEADERS, **headers, "Host": url.netloc.decode("ascii")}.items()
            ],
            content=body,
            extensions={
                "timeout": {"connect": self._config.connect_timeout_s},
                "sni_hostname": url.raw_host.decode("ascii").rstrip("."),  # certificates name no trailing dot
            },
        )


def _origin(text: str) -> str:
    """What of a URL may be logged: paths and queries may hold signatures."""
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError):
        return "a malformed URL"
    return f"{url.scheme}://{url.raw_host.decode('ascii')}:{url.port or ''}"


def _header(response: httpcore2.Response, name: bytes) -> str:
    """The first header called ``name``, or an empty text."""
    return next((value.decode("latin-1").strip() for key, value in response.headers if key.lower() == name), "")


async def _read(response: httpcore2.Response, max_bytes: int) -> bytes:
    """The body, decoded; stops reading as soon as the wire or the decoded form is over ``max_bytes``."""
    declared = _header(response, b"content-length")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _Refused(f"Content-Length {declared} is over {max_bytes} bytes")
    inflate = _inflater(_header(response, b"content-encoding").lower())
    received = 0
    body = bytearray()
    async with aclosing(response.aiter_stream()) as chunks:
        async for chunk in chunks:
            received += len(chunk)
            body += chunk if inflate is None else inflate.decompress(chunk, max_bytes + 1 - len(body))
            if max(received, len(body)) > max_bytes:
                raise _Refused(f"the body is over {max_bytes} bytes")
    if inflate is not None and not inflate.eof:
        raise _Refused("the compressed body is cut off")
    return bytes(body)


def _inflater(coding: str) -> "zlib._Decompress | None":
    """A decoder for one Content-Encoding, None for plain bytes. We ask for plain bytes; some stores ignore that."""
    if coding in {"", "identity"}:
        return None
    if coding in {"gzip", "x-gzip", "deflate"}:
        return zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: a gzip or a zlib header, whichever is there
    raise _Refused(f"Content-Encoding {coding!r}")
