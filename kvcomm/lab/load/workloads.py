"""What clients ask: sessions of requests, made of words that nearly every tokenizer has as one token.

A workload is made before the clock starts, the same for the same seed. Lengths are in words, so about in tokens; how
many tokens they were the server tells. Trace workloads keep a trace's shape, who shares how many blocks with whom and
when, at a size that the model can take.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import NamedTuple

from kvcomm.errors import InvalidRequest
from kvcomm.lab.load.client import ChatMessage
from kvcomm.lab.load.trace_file import Trace, TraceRequest

TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had "
    "by word but not what all were we when your can said there use an each which she do how their if will "
    "up other about out many then them these so some her would make like him into time has look two more "
    "write go see number no way could people my than first water been call who oil its now find long down "
    "day did get come made may part over new sound take only little work know place year live me back "
    "give most very after thing our just name good sentence man think say great where help through much "
    "before line right too mean old any same tell boy follow came want show also around form three small "
    "set put end does another well large must big even such because turn here why ask went men read need "
    "land different home us move try kind hand picture again change off play spell air away animal house "
    "point page letter mother answer found study still learn should world"
)
WORDS = TEXT.split()


class SessionTurn(NamedTuple):
    """One request: what it says behind what its session has said, and the most tokens of its answer."""

    text: str
    max_tokens: int
    at_s: float = 0.0
    """Not sent before, in seconds from the start of the run."""


@dataclass(frozen=True)
class Session:
    """Requests of one client, stage by stage; those of a stage are sent at once.

    Attributes:
        system: what every request of the session begins with.
        is_conversation: each request of a stage of one, and its answer, is read by those behind it.
    """

    stages: tuple[tuple[SessionTurn, ...], ...]
    system: str | None = None
    is_conversation: bool = False

    @property
    def opening(self) -> tuple[ChatMessage, ...]:
        """What all requests begin with."""
        return () if self.system is None else ({"role": "system", "content": self.system},)

    @property
    def first_chat(self) -> tuple[ChatMessage, ...]:
        """The first request."""
        return (*self.opening, {"role": "user", "content": self.stages[0][0].text})

    @property
    def num_requests(self) -> int:
        """Over all stages."""
        return sum(len(stage) for stage in self.stages)


@dataclass(frozen=True)
class WorkloadSizes:
    """Sizes of a workload: lengths in words.

    Attributes:
        num_requests: at most; whole sessions.
        num_prefixes: different shared beginnings, in turn.
        turns: of a conversation, or of an agentic session at most; branches: of a fan-out.
    """

    num_requests: int
    prefix_len: int
    input_len: int
    output_len: int
    num_prefixes: int
    turns: int
    branches: int
    seed: int


def shared_prefix(shape: WorkloadSizes) -> Iterator[Session]:
    """Requests that begin with the same text and end differently."""
    draw = random.Random(shape.seed)
    prefixes = [random_words(draw, shape.prefix_len) for _ in range(shape.num_prefixes)]
    for index in range(shape.num_requests):
        yield Session(((_turn(draw, shape),),), prefixes[index % shape.num_prefixes])


def multi_turn(shape: WorkloadSizes) -> Iterator[Session]:
    """Conversations: every turn reads all before it."""
    draw = random.Random(shape.seed)
    prefixes = [random_words(draw, shape.prefix_len) for _ in range(shape.num_prefixes)]
    for index in range(_sessions(shape, shape.turns)):
        stages = tuple((_turn(draw, shape),) for _ in range(shape.turns))
        yield Session(stages, prefixes[index % shape.num_prefixes], is_conversation=True)


def fan_out(shape: WorkloadSizes) -> Iterator[Session]:
    """Planners whose answer several others read at once; no two planners begin alike."""
    draw = random.Random(shape.seed)
    for _ in range(_sessions(shape, 1 + shape.branches)):
        branches = tuple(_turn(draw, shape) for _ in range(shape.branches))
        stages = ((_turn(draw, shape),), branches)
        yield Session(stages, random_words(draw, shape.prefix_len), is_conversation=True)


def replayed(
    trace: Trace, shape: WorkloadSizes, *, block_len: int, max_input_len: int, slowdown: float | None
) -> Iterator[Session]:
    """The beginning of a trace, at a size that the model can take.

    Blocks become `block_len` words, and of all prompts the same share of blocks is kept, evenly, so that the longest
    has about `max_input_len` words: who shares how much with whom stays, in proportion. Requests of a mooncake trace
    know nothing of each other; those of an agentic session follow one another, its first `shape.turns` ones.

    Args:
        slowdown: seconds of the run per second of the trace; None: as soon as a client is free.
    """
    sessions = list(_first_sessions(trace, shape))
    longest = max(request.blocks.size for session in sessions for request in session)
    step = max(1, -(-longest * block_len // max_input_len))
    start_s = min(request.at_s for session in sessions for request in session)

    def turn(request: TraceRequest) -> SessionTurn:
        blocks = request.blocks[::step].tolist()
        text = " ".join(_block(request.session, block, block_len) for block in blocks)
        wanted = shape.output_len if request.num_output is None else request.num_output
        at_s = 0.0 if slowdown is None else (request.at_s - start_s) * slowdown
        return SessionTurn(text or WORDS[0], max(1, min(wanted, shape.output_len)), at_s)

    for session in sessions:
        yield Session(tuple((turn(request),) for request in session))


def _first_sessions(trace: Trace, shape: WorkloadSizes) -> Iterator[list[TraceRequest]]:
    """Requests that follow one another, `shape.num_requests` in all."""
    if trace.format == "mooncake":
        yield from ([request] for request in trace.requests[: shape.num_requests])
        return
    left = shape.num_requests
    in_sessions = sorted(trace.requests, key=lambda request: request.session)  # stable: in order of time
    for _, requests in groupby(in_sessions, key=lambda request: request.session):
        if session := list(islice(requests, min(shape.turns, left))):
            left -= len(session)
            yield session


def arriving(sessions: Iterable[Session], *, rate: float, seed: int) -> Iterator[Session]:
    """The same sessions, begun at random times, `rate` a second on average (a Poisson process)."""
    draw, at_s = random.Random(seed), 0.0
    for session in sessions:
        first, *rest = session.stages
        yield replace(session, stages=(tuple(turn._replace(at_s=at_s) for turn in first), *rest))
        at_s += draw.expovariate(rate)


def _sessions(shape: WorkloadSizes, requests_each: int) -> int:
    if shape.num_requests < requests_each:
        raise InvalidRequest(f"{shape.num_requests} requests are too few for one session of {requests_each}")
    return shape.num_requests // requests_each


def _turn(draw: random.Random, shape: WorkloadSizes) -> SessionTurn:
    return SessionTurn(random_words(draw, shape.input_len), shape.output_len)


def _block(session: int, block: int, num_words: int) -> str:
    return random_words(random.Random(f"{session}/{block}"), num_words)


def random_words(draw: random.Random, num_words: int) -> str:
    """A text of so many words."""
    return " ".join(draw.choices(WORDS, k=num_words))
