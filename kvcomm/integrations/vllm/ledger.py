"""The scheduler's side: which request waits for what, and what the workers are to do about it. No tensors, no vLLM.

A request that has something to wait for is asked about once (`Prepare`), and answers "later" until every worker has
said how many leading tokens it has. Then it is scheduled with so many loaded ones. What is loaded stays prepared until
the request ends, so that it can be loaded again after a preemption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvcomm.integrations.vllm.messages import Forget, Load, Prepare, Prepared, Release, Save, UsageValues, WorkerJob
from kvcomm.integrations.vllm.params import RequestParams


@dataclass
class _Entry:
    """One request.

    Attributes:
        moves: its KV may be approximate.
        saves, tells: see `add`.
        is_asked: whether the workers have been asked.
        answers: of the workers so far.
        num_ready: leading tokens that all workers have; None: not all have said.
    """

    params: RequestParams
    token_ids: tuple[int, ...]
    moves: bool
    saves: bool
    tells: bool
    is_asked: bool = False
    answers: list[Prepared] = field(default_factory=list)
    num_ready: int | None = None
    num_loaded: int = 0


class Ledger:
    """Requests that concern kvcomm, from arrival to end."""

    def __init__(self, num_workers: int = 1) -> None:
        self._num_workers = num_workers
        self._entries: dict[str, _Entry] = {}
        self._jobs: list[WorkerJob] = []

    @property
    def num_requests(self) -> int:
        """Requests that are known."""
        return len(self._entries)

    def add(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: RequestParams,
        *,
        moves: bool,
        reads: bool,
        saves: bool,
        tells: bool = True,
    ) -> None:
        """A request has arrived.

        Args:
            moves: kvcomm's engine prepares its prompt.
            reads: else the tier is asked for a prefix.
            saves: its exact KV is kept when it ends.
            tells: whether its client is told anything.
        """
        entry = _Entry(params, tuple(token_ids), moves, saves and not moves, tells)
        self._entries[request_id] = entry
        if moves or reads:
            self._ask(request_id, entry)
        else:
            entry.num_ready = 0

    def num_matched(self, request_id: str, num_tokens: int, num_local: int) -> int | None:
        """Tokens that can be loaded behind `num_local` ones; None: ask later.

        Args:
            num_tokens: of the request; its last one is always computed.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return 0
        if entry.num_ready is None:
            return None
        return max(0, min(entry.num_ready, num_tokens - 1) - num_local)

    def allocated(self, request_id: str, blocks: Sequence[int], num_local: int, num_external: int) -> None:
        """A request is scheduled; `num_external` tokens behind the first `num_local` are to be loaded into blocks."""
        entry = self._entries.get(request_id)
        if entry is None or num_external == 0:
            return
        entry.num_loaded = num_local + num_external
        self._jobs.append(Load(request_id, tuple(blocks), num_local, num_local + num_external))

    def take_jobs(self) -> list[WorkerJob]:
        """What the workers are to do in this step, in order."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def took(self, prepared: Mapping[str, Sequence[Prepared]]) -> None:
        """Answers of workers; a request is ready as far as all of them are."""
        for request_id, answers in prepared.items():
            entry = self._entries.get(request_id)
            if entry is None:
                continue
            entry.answers += answers
            if len(entry.answers) >= self._num_workers:
                entry.num_ready = min(answer.num_tokens for answer in entry.answers)

    def usage(self, request_id: str) -> UsageValues | None:
        """What a client is told; None: nothing."""
        entry = self._entries.get(request_id)
        if entry is None or not entry.tells or not entry.answers:
            return None
        return {"loaded_tokens": entry.num_loaded, **entry.answers[0].usage}

    def finished(
        self, request_id: str, token_ids: Sequence[int], num_computed: int, blocks: Sequence[int], *, is_whole: bool
    ) -> bool:
        """A request has ended; True: the workers still read its blocks.

        Args:
            token_ids: prompt and answer.
            num_computed: of them, whose KV is in the blocks.
            is_whole: it ended by itself, and was not aborted.
        """
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return False
        self._jobs = [job for job in self._jobs if job.request_id != request_id]
        answer = tuple(token_ids[len(entry.token_ids) :])
        if entry.is_asked:
            is_source = is_whole and entry.params.answer is not None
            self._jobs.append(Release(request_id, answer if is_source else (), entry.params.answer))
        num_kept = min(num_computed, len(token_ids))
        if not entry.saves or num_kept <= (entry.num_ready or 0) or not blocks:
            return False
        kept = tuple(token_ids[:num_kept])
        self._jobs.append(Save(request_id, tuple(blocks), kept, entry.num_ready or 0, entry.params))
        return True

    def forget(self) -> None:
        """Let the workers drop what they have cached."""
        self._jobs.append(Forget())

    def _ask(self, request_id: str, entry: _Entry) -> None:
        entry.is_asked = True
        self._jobs.append(Prepare(request_id, entry.token_ids, entry.params, entry.moves))
