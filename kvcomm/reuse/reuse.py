"""Approximate reuse of one engine, for its users: what is known about moving text, taught, measured, kept and told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, overload

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Pair, SourcesRead
from kvcomm.align.ladder import Ladder, Rung
from kvcomm.align.levels import Count
from kvcomm.align.profile_file import Profile
from kvcomm.align.readers import Reader, reader_of
from kvcomm.align.standings import Level, Standing
from kvcomm.align.watch import Watch
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Prompt, Segment
from kvcomm.model.live import Weights
from kvcomm.plain import MAX_TEXT
from kvcomm.reuse.parts import ReuseParts
from kvcomm.reuse.policy import ReusePolicy, checked_policy
from kvcomm.reuse.replay import Outcome
from kvcomm.reuse.shared_learning import SharedLearning
from kvcomm.reuse.status import ReaderStatus, status_of
from kvcomm.tiers.space import DEFAULT_TENANT, TierSpace
from kvcomm.tiers.tier import Tier


class Whose(NamedTuple):
    """Whose text is moved: where their KV is cached, and what computes it."""

    namespace: str
    weights: Weights


class Reuse:
    """What an engine knows about moving text. Thread-safe.

    Nobody needs any of the verbs: requests under a policy that learns teach the engine by themselves. They are for
    those who have examples, measure, or carry what was learned from one process to another.

    Attributes:
        parts: that plan, learn and work beside requests; for whoever builds on them.
        read: gives the checked segments of a prompt.
    """

    def __init__(
        self,
        parts: ReuseParts,
        policy: ReusePolicy,
        tier: Tier | None,
        *,
        read: Callable[[Prompt], tuple[Segment, ...]],
        whose: Callable[[str, str | None], Whose],
        space_of: Callable[[Weights, str], TierSpace],
    ) -> None:
        """Make one.

        Args:
            policy: of requests that come with none.
            tier: where what was learned is shared; None: nowhere.
            read: the checked segments of a prompt.
            whose: by tenant and adapter.
            space_of: whose KV it is in the tier that weights compute for a tenant.
        """
        self.parts = parts
        self._policy = policy
        self.read = read
        self._whose = whose
        self._space_of = space_of
        self._shared = SharedLearning(parts, tier)

    @property
    def immovable(self) -> str | None:
        """Why nothing can be moved; None: it can."""
        return self.parts.planner.immovable

    def require_known(self, rungs: Iterable[Rung]) -> None:
        """Raises InvalidRequest for a rung that names what this engine does not have."""
        self.parts.planner.require_known(rungs)

    def used(self, namespace: str, weights: Weights, tenant: str) -> None:
        """A request may move text: take over what the tier knows, the first time; give it what is new, now and then."""
        self._shared.used(namespace, self._space_of(weights, tenant))

    def learn(
        self,
        prompt: Prompt,
        *,
        estimators: Iterable[str] = ("token",),
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Future[int]:
        """Teach estimators from a prompt whose named segments are also known from other contexts.

        Done in idle time; the future gives how many tokens were kept. Requests under a policy that learns do this by
        themselves, until the anchors suffice.

        Raises:
            InvalidRequest: the prompt is empty, or this engine has no such estimator.
        """
        segments, names = self.read(prompt), tuple(estimators)
        self.require_known(map(Rung, names))
        namespace, weights = self._whose(tenant, adapter)
        return self.parts.learner.learn(namespace, weights, segments, names)

    def calibrate(
        self,
        prompt: Prompt,
        answer: Iterable[int],
        policy: ReusePolicy,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Future[Pair | None]:
        """Add a prompt to the pairs of its reader, with the anchors as they are.

        Done in idle time; the future gives the pair, None if nothing of the prompt can be moved. Requests under a
        policy that learns do this by themselves.

        Args:
            answer: token ids of the exact greedy answer; the first 32 are looked at.
            policy: says which rungs.

        Raises:
            InvalidRequest: the prompt or the answer is empty, or a rung names what this engine does not have.
        """
        segments, tokens = self._read_case(prompt, answer)
        self.require_known(policy.rungs)
        namespace, weights = self._whose(tenant, adapter)
        return self.parts.learner.calibrate(namespace, weights, segments, tokens, policy)

    def measure(
        self,
        prompt: Prompt,
        answer: Iterable[int],
        rungs: Iterable[Rung],
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Future[list[Outcome]]:
        """What moved KV would have cost a prompt, one outcome per rung; none if nothing of it can be moved.

        Done in idle time. Both sides are computed for it, exact and moved; nothing of it is kept.

        Args:
            answer: token ids of the exact greedy answer; the first 32 are looked at.

        Raises:
            InvalidRequest: the prompt or the answer is empty, or a rung names what this engine does not have.
        """
        wanted = tuple(rungs)
        self.require_known(wanted)
        segments, tokens = self._read_case(prompt, answer)
        namespace, weights = self._whose(tenant, adapter)
        return self.parts.learner.measure(namespace, weights, segments, tokens, wanted)

    @overload
    def status(
        self,
        reader: None = None,
        *,
        policy: ReusePolicy | None = None,
        tenant: str = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> list[ReaderStatus]: ...

    @overload
    def status(
        self,
        reader: Reader | Prompt,
        *,
        policy: ReusePolicy | None = None,
        tenant: str = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> ReaderStatus: ...

    def status(
        self,
        reader: Reader | Prompt | None = None,
        *,
        policy: ReusePolicy | None = None,
        tenant: str = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> ReaderStatus | list[ReaderStatus]:
        """What a reader has, and what is missing until its text is moved, in numbers.

        Args:
            reader: a reader, the first digits of its digest, or the segments of a prompt, whose reader need not have
                been seen; None: every reader there is, the one used last at the end.
            policy: that requests come under; None: the engine's.

        Raises:
            InvalidRequest: a reader that the tenant does not have, or a prompt that holds nothing to be moved.
        """
        wanted = checked_policy(policy) or self._policy
        found = None if reader is None or isinstance(reader, str | Reader) else reader_of(self._movable(reader))
        with self.parts.lock:
            namespace = self._whose(tenant, adapter).namespace
            known = [standing.reader for standing in self.parts.book.standings(namespace)]
            if reader is None:
                return [status_of(self.parts, namespace, each, wanted) for each in known]
            if found is None:
                digest = reader.digest if isinstance(reader, Reader) else str(reader)
                matching = [each for each in known if digest and each.digest.startswith(digest)]
                if len(matching) != 1:
                    raise InvalidRequest(_unknown_reader(digest, len(matching), len(known), tenant))
                (found,) = matching
            return status_of(self.parts, namespace, found, wanted)

    def readers(self, tenant: str = DEFAULT_TENANT, *, adapter: str | None = None) -> list[Standing]:
        """What is known about everybody into whose prompts text was moved, or could have been; live objects."""
        with self.parts.lock:
            return list(self.parts.book.standings(self._whose(tenant, adapter).namespace))

    def standings(self, namespace: str) -> list[Standing]:
        """`readers` of one namespace, the one used last at the end."""
        with self.parts.lock:
            return list(self.parts.book.standings(namespace))

    def status_in(self, namespace: str, reader: Reader, policy: ReusePolicy) -> ReaderStatus:
        """`status` of a reader of one namespace, which may be unknown."""
        with self.parts.lock:
            return status_of(self.parts, namespace, reader, policy)

    def watches(self, namespace: str) -> list[tuple[Level, Reader | None, Watch]]:
        """Every bound that was asked for: its level, its reader (None: all of them together), its audits."""
        with self.parts.lock:
            return list(self.parts.book.watches(namespace))

    def counts(
        self, namespace: str, reader: Reader, ladders: Iterable[Ladder], bound: Bound, level: Level, read: SourcesRead
    ) -> list[Count]:
        """Pairs that would decide about requests of a reader whose sources had read so much."""
        with self.parts.lock:
            return list(self.parts.book.counts(namespace, reader, tuple(ladders), bound, (level,), read=read))

    @property
    def num_violations(self) -> int:
        """Audits in which moved KV broke its bound."""
        return self.parts.learner.auditor.num_violations

    def save(self, folder: str | Path, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> Profile:
        """Write what a tenant has learned about moving text: anchor banks, pairs of readers, what audits said.

        Raises:
            AnchorFileError: a file cannot be written; what was there under that name is untouched.
        """
        return self.parts.save(Path(folder), self._whose(tenant, adapter).namespace)

    def load(self, folder: str | Path, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> Profile:
        """Take over what `save` wrote for the same model and tenant, all of it or nothing.

        Where banks are missing in the folder, what was measured with anchors is left out.

        Raises:
            AnchorFileForeign: of another model or tenant, or of larger banks than this engine keeps.
            AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: damaged, newer, unreadable.
        """
        return self.parts.load(Path(folder), self._whose(tenant, adapter).namespace)

    def share(self, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> bool:
        """Write to the tier now what a tenant has learned about moving text; see `save`.

        An engine does so by itself now and then, and when it is closed. False: nothing is known, there is no tier, or
        it could not be written.
        """
        namespace, weights = self._whose(tenant, adapter)
        return self._shared.put(namespace, self._space_of(weights, tenant))

    def take(self, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> Profile | None:
        """Take over what the tier has of it; see `load`. None: the tier has nothing, or there is none.

        An engine that knows nothing of a tenant does so by itself with the first request that may move text.

        Raises:
            AnchorFileError: what is there is refused; see the subclasses.
        """
        namespace, weights = self._whose(tenant, adapter)
        return self._shared.get(namespace, self._space_of(weights, tenant))

    def close(self) -> None:
        """Give the tier what was learned since it was last given."""
        self._shared.close()

    def _read_case(self, prompt: Prompt, answer: Iterable[int]) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
        segments, tokens = self.read(prompt), tuple(answer)
        if not tokens:
            raise InvalidRequest("an empty answer cannot be replayed; generate at least one token")
        return segments, tokens

    def _movable(self, prompt: Prompt) -> tuple[Segment, ...]:
        segments = self.read(prompt)
        require_movable(segments, "this prompt")
        return segments


def is_movable(segments: Iterable[Segment]) -> bool:
    """Whether any of these segments may be moved: only those with a name are."""
    return any(segment.name is not None for segment in segments)


def require_movable(segments: Iterable[Segment], named: str) -> None:
    """Raises InvalidRequest for a prompt of which no segment has a name; `named` says which one it is."""
    if not is_movable(segments):
        raise InvalidRequest(
            f"nothing of {named} can be moved: only segments with a name are, engine.segment(text, name=...)"
        )


def _unknown_reader(digest: str, num_matching: int, num_known: int, tenant: str) -> str:
    which = "no reader" if not num_matching else f"{num_matching} readers"
    return (
        f"{which} {digest[:MAX_TEXT]!r} among {num_known} of tenant {tenant!r}; reuse.status() lists those that have "
        "been asked, and segments of a prompt tell about one that has not"
    )
