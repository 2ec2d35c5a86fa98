"""Whole runs of a team, where decoding counts: transformers agent by agent against a kvcomm group.

`stock` is transformers' own `generate` on one agent after the other, in an order in which each has what it reads: batch
1, greedy, default cache, each agent's whole prompt. `kvcomm` is the group's own run, from the call to its return:
agents that wait for nobody share a batch, roles come from the cache, and with --anchors text is moved within the
bound. Without --anchors it is the same as `exact`, exact reuse only. All answers have the same number of tokens,
whatever would end them. Stock is given the very prompts, as token ids, that a rehearsal of kvcomm's run has left:
`same_prompts` is the share of timed runs that read these again, `same_answers` that of stock's answers that equal the
exact rehearsal's. Both are 1 in float32; in bfloat16 even another batch can change an answer and what others read then,
though not how long it is.

A folder of --anchors that is not there yet is learned on the questions behind those that are measured, --warm and
--calibration together: the team warms up on them. A quarter of the latter is answered under the bound itself, so that
what audits find of agents who read answers given on moved KV counts, too. What the bound forbids is computed: the
reasons are among the figures.

One question at a time, each unknown to the cache, role prompts known as in a team at work; stock and kvcomm take turns
in one process, each going first every other time. `batched` lets several questions into one engine at once, against the
same stock seconds: what one who wants throughput would do. A run is split by the clock: prefill is the time in which at
least one agent waits for its first token (others may decode meanwhile), decode the rest. Tokenizing counts for kvcomm
only. Its audits and learning, which take idle time, are off.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from eval.figures import Figure, Report
from eval.stock import Stock
from eval.ttft.team import tokens_of
from eval.workload import note, settings
from kvcomm import Engine, KVCommAgentGroup, ReusePolicy, SamplingParams
from kvcomm.agents.comparison import read_roles
from kvcomm.agents.example_runs import BATCH, examples, run_all
from kvcomm.agents.results import AgentResult, GroupResult
from kvcomm.agents.team import Team, load_team
from kvcomm.errors import InvalidRequest
from kvcomm.lab.timings import Samples, TakeTokens

GOALS = {"end_to_end_speedup": ">= 2.5", "same_prompts": "1", "same_answers": "1"}

EXACT, KVCOMM = "exact", "kvcomm"

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
    """One way to run the team: the same questions with stock and with kvcomm.

    Attributes:
        rehearsed: the run of each question whose prompts stock is given.
        batched: several questions at once: which ones, and the seconds for all of them.
        same_prompts, same_answers: whether each timed run read, and each answer of stock was, what was rehearsed.
        reused, moved: share of a timed run's prompt tokens that came from the cache as they were, and moved.
        computed: the other prompt tokens of all timed runs by reason.
    """

    group: KVCommAgentGroup
    rehearsed: list[GroupResult] = field(default_factory=list)
    stock: list[Seconds] = field(default_factory=list)
    kvcomm: list[Seconds] = field(default_factory=list)
    batched: list[tuple[range, float]] = field(default_factory=list)
    same_prompts: list[bool] = field(default_factory=list)
    same_answers: list[bool] = field(default_factory=list)
    reused: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    computed: Counter[str] = field(default_factory=Counter)

    @property
    def speedup(self) -> Samples:
        """Stock over kvcomm, question by question."""
        return _part(self.stock, "total").per(_part(self.kvcomm, "total"))

    @property
    def batched_speedup(self) -> Samples:
        """Stock one question after the other, over kvcomm with all of them at once."""
        stock = [sum(self.stock[index].total for index in batch) for batch, _ in self.batched]
        return Samples(tuple(stock)).per(Samples(tuple(seconds for _, seconds in self.batched)))


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
    ways = {EXACT: Times(team.group(engine, policy=ReusePolicy.exact()))}
    if options.anchors is not None:
        policy = ReusePolicy(options.max_divergence, options.confidence)
        _earn(engine, team, others, policy, options)
        ways[KVCOMM] = Times(team.group(engine, policy=replace(policy, learn=False, audit=0.0)))
    bench = Bench(engine, Stock(engine.model), team, inputs, options.answer_tokens)
    for name, times in ways.items():
        bench.measure(name, times, options.in_flight)
    config = settings(
        engine,
        options,
        prompts="questions",
        questions=None if options.questions is None else options.questions.name,
        anchors=None if options.anchors is None else options.anchors.name,
        kvcomm="exact prefixes and moved KV" if KVCOMM in ways else "exact prefixes",
    )
    return Report("ttft end-to-end", _figures(ways.get(KVCOMM, ways[EXACT]), ways[EXACT]), config, _raw(ways))


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
        profile = engine.load_anchors(options.anchors)
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
    engine.clear_cache()
    engine.save_anchors(options.anchors)


@dataclass(frozen=True)
class Bench:
    """One team and questions, on stock and engine of the same model."""

    engine: Engine
    stock: Stock
    team: Team
    inputs: Sequence[Inputs]
    num_answer_tokens: int

    def measure(self, name: str, times: Times, in_flight: int) -> None:
        """Rehearse every question, then time it on both sides, and batches of questions in between."""
        for index in range(len(self.inputs)):
            note(f"{name}: rehearsal {index + 1} of {len(self.inputs)}")
            times.rehearsed.append(self._run(times.group, index)[0])
        self.stock.generate(
            tokens_of(_answers(times.rehearsed[0])[0].prompt), num_rows=1, num_new_tokens=WARM_UP_TOKENS
        )
        in_flight = min(in_flight, len(self.inputs))
        for index in range(len(self.inputs)):
            self._pair(name, times, index)
            if (index + 1) % in_flight == 0:
                self._batch(name, times, range(index + 1 - in_flight, index + 1))

    def _pair(self, name: str, times: Times, index: int) -> None:
        """One question on both sides, kvcomm first every other time."""
        if index % 2 == 0:
            times.stock.append(self._stock_run(times, index))
        result, seconds = self._run(times.group, index)
        answers = _answers(result)
        num_tokens = sum(answer.prompt_tokens for answer in answers)
        times.kvcomm.append(Seconds(seconds, waiting_s(answers)))
        times.reused.append(sum(answer.usage.exact_tokens for answer in answers) / num_tokens)
        times.moved.append(sum(answer.usage.aligned_tokens for answer in answers) / num_tokens)
        for answer in answers:
            times.computed.update(answer.usage.reasons)
        times.same_prompts.append(_prompts(result) == _prompts(times.rehearsed[index]))
        if index % 2:
            times.stock.append(self._stock_run(times, index))
        note(
            f"{name}: question {index + 1} of {len(self.inputs)}: stock {times.stock[-1].total:.1f} s, "
            f"kvcomm {seconds:.1f} s"
        )

    def _batch(self, name: str, times: Times, batch: range) -> None:
        self._forget()
        start = time.perf_counter()
        results = run_all(times.group, [self.inputs[index] for index in batch], self.team)
        seconds = time.perf_counter() - start
        times.batched.append((batch, seconds))
        rehearsed = [times.rehearsed[index] for index in batch]
        times.same_prompts += [_prompts(one) == _prompts(two) for one, two in zip(results, rehearsed, strict=True)]
        note(f"{name}: {len(batch)} questions at once: {seconds:.1f} s")

    def _run(self, group: KVCommAgentGroup, index: int) -> tuple[GroupResult, float]:
        """One question, new to the cache; the result and its seconds."""
        self._forget()
        start = time.perf_counter()
        (result,) = run_all(group, [self.inputs[index]], self.team)
        seconds = time.perf_counter() - start
        assert all(answer.finish_reason == "length" for answer in _answers(result)), result
        return result, seconds

    def _stock_run(self, times: Times, index: int) -> Seconds:
        """The rehearsed prompts of one question, agent by agent."""
        total = prefill = 0.0
        for answer in _answers(times.rehearsed[index]):
            made = self.stock.generate(tokens_of(answer.prompt), num_rows=1, num_new_tokens=self.num_answer_tokens)
            total += made.total_s
            prefill += made.total_s - made.decode_s
            # A group hands answers on without the control tokens at their end.
            times.same_answers.append(made.token_ids[0][: len(answer.token_ids)] == answer.token_ids)
        return Seconds(total, prefill)

    def _forget(self) -> None:
        """Leave nothing but the role prompts in the cache."""
        self.engine.clear_cache()
        read_roles(self.engine, self.team, self.inputs[0])


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


def _figures(kvcomm: Times, exact: Times) -> list[Figure]:
    speedups = {
        "end_to_end_speedup": kvcomm.speedup,
        "end_to_end_speedup_exact": exact.speedup,
        "end_to_end_speedup_batched": kvcomm.batched_speedup,
        "end_to_end_speedup_batched_exact": exact.batched_speedup,
        "prefill_speedup": _part(kvcomm.stock, "prefill").per(_part(kvcomm.kvcomm, "prefill")),
        "decode_speedup": _part(kvcomm.stock, "decode").per(_part(kvcomm.kvcomm, "decode")),
    }
    figures = [Figure(name, each.median, "x", each.quartiles, GOALS.get(name, "")) for name, each in speedups.items()]
    for side, runs in (("stock", kvcomm.stock), ("kvcomm", kvcomm.kvcomm), ("exact", exact.kvcomm)):
        for part in ("total", "prefill", "decode"):
            seconds = _part(runs, part)
            name = f"{side}_s" if part == "total" else f"{side}_{part}_s"
            figures.append(Figure(name, seconds.median, "s", seconds.quartiles))
    batched = Samples(tuple(seconds / len(batch) for batch, seconds in kvcomm.batched))
    shares: dict[str, Sequence[float]] = {
        "same_prompts": [*kvcomm.same_prompts, *exact.same_prompts],
        "same_answers": exact.same_answers,
        "reused": kvcomm.reused,
        "moved": kvcomm.moved,
    }
    reasons = [
        Figure(f"computed_{reason}", count / len(kvcomm.kvcomm), "tokens")
        for reason, count in kvcomm.computed.most_common()
    ]
    return [
        *figures,
        Figure("batched_per_question_s", batched.median, "s", batched.quartiles),
        *(Figure(name, sum(each) / len(each), "share", goal=GOALS.get(name, "")) for name, each in shares.items()),
        *reasons,
    ]


def _part(runs: Sequence[Seconds], part: str) -> Samples:
    """The totals, prefills or decodes of runs."""
    return Samples(tuple(getattr(seconds, part) for seconds in runs))


def _raw(ways: Mapping[str, Times]) -> dict[str, list[float]]:
    """Every measurement by name."""
    return dict(_measurements(ways))


def _measurements(ways: Mapping[str, Times]) -> Iterator[tuple[str, list[float]]]:
    for name, times in ways.items():
        for side, runs in ((f"{name}_stock", times.stock), (name, times.kvcomm)):
            yield f"{side}_s", [seconds.total for seconds in runs]
            yield f"{side}_prefill_s", [seconds.prefill for seconds in runs]
        yield f"{name}_batched_s", [seconds for _, seconds in times.batched]
        yield f"{name}_reused", times.reused
        yield f"{name}_moved", times.moved
        yield f"{name}_same_prompts", [float(same) for same in times.same_prompts]
        yield f"{name}_same_answers", [float(same) for same in times.same_answers]
