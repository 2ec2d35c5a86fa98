"""Wrong base URLs: every operation is found again behind whatever a client was told to put before it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from kvcomm.server.app import SURFACES
from kvcomm.server.unknown_urls import BASE_URLS, ELSEWHERE, MAX_SHOWN, UnknownUrls
from tests.server.conftest import chat

UNKNOWN = UnknownUrls(SURFACES)
OPENAI = BASE_URLS["OpenAI"]


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/openai/v1/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/api/v1/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/openai/deployments/gpt-4o/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/v1/chat/completions/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/V1/Chat/Completions", "POST /v1/chat/completions"),
        ("POST", "//v1//chat/completions", "POST /v1/chat/completions"),
        ("GET", "/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/v2/completions", "POST /v1/completions"),
        ("POST", "/v1/engines/tiny/completions", "POST /v1/completions"),
        ("GET", "/models", "GET /v1/models"),
        ("GET", "/v1/chat/completions/models", "GET /v1/models"),
        ("GET", "/models/My-Model", "GET /v1/models/My-Model"),
    ],
)
def test_what_was_meant(client: TestClient, method: str, path: str, meant: str) -> None:
    answer = client.request(method, f"http://localhost{path}", json=chat() if method == "POST" else None)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "unknown_url")
    assert error["message"] == f"there is nothing at {method} {path}; did you mean {meant}? {OPENAI}"


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("GET", "/v1/health", "GET /health"),
        ("GET", "/v1/ui", "GET /ui"),
        ("POST", "/contexts/ctx_12/fork", "POST /v1/contexts/ctx_12/fork"),
    ],
)
def test_paths_of_kvcomms_own(method: str, path: str, meant: str) -> None:
    assert UNKNOWN.hint(method, path) == f"did you mean {meant}?"


@pytest.mark.parametrize(
    "path", ["/v1", "/api/chat", "/v1/embeddings", "/v1/chat", "/completionsx", "/%00", "/{model}"]
)
def test_what_is_like_nothing(client: TestClient, path: str) -> None:
    answer = client.post(path, json={})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith(f"; {ELSEWHERE}")


def test_a_long_path_does_not_push_the_hint_out() -> None:
    message = UNKNOWN("POST", "/" + "x" * 5000 + "/chat/completions").detail
    assert f"/{'x' * (MAX_SHOWN - 1)}...;" in message
    assert message.endswith(OPENAI)


@given(st.lists(st.text(st.characters(exclude_characters="/"), max_size=6), max_size=4))
def test_any_prefix(parts: list[str]) -> None:
    path = "/".join(["", *parts, "chat", "completions"])
    assert UNKNOWN.hint("POST", path).startswith("did you mean POST /v1/chat/completions? ")


@given(st.text())
def test_any_path_has_an_answer(path: str) -> None:
    assert UNKNOWN("GET", path).status_code == 404
