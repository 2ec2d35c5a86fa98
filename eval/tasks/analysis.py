"""What a run's samples say: accuracy and flips with their uncertainty, divergence, reuse, times. Needs no model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from eval.tasks.samples import Answer, Sample


class Interval(NamedTuple):
    """A share with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ModeResult:
    """One mode over all questions.

    Attributes:
        accuracy, strict: shares of right answers, tolerantly and strictly read.
        flips: share of questions whose verdict differs from dense (either way); `lost` and `won` are their numbers.
        mcnemar_p: of as many or more one-sided flips, if reuse made no difference (exact test).
        changed: share of questions where something else was read out of the referee's answer than in dense.
        divergences, agreements: nats and shares, one per measured request that reads others.
        violations: share of measured approximated requests above the bound; None: no bound, or none measured.
        first_change: index of the first token that differs from dense, one per request that differs at all.
        same: share of requests whose tokens are those of dense as far as both go.
        tokens: prompt tokens that were exact, aligned, computed.
        reasons: computed tokens by reason.
        rungs: approximated requests by the rung they were served at.
        approximated: share of requests that read others.
        ttft_s: agent -> median seconds to the first token, other questions beside it included.
        by_group: group of rows -> share of right answers.
        pass_at: k -> the chance that one of k drawn answers is right.
        team_ttft_s, team_s: medians over questions, summed over agents, and from the first request to the last answer.
        computed_share: of the prompt tokens.
    """

    mode: str
    num_questions: int
    accuracy: Interval
    strict: Interval
    flips: Interval
    lost: int
    won: int
    mcnemar_p: float
    changed: Interval
    divergences: tuple[float, ...]
    agreements: tuple[float, ...]
    violations: Interval | None
    first_change: tuple[int, ...]
    same: float
    tokens: Mapping[str, int]
    reasons: Mapping[str, int]
    rungs: Mapping[str, int]
    approximated: Interval
    ttft_s: Mapping[str, float]
    team_ttft_s: float
    team_s: float
    predictions: tuple[tuple[float, float], ...] = field(default=())
    by_group: Mapping[str, float] = field(default_factory=dict)
    pass_at: Mapping[int, float] = field(default_factory=dict)

    @property
    def computed_share(self) -> float:
        """Of the prompt tokens."""
        return self.tokens["computed"] / max(1, sum(self.tokens.values()))

    @property
    def macro(self) -> float | None:
        """Mean over groups of the share of right answers; None: there are no groups."""
        return float(np.mean(list(self.by_group.values()))) if self.by_group else None

    @property
    def mean_divergence(self) -> float | None:
        """Nats; None: not measured."""
        return float(np.mean(self.divergences)) if self.divergences else None


