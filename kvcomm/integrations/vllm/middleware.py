"""Our `segments` and `reuse` in front of vLLM's OpenAI server.

    vllm serve MODEL --middleware kvcomm.integrations.vllm.middleware.SegmentsMiddleware ...

A chat or completion that uses none of our words passes byte for byte, and so do all other requests and all streams. One
that does is made anew by `bodies`; whatever is wrong with it is a 400 in OpenAI's shape, before vLLM has seen it. Into
the usage of an answer that is no stream goes what the connector says about the request.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcomm.errors import KVCommError
from kvcomm.integrations.vllm.bodies import CHAT, COMPLETION, OF_PARTS, OURS, BodyMaker, TokenizerSource, is_ours
from kvcomm.integrations.vllm.params import KEY
from kvcomm.server.errors import CLOSE, ApiError, translate
from kvcomm.server.json_text import JsonCaps, JsonRefused, read_json

logger = logging.getLogger("kvcomm.vllm")

MAX_BODY_BYTES = 64 * 2**20
"""Of a chat or completion; what is longer may hold segments and cannot be looked at."""

CAPS = JsonCaps(values=4_194_304)
"""Room for token ids of any model's longest prompt."""

MENTIONS = re.compile(rb'\\u00|"(?:' + b"|".join(name.encode() for name in (*OURS, *OF_PARTS)) + rb')"')
"""Bytes without which a body cannot use our words; a name may be spelled with escapes."""


class SegmentsMiddleware:
    """ASGI middleware, as vLLM's `--middleware` takes it.

    Args:
        app: vLLM's server.
        make_bodies: gives the maker of bodies, given the server's state; called once, when it is first needed.
        max_body_bytes: longer chats and completions are refused with a 413.
    """

    def __init__(
        self,
        app: ASGIApp,
        make_bodies: Callable[[Any], BodyMaker] | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._app = app
        self._make_bodies = make_bodies or bodies_of
        self._max_body_bytes = max_body_bytes
        self._bodies: BodyMaker | None = None
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in (CHAT, COMPLETION):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._whole_body(receive, scope)
            if body is None:  # the client is gone, and nobody is left to answer
                return
            made = await asyncio.to_thread(self._made, scope, body) if MENTIONS.search(body) else None
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if made is None:
            await self._app(scope, _replaying(body, receive), send)
            return
        await self._app(_with_length(scope, len(made)), _replaying(made, receive), _Answer(send))

    async def _whole_body(self, receive: Receive, scope: Scope) -> bytes | None:
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:18]) > self._max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._max_body_bytes} bytes, the most that kvcomm reads in front of vLLM"
        return ApiError(413, "body_too_large", message, headers=CLOSE)

    def _made(self, scope: Scope, body: bytes) -> bytes | None:
        """The body for vLLM; None: this one, as it is."""
        try:
            value = read_json(body, CAPS)
        except JsonRefused as error:
            if not error.is_json:  # vLLM says so in its own words
                return None
            raise ApiError(400, "invalid_value", f"the body cannot be taken: {error}", param=error.param) from error
        if not is_ours(scope["path"], value):
            return None
        try:
            return json.dumps(self._maker(scope).make(scope["path"], value)).encode()
        except KVCommError as error:
            raise translate(error) from error

    def _maker(self, scope: Scope) -> BodyMaker:
        with self._lock:  # two first requests would both load the tokenizer
            if self._bodies is None:
                self._bodies = self._make_bodies(scope["app"].state)
            return self._bodies


def bodies_of(state: Any) -> BodyMaker:
    """The maker for a vLLM server's model, from `app.state` as vLLM's server fills it.

    Raises:
        ApiError: 501, the server's state is another than kvcomm knows.
    """
    from transformers import AutoTokenizer

    try:
        arguments, config = state.args, state.vllm_config.model_config
        name, trusts = config.tokenizer, config.trust_remote_code
        vocab_size, max_context = config.get_vocab_size(), config.max_model_len
    except AttributeError as error:
        message = f"kvcomm does not know this version of vLLM's server ({error}); use kv_transfer_params instead"
        raise ApiError(501, "unknown_vllm", message) from error
    tokenizer = AutoTokenizer.from_pretrained(name, revision=config.tokenizer_revision, trust_remote_code=trusts)
    template = getattr(arguments, "chat_template", None)
    if template is not None:
        tokenizer.chat_template = _template_text(template)
    source = TokenizerSource(tokenizer, name=name, vocab_size=vocab_size, max_context=max_context)
    variables = getattr(arguments, "default_chat_template_kwargs", None)
    return BodyMaker(source, variables, takes_chats=takes_ids_in_chats())


def takes_ids_in_chats() -> bool:
    """Whether this vLLM reads `kv_transfer_params.prompt_token_ids` of a chat; an older one renders the messages."""
    try:
        renderer = importlib.import_module("vllm.renderers.online_renderer")
    except ImportError:
        return False
    return hasattr(renderer, "_reused_prompt_token_ids")


def _template_text(template: str) -> str:
    """A chat template that is given as a file or as itself, as vLLM's `--chat-template` takes it."""
    file = Path(template)
    if "{" not in template and file.is_file():
        return file.read_text(encoding="utf-8")
    return template


class _Answer:
    """Passes an answer on; of one that is whole JSON the usage learns what the connector says."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_whole_json(message):
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._finish()

    async def _finish(self) -> None:
        start, self._start = self._start, None
        assert start is not None
        body = await asyncio.to_thread(with_usage, b"".join(self._parts))
        MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def with_usage(body: bytes) -> bytes:
    """An answer whose usage holds what `kv_transfer_params.kvcomm` says; any other body as it is."""
    try:
        value = json.loads(body)
    except ValueError:
        return body
    told = _object(_object(value).get("kv_transfer_params")).get(KEY)
    if not isinstance(told, dict) or not isinstance(value.get("usage"), dict):
        return body
    return json.dumps({**value, "usage": {**told, **value["usage"]}}, ensure_ascii=False).encode()


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_whole_json(start: Message) -> bool:
    headers = Headers(raw=start.get("headers", []))
    return start["status"] == 200 and headers.get("content-type", "").partition(";")[0].strip() == "application/json"


def _with_length(scope: Scope, num_bytes: int) -> Scope:
    """The same request with a body of another length."""
    headers = [pair for pair in scope["headers"] if pair[0].lower() not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(num_bytes).encode())]}


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A receive that gives a body that was read, and then what comes."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
