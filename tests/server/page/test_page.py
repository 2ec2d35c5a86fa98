"""The dashboard in a real browser: it shows what the server says, by mouse, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx2
import pytest
from selenium.webdriver.common.keys import Keys as Key

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.ladder import TURNED
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Audit, Level
from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S
from tests.server.browser import Browser
from tests.server.conftest import MODEL, Keys, chat
from tests.server.live import Live, serving
from tests.server.page.conftest import XSS, rows, send, send_elsewhere


def test_how_requests_ended_and_why_some_were_refused(page: Browser, live: Live) -> None:
    send(page, "hello")
    for body in (chat(nonsense=1), chat(model=XSS)):
        assert httpx2.post(f"{live.url}/v1/chat/completions", json=body, timeout=PATIENCE_S).status_code >= 400
    page.wait(lambda: len(page.all("#refused tbody tr")) == 2)
    reasons = live.state.tenants.get().tally.finish_reasons
    assert reasons["refused"] == 2
    parts = "(item) => [...item.children].map((part) => part.textContent)"
    shown = page.run(f"return [...document.querySelectorAll('#endings li')].map({parts})")
    numbers = sorted((name, number) for name, _, number in shown)
    explained = {"length": "as long as", "refused": "answered with", "prefill": "computed ahead", "stop": "the model"}
    for (name, number), reason in zip(numbers, sorted(reasons), strict=True):
        assert name.startswith(reason + explained[reason])
        assert number == str(reasons[reason])
    newest, oldest = rows(page, "#refused")
    assert oldest[1:] == ["POST /v1/chat/completions", "400 unknown parameter unknown parameter: 'nonsense'"]
    assert newest[2].startswith("404 model not found there is no model '<img")
    assert page.run("return document.title") == "kvcomm"


def test_rates_and_curves_stand_beside_the_sums(page: Browser) -> None:
    labels = page.run("return [...document.querySelectorAll('#summary .curve')].map((each) => each.ariaLabel)")
    assert [label.split(",")[0] for label in labels] == ["Requests", "Prompt tokens", "Tokens generated", "Refused"]
    assert labels[-1] == "Refused, last 10 min: at most 0 in 10 s"
    assert re.match(r"[\d.]+/(s|min), 0 in flight", page.text("#summary dd small"))
    rates = page.run("return [[0, 60], [1, 60], [150, 60], [90, 60], [3, 0]].map((each) => rate(...each))")
    assert rates == ["0/s", "1/min", "2.5/s", "1.5/s", "3/s"]
    page.run("window.drawn = curve('x', [0, 2, 4, 0], 10, [0, 1, 4, 0])")
    paths = page.run("return [...drawn.querySelectorAll('path')].map((each) => each.getAttribute('d'))")
    assert paths == ["M0,26V26.0h30V13.0h30V0.0h30V26.0h30V26Z", "M0,26V26.0h30V19.5h30V0.0h30V26.0h30V26Z"]


def test_audits_against_their_bounds(page: Browser, engine: Engine) -> None:
    assert "has been audited yet" in page.text("#audits")
    bounds, reader = (Bound(0.02, 0.05), Bound(0.05, 0.1)), Reader("5a" * 32, ("document", XSS))
    with engine.lock:
        book, namespace = engine.reuse.parts.book, engine.namespace()
        for divergence, bound in ((0.0, bounds[0]), (0.03, bounds[0]), (0.03, bounds[1]), (float("nan"), bounds[1])):
            book.audited(namespace, reader, Audit(time.monotonic(), divergence, float("inf"), bound, Level.OWN))
        for _ in range(9):
            book.add(namespace, reader, Pair({rung: Measured(0.01) for rung in TURNED}))
    send(page, "hello")  # a tenant that never asked for anything has no readers
    page.wait(lambda: page.all("#audits svg.audits .kept"))
    heights = (
        "const at = (each) => each.getBoundingClientRect().y, all = (kinds) => [...document.querySelectorAll(kinds)];"
    )
    pairs = "[all('#audits .audits :is(.kept, .broken)').map((each) => [each.classList[0], at(each)])"
    marks, limits = page.run(f"{heights} return {pairs}, all('#audits .audits .limit').map(at)]")
    assert [kind for kind, _ in marks] == ["kept", "broken", "kept", "broken"]
    for (kind, height), limit in zip(marks, limits, strict=True):
        assert (height < limit) == (kind == "broken")
    name = f"5a5a5a5a document, {XSS}"
    assert sorted(rows(page, "#bounds")) == [
        [name, "own", "0.02", "95 %", "9 of 19", "2", "1", "holds"],
        [name, "own", "0.05", "90 %", "9", "2", "1", "holds"],
    ]
    assert rows(page, "#readers") == [[name, "9", "0", "0", "4, each one"]]


def test_what_was_dropped_and_why(page: Browser, engine: Engine) -> None:
    page.one("#trial-system").clear()
    send(page, XSS)
    with engine.lock:
        engine.tree.reset()
    page.wait(lambda: "reset" in page.text("#evictions"))
    assert "user\n<img" in page.text("#evictions")
    assert page.all("main img") == []


def test_prompts_are_text_and_never_markup(page: Browser) -> None:
    send(page, XSS)
    assert page.run("return document.title") == "kvcomm"
    assert page.all("main img, main script, main iframe") == []
    page.wait(lambda: "<img" in page.text("#tree"))
    assert page.run("return document.title") == "kvcomm"
    assert page.all("main img, main script, main iframe") == []


def test_the_policy_stops_what_would_be_inserted(page: Browser) -> None:
    """Should a mistake ever let markup in, the browser refuses to make or to run it."""
    for way in ("document.body.innerHTML = '<b>x</b>'", "document.createElement('script').text = 'document.title = 1'"):
        assert page.run(f"try {{ {way}; return '' }} catch (error) {{ return error.name }}") == "TypeError"
    page.run("const s = document.createElement('script'); s.append('document.title = 1'); document.body.append(s)")
    page.run("return fetch('http://localhost:1/').catch(() => null)")
    assert page.run("return document.title") == "kvcomm"
    complaints = " ".join(page.complaints())
    assert "TrustedHTML" in complaints
    assert "connect-src" in complaints


def test_what_is_read_keeps_still(page: Browser, live: Live, engine: Engine) -> None:
    send(page, "hello")
    with engine.lock:
        engine.tree.reset()
    page.wait(lambda: page.all("#evictions .scroll"))
    page.run("document.querySelector('#evictions .scroll').focus()")
    send_elsewhere(live)
    page.wait(lambda: page.text("#summary div dd").startswith(str(live.state.tenants.get().tally.num_requests)))
    assert page.run("return document.activeElement.className") == "scroll"


def test_everything_is_reached_by_keyboard(page: Browser) -> None:
    reached = []
    page.run("document.activeElement.blur()")
    for _ in range(20):
        page.press(Key.TAB)
        reached.append(page.run("return document.activeElement.closest('[id]')?.id"))
    wanted = [
        "pause",
        "trial-system",
        "trial-user",
        "trial-mode",
        "trial-tokens",
        "trial-add",
        "trial-send",
        "tree",
        "contexts",
    ]
    assert [each for each in reached if each in wanted][: len(wanted)] == wanted


@pytest.mark.parametrize(("width", "is_phone"), [(360, True), (1280, False)])
def test_nothing_sticks_out(page: Browser, width: int, is_phone: bool) -> None:
    send(page, "a long message " * 12)
    page.resize(width, 800, is_phone=is_phone)
    assert page.run("return document.documentElement.scrollWidth") <= width
    wide = "return [...document.querySelectorAll('.card')].filter((card) => card.scrollWidth > card.clientWidth).length"
    assert page.run(wide) == 0
    fields = "[...document.querySelectorAll('button, input, select')].filter((each) => each.offsetParent)"
    small = f"return {fields}.filter((each) => each.offsetHeight < 32).length"
    assert page.run(small) == 0


def luminance(colour: str) -> float:
    """Relative luminance of an `rgb(...)` colour, WCAG 2.2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    card = page.run("return getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert (luminance(card) > 0.5) == (scheme == "light")
    for selector in (".card h2", "#summary dt", ".note", "#tree .label"):
        text = page.run("return getComputedStyle(document.querySelector(arguments[0])).color", selector)
        dark, light = sorted((luminance(text), luminance(card)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (selector, text, card)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_inside_marks_stand_out(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    paint = (
        "const mark = document.body.appendChild(document.createElement('b'));"
        "mark.style.color = `var(--${arguments[0]})`;"
        "const colour = getComputedStyle(mark).color; mark.remove(); return colour"
    )
    words = luminance(page.run(paint, "on-kind"))
    for kind in ("exact", "aligned", "computed"):
        assert (words + 0.05) / (luminance(page.run(paint, kind)) + 0.05) >= 4.5, kind


def test_kinds_differ_by_pattern_too(page: Browser) -> None:
    script = "return getComputedStyle(document.querySelector('.legend .' + arguments[0])).backgroundImage.split('(')[0]"
    send(page, "hello")
    patterns = {kind: page.run(script, kind) for kind in ("exact", "aligned", "computed")}
    assert patterns == {"exact": "none", "aligned": "repeating-linear-gradient", "computed": "radial-gradient"}


def test_pausing_stops_the_polls(page: Browser, live: Live) -> None:
    """Whoever comes back to the page makes it poll at once, as its timer does; not while it is paused."""
    page.run("window.asked = 0; const ask = fetch; window.fetch = (...what) => (window.asked += 1, ask(...what))")
    come_back = "window.asked = 0; document.dispatchEvent(new Event('visibilitychange')); return window.asked"
    assert page.run(come_back) == 1
    page.one("#pause").click()
    page.wait(lambda: page.text("#status") == "paused")
    assert page.run(come_back) == 0
    page.one("#pause").click()
    page.wait(lambda: page.text("#status") == "live")
    assert page.run(come_back) == 1


def test_the_page_needs_a_key_where_the_server_does(
    engine: Engine, keys: Keys, key_file: Path, browser: Browser
) -> None:
    def give(name: str) -> None:
        browser.wait(lambda: browser.one("#key-form").is_displayed())
        browser.one("#key").send_keys(keys[name], Key.ENTER)

    with serving(engine, ServerSettings(model=MODEL, port=0), keys=KeyRing(key_file)) as live:
        browser.open(f"{live.url}/ui")
        browser.wait(lambda: browser.text("#status") == "needs a key")
        assert browser.text("#summary") == ""
        give("admin")
        browser.wait(lambda: "role admin" in browser.text("#key-error"))
        give("ann")
        browser.wait(lambda: browser.text("#status") == "live")
        assert not browser.one("#key-form").is_displayed()
        send(browser, "hello")
        assert live.state.tenants.get("ann").tally.num_requests == 1
        assert browser.run("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        browser.one("#forget").click()
        browser.wait(lambda: browser.text("#status") == "needs a key")
        assert browser.run("return sessionStorage.length") == 0
        browser.leave()
    assert all("401" in each or "403" in each for each in browser.complaints())
