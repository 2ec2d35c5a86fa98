"""What the demo found: a picture, a table, a summary and figures, all from the same runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from kvcomm import ReusePolicy, Usage
from kvcomm.agents import AgentResult
from kvcomm.agents.comparison import AgentReuse, Results, Way
from kvcomm.cli.output import table
from kvcomm.figures import Figure
from kvcomm.lab.moving import Reason

NAME_WIDTH, COUNT_WIDTH, MIN_BAR_WIDTH = 11, 11, 12
TABLE_WIDTH = 79
LABELS = {
    Way.DENSE: "no\ncache",
    Way.EXACT: "exact\nprefix",
    Way.ALONG: "read\nalong",
    Way.MOVED: "moved\nKV",
    Way.HEALED: "moved,\nhealed",
}
"""Of the table's columns, in two lines."""
MEANINGS = {
    "no cache": "every prompt token is computed",
    "exact prefix": "what prompts begin with alike is computed once",
    "read along": "beside that, agents that wait read what others write while they write it",
    "moved KV": "text that another prompt holds is moved from there",
    "moved, healed": "the same, replaced by exact KV while the answer begins",
    "text moved": "at how many questions; whoever reads first has nothing to move",
    "nats": "how far an answer on moved KV is from the exact one (0: not at all), the largest of all questions: as "
    "expected at most, and as measured when it was computed exactly afterwards (audited)",
}
"""What stands above the table's columns."""
LEVELS = {"prior": "that ship with the model", "pool": "of this engine's requests", "own": "of each agent's own"}
NOT_ABOUT_MOVING = frozenset({"new", "glue", "rung", "last_token"})
"""Reasons to compute what could not have been moved anyway, or is computed for the bound's sake."""


class Symbols(NamedTuple):
    """What a bar is drawn with."""

    exact: str
    moved: str
    computed: str


BLOCKS, LETTERS = Symbols("█", "▒", "·"), Symbols("#", "=", ".")
STYLES = Symbols("green", "cyan", "red")
MIDDLE = {Way.MOVED: "moved", Way.ALONG: "along"}
"""What the middle of a bar stands for."""


class Tokens(NamedTuple):
    """Where the tokens of prompts came from. Those read along are no others than moved ones: one way has either."""

    exact: float
    moved: float
    computed: float

    @property
    def shares(self) -> Tokens:
        """Of all of them."""
        return Tokens(*(count / sum(self) for count in self))


@dataclass(frozen=True)
class Report:
    """All that was run.

    Attributes:
        runs: one per question.
        agents: the same agent by agent, in the team's order. The first one reads every question before anybody else;
            all others read what was read before them.
        policy: of the runs on moved KV.
    """

    runs: Sequence[Results]
    agents: Sequence[AgentReuse]
    policy: ReusePolicy

    @property
    def readers(self) -> Sequence[AgentReuse]:
        """Agents that read what another one has read before."""
        return self.agents[1:]

    @property
    def num_movers(self) -> int:
        """Readers into whose prompts text was moved, at one question at least."""
        return sum(bool(agent.rungs) for agent in self.readers)

    @property
    def num_moved(self) -> int:
        """Prompts into which text was moved."""
        return sum(len(agent.rungs) for agent in self.agents)

    @property
    def audited(self) -> list[float]:
        """Nats, of every audited answer."""
        return [nats for agent in self.agents for nats in agent.audited]

    @property
    def num_violations(self) -> int:
        """Audited answers that broke the bound."""
        return sum(not nats <= self.policy.max_divergence for nats in self.audited)

    @property
    def tokens(self) -> Tokens:
        """Of the whole team's prompts on moved KV, mean of the questions."""
        return self.team_tokens(Way.MOVED)

    def agent_tokens(self, way: Way) -> dict[str, Tokens]:
        """Of each agent's prompts in a way, mean of the questions."""
        return {agent.agent: _tokens([run[way][agent.agent].usage for run in self.runs]) for agent in self.agents}

    def team_tokens(self, way: Way) -> Tokens:
        """Of the whole team's."""
        return Tokens(*map(sum, zip(*self.agent_tokens(way).values(), strict=True)))

    def first_tokens_s(self, way: Way) -> float:
        """Seconds to the first token, summed over the team: mean of the questions."""
        return statistics.fmean(first_tokens_s(results, way) for results in self.runs)

    def gain(self, way: Way, over: Way) -> float:
        """How many times sooner the team's first tokens come in one way than in another."""
        return self.first_tokens_s(over) / self.first_tokens_s(way)

    @property
    def read_share(self) -> float:
        """Of the prompt tokens that agents computed who read along, those computed before the prompt was complete."""
        usages = [answer.usage for results in self.runs for answer in results[Way.ALONG].values()]
        return sum(usage.read_along_tokens for usage in usages) / sum(usage.computed_tokens for usage in usages)

    @property
    def num_answers(self) -> int:
        """Answers that were given in each way."""
        return sum(len(results[Way.DENSE]) for results in self.runs)

    @property
    def num_equal(self) -> int:
        """Of these, the ones that are the same in every exact way, token by token, to the same prompt."""
        return sum(
            all(
                (dense.token_ids, dense.prompt) == (results[way][name].token_ids, results[way][name].prompt)
                for way in (Way.EXACT, Way.ALONG)
            )
            for results in self.runs
            for name, dense in results[Way.DENSE].items()
        )


