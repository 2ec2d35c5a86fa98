"""Hosts and web pages at the door: which requests run, on real sockets where clients in process cannot write them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.server.app import make_app
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import ServerSettings, load_settings
from tests.server.conftest import MODEL, Keys, MakeClient, chat
from tests.server.live import Live, read_all, serving
from tests.server.test_hosts import NO_HOSTS

PAGE = "http://page.example"
READING = ("/v1/models", "/v1/anchors", "/v1/stats", "/v1/contexts", "/v1/segments", "/v1/cache/tree", "/v1/snapshots")
OPERATORS = ("/metrics", "/admin/status", "/admin/tenants")
FOREIGN: list[dict[str, str]] = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "something new"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
    {"sec-fetch-site": "cross-site", "origin": PAGE},
    {"sec-fetch-site": "none", "origin": PAGE},
    {"origin": PAGE},
    {"origin": "null"},
    {"origin": "http://localhost.evil.example"},
    {"origin": "http://localhost:3000"},
    {"origin": "http://localhost evil"},
    {"referer": f"{PAGE}/a"},
    {"referer": "http://localhost@page.example/"},
    {"referer": "http://localhost:3000/http://localhost/"},
    {"referer": "odd"},
]
OWN: list[dict[str, str]] = [
    {},
    {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
    {"sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "same-origin", "origin": "http://localhost"},
    {"origin": "http://localhost"},
    {"origin": "http://LOCALHOST:80"},
    {"referer": "http://localhost/ui?a#b"},
    {"referer": "http://localhost"},
]


def error_of(response: Any) -> tuple[int, str]:
    """Status and code of a refusal."""
    return response.status_code, response.json()["error"]["code"]


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    with serving(engine, ServerSettings(model=MODEL, port=0)) as server:
        yield server


def status_of(live: Live, request: str) -> bytes:
    """The status with which raw bytes are answered."""
    with closing(live.connect()) as connection:
        connection.sendall(request.encode("latin-1"))
        return read_all(connection).partition(b"\r\n")[0].split(b" ", 2)[1]


@pytest.mark.parametrize("host", [text for text in NO_HOSTS if text.isprintable() and text.isascii()])
def test_odd_hosts_are_nobodys(client: TestClient, host: str) -> None:
    assert error_of(client.get("/v1/models", headers={"host": host})) == (403, "wrong_host")


@pytest.mark.parametrize("host", ["LOCALHOST", "localhost.", "LocalHost.:8000", "[::1]:1", "127.0.0.1", "[0:0::1]:80"])
def test_this_machine_has_these_names(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("target", "hosts", "status"),
    [
        ("/v1/models", ["localhost"], b"200"),
        ("/v1/models", ["  LOCALHOST.:80  "], b"200"),
        ("/v1/models", ["[::1].evil.com"], b"403"),
        ("/v1/models", ["localhost:80:evil"], b"403"),
        ("/v1/models", ["[::1%25lo]"], b"403"),
        ("/v1/models", ["localhost\xa0"], b"403"),
        ("/v1/models", [""], b"403"),
        ("/v1/models", ["localhost", "evil.example"], b"400"),
        ("/v1/models", ["localhost", "localhost"], b"400"),
        ("/v1/models", [], b"400"),
        ("http://localhost:1/v1/models", ["evil.example"], b"200"),  # the URL counts: RFC 9112, 3.2.2
        ("HTTP://localhost/v1/models?x=http://evil.example/", ["localhost"], b"200"),
        ("http://evil.example/v1/models", ["localhost"], b"403"),
        ("http://evil.example/admin/status", ["localhost"], b"403"),
        ("http://evil@localhost/v1/models", ["localhost"], b"403"),
        ("http://localhost%2Fx/v1/models", ["localhost"], b"403"),
        ("http://localhost", ["localhost"], b"307"),  # to the page
        ("http:///v1/models", ["localhost"], b"403"),
        ("ftp://localhost/v1/models", ["localhost"], b"404"),
        ("localhost/v1/models", ["localhost"], b"404"),
    ],
)
def test_hosts_on_a_socket(live: Live, target: str, hosts: list[str], status: bytes) -> None:
    lines = [f"GET {target} HTTP/1.1", *(f"host: {host}" for host in hosts), "connection: close"]
    assert status_of(live, "\r\n".join([*lines, "", ""])) == status


def test_an_old_request_without_a_host_is_for_nobody(live: Live) -> None:
    assert status_of(live, "GET /v1/models HTTP/1.0\r\n\r\n") == b"403"


@pytest.mark.parametrize("path", [*READING, *OPERATORS])
@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_other_sites_pages_run_nothing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str]
) -> None:
    """Their browsers send such requests without asking, and only keep the answers to themselves."""

    def never(*_: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(client.app.state.kvcomm.tenants, "get", never)  # type: ignore[attr-defined]
    assert error_of(client.get(path, headers=headers)) == (403, "cross_site")
    assert error_of(client.delete(path, headers=headers)) == (403, "cross_site")


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/admin/status"])
@pytest.mark.parametrize("headers", OWN, ids=str)
def test_the_servers_own_page_and_programs_run(client: TestClient, path: str, headers: dict[str, str]) -> None:
    assert client.get(path, headers=headers).status_code == 200


def test_a_page_that_was_opened_from_elsewhere_is_shown(client: TestClient) -> None:
    """The dashboard has no data in it: a link to it may stand anywhere."""
    assert client.get("/ui", headers=FOREIGN[3]).status_code == 200


def test_a_foreign_page_cannot_generate(client: TestClient) -> None:
    assert error_of(client.post("/v1/chat/completions", json=chat(), headers={"origin": PAGE})) == (403, "cross_site")


def test_with_keys_a_page_needs_more_than_a_key(make_client: MakeClient, keys: Keys, key_file: Any) -> None:
    """A browser only sends a key for a page after a preflight: an origin that has passed none is not who it says."""
    client = make_client(keys=KeyRing(key_file))
    for name, path in (("ann", "/v1/models"), ("admin", "/admin/status"), ("metrics", "/metrics")):
        assert client.get(path, headers=keys.header(name)).status_code == 200
        assert client.get(path, headers={**keys.header(name), "referer": PAGE}).status_code == 200
        for headers in ({"origin": PAGE}, {"sec-fetch-site": "cross-site"}):
            assert error_of(client.get(path, headers={**keys.header(name), **headers})) == (403, "cross_site")


def test_behind_a_proxy_that_calls_the_server_otherwise(make_client: MakeClient, keys: Keys, key_file: Any) -> None:
    """The browser's own word that page and server are one counts more than a Host that a proxy put there."""
    client = make_client(keys=KeyRing(key_file))
    sent = {"host": "backend:8000", "origin": "https://api.example", "sec-fetch-site": "same-origin"}
    assert client.get("/v1/models", headers={**sent, **keys.header("ann")}).status_code == 200
    kept = {"host": "api.example", "origin": "https://api.example"}
    assert client.get("/v1/models", headers={**kept, **keys.header("ann")}).status_code == 200


