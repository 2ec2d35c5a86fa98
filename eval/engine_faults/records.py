"""What callers know: what they have asked for, hold, pinned and saved, and the prompts that they have open."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from eval.engine_faults.subject import Weights
from kvcomm import Context, OpenPrompt, RequestHandle, SamplingParams


@dataclass(eq=False)
class Asked:
    """A request as its caller knows it.

    Attributes:
        tokens: of the whole prompt, the context's own included.
        weights: in force when it was made.
        may_move: its caller allows moved KV.
        is_invalid: one of its values must be refused.
        is_first: nobody of its tenant has asked before.
        opened: the open prompt that it was, which knows its tokens once the answers that it follows are there.
        num_followed: tokens that those may have, as long as they are not.
        is_hurried: it may be given up for taking too long.
        was_cancelled, context_was_busy, context_was_released, held_other_weights: what it may meet for that reason.
        submitted: on the monotonic clock.
        num_fired: by point, faults fired before it was made.
    """

    tokens: tuple[int, ...]
    params: SamplingParams
    weights: Weights
    tenant: str
    num_fired: Counter[str]
    may_move: bool = False
    is_invalid: bool = False
    is_first: bool = False
    opened: Opened | None = None
    num_followed: int = 0
    is_hurried: bool = False
    was_cancelled: bool = False
    context_was_busy: bool = False
    context_was_released: bool = False
    held_other_weights: bool = False
    submitted: float = field(default_factory=time.monotonic)

    def __repr__(self) -> str:
        return f"prompt {list(self.tokens)}, {self.params}, tenant {self.tenant!r}, {self.weights}"


@dataclass(eq=False)
class Held:
    """A context and what is known about it.

    Attributes:
        weights: that computed it.
        adapter: that it names; None: it goes by what is active.
        flight: runs on it, or ran and was not looked at yet.
    """

    context: Context
    tenant: str
    weights: Weights
    adapter: str | None = None
    flight: Flight | None = None


@dataclass(eq=False)
class Flight:
    """A request somebody will ask about later. `before` and `added` are the tokens of a context that lent itself."""

    asked: Asked
    handle: RequestHandle
    on: Held | None = None
    before: tuple[int, ...] = ()


class Pin(NamedTuple):
    """A prompt of which `num_tokens` were cached when it was pinned."""

    tokens: tuple[int, ...]
    tenant: str
    weights: Weights
    num_tokens: int


class Saved(NamedTuple):
    """A snapshot and what is in it."""

    file: Path
    tokens: tuple[int, ...]
    tenant: str
    weights: Weights
    adapter: str | None


class Unpassed(Exception):
    """What a caller's `keep` raises."""


def keep_all(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The whole answer."""
    return token_ids


def keep_but_last(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The answer without its last token."""
    return token_ids[:-1]


def keep_nothing(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """An empty answer."""
    return ()


def keep_fails(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """A caller's code that fails."""
    raise Unpassed("thrown in by the evaluation")


KEEPS = {"all": keep_all, "but last": keep_but_last, "nothing": keep_nothing, "fails": keep_fails}


@dataclass(frozen=True, eq=False)
class Followed:
    """An answer in a prompt; `source` is whoever gives it."""

    source: Flight | Opened
    keep: str

    @property
    def handle(self) -> RequestHandle | None:
        """Of the answer, if it was asked for."""
        return self.source.handle

    @property
    def max_tokens(self) -> int:
        """That the answer may have."""
        return int(self.source.asked.params.max_new_tokens)

    @property
    def token_ids(self) -> tuple[int, ...] | None:
        """What is passed on of the answer; None: there is none."""
        if self.handle is None or not self.handle.done or self.keep == "fails":
            return None
        try:
            return KEEPS[self.keep](self.handle.result().token_ids)
        except Exception:
            return None


@dataclass(eq=False)
class Opened:
    """An open prompt and what was put into it."""

    prompt: OpenPrompt
    asked: Asked
    parts: list[tuple[int, ...] | Followed] = field(default_factory=list)
    handle: RequestHandle | None = None

    def has_failed_source(self) -> bool:
        """Whether an answer that it follows will never be there, as far as can be seen now."""
        return any(isinstance(part, Followed) and part.token_ids is None for part in self.parts)

    def settle(self) -> None:
        """Let what is asked be the whole prompt, if all that it follows is there."""
        known: list[int] = []
        for part in self.parts:
            ids = part.token_ids if isinstance(part, Followed) else part
            if ids is None:
                return
            known += ids
        self.asked.tokens, self.asked.num_followed = tuple(known), 0

    def waits_for(self, other: Opened) -> bool:
        """Whether it would wait for itself behind the other one."""
        stack = [self]
        while stack:
            each = stack.pop()
            if each is other:
                return True
            sources = (part.source for part in each.parts if isinstance(part, Followed))
            stack += [source for source in sources if isinstance(source, Opened)]
        return False
