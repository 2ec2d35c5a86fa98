"""Where an engine of this process can be made to fail, for evaluations that prove what comes of it.

A place is a call inside the engine that code of one choice, a pass or a file goes through. While `places_watched` lasts
a function of the caller's is told of every call, before it has changed anything; what that function raises is raised
there. All engines of the process are concerned. Left out is what gives back (release, settle, closing): it fails for no
cause outside the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import safetensors.torch

from kvcomm.engine import detokenize, request, sampler
from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.handle import RequestHandle
from kvcomm.memory import pool, sealed_file, tree
from kvcomm.reuse import attempt, learner, planner

__all__ = ["attention_watched", "places_watched"]

Reached = Callable[[str], None]
"""Is told the name of a place; what it raises is raised there."""

PLACES: dict[str, tuple[Any, str]] = {
    "sampler.make": (sampler.Sampler, "__init__"),
    "sampler.sample": (sampler.Sampler, "sample"),
    "detokenizer.push": (detokenize.Detokenizer, "push"),
    "detokenizer.finish": (detokenize.Detokenizer, "finish"),
    "handle.publish": (RequestHandle, "publish"),
    "request.completion": (request.Request, "completion"),
    "context.complete": (Context, "_complete"),
    "tree.match": (tree.RadixTree, "match"),
    "tree.insert": (tree.RadixTree, "insert"),
    "reuse.plan": (planner.Planner, "plan"),
    "reuse.assemble": (attempt.Attempt, "assemble"),
    "reuse.look": (attempt.Attempt, "watch"),
    "reuse.advance": (attempt.Attempt, "advance"),
    "reuse.publish": (planner.Planner, "publish"),
    "learner.after": (learner.Learner, "after"),
    "pool.allocate": (pool.PagePool, "allocate"),
    "pool.copy_page": (pool.PagePool, "copy_page"),
    "snapshot.write": (safetensors.torch, "save_file"),
    "snapshot.read": (sealed_file, "safe_open"),
}
"""By name: whose call it is, and what it is called there. `logprobs` is called by several, see `_places`."""


@contextmanager
def places_watched(reached: Reached) -> Iterator[None]:
    """Tell of every call at a place, by its name."""
    with ExitStack() as stack:
        for place, owner, name in _places():
            stack.enter_context(mock.patch.object(owner, name, _watched(place, owner.__dict__[name], reached)))
        yield


def attention_watched(engine: Engine, reached: Reached) -> None:
    """Tell of every pass of an engine's attention ("attention.prepare") and of each layer ("attention.layer").

    For as long as the engine lives.
    """
    prepare = engine.backend.prepare

    def watched_prepare(*arguments: Any, **keywords: Any) -> Any:
        reached("attention.prepare")
        return _watched("attention.layer", prepare(*arguments, **keywords), reached)

    engine.backend.prepare = watched_prepare  # type: ignore[method-assign]


def _places() -> Iterator[tuple[str, Any, str]]:
    """Name, owner, and what it is called there."""
    for place, (owner, name) in PLACES.items():
        yield place, owner, name
    function = sampler.token_logprob
    for path, module in list(sys.modules.items()):
        if path.startswith("kvcomm.") and getattr(module, function.__name__, None) is function:
            yield "logprobs", module, function.__name__


def _watched(place: str, function: Callable[..., Any], reached: Reached) -> Callable[..., Any]:
    def watched(*arguments: Any, **keywords: Any) -> Any:
        reached(place)
        return function(*arguments, **keywords)

    return watched
