"""Whole runs of a team, where decoding counts: transformers agent by agent against a kvcomm group.

`stock` is transformers' own `generate` on one agent after the other, in an order in which each has what it reads: batch
1, greedy, default cache, each agent's whole prompt. The others are the group's own runs, from the call to the return:
agents that wait for nobody share a batch, and roles come from the cache. `exact` is exact reuse only. `along` is the
same with agents that read along: while others answer, their prompts are computed as far as these answers leave time.
`moved`, with --anchors, moves text within the bound instead, and `healed` makes what was moved exact while the answer
is decoded. All answers have the same number of tokens, whatever would
end them. Stock is given the very prompts, as token ids, that a rehearsal has left; exact and along share one:
`same_prompts` is the share of timed runs that read these again, `same_answers` that of stock's, exact's and along's
answers that equal the rehearsal's. Both are 1 in float32; in bfloat16 even another batch can change an answer and what
others read then, though not how long it is.

A folder of --anchors that is not there yet is learned on the questions behind those that are measured, --warm and
--calibration together: the team warms up on them. A quarter of the latter is answered under the bound itself, so that
what audits find of agents who read answers given on moved KV counts, too. What the bound forbids is computed: the
reasons are among the figures.

One question at a time, each unknown to the cache, role prompts known as in a team at work; stock and the ways take
turns in one process, another one going first with each question. `batched` lets several questions into one engine at
once, against the same stock seconds: what one who wants throughput would do. A run is split by the clock: prefill is
the time in which at least one agent waits for its first token (others may decode meanwhile), decode the rest.
Tokenizing counts for kvcomm only. Its audits and learning, which take idle time, are off. What being followed costs
answers is measured by itself (`eval.ttft.following`).
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from eval.command import note
from eval.figures import Figure, Report
from eval.stock import Stock
from eval.ttft.following import Slowdown, measure_slowdown
from eval.ttft.team import tokens_of
from eval.workload import settings
from kvcomm import Engine, KVCommAgentGroup, ReusePolicy, SamplingParams
from kvcomm.agents import AgentResult, GroupResult, Team, load_team
from kvcomm.errors import InvalidRequest
from kvcomm.lab.teams import BATCH, examples, read_roles, run_all
from kvcomm.lab.timings import Samples, TakeTokens

GOALS = {
    "end_to_end_speedup": ">= 3.8",
    "end_to_end_batched": ">= 5",
    "same_prompts": "1",
    "same_answers": "1",
    "follow_slowdown": "<= 1.10",
}

EXACT, ALONG, MOVED, HEALED = "exact", "along", "moved", "healed"
STOCK = "stock"

WARM_UP_TOKENS = 2
"""Of stock's first answer, which does not count."""

Inputs = Mapping[str, str]


class Seconds(NamedTuple):
    """A whole run, and what of it agents spent waiting for first tokens."""

    total: float
    prefill: float

    @property
    def decode(self) -> float:
        """The rest."""
        return self.total - self.prefill


@dataclass
class Times:
    """One way to run the team; lists have one entry per question unless they say otherwise.

    Attributes:
        seconds: of the runs.
        batched: several questions at once: which ones, and the seconds for all of them.
        same_prompts: whether each timed run read what was rehearsed.
        same_answers: whether each answer is the rehearsed one.
        reused, moved, read: share of a timed run's prompt tokens that came from the cache as they were, were moved, and
            were computed before their prompt was complete.
        computed: the other prompt tokens of all timed runs by reason.
    """

    group: KVCommAgentGroup
    seconds: list[Seconds] = field(default_factory=list)
    batched: list[tuple[range, float]] = field(default_factory=list)
    same_prompts: list[bool] = field(default_factory=list)
    same_answers: list[bool] = field(default_factory=list)
    reused: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    computed: Counter[str] = field(default_factory=Counter)

    def add(self, result: GroupResult, seconds: float, rehearsed: GroupResult) -> None:
        """A timed run."""
        answers = _answers(result)
        num_tokens = sum(answer.prompt_tokens for answer in answers)
        self.seconds.append(Seconds(seconds, waiting_s(answers)))
        self.reused.append(sum(answer.usage.exact_tokens for answer in answers) / num_tokens)
        self.moved.append(sum(answer.usage.aligned_tokens for answer in answers) / num_tokens)
        self.read.append(sum(answer.usage.read_along_tokens for answer in answers) / num_tokens)
        for answer in answers:
            self.computed.update(answer.usage.reasons)
        self.compare(result, rehearsed)

    def compare(self, result: GroupResult, rehearsed: GroupResult) -> None:
        """Note what a run has in common with the rehearsed one."""
        self.same_prompts.append(_prompts(result) == _prompts(rehearsed))
        self.same_answers += [one == other for one, other in zip(_ids(result), _ids(rehearsed), strict=True)]


