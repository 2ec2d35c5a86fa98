"""What a run's records say: accuracy and flips with their uncertainty, divergence, reuse, times. Needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.tasks.replays import LEVELS, Divergence
from eval.tasks.samples import Answer, Sample
from eval.tasks.statistics import mcnemar, mean, median, pass_at_k
from eval.tasks.timing import Timed
from kvcomm.lab.bounds import Interval, violation_limit, wilson

PASSES = (1, 2, 5, 10, 100)


@dataclass(frozen=True)
class Outcome:
    """What became of the answers.

    Attributes:
        accuracy, otherwise: shares of right answers, by the reading that counts and by the second one.
        flips: share of questions whose verdict differs from dense (either way); `lost` and `won` are their numbers.
        mcnemar_p: of as many or more one-sided flips, if reuse made no difference (exact test).
        changed: share of questions where something else was read out of the referee's answer than in dense.
        by_group, by_group_otherwise: group of rows -> share of right answers.
        pass_at: k -> the chance that one of k drawn answers is right.
    """

    accuracy: Interval
    otherwise: Interval
    flips: Interval
    lost: int
    won: int
    mcnemar_p: float
    changed: Interval
    by_group: Mapping[str, float]
    by_group_otherwise: Mapping[str, float]
    pass_at: Mapping[int, float]

    @property
    def macro(self) -> float | None:
        """Mean over groups of the share of right answers; None: there are no groups."""
        return mean(self.by_group.values())

    @property
    def macro_otherwise(self) -> float | None:
        """As `macro`, by the second reading."""
        return mean(self.by_group_otherwise.values())


@dataclass(frozen=True)
class Reuse:
    """Where the prompts' KV came from.

    Attributes:
        tokens: prompt tokens that were exact, aligned, computed.
        requests: those that moved text, those that only had an exact prefix, those that computed everything.
        reasons: computed tokens by reason.
        rungs: requests that moved text, by rung.
        approximated: share of the requests that read others which moved text.
        by_agent: agent -> prompt tokens that were exact, aligned, computed; in the order in which agents answer.
    """

    tokens: Mapping[str, int]
    requests: Mapping[str, int]
    reasons: Mapping[str, int]
    rungs: Mapping[str, int]
    approximated: Interval
    by_agent: Mapping[str, Mapping[str, int]]

    @property
    def computed_share(self) -> float:
        """Of the prompt tokens."""
        return self.tokens["computed"] / max(1, sum(self.tokens.values()))


@dataclass(frozen=True)
class Damage:
    """How far the answers are from dense ones.

    Attributes:
        divergences, agreements: nats and shares, one per replayed request that reads others.
        first_change: index of the first token that differs from dense, one per request that differs at all.
        same: share of requests that read others whose tokens are those of dense as far as both go.
        by_position: nats at every token of the continuation, mean over replayed requests that moved text.
        key_errors, value_errors: relative, layer by layer, means over the same.
        bound: the (epsilon, delta) in force; None: none was.
        num_audited: replayed requests that moved text under the bound.
        violations: share of those above the bound; None: none was in force, or none was replayed.
        predictions: (nats predicted for the request at the confidence, nats measured) of those.
        reliability: (confidence, share of those within what was predicted at it).
    """

    divergences: tuple[float, ...]
    agreements: tuple[float, ...]
    first_change: tuple[int, ...]
    same: float
    by_position: tuple[float, ...]
    key_errors: tuple[float, ...]
    value_errors: tuple[float, ...]
    bound: tuple[float, float] | None
    num_audited: int
    violations: Interval | None
    predictions: tuple[tuple[float, float], ...]
    reliability: tuple[tuple[float, Interval], ...]

    @property
    def mean_divergence(self) -> float | None:
        """Nats; None: nothing was replayed."""
        return mean(self.divergences)

    @property
    def agreement(self) -> float | None:
        """Share of tokens; None: nothing was replayed."""
        return mean(self.agreements)

    @property
    def violation_limit(self) -> float | None:
        """What the share of violations stays below if the bound holds; None: none was in force."""
        return None if self.bound is None else violation_limit(self.bound[1], self.num_audited)


@dataclass(frozen=True)
class Times:
    """Of the questions that were timed alone.

    Attributes:
        num_questions: how many those are.
        ttft_s, total_s: agent -> median seconds to the first token, and to the last one.
        team_ttft_s, team_s: medians over questions of the sums over agents.
        kv_bytes: of KV in use, the largest of all requests.
        anchor_bytes: of what the mode's estimator has learned.
    """

    num_questions: int
    ttft_s: Mapping[str, float]
    total_s: Mapping[str, float]
    team_ttft_s: float
    team_s: float
    kv_bytes: int
    anchor_bytes: int


@dataclass(frozen=True)
class ModeResult:
    """One mode over all questions."""

    mode: str
    num_questions: int
    outcome: Outcome
    reuse: Reuse
    damage: Damage
    times: Times


def analyse(
    mode: str,
    samples: Mapping[int, Sample],
    dense: Mapping[int, Sample],
    *,
    divergences: Sequence[Divergence] = (),
    times: Sequence[Timed] = (),
    bound: tuple[float, float] | None = None,
    anchor_bytes: int = 0,
) -> ModeResult:
    """Hold a mode against dense on the questions that both have.

    Args:
        divergences, times: of this mode.
        bound: the (epsilon, delta) in force; None: none.
    """
    pairs = [_Pair(samples[index], dense[index]) for index in sorted(samples.keys() & dense.keys())]
    return ModeResult(
        mode,
        len(pairs),
        _outcome(pairs),
        _reuse(pairs),
        _damage(pairs, divergences, bound),
        _times(times, anchor_bytes),
    )


def as_values(result: ModeResult) -> dict[str, Any]:
    """As JSON values, with what follows from them."""
    outcome, reuse, damage = result.outcome, result.reuse, result.damage
    more: dict[str, dict[str, Any]] = {
        "outcome": {"macro": outcome.macro, "macro_otherwise": outcome.macro_otherwise},
        "reuse": {"computed_share": reuse.computed_share},
        "damage": {
            "mean_divergence": damage.mean_divergence,
            "agreement": damage.agreement,
            "violation_limit": damage.violation_limit,
        },
    }
    values = asdict(result)
    return {name: {**found, **more[name]} if name in more else found for name, found in values.items()}


@dataclass(frozen=True)
class _Pair:
    own: Sample
    truth: Sample

    @property
    def readers(self) -> list[tuple[Answer, Answer]]:
        """Own and dense answers of all agents but the first, who reads nobody."""
        return [(answer, self.truth.answers[name]) for name, answer in list(self.own.answers.items())[1:]]


def _outcome(pairs: Sequence[_Pair]) -> Outcome:
    scored = [(each.own.score, each.truth.score) for each in pairs if each.own.score and each.truth.score]
    lost = sum(before.is_right and not now.is_right for now, before in scored)
    won = sum(now.is_right and not before.is_right for now, before in scored)
    count = len(scored)
    return Outcome(
        wilson(sum(now.is_right for now, _ in scored), count),
        wilson(sum(now.is_right_otherwise for now, _ in scored), count),
        wilson(lost + won, count),
        lost,
        won,
        mcnemar(lost, won),
        wilson(sum(now.found != before.found for now, before in scored), count),
        _by_group([(each.own, each.own.score.is_right) for each in pairs if each.own.score]),
        _by_group([(each.own, each.own.score.is_right_otherwise) for each in pairs if each.own.score]),
        _pass_at([each.own for each in pairs]),
    )


def _by_group(judged: Iterable[tuple[Sample, bool]]) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for sample, is_right in judged:
        if sample.extra.get("group"):
            found.setdefault(sample.extra["group"], []).append(is_right)
    return {group: sum(right) / len(right) for group, right in sorted(found.items())}


def _pass_at(samples: Sequence[Sample]) -> dict[int, float]:
    drawn = [(sample.extra["drawn"], sample.extra["right"]) for sample in samples if sample.extra.get("drawn")]
    largest = min((count for count, _ in drawn), default=0)
    wanted = sorted({k for k in (*PASSES, largest) if 0 < k <= largest})
    return {k: float(np.mean([pass_at_k(*each, k) for each in drawn])) for k in wanted}


def _reuse(pairs: Sequence[_Pair]) -> Reuse:
    usages = [answer.usage for pair in pairs for answer in pair.own.answers.values()]
    moved = [usage for usage in usages if usage["moved"] is not None]
    prefixed = sum(usage["exact"] > 0 and usage["moved"] is None for usage in usages)
    num_readers = sum(len(pair.readers) for pair in pairs)
    reasons: Counter[str] = Counter()
    for usage in usages:
        reasons.update(usage["reasons"])
    return Reuse(
        _tokens(usages),
        {"moved": len(moved), "exact prefix": prefixed, "computed": len(usages) - len(moved) - prefixed},
        dict(reasons.most_common()),
        dict(sorted(Counter(usage["moved"]["rung"] for usage in moved).items())),
        wilson(len(moved), num_readers),
        {
            agent: _tokens([pair.own.answers[agent].usage for pair in pairs if agent in pair.own.answers])
            for agent in dict.fromkeys(name for pair in pairs for name in pair.own.answers)
        },
    )


def _tokens(usages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of all these prompts, by where their KV came from."""
    return {kind: sum(usage[kind] for usage in usages) for kind in ("exact", "aligned", "computed")}


