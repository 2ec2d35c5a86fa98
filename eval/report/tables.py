"""The tables of a report: modes in rows, a few columns each, so that they can be read on a narrow screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.tasks.analysis import ModeResult
from eval.tasks.task import Task
from kvcomm.lab.bounds import Interval
from kvcomm.lab.moving import Reason

NONE = "-"


class Table(NamedTuple):
    """Text in rows and columns; `note` says how it is to be read."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def all_tables(results: Sequence[ModeResult], task: Task, facts: Mapping[str, Any]) -> list[Table]:
    """Every table that there is something to say in."""
    tables = [
        _answers(results, task),
        _damage(results),
        _bound(results),
        _reuse(results),
        _reasons(results),
        _times(results, "First tokens", "ttft_s", "team_ttft_s"),
        _times(results, "Whole answers", "total_s", "team_s"),
        _memory(results, facts),
        _passes(results),
        _groups(results, task),
    ]
    return [table for table in tables if table.rows]


def share(interval: Interval) -> str:
    """A share with its interval."""
    return f"{interval.value:.1%} ({interval.low:.0%} to {interval.high:.0%})"


def _answers(results: Sequence[ModeResult], task: Task) -> Table:
    head = ["mode", f"right: {task.readings[0]}", f"right: {task.readings[1]}", "flips", "lost, won", "McNemar p"]
    rows = [
        [
            each.mode,
            share(each.outcome.accuracy),
            share(each.outcome.otherwise),
            share(each.outcome.flips),
            f"{each.outcome.lost}, {each.outcome.won}",
            f"{each.outcome.mcnemar_p:.3f}",
            share(each.outcome.changed),
        ]
        for each in results
    ]
    note = (
        "Right: by two ways of reading the last answer; the first one counts. In brackets: 95 % intervals (Wilson's). "
        "Flips: questions judged right here and wrong in dense, or the other way round. Lost: right in dense only; "
        "won: right here only. McNemar p: how often chance alone would make lost and won so unequal. Changed: "
        "something else was read out of the answer than in dense, right or wrong."
    )
    return Table("Answers", [*head, "changed"], rows, note)


def _damage(results: Sequence[ModeResult]) -> Table:
    rows = []
    for each in results:
        damage = each.damage
        ordered = sorted(damage.divergences)
        rows.append(
            [
                each.mode,
                NONE if damage.mean_divergence is None else f"{damage.mean_divergence:.4f}",
                f"{ordered[int(0.9 * (len(ordered) - 1))]:.4f}" if ordered else NONE,
                NONE if damage.agreement is None else f"{damage.agreement:.1%}",
                f"{len(ordered)}",
                f"{damage.same:.0%}",
                f"{sorted(damage.first_change)[len(damage.first_change) // 2]}" if damage.first_change else NONE,
            ]
        )
    head = ["mode", "divergence, nats", "90 % below", "same choice", "replayed", "same tokens", "first other token"]
    note = (
        "Of requests that read other agents' answers. Replayed: requests of which the dense answer's first 32 tokens "
        "were put behind the reused prompt one by one; divergence is the mean over these tokens, 90 % below: what "
        "nine of ten requests stay below, same choice: share of the tokens that are the most probable ones "
        "there as well. Same tokens: share of answers that are the dense one as far as both go; first other token: "
        "where the rest leave it, the median."
    )
    return Table("Divergence", head, rows, note)


def _bound(results: Sequence[ModeResult]) -> Table:
    rows = [
        [
            each.mode,
            f"{each.damage.bound[0]:g} nats in {100 * (1 - each.damage.bound[1]):.3g} % of cases",
            f"{each.damage.num_audited}",
            NONE if each.damage.violations is None else share(each.damage.violations),
            NONE if each.damage.violation_limit is None else f"{each.damage.violation_limit:.1%}",
        ]
        for each in results
        if each.damage.bound is not None
    ]
    head = ["mode", "bound", "audited", "broke it", "chance allows"]
    note = (
        "Bound: divergence that is not to be exceeded, and in which share of cases. Audited: requests that moved text "
        "under it and were computed exactly as well. Chance allows: a bound that just holds is broken more often than "
        "that in one of forty samples of this size (two standard errors)."
    )
    return Table("The bound", head, rows, note)


