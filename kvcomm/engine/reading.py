"""A prompt that is not complete yet, as the engine's thread works on it: what is known of it, and what is read so far.

A follower knows no more of a request than what its handle tells everybody: the ids whose text is out, and at the end
the answer's. What was read too far (a stop string cuts text that looked final, an agent's end-of-turn token is not
passed on) is taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import NamedTuple

import numpy as np

from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, KVCommError, PromptTooLong, RequestCancelled, SourceFailed, kept
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence, num_common
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.live import Weights
from kvcomm.values import told

MAX_ID = 2**31 - 1

TokenIds = tuple[int, ...]
Keep = Callable[[TokenIds], TokenIds]
Begin = Callable[["Reading", tuple[Segment, ...]], None]
"""Makes the request of a prompt that is complete, of these segments; called under the engine's lock."""


class Known(NamedTuple):
    """What is known of an answer: its ids so far, and whether these are all."""

    token_ids: TokenIds
    is_final: bool


@dataclass(frozen=True, eq=False)
class Followed:
    """An answer that stands in a prompt, whoever gives it.

    Attributes:
        source: the request, or the prompt that will become it.
        keep: what of the final ids is passed on.
    """

    source: RequestHandle | Reading
    name: str
    keep: Keep

    @property
    def handle(self) -> RequestHandle | None:
        """The request's; None as long as it has not been asked for."""
        return self.source if isinstance(self.source, RequestHandle) else self.source.handle

    def look(self) -> Known:
        """What is known of it now.

        Raises:
            SourceFailed: there is no answer, and there will be none.
        """
        handle = self.handle
        if handle is None:
            assert isinstance(self.source, Reading)
            if self.source.is_over:
                raise SourceFailed(f"the prompt whose answer is followed as {self.name!r} was given up")
            return Known((), is_final=False)
        outcome = handle.outcome
        if outcome is None:
            return Known(handle.drawn, is_final=False)
        if isinstance(outcome, BaseException):  # without its traceback, which knows whoever has asked for the result
            raise self._failed(handle, outcome) from kept(outcome)
        try:
            return Known(_ids(self.keep(outcome.token_ids)), is_final=True)
        except Exception as error:
            raise self._failed(handle, error) from error

    def _failed(self, handle: RequestHandle, error: BaseException) -> SourceFailed:
        return SourceFailed(
            f"request {handle.request_id}, whose answer is followed as {self.name!r}, gave none: {error}"
        )