@pytest.mark.parametrize("has_keys", [False, True])
def test_allowed_hosts(make_client: MakeClient, keys: Keys, key_file: Any, has_keys: bool) -> None:
    client = make_client(
        allowed_hosts=("Host.Docker.Internal", "10.0.0.7:8000"), keys=KeyRing(key_file) if has_keys else None
    )
    own = keys.header("ann") if has_keys else {}
    for host, status in {
        "host.docker.internal": 200,
        "HOST.docker.internal.:8000": 200,
        "10.0.0.7:8000": 200,
        "localhost": 200,
        "10.0.0.7": 403,
        "10.0.0.7:8001": 403,
        "docker.internal": 403,
        "x.host.docker.internal": 403,
        "host.docker.internal:80:evil": 403,
    }.items():
        assert client.get("/v1/models", headers={"host": host, **own}).status_code == status, host


def preflight(origin: str, **headers: str) -> dict[str, str]:
    """What a browser asks before it sends a page's request with a key."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"origin": origin, "access-control-request-method": "POST", "sec-fetch-site": "cross-site", **named}


@pytest.mark.parametrize("has_keys", [False, True])
def test_an_allowed_origin(make_client: MakeClient, keys: Keys, key_file: Any, has_keys: bool) -> None:
    client = make_client(cors_origins=("http://Page.example:80",), keys=KeyRing(key_file) if has_keys else None)
    key = keys.header("ann") if has_keys else {}
    asked = preflight(PAGE, access_control_request_headers="authorization,content-type,x-stainless-os")
    allowed = client.options("/v1/chat/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in allowed.headers

    sent = {"origin": PAGE, "sec-fetch-site": "cross-site", **key}
    answer = client.post("/v1/chat/completions", json=chat(), headers=sent)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert {"retry-after", "x-request-id"} <= set(answer.headers["access-control-expose-headers"].split(", "))
    assert "origin" in answer.headers["vary"].lower()

    refused = client.get("/v1/contexts/ctx_000000000000000000000000", headers=sent)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (404, PAGE)  # pages read errors too
    if has_keys:
        stranger = client.get("/v1/models", headers={**sent, "authorization": "Bearer wrong"})
        assert (stranger.status_code, stranger.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize(
    "origin", ["http://page.example.evil", "https://page.example", "null", "http://page.example:81"]
)
def test_other_origins_stay_out(make_client: MakeClient, origin: str) -> None:
    client = make_client(cors_origins=(PAGE,))
    answer = client.options("/v1/models", headers=preflight(origin))
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    refused = client.get("/v1/models", headers={"origin": origin, "sec-fetch-site": "cross-site"})
    assert error_of(refused) == (403, "cross_site")
    assert "access-control-allow-origin" not in refused.headers


def test_without_keys_an_allowed_page_is_no_operator(make_client: MakeClient) -> None:
    client = make_client(cors_origins=(PAGE,))
    for path in ("/metrics", "/admin/status"):
        assert error_of(client.get(path, headers={"origin": PAGE, "sec-fetch-site": "cross-site"})) == (
            403,
            "cross_site",
        )


def test_an_operators_page_needs_the_operators_key(make_client: MakeClient, keys: Keys, key_file: Any) -> None:
    client = make_client(cors_origins=(PAGE,), keys=KeyRing(key_file))
    sent = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    assert client.get("/admin/status", headers={**sent, **keys.header("admin")}).status_code == 200
    assert client.get("/admin/status", headers={**sent, **keys.header("ann")}).status_code == 403
    assert client.get("/admin/status", headers=sent).status_code == 401


def test_every_origin_needs_keys(make_client: MakeClient, keys: Keys, key_file: Any, engine: Engine) -> None:
    client = make_client(cors_origins=("*",), keys=KeyRing(key_file))
    sent = {"origin": "https://anything.example", "sec-fetch-site": "cross-site", **keys.header("ann")}
    answer = client.get("/v1/models", headers=sent)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    assert client.get("/v1/models", headers={**sent, "origin": "null"}).status_code == 403
    with pytest.raises(InvalidRequest, match="refusing --cors-origin '\\*' without keys"):
        make_app(engine, ServerSettings(model=MODEL, cors_origins=("*",)))


def test_without_any_allowed_origin_nothing_is_said_about_them(client: TestClient) -> None:
    answer = client.get("/v1/models", headers={"origin": "http://localhost"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert error_of(client.options("/v1/models", headers=preflight(PAGE))) == (403, "cross_site")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"allowed_hosts": ["http://x.example"]}, "must be a host such as"),
        ({"allowed_hosts": ["x.example/"]}, "must be a host such as"),
        ({"allowed_hosts": ["*"]}, "must be a host such as"),
        ({"allowed_hosts": [""]}, "must be a host such as"),
        ({"cors_origins": ["x.example"]}, "must be an origin such as"),
        ({"cors_origins": ["https://x.example/path"]}, "must be an origin such as"),
        ({"cors_origins": ["null"]}, "must be an origin such as"),
    ],
)
def test_what_cannot_be_allowed(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_settings(flags, {})


def test_lists_from_the_environment() -> None:
    read = load_settings(
        {},
        {
            "KVCOMM_SERVE_ALLOWED_HOSTS": "Host.Docker.Internal, 10.0.0.7:80",
            "KVCOMM_SERVE_CORS_ORIGINS": "https://a.example:443,http://localhost:3000",
        },
    )
    assert read.allowed_hosts == ("host.docker.internal", "10.0.0.7:80")
    assert read.cors_origins == ("https://a.example", "http://localhost:3000")
    assert load_settings({"allowed_hosts": ["b"]}, {"KVCOMM_SERVE_ALLOWED_HOSTS": "a"}).allowed_hosts == ("b",)