@dataclass
class Turns:
    """Ways that read the same prompts, by name, and transformers on these.

    Attributes:
        rehearsed: the run of each question whose prompts stock is given; in the first one of the ways.
        stock: of each question.
        same_answers: whether each answer of stock's is the rehearsed one.
    """

    ways: Mapping[str, Times]
    rehearsed: list[GroupResult] = field(default_factory=list)
    stock: list[Seconds] = field(default_factory=list)
    same_answers: list[bool] = field(default_factory=list)

    def speedup(self, way: str, part: str = "total") -> Samples:
        """Stock over a way, question by question; of whole runs, or of a part."""
        return _part(self.stock, part).per(_part(self.ways[way].seconds, part))

    def batched_speedup(self, way: str) -> Samples:
        """Stock one question after the other, over a way with all of them at once."""
        batched = self.ways[way].batched
        stock = [sum(self.stock[index].total for index in batch) for batch, _ in batched]
        return Samples(tuple(stock)).per(Samples(tuple(seconds for _, seconds in batched)))


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """All figures of an engine.

    Raises:
        InvalidRequest: too few questions, or too many at once.
    """
    if options.in_flight > BATCH:
        raise InvalidRequest(f"--in-flight {options.in_flight} is more than the {BATCH} runs that are made at once")
    sampling = SamplingParams(max_new_tokens=options.answer_tokens, ignore_eos=True)
    team = load_team(options.team)
    team = replace(team, agents=tuple(replace(agent, sampling=sampling) for agent in team.agents))
    inputs, others = _questions(team, engine, options)
    exact = ReusePolicy.exact()
    turns = [
        Turns(
            {
                EXACT: Times(team.group(engine, policy=exact, read_along=False)),
                ALONG: Times(team.group(engine, policy=exact)),
            }
        )
    ]
    if options.anchors is not None:
        policy = ReusePolicy(options.max_divergence, options.confidence)
        _earn(engine, team, others, policy, options)
        policy = replace(policy, learn=False, audit=0.0)
        for name, moving in ((MOVED, policy), (HEALED, replace(policy, heal=True))):
            turns.append(Turns({name: Times(team.group(engine, policy=moving, read_along=False))}))
    bench = Bench(engine, Stock(engine.model), team, inputs, options.answer_tokens)
    for each in turns:
        bench.measure(each, options.in_flight)
    slowdown = measure_slowdown(
        engine, [_answers(run) for run in turns[0].rehearsed], options.answer_tokens, bench.forget
    )
    config = settings(
        engine,
        options,
        prompts="questions",
        questions=None if options.questions is None else options.questions.name,
        anchors=None if options.anchors is None else options.anchors.name,
        ways=[name for each in turns for name in each.ways],
    )
    return Report("ttft end-to-end", _figures(turns, slowdown), config, dict(_measurements(turns, slowdown)))


