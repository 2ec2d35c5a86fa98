"""The middleware in front of a server that only remembers what it was sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.engine.engine import Engine
from kvcomm.integrations.vllm import middleware
from kvcomm.integrations.vllm.bodies import CHAT, COMPLETION, OF_PARTS, OURS, BodyMaker, TokenizerSource, spans_of
from kvcomm.integrations.vllm.middleware import SegmentsMiddleware, bodies_of
from kvcomm.integrations.vllm.params import MAX_SPANS, RequestParams
from kvcomm.memory.segments import Segment
from kvcomm.server.errors import ApiError
from kvcomm.server.prompts import PromptMaker
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.completions import CompletionRequest
from kvcomm.server.segments.registry import SegmentRegistries
from tests.tiny import save_tiny_model, tiny_model

FOX, DOG = "The quick brown fox.\n", " jumps over the dog"
DOCUMENT = {"id": "doc", "content": FOX, "kind": "dynamic"}
RULES = {"id": "rules", "content": "Be brief.\n"}
ASKED = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "which?"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": FOX, "name": "web"}, {"type": "text", "text": "so?"}]}]
JSON_TYPE = [(b"content-type", b"application/json; charset=utf-8")]


class Host:
    """A server that answers as it is told."""

    def __init__(self, answer: bytes = b"{}", headers: Sequence[tuple[bytes, bytes]] = (), pieces: int = 1) -> None:
        size = max(1, -(-len(answer) // pieces))
        self.bodies = [answer[at : at + size] for at in range(0, len(answer), size)] or [b""]
        self.headers = [*headers, (b"content-length", str(len(answer)).encode())]
        self.state: Any = SimpleNamespace()
        self.received: list[bytes] = []
        self.scopes: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body, has_more = b"", True
        while has_more:
            message = await receive()
            assert message["type"] == "http.request"
            body += message["body"]
            has_more = message.get("more_body", False)
        self.received.append(body)
        for message in self.messages:
            await send(message)

    @property
    def messages(self) -> list[dict[str, Any]]:
        start = {"type": "http.response.start", "status": 200, "headers": list(self.headers)}
        last = len(self.bodies) - 1
        return [
            start,
            *(
                {"type": "http.response.body", "body": body, "more_body": at < last}
                for at, body in enumerate(self.bodies)
            ),
        ]


def call(
    app: Any,
    host: Host,
    body: bytes | Sequence[bytes],
    *,
    path: str = CHAT,
    method: str = "POST",
    is_gone: bool = False,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> list[dict[str, Any]]:
    """Send a request, in as many messages as the body has pieces; returns the messages of the answer."""
    pieces = [body] if isinstance(body, bytes) else list(body) or [b""]
    coming = [
        {"type": "http.request", "body": each, "more_body": at < len(pieces) - 1} for at, each in enumerate(pieces)
    ]
    if is_gone:
        coming[-1] = {"type": "http.disconnect"}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return coming.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "app": host}
    asyncio.run(app(scope, receive, send))
    return sent


def refuse_to_make(state: Any) -> BodyMaker:
    raise AssertionError("nothing of ours is in this body")


TINY = tiny_model()
SOURCE = TokenizerSource(TINY.tokenizer, name="tiny", vocab_size=len(TINY.tokenizer), max_context=512)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(TINY.model, TINY.tokenizer) as made:
        yield made


def sent_to_host(body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    """What the server gets of a body; it must be taken."""
    host = Host()
    answer = call(SegmentsMiddleware(host, lambda state: BodyMaker(SOURCE)), host, json.dumps(body).encode(), path=path)
    assert answer == host.messages
    (received,) = host.received
    assert dict(host.scopes[0]["headers"])[b"content-length"] == str(len(received)).encode()
    made: dict[str, Any] = json.loads(received)
    assert not set(OURS) & set(made)
    return made


def error_of(body: object, path: str = CHAT) -> tuple[int, dict[str, Any]]:
    """How a body is refused, of which the server must see nothing."""
    host = Host()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    start, *rest = call(SegmentsMiddleware(host, lambda state: BodyMaker(SOURCE)), host, raw, path=path)
    assert host.scopes == []
    error: dict[str, Any] = json.loads(b"".join(each["body"] for each in rest))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return start["status"], error


words = st.sampled_from(["model", "messages", "prompt", "stream", "content", "role", "text", "n"])
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([*OURS, *OF_PARTS])


def deeper(each: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(each, max_size=3) | st.dictionaries(words, each, max_size=3)


others = st.recursive(leaves, deeper)


def in_pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(cut, len(raw)) for cut in cuts} | {len(raw)})
    return [raw[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@settings(deadline=None)
@given(
    st.binary(max_size=60) | others.map(lambda value: json.dumps(value).encode()),
    st.lists(st.integers(0, 60), max_size=4),
    st.sampled_from([CHAT, COMPLETION]),
    st.binary(max_size=30),
    st.integers(1, 4),
)
def test_what_uses_none_of_our_words_passes_as_it_is(
    raw: bytes, cuts: list[int], path: str, answer: bytes, pieces: int
) -> None:
    host = Host(answer, JSON_TYPE, pieces)
    assert call(SegmentsMiddleware(host, refuse_to_make), host, in_pieces(raw, cuts), path=path) == host.messages
    assert host.received == [raw]


@pytest.mark.parametrize(("path", "method"), [("/v1/embeddings", "POST"), ("/v1/models", "GET"), (CHAT, "OPTIONS")])
def test_other_requests_are_not_looked_at(path: str, method: str) -> None:
    host, raw = Host(), json.dumps({"segments": [DOCUMENT]}).encode()
    call(SegmentsMiddleware(host, refuse_to_make), host, raw, path=path, method=method)
    assert host.received == [raw]


def test_a_chat_gets_the_prompt_that_our_own_server_makes(engine: Engine) -> None:
    body = {
        "model": "tiny",
        "segments": [RULES, DOCUMENT],
        "messages": ASKED,
        "reuse": {"max_divergence": 0.05, "confidence": 0.9},
        "stream": True,
        "made_up": [1, {"a": None}],
        "kv_transfer_params": {"other": 1},
    }
    made = sent_to_host(body)
    request = ChatRequest.model_validate({"model": "tiny", "segments": [RULES, DOCUMENT], "messages": ASKED})
    ours = PromptMaker(engine, SegmentRegistries(0)).chat(request, "default")
    transfer = made["kv_transfer_params"]
    assert transfer["prompt_token_ids"] == ours.token_ids
    assert (made["stream"], made["made_up"], made["messages"], transfer["other"]) == (True, [1, {"a": None}], ASKED, 1)
    params = RequestParams.model_validate(transfer["kvcomm"])
    assert params.reuse is not None
    assert (params.reuse.max_divergence, params.reuse.confidence, params.reuse.basis) == (0.05, 0.9, "prior")
    texts = [engine.texts.decode(ours.token_ids[span.start : span.end]) for span in params.segments]
    assert texts == ["Be brief.\n", FOX, "which?"]
    slots = [span.slot or "" for span in params.segments]
    assert (slots[0].partition("@")[0], slots[1:]) == ("rules", ["doc", "text"])
    assert all(span.kind == "dynamic" for span in params.segments)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"segments": [{"id": "plan", "response_id": "cmpl-1"}]}, "segments[0]"),
        ({"segments": [RULES, {"id": "plan", "context_id": "ctx_" + 24 * "0"}]}, "segments[1]"),
        ({"segments": [DOCUMENT], "reuse": {"heal": True}}, "reuse.heal"),
    ],
)
def test_what_only_our_own_server_does_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    maker = BodyMaker(SOURCE)
    for path, prompt in ((CHAT, {"messages": ASKED}), (COMPLETION, {"prompt": "a fox"})):
        with pytest.raises(ApiError, match="not supported on vLLM") as caught:
            maker.make(path, {"model": "tiny", **prompt, **fields})
        assert (caught.value.status_code, caught.value.param) == (400, param)


def test_parts_of_messages_are_segments_too(engine: Engine) -> None:
    made = sent_to_host({"model": "tiny", "messages": PARTS})
    ids = made["kv_transfer_params"]["prompt_token_ids"]
    ours = PromptMaker(engine, SegmentRegistries(0)).chat(ChatRequest(model="tiny", messages=PARTS), "default")
    assert ids == ours.token_ids
    assert made["messages"] == [{"role": "user", "content": f"{FOX}so?"}]
    spans = RequestParams.model_validate(made["kv_transfer_params"]["kvcomm"]).segments
    assert [span.slot for span in spans] == ["web", "text"]
    assert "reuse" not in made["kv_transfer_params"]["kvcomm"]  # nothing may be moved unless the client says so


@pytest.mark.parametrize("prompt", [DOG, [5, 6, 7], [[5, 6, 7]], [DOG]])
def test_a_completion_gets_token_ids(engine: Engine, prompt: Any) -> None:
    made = sent_to_host({"model": "tiny", "segments": [DOCUMENT], "prompt": prompt, "max_tokens": 0}, COMPLETION)
    inner = prompt[0] if isinstance(prompt[0], str | list) and not isinstance(prompt, str) else prompt
    request = CompletionRequest.model_validate({"model": "tiny", "segments": [DOCUMENT], "prompt": prompt})
    ours = PromptMaker(engine, SegmentRegistries(0)).completion(inner, request, "default")
    assert (made["prompt"], made["max_tokens"]) == (ours.token_ids, 0)
    spans = RequestParams.model_validate(made["kv_transfer_params"]["kvcomm"]).segments
    assert engine.texts.decode(made["prompt"][spans[0].start : spans[0].end]) == FOX


def test_without_segments_only_our_words_are_taken_out() -> None:
    made = sent_to_host({"model": "tiny", "messages": ASKED, "reuse": {"mode": "exact"}, "segments": None})
    assert made == {"model": "tiny", "messages": ASKED}
    made = sent_to_host({"model": "tiny", "prompt": ["a", "b"], "segments": [], "boundary": "merge"}, COMPLETION)
    assert made == {"model": "tiny", "prompt": ["a", "b"]}


def test_a_name_may_be_spelled_with_escapes() -> None:
    raw = json.dumps({"messages": ASKED, "segments": [DOCUMENT]}).replace("segments", "\\u0073egments").encode()
    host = Host()
    call(SegmentsMiddleware(host, lambda state: BodyMaker(SOURCE)), host, raw)
    assert "prompt_token_ids" in json.loads(host.received[0])["kv_transfer_params"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": ASKED, "segments": [{"id": "a"}]}, "segments[0].content"),
        (CHAT, {"messages": ASKED, "segments": "a"}, "segments"),
        (CHAT, {"messages": ASKED, "segments": [DOCUMENT], "boundary": "none"}, "boundary"),
        (CHAT, {"messages": ASKED, "segments": [DOCUMENT], "reuse": {"confidence": 2}}, "reuse.confidence"),
        (CHAT, {"segments": [DOCUMENT]}, "messages"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "segments": [DOCUMENT]},
            "messages",
        ),
        (CHAT, {"messages": ASKED, "segments": [DOCUMENT], "context_id": "ctx_0"}, "context_id"),
        (CHAT, {"messages": ASKED, "segments": [DOCUMENT], "chat_template": "{{ 1 }}"}, "chat_template"),
        (CHAT, {"messages": ASKED, "segments": [DOCUMENT], "kv_transfer_params": 3}, "kv_transfer_params"),
        (
            CHAT,
            {"messages": ASKED, "segments": [DOCUMENT], "kv_transfer_params": {"kvcomm": {}}},
            "kv_transfer_params.kvcomm",
        ),
        (CHAT, {"messages": ASKED, "segments": [{"id": "a", "name": "kept"}]}, "name"),
        (COMPLETION, {"segments": [DOCUMENT]}, "prompt"),
        (COMPLETION, {"segments": [DOCUMENT], "prompt": ["a", "b"]}, "prompt"),
        (COMPLETION, {"segments": [DOCUMENT], "prompt": "a", "echo": True}, "echo"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(path: str, body: dict[str, Any], param: str) -> None:
    status, error = error_of(body, path)
    assert status in (400, 404)
    assert (error["param"] or "").startswith(param)


def test_prompts_that_cannot_be_served_are_refused() -> None:
    status, error = error_of({"messages": ASKED, "segments": [{"id": "long", "content": "word " * 40_000}]})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    status, error = error_of({"prompt": [10**6], "segments": [DOCUMENT]}, COMPLETION)
    assert status == 400
    assert "1000000" in error["message"]
    status, error = error_of(b'{"segments": [], "segments": [1]}')
    assert (status, error["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_body_is_read_up_to_the_limit(is_declared: bool) -> None:
    host = Host()
    app = SegmentsMiddleware(host, refuse_to_make, max_body_bytes=10)
    headers = [(b"content-length", b"11")] if is_declared else []
    call(app, host, [b"0123456789"])
    assert host.received == [b"0123456789"]
    start, *_ = call(app, host, [b"01234", b"567890"], headers=headers)
    assert start["status"] == 413
    assert len(host.received) == 1


def test_a_client_that_goes_while_it_sends_reaches_nobody() -> None:
    host = Host()
    assert call(SegmentsMiddleware(host, refuse_to_make), host, [b"{", b"}"], is_gone=True) == []
    assert host.scopes == []


OWN = {"prompt_tokens": 9, "total_tokens": 9}
TOLD = {"aligned_tokens": 5, "prompt_tokens": 1}
ANSWER = {"id": "x", "usage": OWN, "kv_transfer_params": {"kvcomm": TOLD}, "text": "\u00fc"}


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_usage_learns_what_the_connector_says(pieces: int) -> None:
    host = Host(json.dumps(ANSWER).encode(), JSON_TYPE, pieces)
    body = json.dumps({"messages": ASKED, "segments": [DOCUMENT]}).encode()
    start, message = call(SegmentsMiddleware(host, lambda state: BodyMaker(SOURCE)), host, body)
    assert json.loads(message["body"]) == {**ANSWER, "usage": {**OWN, "aligned_tokens": 5}}
    assert dict(start["headers"])[b"content-length"] == str(len(message["body"])).encode()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"data: {}\n\ndata: [DONE]\n\n", b"text/event-stream"),
        (b"not json", b"application/json"),
        (b"[1]", b"application/json"),
    ],
)
def test_streams_and_what_is_no_answer_pass_as_they_are(answer: bytes, kind: bytes) -> None:
    host = Host(answer, [(b"content-type", kind)])
    body = json.dumps({"messages": ASKED, "segments": [DOCUMENT]}).encode()
    sent = call(SegmentsMiddleware(host, lambda state: BodyMaker(SOURCE)), host, body)
    assert b"".join(each.get("body", b"") for each in sent) == answer


def test_the_longest_spans_stay_where_there_are_too_many() -> None:
    segments = [Segment((1,) * (1 + at % 3), f"s{at}") for at in range(2 * MAX_SPANS)]
    spans = spans_of([Segment((7,)), *segments, Segment((), "empty")])
    assert len(spans) == MAX_SPANS
    assert list(spans) == sorted(spans, key=lambda span: span.start)
    assert min(span.end - span.start for span in spans) >= 2


def vllm_state(folder: Path, **arguments: Any) -> Any:
    """What the server of vLLM keeps in `app.state`, as far as it is read."""
    config = SimpleNamespace(
        tokenizer=str(folder),
        tokenizer_revision=None,
        trust_remote_code=False,
        max_model_len=512,
        get_vocab_size=lambda: len(TINY.tokenizer),
    )
    return SimpleNamespace(args=SimpleNamespace(**arguments), vllm_config=SimpleNamespace(model_config=config))


def test_the_tokenizer_and_the_chat_template_are_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "takes_ids_in_chats", lambda: True)
    folder = save_tiny_model(tmp_path / "model")
    own = bodies_of(vllm_state(folder)).make(CHAT, {"messages": ASKED, "segments": [DOCUMENT]})
    theirs = BodyMaker(SOURCE).make(CHAT, {"messages": ASKED, "segments": [DOCUMENT]})
    ids = own["kv_transfer_params"]["prompt_token_ids"]
    assert ids == theirs["kv_transfer_params"]["prompt_token_ids"]
    template = "{% for message in messages %}{{ mood }}:{{ message.content }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    for given_as in (template, str(tmp_path / "chat.jinja")):
        maker = bodies_of(vllm_state(folder, chat_template=given_as, default_chat_template_kwargs={"mood": "glad"}))
        made = maker.make(CHAT, {"messages": ASKED, "segments": [DOCUMENT]})["kv_transfer_params"]
        assert "glad:" in TINY.tokenizer.decode(made["prompt_token_ids"])


def test_a_vllm_that_would_leave_out_segments_is_not_asked() -> None:
    maker = BodyMaker(SOURCE, takes_chats=False)
    with pytest.raises(ApiError, match="send segments to /v1/completions"):
        maker.make(CHAT, {"messages": ASKED, "segments": [DOCUMENT]})
    assert maker.make(CHAT, {"messages": ASKED, "reuse": {}}) == {"messages": ASKED}
    assert maker.make(COMPLETION, {"prompt": "a", "segments": [DOCUMENT]})["prompt"]


def test_an_unknown_server_is_said_and_not_guessed() -> None:
    host = Host()
    body = json.dumps({"messages": ASKED, "segments": [DOCUMENT]}).encode()
    start, message = call(SegmentsMiddleware(host), host, body)
    assert (start["status"], json.loads(message["body"])["error"]["code"]) == (501, "unknown_vllm")
    assert host.received == []
