"""kvcomm: many agents, one KV cache.

Exact prefixes are shared through a radix tree over paged KV, contexts fork without copying, and agents that read the
same text run on one engine. Importing the package is cheap; torch is loaded with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcomm.agents import Agent, KVCommAgentGroup
    from kvcomm.config import EngineConfig
    from kvcomm.engine.chat import Static
    from kvcomm.engine.context import Context
    from kvcomm.engine.engine import Engine
    from kvcomm.engine.grammar import Grammar
    from kvcomm.engine.results import Completion, Usage
    from kvcomm.engine.sampling import SamplingParams
    from kvcomm.errors import KVCommError
    from kvcomm.memory.segments import Segment
    from kvcomm.reuse.policy import ReusePolicy

__version__ = "0.1.0"

_HOMES = {
    "Agent": "kvcomm.agents",
    "Completion": "kvcomm.engine.results",
    "Context": "kvcomm.engine.context",
    "Engine": "kvcomm.engine.engine",
    "EngineConfig": "kvcomm.config",
    "Grammar": "kvcomm.engine.grammar",
    "KVCommAgentGroup": "kvcomm.agents",
    "KVCommError": "kvcomm.errors",
    "ReusePolicy": "kvcomm.reuse.policy",
    "SamplingParams": "kvcomm.engine.sampling",
    "Segment": "kvcomm.memory.segments",
    "Static": "kvcomm.engine.chat",
    "Usage": "kvcomm.engine.results",
}

__all__ = [
    "Agent",
    "Completion",
    "Context",
    "Engine",
    "EngineConfig",
    "Grammar",
    "KVCommAgentGroup",
    "KVCommError",
    "ReusePolicy",
    "SamplingParams",
    "Segment",
    "Static",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvcomm.starting import collector_paused

    with collector_paused():
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