@dataclass(eq=False)
class Reading:
    """An open prompt, as the engine works on it. Changed under the engine's lock only.

    What always holds: `sequence` has the tokens of `segments` and behind them, as far as known, those of the answer
    that is being followed; what of it counts as computed has the KV of exactly these tokens.

    Attributes:
        request_id: in messages, and for passes.
        owner: what the tenant's quota goes by.
        sequence: what is read so far; pages are its own or shared.
        parts: what the prompt consists of.
        num_parts: leading parts whose text is final, and stands in `segments`.
        segments: the final text, behind what stands before it in a context.
        num_final: tokens of `sequence` that are final.
        num_before: of these, tokens of the context that it stands behind.
        num_shared: leading tokens whose KV was there already.
        num_own: leading tokens up to which it has computed something itself.
        num_cached: leading tokens that the tree has from it.
        followed: `[start, end)` of answers, final or not.
        due_s: when it is given up, on the monotonic clock.
        begin: makes the request once the prompt is complete.
        sampling: of the answer; None: it has not been closed.
        prompt: the whole prompt, where the caller has said what it is.
        handle: of the answer, once it was asked for.
        is_begun: the request has been made, and takes what was read.
        is_in_pass: a pass is writing into its pages.
        was_denied: since it was last given rows, answers in progress have left it none.
        has_no_room: of the pool: what was free when there was too little; None: there was enough.
        error: why it can become nothing.
        attempt: nothing is moved into it.
    """

    request_id: int
    namespace: str
    tenant: str
    owner: str
    weights: Weights
    sequence: KVSequence
    due_s: float
    max_tokens: int
    begin: Begin
    parts: list[Segment | Followed] = field(default_factory=list)
    num_parts: int = 0
    segments: list[Segment] = field(default_factory=list)
    num_final: int = 0
    num_before: int = 0
    num_shared: int = 0
    num_own: int = 0
    num_cached: int = 0
    followed: list[tuple[int, int]] = field(default_factory=list)
    sampling: SamplingParams | None = None
    prompt: tuple[Segment, ...] | None = None
    handle: RequestHandle | None = None
    is_begun: bool = False
    is_cancelled: bool = False
    is_over: bool = False
    is_spoiled: bool = False
    is_in_pass: bool = False
    was_denied: bool = False
    has_no_room: int | None = None
    error: BaseException | None = None
    attempt: None = None

    def __post_init__(self) -> None:
        self.num_before = self.num_final = self.sequence.num_tokens
        self.num_shared = self.sequence.num_computed

    @property
    def is_complete(self) -> bool:
        """Whether all of its text is final and no more will come."""
        return self.sampling is not None and (self.prompt is not None or self.num_parts == len(self.parts))

    @property
    def num_unread(self) -> int:
        """Known tokens that are not computed; the last token of a complete prompt is left to the request."""
        return self.sequence.num_tokens - self.sequence.num_computed

    @property
    def is_waiting(self) -> bool:
        """Whether an answer that it follows is not there yet."""
        return self.num_parts < len(self.parts)

    def sources(self) -> Iterator[Reading]:
        """Open prompts whose answers it waits for."""
        for part in self.parts[self.num_parts :]:
            if isinstance(part, Followed) and isinstance(part.source, Reading):
                yield part.source

    def waits_for(self, other: Reading) -> bool:
        """Whether it, or what it waits for, waits for another one, or is that one."""
        seen, stack = set(), [self]
        while stack:
            reading = stack.pop()
            if reading is other:
                return True
            if id(reading) not in seen:
                seen.add(id(reading))
                stack += reading.sources()
        return False

    def refresh(self) -> None:
        """Take over what has become known; pages stay, so a pass may be writing into them.

        Raises:
            SourceFailed: an answer that it follows will never come.
            PromptTooLong: more than the model may see.
        """
        while self.num_parts < len(self.parts):
            part = self.parts[self.num_parts]
            known = Known(part.token_ids, is_final=True) if isinstance(part, Segment) else part.look()
            self._show(known.token_ids)
            if isinstance(part, Followed):
                self._mark(self.num_final, self.sequence.num_tokens)
            if not known.is_final:
                return
            self.segments.append(part if isinstance(part, Segment) else Segment(known.token_ids, part.name))
            self.num_final, self.num_parts = self.sequence.num_tokens, self.num_parts + 1

    def count(self, start: int, token_ids: IntArray) -> None:
        """A pass has computed tokens from `start` on; what has been taken back meanwhile does not count."""
        sequence = self.sequence
        if start > sequence.num_computed:
            return
        end = start + num_common(token_ids, sequence.token_ids[start:])
        if end > sequence.num_computed:
            sequence.count(end)
            self.num_own = max(self.num_own, end)

    def num_usable(self, namespace: str, token_ids: IntArray) -> int:
        """Leading tokens of a prompt of which this has the KV."""
        if self.is_over or namespace != self.namespace:
            return 0
        return min(self.num_alike(token_ids), self.sequence.num_computed)

    def num_alike(self, token_ids: IntArray) -> int:
        """Leading tokens of a prompt that are its own."""
        return num_common(self.sequence.token_ids, token_ids)

    def cancel(self) -> None:
        """Nobody wants its answer any more."""
        self.is_cancelled = True
        if self.is_begun and self.handle is not None:
            self.handle.cancel()

    def _show(self, token_ids: Sequence[int]) -> None:
        """Let these be the tokens behind the final ones; of those that stood there, an equal beginning stays."""
        sequence, new = self.sequence, np.array(token_ids, dtype=np.int32)
        if self.num_final + len(new) > self.max_tokens:
            raise PromptTooLong(
                f"an open prompt of {self.num_final + len(new)} tokens exceeds the model's limit of {self.max_tokens}; "
                "shorten the prompt, or lower max_new_tokens of the answers that it follows"
            )
        num_same = num_common(sequence.token_ids[self.num_final :], new)
        sequence.truncate(self.num_final + num_same)
        sequence.append(new[num_same:])

    def _mark(self, start: int, end: int) -> None:
        if self.followed and self.followed[-1][0] == start:
            self.followed.pop()
        self.followed.append((start, end))


def require_open(reading: Reading) -> None:
    """Raises why a prompt can take no more text: InvalidRequest where it was closed, else what has ended it."""
    if reading.handle is not None:
        raise InvalidRequest("the prompt is closed: its answer was asked for; open another one")
    if reading.error is not None:
        raise kept(reading.error)
    if reading.is_over or reading.is_cancelled:
        raise RequestCancelled("the open prompt was cancelled; open another one")


def overdue(reading: Reading) -> KVCommError | None:
    """What ends a prompt that has been open for too long; None: it has time left."""
    if reading.is_begun or time.monotonic() < reading.due_s:
        return None
    waits = next((part.name for part in reading.parts[reading.num_parts :] if isinstance(part, Followed)), None)
    why = "it was not closed" if waits is None else f"the answer that it follows as {waits!r} has not ended"
    return SourceFailed(f"the open prompt was given up at its deadline: {why}; raise deadline_s")


def nothing_to_begin(reading: Reading, segments: tuple[Segment, ...]) -> None:
    """Begins what is over."""
    raise RequestCancelled(f"open prompt {reading.request_id} is over")


def _ids(given: object) -> TokenIds:
    """What a caller's `keep` has returned. Raises InvalidRequest, or what is wrong with it, if these are no ids."""
    ids = tuple(index(token) for token in given)  # type: ignore[attr-defined]  # what is none is told by its error
    if not all(0 <= token <= MAX_ID for token in ids):
        raise InvalidRequest(f"keep must return token ids, not {told(given)}")
    return ids
