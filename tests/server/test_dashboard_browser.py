"""The dashboard in a real browser: it shows what the server says, by mouse, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from selenium.webdriver.common.keys import Keys as Key

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.ladder import TURNED
from kvcomm.align.levels import Audit, Level
from kvcomm.align.readers import Reader
from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S, wait_for
from tests.server.browser import Browser, browsing
from tests.server.conftest import MODEL, Keys, chat
from tests.server.live import Live, serving
from tests.stalling import stalling

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


def test_a_request_and_its_plan(page: Browser, live: Live) -> None:
    for kinds in (["computed"], ["exact", "computed"]):
        send(page, "how many apples are left?")
        spans = page.all("#trial-result .span")
        assert [str(span.get_attribute("class")).split()[-1] for span in spans] == kinds
        assert len(page.all("#trial-result tbody tr")) == len(kinds)
    tally = live.state.tenants.get().tally
    usage = tally.recent[-1].usage
    label = str(page.one("#trial-result .strip").get_attribute("aria-label"))
    assert label == f"Plan: {usage.exact_tokens} exact, 0 aligned, {usage.computed_tokens} computed"
    widths = [span.size["width"] for span in spans]
    assert widths[0] / sum(widths) == pytest.approx(usage.exact_tokens / usage.prompt_tokens, abs=0.02)
    assert "last token" in page.text("#trial-result tbody")
    page.wait(lambda: page.text("#summary div dd").startswith(str(tally.num_requests)))  # and the counters follow
    assert f"exact {100 * tally.tokens['exact'] / tally.tokens.total():.1f} %" in page.text("#sources .legend")
    assert page.all("#ttft .histogram li")


def test_segments_stand_before_the_messages(page: Browser, live: Live) -> None:
    for text in ("an apple", "a fox", "a dog"):
        page.one("#trial-add").click()
        page.press(text)
    page.one("[aria-label='Remove segment 2']").click()
    assert [each.text for each in page.all("#trial-segments label span")] == ["Segment 1", "Segment 2"]
    send(page, "how many?")
    used = live.state.tenants.get().tally.recent[-1].usage.prompt_tokens
    for item in page.all("#trial-segments button"):
        item.click()
    send(page, "how many?")
    without = live.state.tenants.get().tally.recent[-1].usage.prompt_tokens
    added = sum(len(live.state.engine.segment(text).token_ids) for text in ("an apple", "a dog"))
    assert used == without + added


def test_moved_text_in_a_plan(page: Browser) -> None:
    """What an answer says about moved text, given to the page as a server would."""
    event = {
        "choices": [],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 7,
            "cached_prefix_tokens": 20,
            "aligned_tokens": 50,
            "computed_tokens": 30,
            "bound": {"max_divergence": 0.02, "confidence": 0.95, "level": "pool", "num_pairs": 41},
            "rung_name": "token 10 % attention",
            "timings": {"ttft_s": 0.25, "total_s": 1.5},
            "plan": [
                {"start": 0, "end": 20, "source": "exact", "reason": None},
                {"start": 20, "end": 70, "source": "aligned", "reason": None},
                {"start": 70, "end": 100, "source": "computed", "reason": "out_of_distribution"},
            ],
        },
    }
    page.run("window.answer = new TrialAnswer(document.getElementById('trial-result'))")
    for piece in (XSS[:20], XSS[20:]):
        page.run("answer.take({ choices: [{ delta: { content: arguments[0] }, finish_reason: null }] })", piece)
    page.run("answer.take({ choices: [{ delta: {}, finish_reason: 'tool_calls' }] }); answer.take(arguments[0])", event)
    spans = page.all("#trial-result .span")
    assert [span.text for span in spans] == ["exact 20", "aligned 50", "out of distribution 30"]
    widths = [span.size["width"] for span in spans]
    assert [width / sum(widths) for width in widths] == pytest.approx([0.2, 0.5, 0.3], abs=0.02)
    words = "bound 0.02 nats at 95 % by 41 pairs of all your prompts, moved by token 10 % attention"
    assert words in page.text("#trial-result")
    assert "7 tokens in 1.5 s, ended with tool calls: the answer calls tools" in page.text("#trial-result")
    assert page.text("#trial-result .answer") == XSS
    assert page.run("return document.title") == "kvcomm"


def test_an_answer_is_shown_while_it_comes(page: Browser, live: Live, engine: Engine) -> None:
    """Before its plan, which comes with the end of the stream; one request at a time."""
    with stalling(engine, after=24) as go_on:
        page.one("#trial-send").click()
        page.wait(lambda: page.text("#trial-result .answer"))
        assert page.text("#trial-result .note") == "writing"
        assert page.one("#trial-result").get_attribute("aria-busy") == "true"
        assert page.all("#trial-result .strip") == []
        assert not page.one("#trial-send").is_enabled()
        page.run("document.getElementById('trial').requestSubmit()")  # as the Enter key does
        go_on.set()
        page.wait(lambda: page.all("#trial-result .strip"))
    page.wait(lambda: page.one("#trial-send").is_enabled())
    assert not page.one("#trial-cancel").is_displayed()
    order = page.run("return [...document.querySelectorAll('#trial-result h3')].map((each) => each.textContent)")
    assert order == ["Answer", "Plan of the prompt"]
    reasons = live.state.tenants.get().tally.finish_reasons
    wait_for(lambda: reasons["length"] + reasons["stop"] == 1)


def test_an_answer_is_cancelled(page: Browser, live: Live, engine: Engine) -> None:
    """The server stops computing it, what was written stays, and the focus does not get lost."""
    with stalling(engine, after=24):
        page.one("#trial-send").click()
        page.wait(lambda: page.text("#trial-result .answer"))
        page.one("#trial-cancel").click()
        page.wait(lambda: "cancelled" in page.text("#trial-result .note"))
        wait_for(lambda: live.state.tenants.get().tally.finish_reasons["client_gone"] == 1)
    assert page.text("#trial-result .answer")
    assert page.run("return document.activeElement.id") == "trial-send"
    assert not page.one("#trial-error").is_displayed()
    page.wait(lambda: "client gone" in page.text("#endings"))
    send(page, "hello")


FOX = 'data: {"choices": [{"delta": {"content": "a 🦊 "}, "finish_reason": null}], "usage": null}\n\n'
ERROR = 'data: {"error": {"message": "it went wrong", "code": "x"}}\n\n'


@pytest.mark.parametrize(
    ("stream", "written", "error"),
    [
        (FOX + FOX + FOX[:30], ["a 🦊 a 🦊 "], "the answer broke off"),
        (FOX + ERROR, ["a 🦊 "], "it went wrong"),
        ("", [], "the answer broke off"),
    ],
)
def test_streams_that_end_badly(page: Browser, stream: str, written: list[str], error: str) -> None:
    """Cut anywhere, also inside a character; what has come of the answer stays to be read."""
    page.run(
        "const ask = fetch, bytes = [...new TextEncoder().encode(arguments[0])];"
        "const body = () => new ReadableStream({ start: (to) => {"
        "  bytes.forEach((each) => to.enqueue(new Uint8Array([each]))); to.close(); } });"
        "window.fetch = async (path, what) => path.endsWith('completions') ? new Response(body()) : ask(path, what)",
        stream,
    )
    page.one("#trial-send").click()
    page.wait(lambda: page.text("#trial-error") == error)
    assert [each.get_attribute("textContent") for each in page.all("#trial-result pre")] == written
    assert page.one("#trial-send").is_enabled()


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
    rows = [[cell.text for cell in row.find_elements("tag name", "td")] for row in page.all("#refused tbody tr")]
    assert rows[1][1:] == ["POST /v1/chat/completions", "400 unknown parameter unknown parameter: 'nonsense'"]
    assert rows[0][2].startswith("404 model not found there is no model '<img")
    assert page.run("return document.title") == "kvcomm"


def test_rates_and_curves_stand_beside_the_sums(page: Browser) -> None:
    labels = [str(each.get_attribute("aria-label")) for each in page.all("#summary .curve")]
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
        book, namespace = engine.reuse.book, engine.namespace()
        for divergence, bound in ((0.0, bounds[0]), (0.03, bounds[0]), (0.03, bounds[1]), (float("nan"), bounds[1])):
            book.audited(namespace, reader, Audit(time.monotonic(), divergence, float("inf"), bound, Level.OWN))
        for _ in range(9):
            book.add(namespace, reader, Pair({rung: Measured(0.01) for rung in TURNED}))
    send(page, "hello")  # a tenant that never asked for anything has no readers
    page.wait(lambda: page.all("#audits svg.audits .kept"))
    marks = page.run(
        "return [...document.querySelectorAll('#audits svg.audits .kept, #audits svg.audits .broken')]"
        ".map((mark) => [mark.getAttribute('class'), mark.getBoundingClientRect().y])"
    )
    assert [kind for kind, _ in marks] == ["kept", "broken", "kept", "broken"]
    limits = [each.location["y"] for each in page.all("#audits svg.audits .limit")]
    for (kind, height), limit in zip(marks, limits, strict=True):
        assert (height < limit) == (kind == "broken")
    rows = [[cell.text for cell in row.find_elements("tag name", "td")] for row in page.all("#bounds tbody tr")]
    name = f"5a5a5a5a document, {XSS}"
    assert sorted(rows) == [
        [name, "own", "0.02", "95 %", "9 of 19", "2", "1", "holds"],
        [name, "own", "0.05", "90 %", "9", "2", "1", "holds"],
    ]
    (row,) = page.all("#readers tbody tr")
    assert [cell.text for cell in row.find_elements("tag name", "td")] == [name, "9", "0", "0", "4, each one"]


def test_what_was_dropped_and_why(page: Browser, engine: Engine) -> None:
    page.one("#trial-system").clear()
    send(page, XSS)
    with engine.lock:
        engine.tree.reset()
    page.wait(lambda: "reset" in page.text("#evictions"))
    assert "user\n<img" in page.text("#evictions")
    assert page.all("main img") == []


def test_what_the_server_refuses_is_said(page: Browser) -> None:
    send(page, "hello")
    page.run("document.getElementById('trial-user').value = 'x'.repeat(100000)")
    page.one("#trial-send").click()
    page.wait(lambda: "the model's limit" in page.text("#trial-error"))
    assert page.one("#trial-error").is_displayed()
    assert any("400" in each for each in page.complaints())


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


def test_the_cache(page: Browser, live: Live) -> None:
    """Real nodes with the server's words, those first that hold most with what hangs below them."""

    def held(node: dict[str, Any]) -> int:
        own = 0 if node["kind"] in ("segment", "salt") else node["bytes"]
        return int(own) + sum(map(held, node["children"]))

    def expected(node: dict[str, Any], level: int) -> list[tuple[str, str]]:
        return [
            each
            for child in sorted(node["children"], key=held, reverse=True)
            for each in [(str(level), child["label"] or child["id"]), *expected(child, level + 1)]
        ]

    send(page, "how many apples are left?")
    send(page, "how many apples are there?")
    root = httpx2.get(f"{live.url}/v1/cache/tree", timeout=PATIENCE_S).json()["root"]
    assert any(child["children"] for child in root["children"])
    page.wait(lambda: tree_labels(page, "#tree") == expected(root, 1))


