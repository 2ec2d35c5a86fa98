"""Warming up: readers learn from examples at once, before anybody waits for an answer.

Examples are served exactly, each with a lesson (`reuse.lesson`), a few at a time, so that their pages fit beside those
of requests. Nothing is done here that requests would not do by and by; it is done completely, and in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from kvcomm import values
from kvcomm.align.readers import reader_of
from kvcomm.align.standings import Level
from kvcomm.engine.handle import RequestHandle
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Prompt, Segment
from kvcomm.plain import Plain
from kvcomm.reuse.lesson import Lesson
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import NUM_CONTINUATION
from kvcomm.reuse.reuse import Reuse, is_movable, require_movable
from kvcomm.reuse.status import NUM_DIGITS, ReaderStatus

BATCH = 8
"""Examples that are answered at the same time."""


class Done(NamedTuple):
    """How far it is. `text`: what is being done, for people."""

    num_done: int
    num_total: int
    text: str


Tell = Callable[[Done], object]
"""Is told how far it is."""
Progress = bool | Tell
"""True: a bar on stderr; False: nothing."""


@dataclass(frozen=True)
class Gained(Plain):
    """What one reader has gained.

    Attributes:
        num_prompts: of its prompts among the examples.
        num_pairs: pairs that came of them.
        num_tokens: anchor tokens that they added.
        status: where it stands now, under the policy.
    """

    num_prompts: int
    num_pairs: int
    num_tokens: int
    status: ReaderStatus

    @property
    def level(self) -> Level | None:
        """That decides about its next request; None: it would be computed."""
        return self.status.level

    def __repr__(self) -> str:
        status = self.status
        served = f"computed ({status.reason})" if status.rung is None else f"{status.rung} by {status.level}"
        who = f"{status.reader[:NUM_DIGITS]} of {', '.join(status.slots)}"
        return f"Gained({who}: {self.num_pairs} pairs, {self.num_tokens} anchor tokens; next: {served})"


@dataclass
class _Tally:
    """One reader: a prompt of its, its anchor tokens before, and its lessons."""

    adapter: str | None
    segments: tuple[Segment, ...]
    num_tokens: int
    lessons: list[Lesson]


class Lessons:
    """The lessons of one warm-up, by reader. Used by every thread that follows requests."""

    def __init__(
        self,
        reuse: Reuse,
        policy: ReusePolicy,
        tell: Tell,
        *,
        num_total: int,
        tenant: str,
        adapter: str | None = None,
    ) -> None:
        """Make one.

        Args:
            num_total: lessons that there will be.
        """
        self._reuse = reuse
        self._lock = reuse.parts.lock
        self._policy = policy
        self._tell = tell
        self._num_steps = 2 * num_total
        self._num_done = 0
        self._tenant = tenant
        self._tallies: dict[tuple[str | None, str], _Tally] = {}
        self._waiting: list[Lesson] = []

    def begin(self, prompt: Prompt, adapter: str | None = None) -> Lesson:
        """The lesson for a request with this prompt, which is about to be submitted."""
        lesson, segments = Lesson(self._policy), self._reuse.read(prompt)
        with self._lock:
            self._waiting.append(lesson)
            if is_movable(segments):
                key = adapter, reader_of(segments).digest
                if key not in self._tallies:
                    self._tallies[key] = _Tally(adapter, segments, self._status(segments, adapter).num_tokens, [])
                self._tallies[key].lessons.append(lesson)
        return lesson

    def answered(self) -> None:
        """One request has its answer."""
        self._advance("answering")

    def wait(self) -> None:
        """Wait until all that has begun is learned, or was given up."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for lesson in waiting:
            lesson.learned.result()
            self._advance("learning")

    def gained(self) -> dict[tuple[str | None, str], Gained]:
        """What came of them: (adapter, digest of a reader) -> that, in the order in which they began."""
        return {key: self._gained(tally) for key, tally in self._tallies.items()}

    def _gained(self, tally: _Tally) -> Gained:
        status = self._status(tally.segments, tally.adapter)
        num_pairs = sum(lesson.learned.result() is not None for lesson in tally.lessons)
        return Gained(len(tally.lessons), num_pairs, status.num_tokens - tally.num_tokens, status)

    def _status(self, segments: tuple[Segment, ...], adapter: str | None) -> ReaderStatus:
        return self._reuse.status(segments, policy=self._policy, tenant=self._tenant, adapter=adapter)

    def _advance(self, text: str) -> None:
        with self._lock:
            self._num_done = min(self._num_done + 1, self._num_steps)
            done = Done(self._num_done, self._num_steps, text)
        self._tell(done)


def warm(
    reuse: Reuse,
    submit: Callable[..., RequestHandle],
    require_open: Callable[[], None],
    prompts: Iterable[Prompt],
    policy: ReusePolicy,
    progress: Progress,
    adapter: str | None,
    tenant: str,
) -> list[Gained]:
    """See `Engine.warm`, and for `submit` and `require_open` the engine's."""
    require_open()
    read = [reuse.read(prompt) for prompt in prompts]
    require_something(reuse, policy, len(read))
    for number, segments in enumerate(read, start=1):
        require_movable(segments, f"prompt {number}")
    with told(progress) as tell:
        lessons = Lessons(reuse, policy, tell, num_total=len(read), tenant=tenant)
        for first in range(0, len(read), BATCH):
            handles = [
                submit(
                    segments,
                    adapter=adapter,
                    tenant=tenant,
                    lesson=lessons.begin(segments, adapter),
                    max_new_tokens=NUM_CONTINUATION,
                    temperature=0.0,
                )
                for segments in read[first : first + BATCH]
            ]
            try:
                for handle in handles:
                    handle.result()
                    lessons.answered()
            finally:
                for handle in handles:
                    handle.cancel()
            lessons.wait()
            require_open()
    return list(lessons.gained().values())


def require_something(reuse: Reuse, policy: ReusePolicy, num_examples: int) -> None:
    """Raises InvalidRequest where there is nothing to learn from, or nothing to learn."""
    if not num_examples:
        raise InvalidRequest("there are no examples to learn from; give at least one")
    if policy.is_exact:
        raise InvalidRequest(
            "the policy is exact reuse only, which has nothing to learn; give one that allows more, such as "
            "ReusePolicy(max_divergence=0.05, confidence=0.9)"
        )
    if reuse.immovable:
        raise InvalidRequest(f"there is nothing to learn, since nothing can be moved: {reuse.immovable}")
    reuse.require_known(policy.rungs)


@contextmanager
def told(progress: Progress) -> Iterator[Tell]:
    """What to tell how far it is; a bar while the block runs, if one is asked for."""
    if callable(progress):
        yield progress
        return
    from kvcomm.model.progress import Reporter

    reporter = Reporter(enabled=values.truth_value("progress", progress))
    with reporter.stage("learning from examples", total=1000) as update:
        yield lambda done: update(1000 * done.num_done // done.num_total)
