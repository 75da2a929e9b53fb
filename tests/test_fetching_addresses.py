"""Which addresses and URLs the guarded client would ever go to."""

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import FetchConfig
from serve_app.errors import ConfigError
from serve_app.fetching import _embedded, is_public, url_problem
from support.hostile import INSIDE, LOOPBACK, MALFORMED


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