FOREST = (
    node("A", 40, node("B", 10, pinned=True), node("C", 30, kind="rendition", fidelity="approximate")),
    node("D", 20, node("E", 20, kind="rendition"), kind="segment", label=XSS),
)


@pytest.fixture
def forest(page: Browser) -> Browser:
    """A page that shows two trees of known sizes in place of an answer."""
    page.run("window.view = new TreeView(document.getElementById('trial-result'), 'known')")
    page.run("view.show(arguments[0].map(cacheNodes), 'and 7 more')", FOREST)
    return page


def test_sizes_and_words_of_a_tree(forest: Browser) -> None:
    place = "#trial-result"
    labels = [("1", "A"), ("2", "B"), ("2", "C"), ("1", XSS), ("2", "E")]
    assert tree_labels(forest, place) == labels
    assert forest.text(f"{place} [data-id=id-C] .note") == "approximate · 30 tokens, 30.0 kB · rendition · used 5 s ago"
    assert " · prefix · pinned · used 5 s ago" in forest.text(f"{place} [data-id=id-B] .note")
    assert forest.text(f"{place} > .empty") == "and 7 more"
    bars = {each: forest.one(f"{place} [data-id=id-{each}] > .node .bar").size["width"] for each in "AB"}
    assert bars["B"] / bars["A"] == pytest.approx(0.25, abs=0.05)
    whole = forest.one(f"{place} .icicle").size["width"]
    shares = [each.size["width"] / whole for each in forest.all(f"{place} .cell")]
    assert shares == pytest.approx([0.8, 0.1, 0.3, 0.2, 0.2], abs=0.02)  # a segment is as big as its renditions