def _reuse(results: Sequence[ModeResult]) -> Table:
    rows = []
    for each in results:
        reuse = each.reuse
        tokens, requests = max(1, sum(reuse.tokens.values())), max(1, sum(reuse.requests.values()))
        rows.append(
            [
                each.mode,
                *(f"{reuse.tokens[kind] / tokens:.0%}" for kind in ("exact", "aligned", "computed")),
                *(f"{reuse.requests[kind] / requests:.0%}" for kind in ("moved", "exact prefix", "computed")),
                share(reuse.approximated),
                ", ".join(f"{rung} {count}" for rung, count in reuse.rungs.items()) or NONE,
            ]
        )
    head = ["mode", "tokens exact", "moved", "computed", "requests that moved", "exact prefix only", "nothing reused"]
    note = (
        "Shares of all prompt tokens, then of all requests. Readers that moved: of the requests that read other "
        "agents' answers, those into which text was moved. Rungs: how moved text was corrected (token: by measured "
        "offsets of similar tokens; rotate: in its positions only), which share of it was computed after all and how "
        "that was chosen, and the number of requests."
    )
    return Table("Reuse", [*head, "readers that moved", "rungs"], rows, note)


def _reasons(results: Sequence[ModeResult]) -> Table:
    names = list(dict.fromkeys(name for each in results for name in each.reuse.reasons))
    rows = []
    for each in results:
        total = max(1, sum(each.reuse.tokens.values()))
        rows.append([each.mode, *(f"{each.reuse.reasons.get(name, 0) / total:.1%}" for name in names)])
    meanings = "; ".join(f"{name}: {Reason(name).words}" for name in names)
    note = f"Shares of all prompt tokens, by reason. {meanings}."
    return Table("Why tokens were computed", ["mode", *names], rows, note if names else "")


def _times(results: Sequence[ModeResult], title: str, by_agent: str, of_team: str) -> Table:
    timed = [each for each in results if each.times.num_questions]
    if not timed:
        return Table(title, [], [])
    agents = list(getattr(timed[0].times, by_agent))
    reference = getattr(timed[0].times, of_team)
    rows = []
    for each in timed:
        seconds, total = getattr(each.times, by_agent), getattr(each.times, of_team)
        ratio = f"{reference / total:.2f}x" if total else NONE
        rows.append([each.mode, *(f"{seconds[name]:.3f} s" for name in agents), f"{total:.3f} s", ratio])
    note = (
        f"Seconds from asking, medians over {timed[0].times.num_questions} questions, one request at a time. Sum: of "
        "all agents, one after the other. Against dense: how many times as fast. All modes give as many tokens."
    )
    return Table(title, ["mode", *agents, "sum", "against dense"], rows, note)


def _memory(results: Sequence[ModeResult], facts: Mapping[str, Any]) -> Table:
    rows = [
        [each.mode, _megabytes(each.times.kv_bytes), _megabytes(each.times.anchor_bytes)]
        for each in results
        if each.times.num_questions
    ]
    room = _megabytes(facts["pool_bytes"])
    note = (
        "KV: keys and values of tokens, the most that was in use while a timed request ran. Learned: what the mode "
        f"keeps to correct moved text. There is room for {room} of KV."
    )
    return Table("Memory", ["mode", "KV in use", "learned"], rows, note)


def _passes(results: Sequence[ModeResult]) -> Table:
    ks = list(dict.fromkeys(k for each in results for k in each.outcome.pass_at))
    rows = [[each.mode, *(f"{each.outcome.pass_at[k]:.1%}" for k in ks)] for each in results if each.outcome.pass_at]
    note = "pass@k: the chance that one of k drawn answers is right, estimated without bias."
    return Table("Drawn answers", ["mode", *(f"pass@{k}" for k in ks)], rows, note)


def _groups(results: Sequence[ModeResult], task: Task) -> Table:
    """By the first reading and the second one."""
    groups = list(results[0].outcome.by_group)
    rows = [
        [
            group,
            *(_both(each.outcome.by_group.get(group), each.outcome.by_group_otherwise.get(group)) for each in results),
        ]
        for group in groups
    ]
    if rows:
        rows.append(["mean", *(_both(each.outcome.macro, each.outcome.macro_otherwise) for each in results)])
    note = f"Each: {task.readings[0]} / {task.readings[1]}. The mean is over subjects, each counted once."
    return Table("Right answers by subject", ["subject", *(each.mode for each in results)], rows, note)


def _both(one: float | None, other: float | None) -> str:
    return " / ".join(NONE if value is None else f"{value:.0%}" for value in (one, other))


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MB"
