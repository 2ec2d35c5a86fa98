"""The tables of a report: modes in rows, a few columns each, so that they can be read on a narrow screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.tasks.analysis import ModeResult
from eval.tasks.task import Task
from kvcomm.lab.bounds import Interval

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
        "Intervals are Wilson's at 95 %. Flips: verdicts that differ from dense, either way. Changed: something else "
    )
    return Table("Answers", [*head, "changed"], rows, f"{note}was read out of the answer than in the dense run.")


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
    head = ["mode", "divergence, nats", "90 % below", "top-1 agreement", "replayed", "same tokens", "first other token"]
    return Table(
        "Divergence",
        head,
        rows,
        "Of requests that read others. Divergence and agreement: over the first 32 tokens of the dense answer, forced. "
        "Same tokens: answers that are the dense one as far as both go; first other token: the median over the others.",
    )


def _bound(results: Sequence[ModeResult]) -> Table:
    rows = [
        [
            each.mode,
            f"{each.damage.bound[0]:g} nats, {each.damage.bound[1]:.3g}",
            f"{each.damage.num_audited}",
            NONE if each.damage.violations is None else share(each.damage.violations),
            NONE if each.damage.violation_limit is None else f"{each.damage.violation_limit:.1%}",
        ]
        for each in results
        if each.damage.bound is not None
    ]
    head = ["mode", "epsilon, delta", "audited", "above epsilon", "delta + 2 standard errors"]
    return Table(
        "The bound", head, rows, "Audited: requests that moved text under the bound and were computed exactly."
    )


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
    note = "Rungs: how moved KV was corrected, the share of it that was computed, and the number of requests."
    return Table("Reuse", [*head, "of those that read others", "rungs"], rows, note)


def _reasons(results: Sequence[ModeResult]) -> Table:
    names = list(dict.fromkeys(name for each in results for name in each.reuse.reasons))
    rows = []
    for each in results:
        total = max(1, sum(each.reuse.tokens.values()))
        rows.append([each.mode, *(f"{each.reuse.reasons.get(name, 0) / total:.1%}" for name in names)])
    return Table("Why tokens were computed", ["mode", *names], rows, "Shares of all prompt tokens, by reason.")


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
        f"Medians over {timed[0].times.num_questions} questions, one request at a time; sum: of all agents, one after "
    )
    return Table(
        title, ["mode", *agents, "sum", "against dense"], rows, f"{note}the other. All modes give as many tokens."
    )


def _memory(results: Sequence[ModeResult], facts: Mapping[str, Any]) -> Table:
    rows = [
        [each.mode, _megabytes(each.times.kv_bytes), _megabytes(each.times.anchor_bytes)]
        for each in results
        if each.times.num_questions
    ]
    room = _megabytes(facts["pool_bytes"])
    note = f"KV: the most that was in use while a timed request ran. The pool has room for {room}."
    return Table("Memory", ["mode", "KV in use", "learned"], rows, note)


def _passes(results: Sequence[ModeResult]) -> Table:
    ks = list(dict.fromkeys(k for each in results for k in each.outcome.pass_at))
    rows = [[each.mode, *(f"{each.outcome.pass_at[k]:.1%}" for k in ks)] for each in results if each.outcome.pass_at]
    note = "Unbiased estimates of the chance that one of k drawn answers is right."
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