def test_contexts(page: Browser, contexts: list[str], live: Live) -> None:
    top = httpx2.get(f"{live.url}/v1/contexts/{contexts[0]}", timeout=PATIENCE_S).json()
    assert tree_labels(page, "#contexts") == [("1", "top"), ("2", "left"), ("1", contexts[2])]
    notes = [page.text(f"#contexts [data-id='{each}'] .note") for each in contexts]
    assert notes[0].startswith(f"exact · {top['tokens']} tokens, ")
    assert notes[0].endswith(" · pinned")
    assert " · 0 of its own · expires in " in notes[1]


def test_a_context_without_its_parent_stands_by_itself(page: Browser) -> None:
    own = {"tokens": 9, "own_tokens": 9, "busy": True, "pinned": False, "expires_in_s": None, "name": None}
    nodes = page.run("return contextNodes(arguments[0])", [{"id": "b", "parent": "gone", **own}])
    assert [(each["label"], each["notes"], each["children"]) for each in nodes] == [("b", ["busy"], [])]


def test_a_tree_by_keyboard(forest: Browser) -> None:
    def focused() -> str:
        return str(forest.run("return document.activeElement.dataset.id"))

    place = "#trial-result"
    assert len(forest.all(f"{place} [tabindex='0']")) == 1
    forest.run("document.querySelector('#trial-result [role=treeitem]').focus()")
    forest.press(Key.ARROW_DOWN, Key.ARROW_DOWN)
    assert focused() == "id-C"
    forest.press(Key.ARROW_LEFT)
    assert focused() == "id-A"
    forest.press(Key.ARROW_LEFT)
    closed = [("1", "A"), ("1", XSS), ("2", "E")]
    assert tree_labels(forest, place) == closed
    forest.run("view.show(arguments[0].map(cacheNodes))", FOREST)  # as the next poll does
    assert tree_labels(forest, place) == closed
    assert focused() == "id-A"
    forest.press(Key.ARROW_RIGHT, Key.ARROW_RIGHT)
    assert focused() == "id-B"
    forest.press(Key.END, Key.HOME)
    assert focused() == "id-A"


