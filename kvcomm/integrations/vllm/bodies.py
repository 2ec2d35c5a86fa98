"""From a body with our `segments` and `reuse` to one that vLLM understands.

The prompt is made as kvcomm's own server makes it: the same schemas, the same rendering, every segment tokenized on its
own. vLLM gets its token ids, for a completion as the prompt, for a chat under `kv_transfer_params.prompt_token_ids` in
place of what it would render itself, so tools, streams and the form of answers stay vLLM's. What may be moved stands in
`kv_transfer_params.kvcomm`. All other fields pass as they came, for vLLM to judge.

Knows neither vLLM nor HTTP. Named segments and contexts are the server's own: they are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from transformers import PreTrainedTokenizerBase

from kvcomm.engine.encoding import PromptReader, TextEncoder
from kvcomm.integrations.vllm.params import (
    DEFAULT_TENANT,
    KEY,
    MAX_NAME,
    MAX_SPANS,
    PromptSpan,
    RequestParams,
    ReuseParams,
)
from kvcomm.memory.segments import Prompt, Segment
from kvcomm.server.errors import ApiError, invalid
from kvcomm.server.prompts import PromptMaker
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.common import ReuseOptions
from kvcomm.server.schemas.completions import CompletionRequest
from kvcomm.server.schemas.segments import FollowedSegment, SegmentedRequest
from kvcomm.server.segments.prepared import PreparedPrompt
from kvcomm.server.segments.registry import SegmentRegistries

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"

OURS = ("segments", "boundary", "reuse")
"""Fields that vLLM does not know."""

OF_PARTS = ("name", "dynamic")
"""Fields of a part of a message that make it a segment."""

NEVER = {
    "context_id": "contexts live in kvcomm serve",
    "include_plan": "plans are told by kvcomm serve",
    "chat_template": "the model's own chat template is used where a prompt has segments",
    "documents": "documents are segments here",
    "echo": "vLLM would render the prompt anew",
    "truncate_prompt_tokens": "segments would be cut",
    "mm_processor_kwargs": "segments are text",
}
"""Fields that change a prompt and cannot be honoured beside segments, and why."""

CHAT_READ = (
    "messages",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)
COMPLETION_READ = ("prompt",)
"""Fields that the prompt is made of, besides our own."""

ModelT = TypeVar("ModelT", bound=BaseModel)


class TokenizerSource:
    """What `PromptMaker` needs of an engine, where there is only a tokenizer.

    Args:
        name: of the model, as its segments' digests know it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, vocab_size: int, max_context: int) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.max_context = max_context
        self._name = name
        self._reader = PromptReader(self.encoder, vocab_size=vocab_size, max_context=max_context)

    def read_prompt(self, prompt: Prompt, *, is_start: bool) -> tuple[Segment, ...]:
        """See `PromptReader.read`."""
        return self._reader.read(prompt, is_start=is_start)

    def segment(self, text: str, *, name: str | None = None) -> Segment:
        """See `PromptReader.segment`."""
        return self._reader.segment(text, name=name)

    def home(self, tenant: str = DEFAULT_TENANT) -> str:
        """What digests of a tenant's segments are made with."""
        return f"vllm|{self._name}|{tenant}"