def first_tokens_s(results: Results, way: Way) -> float:
    """Seconds to the first token, summed over the team."""
    return sum(result.usage.ttft_s for result in results[way].values())


def _tokens(usages: Sequence[Usage]) -> Tokens:
    """Mean of some prompts."""
    counts = [
        (
            usage.exact_tokens,
            usage.aligned_tokens + usage.read_along_tokens,
            usage.computed_tokens - usage.read_along_tokens,
        )
        for usage in usages
    ]
    return Tokens(*map(statistics.fmean, zip(*counts, strict=True)))


# -- the picture ------------------------------------------------------------------------------------------------------


def picture(report: Report, width: int, symbols: Symbols, way: Way = Way.MOVED) -> list[Text]:
    """A bar per agent, and one for the team: what of its prompt came from the cache, was moved, was computed.

    Args:
        way: read along: what was computed while others answered takes the place of what was moved.
        width: of a line at most, in characters. Where they are too few for numbers and bars, there are no numbers.
    """
    counts_width = 3 * COUNT_WIDTH + 2
    if width < NAME_WIDTH + counts_width + MIN_BAR_WIDTH:
        counts_width = 0
    bar_width = max(1, width - NAME_WIDTH - counts_width)
    head = Text(f"{way.value[: NAME_WIDTH - 1]:<{NAME_WIDTH}}")
    for symbol, name, style in zip(symbols, ("exact", MIDDLE[way], "computed"), STYLES, strict=True):
        legend = f"{symbol} {name}"
        head.append(legend.rjust(COUNT_WIDTH) if counts_width else f"{legend}  ", style)
    head.truncate(width)
    rows = [*report.agent_tokens(way).items(), ("team", report.team_tokens(way))]
    return [head, *(_bar_line(name, tokens, bar_width, symbols, bool(counts_width)) for name, tokens in rows)]


def _bar_line(name: str, tokens: Tokens, bar_width: int, symbols: Symbols, with_counts: bool) -> Text:
    line = Text(f"{name[: NAME_WIDTH - 1]:<{NAME_WIDTH}}")
    if with_counts:
        line.append("".join(f"{count:>{COUNT_WIDTH}.0f}" for count in tokens) + "  ")
    for symbol, style, length in zip(symbols, STYLES, bar_lengths(tokens, bar_width), strict=True):
        line.append(symbol * length, style)
    return line


def bar_lengths(tokens: Tokens, width: int) -> list[int]:
    """Characters of a bar for each kind of token: `width`, 3 or more, in all; one at least for what there is any of."""
    lengths = [max(1, round(share * width)) if share else 0 for share in tokens.shares]
    while sum(lengths) != width:  # what rounding left over or took too much: one by one, so that nothing vanishes
        lengths[lengths.index(max(lengths))] += 1 if sum(lengths) < width else -1
    return lengths


# -- the table --------------------------------------------------------------------------------------------------------


