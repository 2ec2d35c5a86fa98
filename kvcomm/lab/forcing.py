"""Contexts that are computed in a certain way and made to write a certain answer: to see what they would have drawn.

What an engine decides by itself is decided here instead, so nothing of it can happen to users' requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvcomm.align.ladder import Rung
from kvcomm.engine.context import PREFILL_ONLY, Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.request import Request
from kvcomm.memory.segments import Prompt
from kvcomm.model.attention.contract import IntArray
from kvcomm.reuse.policy import ReusePolicy

__all__ = ["cold_context", "moved_context", "write_answer"]


def moved_context(engine: Engine, prompt: Prompt, rung: Rung) -> Context:
    """A context of a prompt whose text is moved at a rung, with no bound; computed where nothing of it can be moved.

    Raises:
        InvalidRequest: the prompt is empty or too long, or the engine has no such rung.
        PoolExhausted: no pages for it.
    """
    engine.reuse.require_known([rung])

    def at_rung(request: Request) -> None:
        request.rung = rung

    return _prefilled(engine, prompt, at_rung)


def cold_context(engine: Engine, prompt: Prompt) -> Context:
    """A context of a prompt of which everything is computed, whatever is cached. Raises as `moved_context`."""

    def cold(request: Request) -> None:
        request.reads_cache = False

    return _prefilled(engine, prompt, cold)


def write_answer(engine: Engine, contexts: Sequence[Context], answer: Sequence[int]) -> list[Tensor]:
    """Let contexts write an answer, all at once, whatever they would have drawn; they are longer by it afterwards.

    Args:
        answer: token ids, at least one.

    Returns:
        For each context the log-probabilities that it would have drawn from, [len(answer), vocab_size] float32.

    Raises:
        InvalidRequest: context and answer exceed the model's limit.
        PoolExhausted, ContextBusy, ContextReleased: as for `Context.submit`.
    """
    samplers = [_Forced(answer) for _ in contexts]
    with engine.held():
        handles = [context.submit(max_new_tokens=len(answer), ignore_eos=True) for context in contexts]
        for handle, sampler in zip(handles, samplers, strict=True):
            _request_of(engine, handle).branches[0].sampler = sampler  # type: ignore[assignment]
    for handle in handles:
        handle.result()
    return [sampler.log_probs for sampler in samplers]


class _Forced:
    """Draws what it is told to, in place of a request's sampler, and keeps what it would have drawn from."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = tuple(token_ids)
        self._rows: list[Tensor] = []

    def sample(self, logits: Tensor, token_ids: IntArray, num_answer: int = 0) -> int:
        """See `Sampler.sample`."""
        self._rows.append(logits.float().log_softmax(-1))
        return self._token_ids[num_answer]

    def ends(self, token_id: int) -> bool:
        """Nothing ends before all is written."""
        return False

    @property
    def log_probs(self) -> Tensor:
        """[number of tokens, vocab_size]."""
        return torch.stack(self._rows)


def _prefilled(engine: Engine, prompt: Prompt, change: Callable[[Request], None]) -> Context:
    """A prompt in a context, its request changed before anything of it is computed."""
    context = engine.empty_context(policy=ReusePolicy.exact())
    try:
        with engine.held():
            handle = context.submit(PREFILL_ONLY, prompt=prompt)
            change(_request_of(engine, handle))
        handle.result()
    except BaseException:
        context.release()
        raise
    return context


def _request_of(engine: Engine, handle: RequestHandle) -> Request:
    """What the engine makes of a request; the engine must be held."""
    return next(request for request in engine.scheduler.requests() if request.handle is handle)
