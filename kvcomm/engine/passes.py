"""One pass of the model for the work of several requests, and who pays when it fails.

Whatever is raised in a pass belongs to whoever's work raised it: where what looks on for one request fails, that
request gives up what it looked for, and a pass that the model does not survive is computed again request by request, so
that only those fail which fail alone.
Computing twice is harmless: every run writes the same keys and values to the same slots. Knows neither queues nor
answers; called outside the engine's lock.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.engine.reading import Reading
from kvcomm.engine.request import Branch, Request
from kvcomm.errors import UnsupportedModel, WeightsChanged
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.runner import ModelRunner, Run, ScoreWatch
from kvcomm.reuse.attempt import Attempt

logger = logging.getLogger("kvcomm.engine")


class Work(NamedTuple):
    """Runs of one sequence in a step, ascending, and whom they are for; `branch` is None while the prompt is prefilled.

    Only the last run may give logits. `is_beside`: nobody waits for it.
    """

    request: Request | Reading
    branch: Branch | None
    sequence: KVSequence
    runs: tuple[Run, ...]
    is_beside: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(len(run.token_ids) for run in self.runs)

    @property
    def end(self) -> int:
        """One past the last position computed."""
        return self.runs[-1].end

    @property
    def num_logits(self) -> int:
        """Rows of logits this work gives."""
        return self.runs[-1].num_logits


class Computed(NamedTuple):
    """What a pass gave one piece of work.

    Attributes:
        logits: [work.num_logits, vocab_size], in the model's dtype.
        finite: which of these rows hold neither NaN nor infinity.
    """

    work: Work
    logits: Tensor
    finite: list[bool]


class Failure(NamedTuple):
    """A request whose work could not be computed, and why."""

    request: Request | Reading
    error: BaseException


def compute(runner: ModelRunner, batch: Sequence[Work]) -> tuple[list[Computed], list[Failure]]:
    """Compute a batch in one pass, or request by request where that fails.

    Args:
        batch: work of requests that have the same weights; where these are gone, all of them fail.

    Returns:
        what was computed, in the order of the batch, and the requests that failed; work of these is left out.
    """
    requests = list({id(work.request): work.request for work in batch}.values())
    try:
        return _pass(runner, batch), []
    except (UnsupportedModel, WeightsChanged) as error:
        return [], [Failure(request, error) for request in requests]
    except BaseException as error:
        if len(requests) == 1:
            return [], [Failure(requests[0], error)]
        logger.warning("a pass for %d requests failed, each is computed alone now: %r", len(requests), error)
    computed, failures = [], []
    for request in requests:
        own = [work for work in batch if work.request is request]
        try:
            computed += _pass(runner, own)
        except BaseException as error:
            failures.append(Failure(request, error))
    return computed, failures


def _pass(runner: ModelRunner, batch: Sequence[Work]) -> list[Computed]:
    watches = list(_watches(batch))
    with runner.serving(batch[0].request.weights):
        logits = runner.forward([run for work in batch for run in work.runs], watch=_all_of(watches))
    num_rows = sum(work.num_logits for work in batch)
    if logits.ndim != 2 or len(logits) != num_rows:
        raise ValueError(f"the model gave logits of shape {list(logits.shape)} for {num_rows} rows")
    finite = finite_rows(logits)
    computed, row = [], 0
    for work in batch:
        first, row = row, row + work.num_logits
        computed.append(Computed(work, logits[first:row], finite[first:row]))
    return computed


def _watches(batch: Sequence[Work]) -> Iterator[ScoreWatch]:
    """What looks on during one pass, for requests that choose their rung's tokens by it."""
    row = 0
    for work in batch:
        attempt = work.request.attempt if work.branch is None else None
        for run in work.runs:
            if attempt is not None:
                try:
                    watch = attempt.watch(run, row)
                except Exception as error:
                    attempt.spoil(error)
                else:
                    if watch is not None:
                        yield _guarded(watch, attempt)
            row += len(run.token_ids)


def _guarded(watch: ScoreWatch, attempt: Attempt) -> ScoreWatch:
    """The same, but that the attempt is told of errors, and nobody else."""
    has_failed = False

    def look(layer_id: int, query: Tensor, scale: float) -> None:
        nonlocal has_failed
        if has_failed:
            return
        try:
            watch(layer_id, query, scale)
        except Exception as error:
            has_failed = True
            attempt.spoil(error)

    return look


def _all_of(watches: Sequence[ScoreWatch]) -> ScoreWatch | None:
    """For the runner; None where nobody looks on."""
    if not watches:
        return None

    def look(layer_id: int, query: Tensor, scale: float) -> None:
        for watch in watches:
            watch(layer_id, query, scale)

    return look


def finite_rows(logits: Tensor) -> list[bool]:
    """Which rows of [num_rows, vocab_size] hold neither NaN nor infinity."""
    # They survive a sum, and summing takes a twentieth of testing every logit. The reverse does not hold: a model that
    # hides tokens behind the least number of its dtype overflows the sum.
    finite = logits.sum(-1, dtype=torch.float32).isfinite()
    if not bool(finite.all()):
        finite = logits.isfinite().all(-1)
    rows: list[bool] = finite.tolist()
    return rows
