"""What the scheduler's side of the connector and the workers' sides tell each other, once a step. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvcomm.integrations.vllm.params import RequestParams

UsageValues = dict[str, Any]
"""What a client is told about its prompt, as JSON values."""


@dataclass(frozen=True)
class Prepare:
    """Find or compute KV for a prompt; `moves`: by kvcomm's engine, else from the tier."""

    request_id: str
    token_ids: tuple[int, ...]
    params: RequestParams
    moves: bool


@dataclass(frozen=True)
class Load:
    """Put the prepared KV of positions `[start, end)` into pages, before the step computes.

    Attributes:
        blocks: of positions 0.. in order.
    """

    request_id: str
    blocks: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Save:
    """Keep what pages hold of tokens, which vLLM computed exactly; `start`: the tier has what is before."""

    request_id: str
    blocks: tuple[int, ...]
    token_ids: tuple[int, ...]
    start: int
    params: RequestParams


@dataclass(frozen=True)
class Release:
    """A request is over; `answer`: tokens that other prompts may move, behind the prompt that was prepared."""

    request_id: str
    answer: tuple[int, ...] = ()
    name: str | None = None


@dataclass(frozen=True)
class Forget:
    """Drop all that is cached, for nobody in particular."""

    request_id: str = ""


WorkerJob = Prepare | Load | Save | Release | Forget


@dataclass
class Jobs:
    """Jobs of one step; `num_tokens`: that vLLM computes in it."""

    jobs: list[WorkerJob] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True)
class Prepared:
    """How many leading tokens are ready for a request; 0: vLLM computes them."""

    num_tokens: int
    usage: UsageValues = field(default_factory=dict)
