"""kvcomm: many agents, one KV cache.

Exact prefixes are shared through a radix tree over paged KV, contexts fork without copying, and agents that read the
same text run on one engine. Importing the package is cheap; torch is loaded with the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm.starting import lazily

if TYPE_CHECKING:
    from kvcomm.agents import Agent, KVCommAgentGroup
    from kvcomm.align.ladder import Rung
    from kvcomm.config import EngineConfig
    from kvcomm.engine.chat_template import Static
    from kvcomm.engine.context import Context
    from kvcomm.engine.engine import Engine
    from kvcomm.engine.grammar import Grammar
    from kvcomm.engine.handle import RequestHandle
    from kvcomm.engine.open_prompt import OpenPrompt
    from kvcomm.engine.results import Chunk, Completion, Usage
    from kvcomm.engine.sampling import SamplingParams
    from kvcomm.errors import KVCommError
    from kvcomm.memory.segments import Segment
    from kvcomm.reuse.policy import ReusePolicy

__version__ = "0.1.0"

_HOMES = {
    "Agent": "kvcomm.agents",
    "Chunk": "kvcomm.engine.results",
    "Completion": "kvcomm.engine.results",
    "Context": "kvcomm.engine.context",
    "Engine": "kvcomm.engine.engine",
    "EngineConfig": "kvcomm.config",
    "Grammar": "kvcomm.engine.grammar",
    "KVCommAgentGroup": "kvcomm.agents",
    "KVCommError": "kvcomm.errors",
    "OpenPrompt": "kvcomm.engine.open_prompt",
    "RequestHandle": "kvcomm.engine.handle",
    "ReusePolicy": "kvcomm.reuse.policy",
    "Rung": "kvcomm.align.ladder",
    "SamplingParams": "kvcomm.engine.sampling",
    "Segment": "kvcomm.memory.segments",
    "Static": "kvcomm.engine.chat_template",
    "Usage": "kvcomm.engine.results",
}

__all__ = [
    "Agent",
    "Chunk",
    "Completion",
    "Context",
    "Engine",
    "EngineConfig",
    "Grammar",
    "KVCommAgentGroup",
    "KVCommError",
    "OpenPrompt",
    "RequestHandle",
    "ReusePolicy",
    "Rung",
    "SamplingParams",
    "Segment",
    "Static",
    "Usage",
    "__version__",
]


__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