def _damage(pairs: Sequence[_Pair], divergences: Sequence[Divergence], bound: tuple[float, float] | None) -> Damage:
    requests = {(pair.own.index, name): answer for pair in pairs for name, answer in pair.own.answers.items()}
    first_agents = {(pair.own.index, next(iter(pair.own.answers))) for pair in pairs}
    replayed = [each for each in divergences if (each.index, each.agent) in requests.keys() - first_agents]
    moved = [each for each in replayed if each.is_moved]
    first = [_first_change(answer, whole) for pair in pairs for answer, whole in pair.readers]
    audited = moved if bound is not None else []
    predicted = [(requests[each.index, each.agent].usage["moved"]["predicted"], each.divergence) for each in audited]
    return Damage(
        tuple(each.divergence for each in replayed),
        tuple(each.agreement for each in replayed),
        tuple(each for each in first if each is not None),
        sum(each is None for each in first) / max(1, len(first)),
        _means([each.divergences for each in moved]),
        _means([each.key_errors for each in moved]),
        _means([each.value_errors for each in moved]),
        bound,
        len(audited),
        None
        if bound is None or not audited
        else wilson(sum(each.divergence > bound[0] for each in audited), len(audited)),
        tuple((expected, found) for expected, found in predicted if expected is not None),
        tuple(_reliability(audited)),
    )