class BodyMaker:
    """Makes bodies for one model. Safe to use from several threads.

    Args:
        chat_variables: defaults of the chat template's variables.
        takes_chats: whether this vLLM takes token ids in chats; where not, it would leave out the segments.
    """

    def __init__(
        self,
        source: TokenizerSource,
        chat_variables: Mapping[str, Any] | None = None,
        *,
        takes_chats: bool = True,
    ) -> None:
        self._takes_chats = takes_chats
        self._prompts = PromptMaker(source, SegmentRegistries(0), default_tools=False)
        self._variables = dict(chat_variables or {})

    def make(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body for vLLM, of one that is ours (`is_ours`).

        Raises:
            ApiError: a field is wrong, or cannot be honoured; names it.
            InvalidRequest: a text that cannot be tokenized, or a prompt that cannot fit.
        """
        _require_free(body)
        if path == CHAT:
            return self._chat(body)
        return self._completion(body)

    def _chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        request = _checked(ChatRequest, _read(body, CHAT_READ))
        _require_servable(request)
        others = _without_ours(body)
        others["messages"] = [_plain_message(given) for given in body["messages"]]
        if not request.segments and not _has_parts(body):
            return others
        if self._variables:
            variables = {**self._variables, **(request.chat_template_kwargs or {})}
            request = request.model_copy(update={"chat_template_kwargs": variables})
        if not self._takes_chats:
            message = "this version of vLLM takes no token ids in chats; send segments to /v1/completions"
            raise ApiError(501, "unknown_vllm", message, param="segments")
        prompt = self._prompts.chat(request, DEFAULT_TENANT)
        return _with_prompt(others, prompt, request.reuse, is_chat=True)

    def _completion(self, body: Mapping[str, Any]) -> dict[str, Any]:
        request = _checked(CompletionRequest, _read(body, COMPLETION_READ))
        _require_servable(request)
        others = _without_ours(body)
        if not request.segments:
            return others
        given = request.prompt
        if isinstance(given, list) and not isinstance(given[0], int):
            if len(given) > 1:
                message = f"prompt: one prompt stands behind segments, not {len(given)}; send one request for each"
                raise ApiError(400, "invalid_value", message, param="prompt")
            given = given[0]
        prompt = self._prompts.completion(given, request, DEFAULT_TENANT)
        return _with_prompt(others, prompt, request.reuse, is_chat=False)


def is_ours(path: str, body: object) -> bool:
    """Whether a body says anything in our words."""
    if not isinstance(body, dict):
        return False
    return any(name in body for name in OURS) or (path == CHAT and _has_parts(body))


def spans_of(segments: Sequence[Segment]) -> tuple[PromptSpan, ...]:
    """Where the named segments of a prompt stand: what may be moved. The longest ones where they are too many."""
    spans, at = [], 0
    for segment in segments:
        start, at = at, at + len(segment.token_ids)
        if segment.name is not None and at > start:
            spans.append(PromptSpan(start=start, end=at, slot=segment.name[:MAX_NAME], kind="dynamic"))
    if len(spans) > MAX_SPANS:
        longest = sorted(spans, key=lambda span: span.start - span.end)[:MAX_SPANS]
        spans = sorted(longest, key=lambda span: span.start)
    return tuple(spans)


def _with_prompt(
    others: dict[str, Any], prompt: PreparedPrompt, reuse: ReuseOptions | None, *, is_chat: bool
) -> dict[str, Any]:
    wanted = None if reuse is None else ReuseParams(**reuse.model_dump(exclude={"heal", "heal_within"}))
    params = RequestParams(segments=spans_of(prompt.segments), reuse=wanted)
    transfer = {**(others.get("kv_transfer_params") or {}), **params.as_transfer_params()}
    if is_chat:
        transfer["prompt_token_ids"] = prompt.token_ids
    else:
        others["prompt"] = prompt.token_ids
    return {**others, "kv_transfer_params": transfer}


def _require_free(body: Mapping[str, Any]) -> None:
    """Raises ApiError 400 for a field that cannot be honoured, or that says otherwise what we are to say."""
    for name, why in NEVER.items():
        if body.get(name):
            raise ApiError(400, "unsupported_value", f"{name} is not supported beside segments: {why}", param=name)
    transfer = body.get("kv_transfer_params")
    if transfer is not None and not isinstance(transfer, dict):
        raise ApiError(400, "invalid_value", "kv_transfer_params must be an object", param="kv_transfer_params")
    for name in (KEY, "prompt_token_ids"):
        if transfer and name in transfer:
            told = f"kv_transfer_params.{name} is made of segments and reuse; send either of both"
            raise ApiError(400, "invalid_value", told, param=f"kv_transfer_params.{name}")


def _require_servable(request: SegmentedRequest) -> None:
    """Raises ApiError 400 for what kvcomm's own server does, and vLLM does not; names the field."""
    if request.reuse is not None and request.reuse.heal:
        told = "reuse.heal is not supported on vLLM: its answers are decoded by vLLM"
        raise ApiError(400, "unsupported_value", told, param="reuse.heal")
    for index, segment in enumerate(request.segments or ()):
        if isinstance(segment, FollowedSegment):
            told = f"segments[{index}] follows an answer in progress, which is not supported on vLLM: send its text"
            raise ApiError(400, "unsupported_value", told, param=f"segments[{index}]")


def _read(body: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    read = {name: body[name] for name in (*OURS, *names, "cache_salt") if name in body}
    return {"model": "", **read}  # which model is vLLM's matter


def _checked(kind: type[ModelT], fields: Mapping[str, Any]) -> ModelT:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise invalid(errors, fields) from error


def _without_ours(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in OURS}


def _has_parts(body: Mapping[str, Any]) -> bool:
    """Whether any part of a message is a segment, or says that it is none."""
    messages = body.get("messages")
    contents = (
        [each.get("content") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    )
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and name in part for part in parts for name in OF_PARTS)


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text: vLLM does not render it, but checks it."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}
