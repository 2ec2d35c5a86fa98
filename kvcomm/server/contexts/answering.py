"""Answers behind a context: what `context_id` and `store` mean to the two endpoints that generate."""

from __future__ import annotations

from kvcomm.server.contexts.conversation import Continued, continue_conversation
from kvcomm.server.contexts.turns import Turn
from kvcomm.server.errors import ApiError
from kvcomm.server.generation import GenerationCall
from kvcomm.server.prompts import PromptMaker, shown_tools, template_variables
from kvcomm.server.sampling import ttl_of
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.common import GenerationRequest
from kvcomm.server.schemas.completions import CompletionRequest
from kvcomm.server.segments.prepared import PreparedPrompt


def begin_turn(body: GenerationRequest, adapter: str | None, call: GenerationCall) -> Turn | None:
    """A turn on the request's context, which ends with the call; None: it names none.

    Raises:
        ApiError: 404 for an unknown context, 409 for a busy one, or one that was computed by another adapter.
    """
    if body.context_id is None:
        return None
    registry = call.state.contexts.of(call.tenant)
    node = registry.find(body.context_id)
    if node.context.adapter != adapter:
        made_with = node.context.adapter or call.state.settings.name
        message = f"this context was made with the model {made_with!r}; name that one, or make the context anew"
        raise ApiError(409, "context_of_another_model", message, param="model")
    turn = registry.begin_turn(node, keeps=bool(body.store))
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