def _questions(team: Team, engine: Engine, options: Namespace) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Inputs to measure on, and those behind them to earn approximation with."""
    num_others = 0
    if options.anchors is not None and not options.anchors.exists():
        num_others = options.warm + options.calibration
    every = examples(team, options.questions)
    if len(every) < options.repeats + num_others:
        raise InvalidRequest(
            f"{len(every)} questions are too few: {options.repeats} are measured, {num_others} warm up; give --data "
            "a file with more of them, or lower --repeats"
        )
    return every[: options.repeats], every[options.repeats : options.repeats + num_others]


def _earn(engine: Engine, team: Team, others: Sequence[Inputs], policy: ReusePolicy, options: Namespace) -> None:
    """Take what was learned from the folder, or learn and keep it there."""
    if options.anchors.exists():
        profile = engine.reuse.load(options.anchors)
        note(f"anchors and pairs of {len(profile.knowledge.readers)} readers taken from {options.anchors}")
        return
    num_exact = options.warm + -(-3 * options.calibration // 4)
    note(f"learning from {num_exact} questions")
    group = team.group(engine, policy=policy)
    rows = [{**team.inputs, **each} for each in others[:num_exact]]
    group.warm(rows, rounds=team.rounds, progress=True)
    run_all(group, others[num_exact:], team, note)
    note("learning in idle time")
    engine.wait_idle()
    engine.cache.clear()
    engine.reuse.save(options.anchors)


@dataclass(frozen=True)
class Bench:
    """One team and questions, on stock and engine of the same model."""

    engine: Engine
    stock: Stock
    team: Team
    inputs: Sequence[Inputs]
    num_answer_tokens: int

    def measure(self, turns: Turns, in_flight: int) -> None:
        """Rehearse every question, then time it in every way, and batches of questions in between."""
        first, *_ = turns.ways
        for index in range(len(self.inputs)):
            note(f"{first}: rehearsal {index + 1} of {len(self.inputs)}")
            turns.rehearsed.append(self._run(turns.ways[first].group, index)[0])
        self.stock.generate(
            tokens_of(_answers(turns.rehearsed[0])[0].prompt), num_rows=1, num_new_tokens=WARM_UP_TOKENS
        )
        in_flight = min(in_flight, len(self.inputs))
        for index in range(len(self.inputs)):
            self._question(turns, index)
            if (index + 1) % in_flight == 0:
                for name, times in turns.ways.items():
                    self._batch(name, times, turns.rehearsed, range(index + 1 - in_flight, index + 1))

    def forget(self) -> None:
        """Leave nothing but the role prompts in the cache."""
        self.engine.cache.clear()
        read_roles(self.engine, self.team, self.inputs[0])

    def _question(self, turns: Turns, index: int) -> None:
        """One question with stock and in every way."""
        sides = [STOCK, *turns.ways]
        first = index % len(sides)
        for side in sides[first:] + sides[:first]:
            if side == STOCK:
                turns.stock.append(self._stock_run(turns, index))
            else:
                turns.ways[side].add(*self._run(turns.ways[side].group, index), turns.rehearsed[index])
        taken = ", ".join(f"{name} {times.seconds[-1].total:.1f} s" for name, times in turns.ways.items())
        note(f"question {index + 1} of {len(self.inputs)}: stock {turns.stock[-1].total:.1f} s, {taken}")

    def _batch(self, name: str, times: Times, rehearsed: Sequence[GroupResult], batch: range) -> None:
        self.forget()
        start = time.perf_counter()
        results = run_all(times.group, [self.inputs[index] for index in batch], self.team)
        seconds = time.perf_counter() - start
        times.batched.append((batch, seconds))
        for index, result in zip(batch, results, strict=True):
            times.compare(result, rehearsed[index])
        note(f"{name}: {len(batch)} questions at once: {seconds:.1f} s")

    def _run(self, group: KVCommAgentGroup, index: int) -> tuple[GroupResult, float]:
        """One question, new to the cache; the result and its seconds."""
        self.forget()
        start = time.perf_counter()
        (result,) = run_all(group, [self.inputs[index]], self.team)
        seconds = time.perf_counter() - start
        assert all(answer.finish_reason == "length" for answer in _answers(result)), result
        return result, seconds

    def _stock_run(self, turns: Turns, index: int) -> Seconds:
        """The rehearsed prompts of one question, agent by agent."""
        total = prefill = 0.0
        for answer in _answers(turns.rehearsed[index]):
            made = self.stock.generate(tokens_of(answer.prompt), num_rows=1, num_new_tokens=self.num_answer_tokens)
            total += made.total_s
            prefill += made.total_s - made.decode_s
            # A group hands answers on without the control tokens at their end.
            turns.same_answers.append(made.token_ids[0][: len(answer.token_ids)] == answer.token_ids)
        return Seconds(total, prefill)


def waiting_s(answers: Iterable[AgentResult]) -> float:
    """Seconds in which at least one agent had been asked and had no token yet."""
    total, until = 0.0, -math.inf
    for start, end in sorted((answer.started_s, answer.started_s + answer.usage.ttft_s) for answer in answers):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _answers(result: GroupResult) -> list[AgentResult]:
    """Every answer of a run, none before those that it reads."""
    return sorted((answer for answers in result.rounds for answer in answers.values()), key=lambda each: each.started_s)


def _prompts(result: GroupResult) -> list[list[int]]:
    """What every agent read, agents in the team's order."""
    return [tokens_of(answer.prompt) for answers in result.rounds for answer in answers.values()]


