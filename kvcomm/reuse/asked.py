"""What approximate reuse needs to know of a request."""

from __future__ import annotations

from typing import Protocol

from kvcomm.align.ladder import Rung
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.live import Weights
from kvcomm.reuse.attempt import Attempt
from kvcomm.reuse.lesson import Lesson
from kvcomm.reuse.plan import Plan
from kvcomm.reuse.policy import ReusePolicy


class Asked(Protocol):
    """A request, as far as reuse looks at it. Nothing of it is written here."""

    @property
    def namespace(self) -> str:
        """Whose cache it uses."""
        ...

    @property
    def weights(self) -> Weights:
        """What it is computed with."""
        ...

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What its prompt is made of."""
        ...

    @property
    def sequence(self) -> KVSequence:
        """Prompt and, for the first choice, its answer."""
        ...

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that stood in its sequence before; they are none of its own."""
        ...

    @property
    def policy(self) -> ReusePolicy:
        """How far reuse may depart from the exact answer."""
        ...

    @property
    def rung(self) -> Rung | None:
        """Serve at exactly this rung, with no bound; None: as the policy allows."""
        ...

    @property
    def may_move(self) -> bool:
        """Whether its caller and its prompt leave anything to decide about moved text."""
        ...

    @property
    def lesson(self) -> Lesson | None:
        """What is to be learned from it whatever its policy says; None: as that says."""
        ...

    @property
    def is_trial(self) -> bool:
        """Whether it is only planned: what is found for it does not count as used."""
        ...

    @property
    def is_prefilled(self) -> bool:
        """Whether its prompt is computed."""
        ...

    @property
    def plan(self) -> Plan:
        """How its prompt tokens come about."""
        ...

    @property
    def attempt(self) -> Attempt | None:
        """How it reuses moved KV; None: not at all."""
        ...

    @property
    def published_s(self) -> float | None:
        """When others could first move what it computed, on the monotonic clock."""
        ...

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The first choice's tokens as drawn, as far as a divergence looks at them."""
        ...

    @property
    def num_choices(self) -> int:
        """Answers that were asked for."""
        ...
