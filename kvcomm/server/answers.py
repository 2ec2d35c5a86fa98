"""The answers to one chat request, as neutral events: what chat completions and the other APIs are made from.

A surface translates its request into a `ChatRequest`, begins it here, and writes what comes in its own words. Streamed
and whole answers are read by the same reader.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from kvcomm.engine.grammar import Grammar
from kvcomm.engine.sampling import TokenLogprob
from kvcomm.errors import InvalidRequest
from kvcomm.server.contexts.answering import begin_turn, put_messages
from kvcomm.server.contexts.turns import Turn
from kvcomm.server.errors import ApiError
from kvcomm.server.followed import FollowedAnswer
from kvcomm.server.generation import GenerationCall, GenerationJob
from kvcomm.server.prompts import shown_tools
from kvcomm.server.sampling import num_breakpoints, policy_of, sampling_of
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.usage import UsageObject
from kvcomm.server.segments.prepared import PreparedPrompt
from kvcomm.server.state import ServerState
from kvcomm.server.structured import compile_grammar, field_of, grammar_of
from kvcomm.server.tenants import namespace
from kvcomm.server.usage import plan_of, usage_of
from kvcomm.toolcalls.events import Answer, Event, Finish
from kvcomm.toolcalls.reading import NUM_PROMPT_TOKENS


class ChoiceEvents(NamedTuple):
    """What a piece of one choice brings; there may be tokens without an event, as long as their text is held back."""

    choice: int
    events: tuple[Event, ...]
    logprobs: tuple[TokenLogprob, ...] | None


class ChoiceAnswer(NamedTuple):
    """A whole choice."""

    choice: int
    answer: Answer
    logprobs: tuple[TokenLogprob, ...] | None


class _Prepared(NamedTuple):
    """What a worker makes of a request.

    Attributes:
        tools: shown to the model, in whatever way; None: none.
        end: of the prompt, as far as readers want to see it.
        grammar: that the answers have to follow.
    """

    prompt: PreparedPrompt
    tools: list[dict[str, Any]] | None
    end: str
    grammar: Grammar | None


class ChatAnswers:
    """A chat request in the engine."""

    def __init__(self, body: ChatRequest, call: GenerationCall, prepared: _Prepared) -> None:
        self._body = body
        self._call = call
        self._tools = prepared.tools
        tools = None if body.choice_of_tools.mode == "none" else prepared.tools
        make = call.state.prompts.readers.make
        shows_all = body.skip_special_tokens is False
        self._readers = [make(tools, prepared.end, shows_all=shows_all) for _ in range(body.n or 1)]

    @classmethod
    async def begin(cls, body: ChatRequest, call: GenerationCall, *, turn: Turn | None = None) -> ChatAnswers:
        """Render, tokenize and submit a request.

        Args:
            turn: on a context, where the caller has begun one; else the body's `context_id` says which.

        Raises:
            ApiError, KVCommError: it is refused; `GenerationCall.guard` makes one kind of them.
        """
        state = call.state
        adapter = state.adapter_of(body.model)
        turn = turn or begin_turn(body, adapter, call)
        if turn is None:
            more_bytes = state.registries.num_bytes(call.tenant.name, body.segments or ())
        else:
            more_bytes = turn.num_rendered
        followed = call.followed(body)
        prepared = await call.make(partial(_prepare, body, call, turn, followed), more_bytes=more_bytes)
        prompt = prepared.prompt
        sampling = sampling_of(
            body,
            state.settings,
            num_prompt_tokens=prompt.max_tokens,
            max_context=state.engine.max_context,
            wanted_tokens=body.wanted_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        if prepared.grammar is not None:
            sampling = replace(sampling, grammar=prepared.grammar)
        if prepared.tools and not state.prompts.template.shows_tools:
            call.notes.fields["tools"] = "default"
        salt = body.cache_salt if turn is None else turn.salt
        await call.submit(GenerationJob(prompt, sampling, policy_of(body, state.settings), salt, turn, adapter))
        return cls(body, call, prepared)

    async def events(self) -> AsyncGenerator[ChoiceEvents, None]:
        """The events of all choices as they come; each ends with its `Finish`. Raises as `GenerationCall.pieces`."""
        async with aclosing(self._call.pieces()) as pieces:
            async for _, chunk in pieces:
                events = tuple(self._readers[chunk.choice].chunk(chunk))
                if events and isinstance(events[-1], Finish):
                    self._call.ends_as(events[-1].reason, choice=chunk.choice)
                yield ChoiceEvents(chunk.choice, events, chunk.logprobs)

    async def whole(self) -> list[ChoiceAnswer]:
        """All choices, once they have ended. Raises as `GenerationCall.results`."""
        (completion,) = await self._call.results()
        answers = []
        for choice in completion.choices:
            answer = self._readers[choice.index].whole(choice)
            self._call.ends_as(answer.finish_reason, choice=choice.index)
            answers.append(ChoiceAnswer(choice.index, answer, choice.logprobs))
        return answers

    async def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Log-probabilities of the prompt's tokens, if they were asked for; raises as `GenerationCall.results`."""
        if self._body.prompt_logprobs is None:
            return None
        (completion,) = await self._call.results()
        return completion.prompt_logprobs

    async def usage(self) -> UsageObject:
        """Usage of the request, once it has ended; raises as `GenerationCall.results`."""
        (completion,) = await self._call.results()
        usage = usage_of([completion.usage], cache_breakpoints=num_breakpoints(self._body))
        more: dict[str, Any] = {}
        if self._tools:
            more["tools"] = "template" if self._call.state.prompts.template.shows_tools else "default"
        if self._body.include_plan:
            more["plan"] = plan_of(completion.usage.spans)
        return usage.model_copy(update=more)