def test_big_trees_begin_closed(forest: Browser) -> None:
    many = [node(f"N{number}", 1, node(f"M{number}", 1)) for number in range(100)]
    forest.run("view.show(arguments[0].map(cacheNodes))", many)
    assert len(tree_labels(forest, "#trial-result")) == 100
    forest.one("#trial-result [data-id=id-N5] .node").click()
    assert tree_labels(forest, "#trial-result")[5:8] == [("1", "N5"), ("2", "M5"), ("1", "N6")]
    forest.run("document.querySelector('#trial-result [role=tree]').scrollTop = 900")
    forest.run("view.show(arguments[0].map(cacheNodes))", many)
    assert forest.run("return document.querySelector('#trial-result [role=tree]').scrollTop") == 900


def test_small_ones_of_many_are_folded(forest: Browser) -> None:
    sizes = [1, 300, 1, 200, 1, 100, 60, 61, 59, 1]
    nodes = [node(f"N{index}", size) for index, size in enumerate(sizes)]
    nodes.append(node("top", 1, *(node(f"M{index}", 5) for index in range(8))))
    forest.run("view.show(bySize(arguments[0].map(cacheNodes)))", nodes)
    shown = [("1", name) for name in ("N1", "N3", "N5", "N7", "N6", "N8", "top")]
    below = [("2", f"M{index}") for index in range(6)] + [("2", "2 small ones")]
    assert tree_labels(forest, "#trial-result") == [*shown, *below, ("1", "4 small ones")]
    note = forest.text("#trial-result [data-id='small top'] .note")
    assert note == "exact · 4 tokens, 4.0 kB · at most 1.0 kB each"
    assert "41.0 kB with what is below" in forest.text("#trial-result [data-id=id-top] .note")
    forest.one("#trial-result [data-id='small top'] .node").click()
    opened = [("2", f"N{index}") for index in (0, 2, 4, 9)]
    assert tree_labels(forest, "#trial-result") == [*shown, *below, ("1", "4 small ones"), *opened]


@pytest.mark.parametrize("sizes", [[1] * 7, [9, 1], [100] * 30])
def test_nothing_is_folded_for_nothing(forest: Browser, sizes: list[int]) -> None:
    nodes = [node(f"N{index}", size) for index, size in enumerate(sizes)]
    forest.run("view.show(bySize(arguments[0].map(cacheNodes)))", nodes)
    assert tree_labels(forest, "#trial-result") == [("1", f"N{index}") for index in range(len(sizes))]


def test_deep_trees_keep_their_words_on_a_phone(forest: Browser) -> None:
    deepest = node("leaf", 1)
    for level in range(47):
        deepest = node(f"level {level}", 1, deepest)
    forest.run("view.show(arguments[0].map(cacheNodes))", [deepest])
    forest.resize(360, 800, is_phone=True)
    assert forest.one("#trial-result [data-id=id-leaf] .label").size["width"] > 40
    assert forest.run("return document.documentElement.scrollWidth") <= 360


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
    assert page.text("#status") == "paused"
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
