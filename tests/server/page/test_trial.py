"""The "try it" panel: an answer that comes in pieces, its plan, and what may go wrong."""

from __future__ import annotations

import pytest

from kvcomm.engine.engine import Engine
from tests.limits import wait_for
from tests.server.browser import Browser
from tests.server.live import Live
from tests.server.page.conftest import XSS, send
from tests.stalling import stalling


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


def written(page: Browser) -> str:
    """What the page shows of an answer by now."""
    return "".join(str(each.get_attribute("textContent")) for each in page.all("#trial-result .answer"))


def test_an_answer_is_shown_while_it_comes(page: Browser, live: Live, engine: Engine) -> None:
    """Before its plan, which comes with the end of the stream; one request at a time."""
    with stalling(engine, written=6) as go_on:
        page.one("#trial-send").click()
        page.wait(lambda: written(page))
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
    with stalling(engine, written=6):
        page.one("#trial-send").click()
        page.wait(lambda: written(page))
        page.one("#trial-cancel").click()
        page.wait(lambda: "cancelled" in page.text("#trial-result .note"))
        wait_for(lambda: live.state.tenants.get().tally.finish_reasons["client_gone"] == 1)
    assert written(page)
    assert page.run("return document.activeElement.id") == "trial-send"
    assert not page.one("#trial-error").is_displayed()
    page.wait(lambda: "client gone" in page.text("#endings"))
    send(page, "hello")


FOX = 'data: {"choices": [{"delta": {"content": "a 🦊 "}, "finish_reason": null}], "usage": null}\n\n'
ERROR = 'data: {"error": {"message": "it went wrong", "code": "x"}}\n\n'


@pytest.mark.parametrize(
    ("stream", "answers", "error"),
    [
        (FOX + FOX + FOX[:30], ["a 🦊 a 🦊 "], "the answer broke off"),
        (FOX + ERROR, ["a 🦊 "], "it went wrong"),
        ("", [], "the answer broke off"),
    ],
)
def test_streams_that_end_badly(page: Browser, stream: str, answers: list[str], error: str) -> None:
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
    assert [each.get_attribute("textContent") for each in page.all("#trial-result pre")] == answers
    assert page.one("#trial-send").is_enabled()


def test_what_the_server_refuses_is_said(page: Browser) -> None:
    send(page, "hello")
    page.run("document.getElementById('trial-user').value = 'x'.repeat(100000)")
    page.one("#trial-send").click()
    page.wait(lambda: "the model's limit" in page.text("#trial-error"))
    assert page.one("#trial-error").is_displayed()
    assert any("400" in each for each in page.complaints())
