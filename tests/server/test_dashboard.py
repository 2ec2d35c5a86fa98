"""The dashboard as it is sent: one page, under a policy that lets nothing but its own style and script run."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from starlette.testclient import TestClient

from kvcomm.reuse.plan import Reason
from kvcomm.server.dashboard import assemble
from kvcomm.server.endings import FAILED, GONE, REFUSED, TIMED_OUT
from kvcomm.server.generation import PREFILL

INLINE = {"script-src": "script", "style-src": "style"}


@pytest.fixture(scope="module")
def page() -> str:
    """The page's text."""
    return assemble().html


@pytest.mark.parametrize("directive", INLINE)
def test_the_policy_allows_what_is_in_the_page_and_nothing_else(client: TestClient, directive: str) -> None:
    response = client.get("/ui")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(each.split(" ", 1) for each in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    tag = INLINE[directive]
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert policy[directive] == f"'sha256-{digest}'"


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    addresses = re.findall(r"(?:https?:)?//[^\s\"')]+\.[^\s\"')]+", page)
    assert addresses == ["http://www.w3.org/2000/svg"]  # a name, not a place
    assert re.findall(r"""\b(?:src|href)=["']([^"']*)""", page) == ["data:,", "#main"]
    assert "url(" not in page
    assert "@import" not in page


def test_text_cannot_become_markup(page: str) -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in page


def test_the_servers_address_leads_to_the_page(client: TestClient) -> None:
    moved = client.get("/", follow_redirects=False)
    assert (moved.status_code, moved.headers["location"]) == (307, "/ui")
    assert "<title>kvcomm</title>" in client.get("/").text


def test_every_ending_is_explained(page: str) -> None:
    (table,) = re.findall(r"const ENDINGS = \{(.*?)\};", page, flags=re.DOTALL)
    engines = {"stop", "length", "tool_calls", PREFILL}
    assert set(re.findall(r"^ *(\w+):", table, flags=re.MULTILINE)) == engines | {GONE, REFUSED, TIMED_OUT, FAILED}


def test_every_reason_is_explained(page: str) -> None:
    (table,) = re.findall(r"const REASONS = \{(.*?)\};", page, flags=re.DOTALL)
    assert set(re.findall(r"^ *(\w+):", table, flags=re.MULTILINE)) == {reason.value for reason in Reason} | {"reset"}
