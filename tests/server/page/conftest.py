"""A real browser on the dashboard of a real server over a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from selenium.webdriver.common.keys import Keys as Key

from kvcomm.engine.engine import Engine
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S
from tests.server.browser import Browser, browsing
from tests.server.conftest import MODEL, chat
from tests.server.live import Live, serving

XSS = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for the file."""
    with browsing(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser, as on a desk; at the end it must have had nothing to complain about."""
    chromium.resize(1280, 900)
    chromium.prefer("light")
    chromium.complaints()
    yield chromium
    assert chromium.complaints() == []


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    """A server without keys."""
    with serving(engine, ServerSettings(model=MODEL, port=0)) as running:
        yield running


def node(name: str, size: int, *children: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A node of the cache tree."""
    values = {
        "id": f"id-{name}", "label": name, "tokens": size, "bytes": size * 1000, "fidelity": "exact", "kind": "prefix",
        "last_used_s": 5.0, "pinned": False, "expires_in_s": None, "children": list(children),
    }  # fmt: skip
    return values | fields


@pytest.fixture
def contexts(live: Live) -> Iterator[list[str]]:
    """Ids of a context, of a fork of it, and of another one; they are deleted at the end."""
    url, made = f"{live.url}/v1/contexts", list[str]()

    def make(path: str, **body: Any) -> None:
        made.append(httpx2.post(f"{url}{path}", json=body, timeout=PATIENCE_S).json()["id"])

    make("", text="The quick brown fox jumps over the lazy dog", name="top", pinned=True)
    make(f"/{made[0]}/fork", name="left", ttl="20h")
    make("", text=XSS)
    yield made
    for each in made:
        httpx2.delete(f"{url}/{each}", timeout=PATIENCE_S).raise_for_status()


@pytest.fixture
def page(live: Live, contexts: list[str], browser: Browser) -> Iterator[Browser]:
    """The dashboard of the server, once it shows something."""
    browser.open(f"{live.url}/ui")
    browser.wait(lambda: browser.text("#status") == "live" and browser.all("#contexts [role=treeitem]"))
    yield browser
    browser.leave()


def send(page: Browser, message: str) -> None:
    """Try a message and wait for its plan."""
    page.run("document.getElementById('trial-result').replaceChildren()")
    box = page.one("#trial-user")
    box.clear()
    box.send_keys(message)
    page.one("#trial-tokens").clear()
    page.one("#trial-tokens").send_keys("4", Key.ENTER)
    page.wait(lambda: page.all("#trial-result .strip"))


def send_elsewhere(live: Live) -> None:
    """A request that does not come from the page."""
    httpx2.post(f"{live.url}/v1/chat/completions", json=chat(max_tokens=1), timeout=PATIENCE_S).raise_for_status()


def tree_labels(page: Browser, place: str) -> list[tuple[str, str]]:
    """Level and label of every node shown."""
    label = "return arguments[0].querySelector('.label').textContent"
    items = page.all(f"{place} [role=treeitem]")
    return [(str(item.get_attribute("aria-level")), page.run(label, item)) for item in items]


def rows(page: Browser, place: str) -> list[list[str]]:
    """The words of a table's cells, read at once: the page draws its tables anew at every poll."""
    cells = "[...row.children].map((cell) => cell.textContent)"
    script = f"return [...document.querySelectorAll(arguments[0])].map((row) => {cells})"
    return list(page.run(script, f"{place} tbody tr"))