def seconds_table(report: Report, width: int) -> Table:
    """First tokens agent by agent, how often text was moved, and by how much answers were off.

    Args:
        width: characters there are; where they are too few for all, only the first tokens are told.
    """
    nats = ("nats\nexpected", "nats\nmeasured")
    columns = ("seconds to\nfirst token", *(LABELS[way] for way in Way), "text\nmoved", *nats)
    rows = [_seconds_row(agent, report) for agent in report.agents]
    rows.append(("team", *(f"{report.first_tokens_s(way):.2f}" for way in Way), "", "", ""))
    num_columns = len(columns) if width >= TABLE_WIDTH else 1 + len(Way)
    return table(columns[:num_columns], [row[:num_columns] for row in rows], numeric=set(columns[1:]))


def _seconds_row(agent: AgentReuse, report: Report) -> tuple[str, ...]:
    times = [f"{statistics.fmean(each):.2f}" for each in agent.ways_s]
    often = f"{len(agent.rungs)} of {len(report.runs)}" if agent in report.readers else "first"
    nats = [f"{max(each):.4f}" if each else "" for each in (agent.predicted, agent.audited)]
    return (agent.agent, *times, often, *nats)


def notes(report: Report) -> list[str]:
    """What picture and table do not say."""
    equal, answers = report.num_equal, report.num_answers
    same = (
        f"In the first three ways all {answers} prompts and answers are the same, token by token."
        if equal == answers
        else f"ONLY {equal} OF {answers} ANSWERS ARE THE SAME IN THE FIRST THREE WAYS."
    )
    return [
        "Seconds are means over the questions; team: the sum of its agents.",
        *(f"{name}: {meaning}." for name, meaning in MEANINGS.items()),
        same,
        *_healed(report),
        *(f"{agent.agent} moved no text at {why}." for agent in report.readers for why in _unmoved(agent)),
    ]


def _healed(report: Report) -> list[str]:
    """After how many tokens what was moved is exact, where it is healed."""
    after = [count for agent in report.agents for count in agent.healed]
    if not after:
        return []
    most = max(after)
    return [f"Healed: all KV of {len(after)} moved prompts was exact after at most {most} tokens of their answers."]


def _unmoved(agent: AgentReuse) -> list[str]:
    """At how many questions nothing was moved, by the reason for most of their tokens."""
    whys = Counter(_why(usage) for usage in agent.usages if usage.approximation is None)
    return [f"{count} of {len(agent.usages)} questions: {Reason(why).words}" for why, count in whys.items()]


def _why(usage: Usage) -> str:
    told = {reason: count for reason, count in usage.reasons.items() if reason not in NOT_ABOUT_MOVING}
    return max(told or dict(usage.reasons) or {"new": 0}, key=lambda reason: (told or usage.reasons).get(reason, 0))


# -- the summary ------------------------------------------------------------------------------------------------------


def summary(report: Report) -> str:
    """What a newcomer takes home, in a few sentences."""
    along = (
        f"Read along, they come {report.gain(Way.ALONG, over=Way.DENSE):.1f} times as fast as without a cache, with "
        f"the same answers: {report.read_share:.0%} of what agents computed of their prompts was done while others "
        "answered."
    )
    if not report.num_moved:
        exact = report.gain(Way.EXACT, over=Way.DENSE)
        return (
            f"Nothing was moved here; with exact prefixes alone the team's first tokens come {exact:.1f} times as fast "
            f"as without a cache. {along}"
        )
    policy = report.policy
    return (
        f"On moved KV the first tokens of this team come {report.gain(Way.MOVED, over=Way.DENSE):.1f} times as fast as "
        f"without a cache and {report.gain(Way.MOVED, over=Way.EXACT):.1f} times as fast as with exact prefixes alone: "
        f"{report.num_movers} of {len(report.readers)} agents that read others moved text into their prompts, and "
        f"{1 - report.tokens.shares.computed:.0%} of all prompt tokens were not computed. An answer was allowed to be "
        f"off by {policy.max_divergence:g} nats, and by more in {1 - policy.confidence:.0%} of cases"
        f"{_grounds(report)}; {_audits(report)}. {along}"
    )


def _grounds(report: Report) -> str:
    """What the bound rests on."""
    bounds = [usage.bound for agent in report.agents for usage in agent.usages if usage.bound is not None]
    used = [(bound.level, bound.num_pairs) for bound in bounds if bound.level is not None]
    told = " and ".join(LEVELS[level] for level in sorted({level for level, _ in used}))
    return f" (judged by at least {min(count for _, count in used)} measured prompts {told})" if used else ""