def _first_change(answer: Answer, whole: Answer) -> int | None:
    """Index of the first token that differs, as far as both go."""
    pairs = zip(answer.token_ids, whole.token_ids, strict=False)
    return next((index for index, (now, before) in enumerate(pairs) if now != before), None)


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Of rows of different lengths: at every place the mean over those that reach it."""
    longest = max((len(row) for row in rows), default=0)
    return tuple(float(np.mean([row[place] for row in rows if place < len(row)])) for place in range(longest))


def _reliability(audited: Sequence[Divergence]) -> Iterable[tuple[float, Interval]]:
    for level in LEVELS:
        known = [each for each in audited if str(level) in each.predicted]
        if known:
            yield level, wilson(sum(each.divergence <= each.predicted[str(level)] for each in known), len(known))


def _times(times: Sequence[Timed], anchor_bytes: int) -> Times:
    agents = list(dict.fromkeys(each.agent for each in times))
    questions = list(dict.fromkeys(each.index for each in times))

    def of_agent(name: str, agent: str) -> float:
        return median(getattr(each, name) for each in times if each.agent == agent)

    def of_team(name: str) -> float:
        return median(sum(getattr(each, name) for each in times if each.index == index) for index in questions)

    return Times(
        len(questions),
        {agent: of_agent("ttft_s", agent) for agent in agents},
        {agent: of_agent("total_s", agent) for agent in agents},
        of_team("ttft_s"),
        of_team("total_s"),
        max((each.kv_bytes for each in times), default=0),
        anchor_bytes,
    )