def _prepare(
    body: ChatRequest, call: GenerationCall, turn: Turn | None, followed: Sequence[FollowedAnswer]
) -> _Prepared:
    """The prompt, and what is to be known of it; for a worker thread."""
    state, tools = call.state, shown_tools(body)
    if turn is None:
        prompt = state.prompts.chat(body, call.tenant.name, followed)
    else:
        before = turn.before
        prompt = put_messages(turn, body, state.prompts)
        tools = tools or (None if before is None else before.tools)
    end = ""
    if state.prompts.readers.needs_prompt:
        end = state.engine.texts.decode(prompt.token_ids[-NUM_PROMPT_TOKENS:])
    reply = grammar_of(body)
    grammar = _grammar(body, tools or [], end, state, reply)
    if grammar is not None:
        space = namespace(call.tenant.name, body.cache_salt if turn is None else turn.salt)
        param = field_of(body) if grammar == reply or not tools else "tools"
        compile_grammar(state.engine, grammar, space=space, param=param)
    return _Prepared(prompt, tools, end, grammar)


def _grammar(
    body: ChatRequest, tools: list[dict[str, Any]], end: str, state: ServerState, reply: Grammar | None
) -> Grammar | None:
    """The grammar of a choice of tools, and of the `reply` without one; raises ApiError 400 where there can be none."""
    choice, readers = body.choice_of_tools, state.prompts.readers
    try:
        allowed = choice.allowed(tools)
    except InvalidRequest as error:
        raise ApiError(400, "invalid_value", str(error), param="tool_choice") from error
    if readers.grammars is not None:
        try:
            return readers.grammars.of(tools, choice, is_reasoning=readers.is_reasoning(end), reply=reply)
        except InvalidRequest as error:
            raise ApiError(400, "invalid_value", str(error), param="tools") from error
    if choice.is_free(tools, allowed):
        return reply
    message = "this model's calls have a form of its own, to which answers cannot be held here: leave tool_choice, "
    raise ApiError(400, "unsupported_value", message + "parallel_tool_calls and strict out", param="tool_choice")