def _audits(report: Report) -> str:
    """What exact computation has shown."""
    if not report.audited:
        return "no answer could be computed exactly as well, to see whether that held"
    mean, broken = statistics.fmean(report.audited), report.num_violations or "none"
    of_all = f"{len(report.audited)} of {report.num_moved} moved prompts"
    return f"{of_all} were computed exactly as well: {mean:.4f} nats on average, {broken} above the bound"


# -- figures ----------------------------------------------------------------------------------------------------------


def figures(report: Report) -> list[dict[str, Any]]:
    """What picture, table and summary say, as id, value, unit and spread (quartiles over questions)."""
    seconds = {way: [first_tokens_s(results, way) for results in report.runs] for way in Way}
    dense, exact, along, moved, healed = (seconds[way] for way in Way)
    shares = report.tokens.shares
    found = [
        _figure("ttft_cold_s", report.first_tokens_s(Way.DENSE), "s", dense),
        _figure("ttft_reuse_s", report.first_tokens_s(Way.EXACT), "s", exact),
        _figure("ttft_along_s", report.first_tokens_s(Way.ALONG), "s", along),
        _figure("ttft_moved_s", report.first_tokens_s(Way.MOVED), "s", moved),
        _figure("ttft_healed_s", report.first_tokens_s(Way.HEALED), "s", healed),
        _figure("ttft_ratio", report.gain(Way.EXACT, over=Way.DENSE), "x", _ratios(dense, exact)),
        _figure("ttft_along_ratio", report.gain(Way.ALONG, over=Way.DENSE), "x", _ratios(dense, along)),
        _figure("ttft_moved_ratio", report.gain(Way.MOVED, over=Way.DENSE), "x", _ratios(dense, moved)),
        _figure("ttft_moved_over_exact", report.gain(Way.MOVED, over=Way.EXACT), "x", _ratios(exact, moved)),
        _figure("exact_share", shares.exact, ""),
        _figure("moved_share", shares.moved, ""),
        _figure("not_computed_share", shares.exact + shares.moved, ""),
        _figure("read_share", report.read_share, ""),
        _figure("equal_answers", report.num_equal / report.num_answers, ""),
        _figure("readers", len(report.readers), ""),
        _figure("readers_moving", report.num_movers, ""),
        _figure("prompts_moved", report.num_moved, ""),
        _figure("prompts_audited", len(report.audited), ""),
        _figure("violations", report.num_violations, ""),
    ]
    if report.audited:
        found.append(_figure("audited_nats", statistics.fmean(report.audited), "nats", report.audited))
    for agent in report.agents:
        gain = statistics.fmean(agent.dense_s) / statistics.fmean(agent.kvcomm_s)
        found.append(_figure(f"ttft_moved_ratio_{agent.agent}", gain, "x", _ratios(agent.dense_s, agent.kvcomm_s)))
    return [figure._asdict() for figure in found]


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(over, under, strict=True)]


def _figure(figure_id: str, value: float, unit: str, samples: Sequence[float] = ()) -> Figure:
    if len(samples) < 2:
        return Figure(figure_id, value, unit)
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Figure(figure_id, value, unit, (first, third))


def raw_rows(report: Report) -> list[dict[str, Any]]:
    """Every answer with its counts and times."""
    return [
        _raw_row(number, way, result)
        for number, results in enumerate(report.runs, start=1)
        for way in Way
        for result in results[way].values()
    ]


def _raw_row(number: int, way: Way, result: AgentResult) -> dict[str, Any]:
    usage = result.usage
    return {
        "question": number,
        "way": way.value,
        "agent": result.name,
        "text": result.text,
        "prompt_tokens": usage.prompt_tokens,
        "exact_tokens": usage.exact_tokens,
        "aligned_tokens": usage.aligned_tokens,
        "computed_tokens": usage.computed_tokens,
        "read_along_tokens": usage.read_along_tokens,
        "generated_tokens": usage.generated_tokens,
        "queue_s": usage.queue_s,
        "ttft_s": usage.ttft_s,
        "total_s": usage.total_s,
        "tokens_per_s": usage.decode_tokens_per_s,
        "reasons": dict(usage.reasons),
        "rung": None if usage.approximation is None else usage.approximation.rung,
    }
