"""What a run comes to: one sentence in its own numbers, and agent by agent where tokens came from, and the waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eval.tasks.analysis import ModeResult
from eval.tasks.modes import ALONG, DENSE, EXACT, HEAL, KVCOMM, STOCK

MOST_WANTED = (KVCOMM, HEAL, ALONG, EXACT)
"""Which mode the verdict is about, if several ran; else it is the last one."""
WITHOUT_REUSE = {STOCK: "transformers alone", DENSE: "no reuse"}
"""What first tokens are held against, the better reference first."""
KINDS = {"exact": "exact", "aligned": "moved", "computed": "computed"}
"""Where tokens come from: as it is counted, and as it is called."""


class Source(NamedTuple):
    """Tokens of one agent's prompts that came from one place: mean of the questions, and share in percent."""

    name: str
    tokens: float
    percent: float


class Wait(NamedTuple):
    """Seconds until one agent's first token; `percent`: of the longest wait of all agents."""

    mode: str
    told: str
    percent: float


class AgentView(NamedTuple):
    """One agent. `waits` is empty where nothing was timed; else the mode itself comes first."""

    name: str
    sources: list[Source]
    waits: list[Wait]


def subject(results: Sequence[ModeResult]) -> ModeResult | None:
    """The mode that a report is about; None: nothing but dense ran."""
    by_name = {each.mode: each for each in results}
    chosen = [by_name[name] for name in MOST_WANTED if name in by_name]
    others = [each for each in results if each.mode != DENSE]
    return next(iter([*chosen, *reversed(others)]), None)


def reference(results: Sequence[ModeResult]) -> ModeResult | None:
    """What first tokens are held against: transformers alone if it was timed, else dense; None: nothing was timed."""
    timed = {each.mode: each for each in results if each.times.num_questions}
    return next((timed[name] for name in WITHOUT_REUSE if name in timed), None)


def verdict(results: Sequence[ModeResult]) -> str:
    """One sentence: what reuse gave, what it cost, and whether the bound held."""
    own = subject(results)
    if own is None:
        return "Only the mode dense ran, which reuses nothing, so that there is nothing to compare."
    return f"{_gave(own, reference(results))}; {_cost(own)}; {_bound(own)}."


def agent_views(results: Sequence[ModeResult]) -> list[AgentView]:
    """Every agent in the mode that the report is about."""
    own, other = subject(results), reference(results)
    if own is None:
        return []
    compared = [] if other is None or other is own or not own.times.num_questions else [own, other]
    longest_s = max((seconds for each in compared for seconds in each.times.ttft_s.values()), default=0.0)
    return [
        AgentView(name, _sources(own, name), [_wait(each, compared, name, longest_s) for each in compared])
        for name in own.reuse.by_agent
    ]


def _gave(own: ModeResult, other: ModeResult | None) -> str:
    spared = f"Reuse (mode {own.mode}) spared {1 - own.reuse.computed_share:.0%} of the prompt tokens"
    if other is None or other is own or not own.times.num_questions:
        return f"{spared}, and no times were taken"
    own_s, other_s = own.times.team_ttft_s, other.times.team_ttft_s
    return (
        f"{spared}, and a question's first tokens, all agents added up, came {other_s / own_s:.1f} times as fast as "
        f"with {WITHOUT_REUSE[other.mode]} ({own_s:.2f} s instead of {other_s:.2f} s)"
    )


def _cost(own: ModeResult) -> str:
    outcome = own.outcome
    turned = f"{outcome.lost} turned from right to wrong and {outcome.won} from wrong to right"
    turned = f"of {own.num_questions} questions {turned}"
    if own.damage.mean_divergence is None:
        return f"{turned}, and no divergence was measured"
    return f"{turned}, and answers diverged by {own.damage.mean_divergence:.4f} nats on average"


def _bound(own: ModeResult) -> str:
    """Whether it held: at most the share of violations that was allowed, or what chance makes of that."""
    damage = own.damage
    if own.mode == HEAL:
        return "the bound is about answers that are not healed, and was not tested"
    if damage.bound is None:
        return "no bound was in force" if own.reuse.requests["moved"] else "nothing was moved, so no bound was needed"
    epsilon, delta = damage.bound
    if damage.violations is None or damage.violation_limit is None:
        return f"whether the bound of {epsilon:g} nats held was not tested, as no answer on moved text was audited"
    share, limit = damage.violations.value, damage.violation_limit
    held = "held" if share <= delta else "held as far as chance can tell" if share <= limit else "did not hold"
    count = round(share * damage.num_audited)
    chance = "" if share <= delta else f" and up to {limit:.0%} explained by chance"
    return (
        f"the bound {held}: {count} of {damage.num_audited} audited answers on moved text were above {epsilon:g} nats, "
        f"{share:.0%}, with {delta:.0%} allowed{chance}"
    )


def _sources(own: ModeResult, agent: str) -> list[Source]:
    tokens = own.reuse.by_agent[agent]
    total = max(1, sum(tokens.values()))
    return [
        Source(name, tokens[kind] / max(1, own.num_questions), 100 * tokens[kind] / total)
        for kind, name in KINDS.items()
    ]


def _wait(each: ModeResult, compared: Sequence[ModeResult], agent: str, longest_s: float) -> Wait:
    own, other = (result.times.ttft_s[agent] for result in compared)
    seconds = each.times.ttft_s[agent]
    gain = f", {other / own:.1f} times as fast" if each is compared[0] else ""
    return Wait(each.mode, f"{seconds:.3f} s{gain}", 100 * seconds / longest_s)