def analyse(
    mode: str, samples: Mapping[int, Sample], dense: Mapping[int, Sample], epsilon: float | None = None
) -> ModeResult:
    """Hold a mode against dense on the questions that both have.

    Args:
        epsilon: the bound in force, nats; None: none.
    """
    shared = sorted(samples.keys() & dense.keys())
    pairs = [(samples[index], dense[index]) for index in shared]
    own = [sample.score for sample, _ in pairs if sample.score is not None]
    truth = [sample.score for _, sample in pairs if sample.score is not None]
    lost = sum(before.is_right and not now.is_right for now, before in zip(own, truth, strict=True))
    won = sum(now.is_right and not before.is_right for now, before in zip(own, truth, strict=True))
    changed = sum(now.found != before.found for now, before in zip(own, truth, strict=True))
    requests = [
        (answer, whole.answers[name]) for sample, whole in pairs for name, answer in list(sample.answers.items())[1:]
    ]
    usages = [answer.usage for sample, _ in pairs for answer in sample.answers.values()]
    moved = [answer for answer, _ in requests if answer.usage["moved"] is not None]
    measured = [answer for answer, _ in requests if answer.divergence is not None]
    judged = [answer for answer in moved if answer.divergence is not None]
    first = [_first_change(answer, whole) for answer, whole in requests]
    count = len(shared)
    return ModeResult(
        mode,
        count,
        wilson(sum(score.is_right for score in own), count),
        wilson(sum(score.is_strictly_right for score in own), count),
        wilson(lost + won, count),
        lost,
        won,
        mcnemar(lost, won),
        wilson(changed, count),
        tuple(answer.divergence for answer in measured if answer.divergence is not None),
        tuple(answer.agreement for answer in measured if answer.agreement is not None),
        None
        if epsilon is None or not judged
        else wilson(sum((answer.divergence or 0.0) > epsilon for answer in judged), len(judged)),
        tuple(each for each in first if each is not None),
        sum(each is None for each in first) / max(1, len(first)),
        {kind: sum(usage[kind] for usage in usages) for kind in ("exact", "aligned", "computed")},
        _total(usage["reasons"] for usage in usages),
        dict(Counter(f"{answer.usage['moved']['rung']:.0%}" for answer in moved)),
        wilson(len(moved), len(requests)),
        _by_agent([sample for sample, _ in pairs]),
        _median(sum(answer.usage["ttft_s"] for answer in sample.answers.values()) for sample, _ in pairs),
        _median(sample.total_s for sample, _ in pairs),
        tuple(_predictions(judged)),
        _by_group([sample for sample, _ in pairs]),
        _pass_at([sample for sample, _ in pairs]),
    )


def _by_group(samples: Sequence[Sample]) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for sample in samples:
        if sample.score is not None and sample.extra.get("group"):
            found.setdefault(sample.extra["group"], []).append(sample.score.is_right)
    return {group: sum(right) / len(right) for group, right in sorted(found.items())}


def _pass_at(samples: Sequence[Sample]) -> dict[int, float]:
    drawn = [(sample.extra["drawn"], sample.extra["right"]) for sample in samples if sample.extra.get("drawn")]
    largest = min((count for count, _ in drawn), default=0)
    return {k: float(np.mean([pass_at_k(*each, k) for each in drawn])) for k in (1, 2, 5, 10, 100) if k <= largest}


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that of k samples drawn one is right at least: the unbiased estimate (arXiv 2107.03374, section 2.1).

    Raises:
        ValueError: k samples cannot be drawn of these.
    """
    if not 0 < k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples, {num_right} right")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def wilson(count: int, total: int) -> Interval:
    """A share with its 95 % interval; of nothing: 0, and anything is possible."""
    from statsmodels.stats.proportion import proportion_confint

    if not total:
        return Interval(0.0, 0.0, 1.0)
    low, high = proportion_confint(count, total, method="wilson")
    return Interval(count / total, float(low), float(high))


def mcnemar(lost: int, won: int) -> float:
    """Exact p of McNemar's test: as lopsided or more, if flips go either way alike."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test([[0, lost], [won, 0]], exact=True).pvalue) if lost + won else 1.0


def _first_change(answer: Answer, whole: Answer) -> int | None:
    """Index of the first token that differs, as far as both go."""
    pairs = zip(answer.token_ids, whole.token_ids, strict=False)
    return next((index for index, (now, before) in enumerate(pairs) if now != before), None)


def _predictions(judged: Iterable[Answer]) -> Iterable[tuple[float, float]]:
    for answer in judged:
        predicted = answer.usage["moved"]["predicted"]
        if predicted is not None and answer.divergence is not None:
            yield predicted, answer.divergence


def _by_agent(samples: Sequence[Sample]) -> dict[str, float]:
    names = list(samples[0].answers) if samples else []
    return {name: _median(sample.answers[name].usage["ttft_s"] for sample in samples) for name in names}


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total.most_common())


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.median(found)) if found else 0.0


def as_values(result: ModeResult) -> dict[str, Any]:
    """As JSON values."""
    from dataclasses import asdict

    return {
        **asdict(result),
        "computed_share": result.computed_share,
        "mean_divergence": result.mean_divergence,
        "macro": result.macro,
    }
