"""Contexts while requests run on them: a real uvicorn, stalled engines, clients that go away, full pools and quotas."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.schemas.contexts import ForkRequest
from kvcomm.server.settings import Limits
from tests.limits import PATIENCE_S, wait_for
from tests.server.conftest import HELLO, chat, require_nothing_left
from tests.server.live import Live, serving
from tests.server.test_contexts import CHAT, MORE, URL, error_of, ok, said
from tests.server.test_operation import encoded, meanwhile, settings, stalled
from tests.tiny import TinyModel

__all__ = ["stalled"]  # a fixture


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    """A server whose contexts and requests are gone at the end."""
    with serving(engine, settings()) as made:
        yield made
        wait_for(lambda: made.state.admission.num_in_flight == 0)


def ask(live: Live, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """An answer."""
    return httpx2.request(method, live.url + path, json=body, timeout=PATIENCE_S)


def listed(live: Live) -> list[dict[str, Any]]:
    """All contexts."""
    return list(ok(ask(live, "GET", URL))["data"])


def test_a_busy_context_can_be_forked_and_not_extended(live: Live, engine: Engine, stalled: threading.Event) -> None:
    stalled.set()
    context = ok(ask(live, "POST", URL, {"messages": HELLO}))
    where = f"{URL}/{context['id']}"
    expected = ok(ask(live, "POST", CHAT, chat(messages=[*HELLO, *MORE, *MORE])))
    stalled.clear()
    with meanwhile(stalled) as pool:
        extending = pool.submit(ask, live, "POST", f"{where}/extend", {"messages": MORE})
        wait_for(lambda: bool(engine.scheduler.requests()))
        (busy,) = listed(live)
        assert (busy["busy"], busy["expires_in_s"], busy["tokens"]) == (True, None, context["tokens"])
        for refused in (
            ask(live, "POST", f"{where}/extend", {"messages": MORE}),
            ask(live, "POST", CHAT, chat(context_id=context["id"])),
        ):
            assert error_of(refused) == (409, "context_busy")
            assert "fork" in refused.json()["error"]["message"]
        fork = ok(ask(live, "POST", f"{where}/fork", {}))
        stalled.set()
        extended = ok(extending.result())
    assert fork["tokens"] == extended["tokens"] > context["tokens"]
    for context_id in (context["id"], fork["id"]):  # the fork has been given the tokens, and computes them now
        answer = ok(ask(live, "POST", CHAT, chat(messages=MORE, context_id=context_id)))
        assert said(answer) == said(expected)


def test_a_fork_in_the_middle_of_an_answer_goes_on_behind_it(live: Live, engine: Engine) -> None:
    context = ok(ask(live, "POST", URL, {"messages": HELLO}))
    body = chat(messages=[], context_id=context["id"], store=True, stream=True, max_tokens=400, ignore_eos=True)
    with httpx2.stream("POST", live.url + CHAT, json=body, timeout=PATIENCE_S) as stream:
        lines = stream.iter_lines()
        while '"content":""' in (line := next(lines)) or "content" not in line:
            pass
        fork = ok(ask(live, "POST", f"{URL}/{context['id']}/fork", {}))
    assert fork["tokens"] > context["tokens"]
    answer = ok(ask(live, "POST", CHAT, chat(messages=MORE, context_id=fork["id"], store=True)))
    node = live.state.contexts.of(live.state.tenants.get()).find(fork["id"])
    text = engine.texts.decode(node.context.tokens)
    assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{said(answer)}")
    assert text.count("<|im_start|>assistant\n") == 2


def test_an_answer_that_nobody_waits_for_is_not_kept(live: Live, engine: Engine, stalled: threading.Event) -> None:
    stalled.set()
    context = ok(ask(live, "POST", URL, {"messages": HELLO}))
    stalled.clear()
    body = chat(messages=MORE, context_id=context["id"], store=True)
    connections = [live.post(encoded({"text": "a long text " * 20}), URL), live.post(encoded(body))]
    wait_for(lambda: len(engine.scheduler.requests()) == 2)
    for connection in connections:
        connection.close()
    wait_for(lambda: live.state.admission.num_in_flight == 0)
    stalled.set()
    wait_for(lambda: not listed(live)[0]["busy"])
    assert [each["tokens"] for each in listed(live)] == [context["tokens"]]
    engine.check_integrity()
    assert len(engine.contexts) == 1


def test_deleting_a_busy_context_ends_what_extends_it(live: Live, engine: Engine, stalled: threading.Event) -> None:
    stalled.set()
    context = ok(ask(live, "POST", URL, {"messages": HELLO}))
    stalled.clear()
    with meanwhile(stalled) as pool:
        extending = pool.submit(ask, live, "POST", f"{URL}/{context['id']}/extend", {"messages": MORE})
        wait_for(lambda: bool(engine.scheduler.requests()))
        assert ok(ask(live, "DELETE", f"{URL}/{context['id']}"))["deleted"] == [context["id"]]
        assert error_of(extending.result()) == (409, "context_deleted")
    assert engine.contexts == ()


def test_contexts_expire_though_nobody_asks(live: Live, engine: Engine) -> None:
    ok(ask(live, "POST", URL, {"text": "The quick brown fox", "ttl": "1s"}))
    kept = ok(ask(live, "POST", URL, {"text": "jumps", "ttl": "1s", "pinned": True}))
    wait_for(lambda: len(engine.contexts) == 1)
    assert [each["id"] for each in listed(live)] == [kept["id"]]


def test_contexts_count_toward_the_quota(engine: Engine) -> None:
    """What they hold is refused to requests at once: waiting would not bring it back, deleting does."""
    with serving(engine, settings(limits=Limits(held_tokens=80))) as live:
        context = ok(ask(live, "POST", URL, {"token_ids": [5] * 40}))
        assert ok(ask(live, "POST", CHAT, chat(max_tokens=4)))
        refused = ask(live, "POST", CHAT, chat(max_tokens=20))
        assert error_of(refused) == (429, "quota_exceeded")
        assert "hold 40 of its 80 tokens" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        assert error_of(ask(live, "POST", URL, {"token_ids": [6] * 41})) == (429, "quota_exceeded")
        assert error_of(ask(live, "POST", f"{URL}/{context['id']}/extend", {"token_ids": [6] * 41}))[0] == 429
        ok(ask(live, "POST", f"{URL}/{context['id']}/fork", {}))  # takes nothing
        ok(ask(live, "DELETE", f"{URL}/{context['id']}?descendants=true"))
        assert ok(ask(live, "POST", CHAT, chat(max_tokens=20)))
        wait_for(lambda: live.state.admission.num_in_flight == 0)


def test_the_number_of_contexts_is_bounded(engine: Engine) -> None:
    with serving(engine, settings(max_contexts=2)) as live:
        first = ok(ask(live, "POST", URL, {"text": "a"}))
        ok(ask(live, "POST", f"{URL}/{first['id']}/fork", {}))
        for path, body in ((URL, {"text": "b"}), (f"{URL}/{first['id']}/fork", {})):
            assert error_of(ask(live, "POST", path, body)) == (429, "quota_exceeded")


def test_contexts_that_are_being_made_have_a_place(engine: Engine, stalled: threading.Event) -> None:
    with serving(engine, settings(max_contexts=1)) as live, meanwhile(stalled) as pool:
        creating = pool.submit(ask, live, "POST", URL, {"text": "a"})
        wait_for(lambda: bool(engine.scheduler.requests()))
        assert error_of(ask(live, "POST", URL, {"text": "b"})) == (429, "quota_exceeded")
        stalled.set()
        first = ok(creating.result())
        ok(ask(live, "DELETE", f"{URL}/{first['id']}"))
        assert error_of(ask(live, "POST", URL, {"token_ids": [-1]}))[0] in (400, 422)
        assert error_of(ask(live, "POST", URL, {"token_ids": [10**6]}))[0] == 400  # a failure keeps no place
        assert ok(ask(live, "POST", URL, {"text": "c"}))


def test_a_full_pool_says_what_the_contexts_hold(shared_model: TinyModel) -> None:
    config = EngineConfig(page_size=4, pool_tokens=128, max_batch_tokens=64, prefill_chunk=16)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        with serving(engine, settings()) as live:
            context = ok(ask(live, "POST", URL, {"token_ids": [5] * 100}))
            refused = ask(live, "POST", URL, {"token_ids": [6] * 60})
            assert error_of(refused) == (503, "pool_exhausted")
            assert "hold 100 tokens" in refused.json()["error"]["message"]
            assert error_of(ask(live, "POST", f"{URL}/{context['id']}/extend", {"token_ids": [6] * 60}))[0] in (
                400,
                503,
            )
            assert [each["tokens"] for each in listed(live)] == [100]
            ok(ask(live, "DELETE", f"{URL}/{context['id']}"))
            assert ok(ask(live, "POST", URL, {"token_ids": [6] * 60}))
        require_nothing_left(engine)


def test_a_chain_may_be_as_deep_as_it_likes(engine: Engine) -> None:
    with serving(engine, settings(max_contexts=1300)) as live:
        registry = live.state.contexts.of(live.state.tenants.get())
        node = registry.find(ok(ask(live, "POST", URL, {"text": "a"}))["id"])
        root = node
        for _ in range(1200):
            node = registry.fork(node, ForkRequest())
        branch = ok(ask(live, "GET", f"{URL}/{root.id}"))
        assert len(branch["descendants"]) == 1200
        assert len(ok(ask(live, "GET", f"{URL}/{node.id}"))["ancestors"]) == 1200
        assert len(json.loads(ask(live, "DELETE", f"{URL}/{root.id}?descendants=true").text)["deleted"]) == 1201
