"""Texts that are hosts and origins, and all the texts that only look like some."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.server.hosts import parse_authority, parse_origin

NO_HOSTS = [
    "",
    " ",
    ":8000",
    "localhost:",
    "localhost:0",
    "localhost:65536",
    "localhost:80:evil",
    "localhost:80evil",
    "localhost:-1",
    "localhost:+80",
    "localhost:8_0",
    "localhost:0000080",
    "localhost:\u0668\u0660",
    "localhost: 80",
    " localhost",
    "localhost ",
    "local host",
    "localhost\t",
    "localhost\n",
    "localhost\x00",
    "localhost..",
    ".localhost",
    "a..b",
    "-localhost",
    "localhost-",
    "x" * 64,
    ".".join(["x" * 60] * 5),
    "localhost,evil.example",
    "localhost;evil.example",
    "localhost/",
    "localhost/evil",
    "localhost?evil",
    "localhost#evil",
    "localhost\\evil",
    "localhost%2eevil",
    "localhost%",
    "evil@localhost",
    "localhost@",
    "user:word@localhost",
    "http://localhost",
    "\uff4cocalhost",
    "\u212aelvin",
    "*",
    "*.localhost",
    "127.0.0.1.",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "127.0.0.0x1",
    "0177.0.0.1",
    "127.0.0.01",
    "127.0.0.256",
    "127.0.0.1.1",
    "evil.127.0.0.1",
    "::1",
    "::1:8000",
    "[::1",
    "::1]",
    "[]",
    "[::1].evil.com",
    "[::1]evil",
    "[::1]:80:evil",
    "[::1]:",
    "[[::1]]",
    "[::1%lo]",
    "[::1%25lo]",
    "[::1]%25lo",
    "[127.0.0.1]",
    "[localhost]",
    "[v1.x]",
    "evil[::1]",
]


@pytest.mark.parametrize("text", NO_HOSTS)
def test_what_is_no_host(text: str) -> None:
    assert parse_authority(text) is None


@pytest.mark.parametrize(
    ("text", "known", "is_loopback"),
    [
        ("localhost", "localhost", True),
        ("LOCALHOST", "localhost", True),
        ("LocalHost.:8000", "localhost:8000", True),
        ("localhost.", "localhost", True),
        ("localhost:1", "localhost:1", True),
        ("localhost:00080", "localhost:80", True),
        ("localhost:65535", "localhost:65535", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.8.9.1:80", "127.8.9.1:80", True),
        ("[::1]:8000", "[::1]:8000", True),
        ("[0:0:0:0:0:0:0:1]", "[::1]", True),
        ("[0000:0000::0001]", "[::1]", True),
        ("[::ffff:127.0.0.1]", "127.0.0.1", True),
        ("[::FFFF:7f00:1]", "127.0.0.1", True),
        ("[::ffff:10.0.0.1]", "10.0.0.1", False),
        ("10.0.0.1", "10.0.0.1", False),
        ("0.0.0.0", "0.0.0.0", False),
        ("[::]", "[::]", False),
        ("[FE80::1]", "[fe80::1]", False),
        ("localhost.evil.example", "localhost.evil.example", False),
        ("evil.localhost", "evil.localhost", False),
        ("localhost6", "localhost6", False),
        ("127.0.0.1.evil.example", "127.0.0.1.evil.example", False),
        ("Host.Docker.Internal:8000", "host.docker.internal:8000", False),
        ("my_service", "my_service", False),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", False),
        ("x" * 63, "x" * 63, False),
    ],
)
def test_what_is_a_host(text: str, known: str, is_loopback: bool) -> None:
    authority = parse_authority(text)
    assert authority is not None
    assert str(authority) == known
    assert authority.is_loopback is is_loopback
    assert parse_authority(str(authority)) == authority


@given(st.ip_addresses())
def test_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    """In every spelling that the standard library knows of an address."""
    spellings = {str(address), address.exploded, str(address).upper()}
    if address.version == 6:
        assert all(parse_authority(text) is None for text in spellings if ":" in text)
        spellings = {f"[{text}]" for text in spellings}
    known = {parse_authority(text) for text in spellings}
    mapped = getattr(address, "ipv4_mapped", None)
    (authority,) = known
    assert authority is not None
    assert ipaddress.ip_address(authority.host) == (mapped or address)
    assert authority.is_loopback == (mapped or address).is_loopback


@given(st.text(st.characters(codec="latin-1"), max_size=12), st.sampled_from(["localhost", "[::1]", "127.0.0.1", ""]))
def test_only_this_machine_is_this_machine(around: str, inner: str) -> None:
    """Whatever stands around a name, only a dot or a port behind it leaves it this machine's."""
    for text in (inner + around, around + inner):
        authority = parse_authority(text)
        if authority is not None and authority.is_loopback:
            host, _, port = (
                (text.rpartition(":") if not text.endswith("]") else (text, "", "")) if ":" in text else (text, "", "")
            )
            assert host.lower().removesuffix(".") == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
            assert port == "" or (port.isascii() and 1 <= int(port) <= 65_535)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("http://localhost:3000", "http://localhost:3000"),
        ("HTTPS://App.Example", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("http://app.example:443", "http://app.example:443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
        ("null", None),
        ("", None),
        ("*", None),
        ("app.example", None),
        ("//app.example", None),
        ("file://", None),
        ("https://", None),
        ("https://app.example/", None),
        ("https://app.example/x", None),
        ("https://user@app.example", None),
        ("https://a.example https://b.example", None),
        ("https://a.example, https://b.example", None),
        ("https://*.example", None),
        ("https://app.example:0", None),
    ],
)
def test_origins(text: str, known: str | None) -> None:
    origin = parse_origin(text)
    assert (None if origin is None else str(origin)) == known
