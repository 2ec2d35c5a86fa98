"""Sources that later requests of their tenant may name: those in progress, and for a short while those that have ended.

A client knows an answer's id from its stream while it is written, and another one sends it at once; so a follower may
come a moment late, and finds the final ids then. A tenant has its own, so that another's id is as unknown as one that
never was; requests with another salt share nothing either. Used from the event loop's thread only.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcomm.engine.handle import RequestHandle
from kvcomm.errors import SourceFailed

MAX_ENDED = 64
"""Sources of one tenant that have ended and are still known."""

ENDED_S = 60.0
"""How long they are."""

Keep = Callable[[tuple[int, ...]], tuple[int, ...]]
"""What of an answer's ids is passed on."""


@dataclass(eq=False)
class FollowedAnswer:
    """The first answer of a request.

    Attributes:
        space: the engine's tenant that it is asked for.
        max_tokens: that it may have.
        keep: what of its ids whoever follows it reads.
        handle: of its request; None once that has been closed.
        names: that it is found under.
    """

    space: str
    max_tokens: int
    keep: Keep
    handle: RequestHandle | None
    names: list[str] = field(default_factory=list)
    _token_ids: tuple[int, ...] | None = None

    @property
    def is_in_progress(self) -> bool:
        """Whether there is more to come."""
        return self.handle is not None and not self.handle.done

    @property
    def token_ids(self) -> tuple[int, ...] | None:
        """What whoever follows it has read, once it has ended; None: it has not, or not well."""
        if self._token_ids is None and self.handle is not None and self.handle.done:
            try:
                self._token_ids = self.keep(self.handle.result().token_ids)
            except Exception:  # whoever asked for it is told
                return None
        return self._token_ids

    def required_ids(self) -> tuple[int, ...]:
        """The same; raises SourceFailed where it has not ended well."""
        if self.token_ids is None:
            raise SourceFailed("the answer that is followed failed or was cancelled")
        return self.token_ids

    def close(self) -> None:
        """Its request has ended: keep the ids alone."""
        self._token_ids, self.handle = self.token_ids, None


class FollowedAnswers:
    """The answers of one tenant, by their ids. Always holds: what has ended badly is not here."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._by_name: dict[str, FollowedAnswer] = {}
        self._ended: OrderedDict[FollowedAnswer, float] = OrderedDict()  # and when, oldest first

    def __len__(self) -> int:
        return len({id(source) for source in self._by_name.values()})

    def add(self, name: str, source: FollowedAnswer) -> None:
        """Let an answer be found under a name; it is the newest one of that name."""
        self._by_name[name] = source
        source.names.append(name)

    def find(self, name: str, space: str) -> FollowedAnswer | None:
        """An answer in progress in that space, or one that has just ended there."""
        self._sweep()
        source = self._by_name.get(name)
        return None if source is None or source.space != space else source

    def ended(self, source: FollowedAnswer) -> None:
        """A request has ended, in whatever way."""
        source.close()
        if source.token_ids is None:
            self._forget(source)
        else:
            self._ended[source] = self._clock()
        self._sweep()

    def _sweep(self) -> None:
        now = self._clock()
        while self._ended:
            oldest, at_s = next(iter(self._ended.items()))
            if len(self._ended) <= MAX_ENDED and now - at_s <= ENDED_S:
                return
            del self._ended[oldest]
            self._forget(oldest)

    def _forget(self, source: FollowedAnswer) -> None:
        for name in source.names:
            if self._by_name.get(name) is source:
                del self._by_name[name]
