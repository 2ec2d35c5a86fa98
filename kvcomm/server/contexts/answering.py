"""Answers behind a context: what `context_id` and `store` mean to the two endpoints that generate."""

from __future__ import annotations

from kvcomm.server.contexts.conversation import Continued, continue_conversation
from kvcomm.server.contexts.turns import Turn
from kvcomm.server.generation import Call
from kvcomm.server.prompts import PromptMaker, shown_tools, template_variables
from kvcomm.server.sampling import ttl_of
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.common import GenerationRequest
from kvcomm.server.schemas.completions import CompletionRequest
from kvcomm.server.segments.prepared import PreparedPrompt


def begin_turn(body: GenerationRequest, call: Call) -> Turn | None:
    """A turn on the request's context, which ends with the call; None: it names none.

    Raises:
        ApiError: 404 for an unknown context, 409 for a busy one.
    """
    if body.context_id is None:
        return None
    registry = call.state.contexts.of(call.tenant)
    turn = registry.begin_turn(registry.find(body.context_id), keeps=bool(body.store))
    return call.take_turn(turn)


def put_messages(turn: Turn, body: ChatRequest, maker: PromptMaker) -> PreparedPrompt:
    """Put a request's messages behind its context; returns all that the answer stands behind. For a worker thread."""
    tools, variables = shown_tools(body), template_variables(body)
    is_start = turn.num_kept == 0
    turn.put(
        continue_conversation(
            maker, turn.before, body.messages, tools=tools, variables=variables, speaks=True, is_start=is_start
        )
    )
    return PreparedPrompt(turn.path).living(ttl_of(body))


def put_text(turn: Turn, prompt: str | list[int], body: CompletionRequest, maker: PromptMaker) -> PreparedPrompt:
    """Put a text or token ids behind a context, which ends its conversation; returns as `put_messages`.

    An empty text puts nothing there: the model goes on where the context ends.
    """
    turn.put(Continued(maker.text(prompt, is_start=False) if prompt else (), None))
    return PreparedPrompt(turn.path).living(ttl_of(body))
