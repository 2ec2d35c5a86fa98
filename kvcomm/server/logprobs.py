"""Log-probabilities of tokens as chat completions and responses tell them."""

from __future__ import annotations

from collections.abc import Iterable

from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import TokenLogprob
from kvcomm.server.schemas.chat import ChatTokenLogprob, ChatTopLogprob


def told_logprobs(engine: Engine, tokens: Iterable[TokenLogprob]) -> list[ChatTokenLogprob]:
    """Log-probabilities of tokens that were drawn, as they are told."""
    return [_drawn(engine, token) for token in tokens]


def _drawn(engine: Engine, token: TokenLogprob) -> ChatTokenLogprob:
    top = [_top(engine, token_id, logprob) for token_id, logprob in token.top]
    drawn = _top(engine, token.token_id, token.logprob)
    return ChatTokenLogprob(token=drawn.token, logprob=drawn.logprob, bytes=drawn.bytes, top_logprobs=top)


def _top(engine: Engine, token_id: int, logprob: float) -> ChatTopLogprob:
    return ChatTopLogprob(
        token=engine.texts.token_text(token_id), logprob=logprob, bytes=list(engine.texts.token_bytes(token_id))
    )