def _ids(result: GroupResult) -> list[tuple[int, ...]]:
    """What every agent answered, agents in the team's order."""
    return [answer.token_ids for answers in result.rounds for answer in answers.values()]


def _figures(turns: Sequence[Turns], slowdown: Slowdown) -> list[Figure]:
    ways = {name: each for each in turns for name in each.ways}
    best = ways[ALONG]
    ratios = {
        "end_to_end_speedup": best.speedup(ALONG),
        "end_to_end_batched": best.batched_speedup(ALONG),
        **{f"end_to_end_speedup_{name}": each.speedup(name) for name, each in ways.items() if name != ALONG},
        **{f"end_to_end_batched_{name}": each.batched_speedup(name) for name, each in ways.items() if name != ALONG},
        "prefill_speedup": best.speedup(ALONG, "prefill"),
        "decode_speedup": best.speedup(ALONG, "decode"),
        "follow_slowdown": slowdown.ratio,
    }
    figures = [Figure(name, each.median, "x", each.quartiles, GOALS.get(name, "")) for name, each in ratios.items()]
    sides = {STOCK: best.stock} | {name: each.ways[name].seconds for name, each in ways.items()}
    for side, runs in sides.items():
        for part in ("total", "prefill", "decode"):
            seconds = _part(runs, part)
            name = f"{side}_s" if part == "total" else f"{side}_{part}_s"
            figures.append(Figure(name, seconds.median, "s", seconds.quartiles))
    batched = Samples(tuple(seconds / len(batch) for batch, seconds in best.ways[ALONG].batched))
    figures.append(Figure("batched_per_question_s", batched.median, "s", batched.quartiles))
    return [*figures, *_shares(turns, slowdown)]


def _shares(turns: Sequence[Turns], slowdown: Slowdown) -> list[Figure]:
    """What is the same, where prompt tokens came from, and why the others were computed."""
    exact, ways = turns[0], {name: times for each in turns for name, times in each.ways.items()}
    same = [*exact.same_answers, *(same for times in exact.ways.values() for same in times.same_answers)]
    shares: dict[str, Sequence[float]] = {
        "same_prompts": [same for times in ways.values() for same in times.same_prompts],
        "same_answers": same,
        "followed_read": slowdown.read,
    }
    reasons = []
    for name, times in ways.items():
        shares |= {f"{name}_reused": times.reused, f"{name}_moved": times.moved, f"{name}_read": times.read}
        reasons += [
            Figure(f"{name}_computed_{reason}", count / len(times.seconds), "tokens")
            for reason, count in times.computed.most_common()
        ]
    found = [Figure(name, sum(each) / len(each), "share", goal=GOALS.get(name, "")) for name, each in shares.items()]
    return [*found, *reasons]


def _part(runs: Sequence[Seconds], part: str) -> Samples:
    """The totals, prefills or decodes of runs."""
    return Samples(tuple(getattr(seconds, part) for seconds in runs))


def _measurements(turns: Sequence[Turns], slowdown: Slowdown) -> Iterator[tuple[str, list[float]]]:
    """Every measurement by name."""
    for each in turns:
        for name, times in each.ways.items():
            for side, runs in ((f"{name}_stock", each.stock), (name, times.seconds)):
                yield f"{side}_s", [seconds.total for seconds in runs]
                yield f"{side}_prefill_s", [seconds.prefill for seconds in runs]
            yield f"{name}_batched_s", [seconds for _, seconds in times.batched]
            yield f"{name}_reused", times.reused
            yield f"{name}_moved", times.moved
            yield f"{name}_read", times.read
            yield f"{name}_same_prompts", [float(same) for same in times.same_prompts]
            yield f"{name}_same_answers", [float(same) for same in times.same_answers]
    yield "alone_token_s", slowdown.alone_s
    yield "followed_token_s", slowdown.followed_s
    yield "followed_read", slowdown.read
