"""One attempt at moved KV, as a state machine: every way through it, what is to be computed, what counts meanwhile.

A small pool stands for the model: where a pass computes a moved token, it writes a key that is off from its estimate by
what the test wants, so residuals are known in advance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvcomm.align.calibration import Calibration, Measured, Pair
from kvcomm.align.edges import Edge
from kvcomm.align.estimators import Written
from kvcomm.align.ladder import Ladder, Rung, top_tokens
from kvcomm.align.moves import Move, num_moved
from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.align.readers import reader_of
from kvcomm.align.repeats import Surroundings
from kvcomm.align.standings import Level
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import LayerShape, PagePool
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.runner import Run
from kvcomm.reuse.attempt import Attempt, AttemptTools, Stage, TargetPrompt, ToCompute, passes_of
from kvcomm.reuse.choosing import View
from kvcomm.reuse.decision import Acceptance
from kvcomm.reuse.plan import Plan, Reason, SpanKind

NUM_LAYERS, NUM_TOKENS = 4, 31
SEGMENTS = (
    Segment(tuple(range(6))),
    Segment(tuple(range(10, 20)), "first"),
    Segment((1, 2, 3)),
    Segment(tuple(range(20, 28)), "second"),
    Segment((4, 5, 6, 7)),
)
SPANS = ((6, 16), (19, 27))
MOVED = [position for start, end in SPANS for position in range(start, end)]
ESTIMATE = 1.0
RANKS = torch.from_numpy(np.random.default_rng(3).permutation(len(MOVED))).float()
"""Scores of choosers that do not look."""


class Ranked:
    """Chooses by given scores, or where it looks by those that it is shown."""

    def __init__(self, name: str, *, looks: bool) -> None:
        self.name, self.looks = name, looks
        self.chosen: dict[float, list[int]] = {}

    def choose(self, view: View, share: float) -> IntArray:
        assert (view.scores is not None) is self.looks
        scores = RANKS if view.scores is None else view.scores
        found = top_tokens(view.moves, share, scores)
        self.chosen[share] = found.tolist()
        return found


class Writer:
    """An estimate that is the same number everywhere."""

    def __init__(self, distance: float) -> None:
        self.distance = distance

    def write(self, layers: Sequence[LayerStore], move: Move, target: Place, *, with_errors: bool) -> Written:
        for layer in layers:
            layer.keys[target.slots] = ESTIMATE
        return Written(self.distance, torch.ones(move.num_tokens) if with_errors else None)


class Setting(NamedTuple):
    """What a machine is begun with."""

    num_exact: int
    looks: bool
    index: int
    distance: float
    residuals: tuple[float, float, float]
    limits: tuple[float, float]


class Bench:
    """An attempt over a pool of its own, driven as a request drives it."""

    def __init__(self, setting: Setting, *, forced: Rung | None = None) -> None:
        self.setting = setting
        pool = PagePool([LayerShape(1, 1, 1)] * NUM_LAYERS, num_pages=64, page_size=4)
        for stored in (*pool.keys, *pool.values):
            stored.fill_(0.5)
        self.pool, self.memory = pool, Memory(pool, ttl_s=None, rendition_bytes=2**20)
        self.layers = [LayerStore(keys, values, None) for keys, values in zip(pool.keys, pool.values, strict=True)]
        name = "looking" if setting.looks else "ranked"
        self.chooser = Ranked(name, looks=setting.looks)
        self.ladder: Ladder = (Rung("token", 0.6, name), Rung("token", 0.3, name), Rung("token"))
        limits = (*setting.limits, None)
        pair = Pair(
            {rung: Measured(0.1, limit) for rung, limit in zip(self.ladder, limits, strict=True)}, {"token": 1.0}
        )
        acceptance = Acceptance(Level.POOL, Calibration(self.ladder, [pair]), setting.index, 0.5)
        tokens = [token for segment in SEGMENTS for token in segment.token_ids]
        self.sequence = KVSequence(pool, tokens)
        self.memory.make_writable(self.sequence, 0, NUM_TOKENS)
        self.sequence.count(setting.num_exact)
        edge, nothing = Edge("a", "b", "first", "first"), np.empty(0, dtype=np.int32)
        self.moves = [
            Move(edge, start, end, 0, Place(slice(0, 0), 0), nothing, Surroundings(()), risk, not risk)
            for (start, end), risk in zip(SPANS, (0.0, 0.25), strict=True)
        ]
        self.attempt = Attempt(
            AttemptTools(self.memory, self.layers, {name: self.chooser, "attention": self.chooser}),
            TargetPrompt(SEGMENTS, NUM_TOKENS, setting.num_exact, Reason.NEW, Reason.NO_SOURCE),
            reader_of(SEGMENTS),
            self.moves,
            [Writer(0.0), Writer(setting.distance)],
            acceptance if forced is None else forced,
            None,
        )
        self.plan: Plan = self.attempt.plan
        self.pending: list[tuple[int, int]] = list(self.plan.stretches)
        self.queries = torch.from_numpy(np.random.default_rng(5).normal(size=NUM_TOKENS)).float()

    def follow(self, todo: ToCompute) -> None:
        """As `Request.follow`."""
        self.plan, self.pending = todo.plan, list(todo.stretches)
        if todo.moved_from is None:
            self.sequence.rewind(todo.num_counted)
        else:
            self.sequence.place(todo.moved_from, todo.num_counted)

    def begin(self) -> None:
        self.attempt.assemble(self.sequence)
        self.follow(self.attempt.begin())

    def compute(self, num_tokens: int) -> None:
        """A pass over so many of the tokens that are pending."""
        rung = self.attempt.rung
        off = dict(zip(self.ladder, self.setting.residuals, strict=True)).get(rung, 0.0)
        row = 0
        runs: list[tuple[int, int]] = []
        for start, end in self.pending:
            if num_tokens > 0:
                end = min(end, start + num_tokens)
                num_tokens -= end - start
                runs.append((start, end))
        watches: list[Any] = []
        for start, end in runs:
            run = Run(self.sequence.token_ids[start:end], self.sequence.pages, start)
            watches.append(self.attempt.watch(run, row))
            row += end - start
        query = torch.cat([self.queries[start:end] for start, end in runs])[None, None, :, None]
        for layer_id, layer in enumerate(self.layers):
            for start, end in runs:
                for position in range(start, end):
                    # A residual of r: the key is 1 / (1 - r) of what it was estimated to be.
                    layer.keys[self.slot(position)] = ESTIMATE / (1 - off) if position in MOVED else 2.0
            for watch in watches:
                if watch is not None:
                    watch(layer_id, query, 1.0)
        done = runs[-1][1]
        self.pending = [(max(start, done), end) for start, end in self.pending if end > done]
        if not self.pending:
            self.sequence.count(NUM_TOKENS)

    def slot(self, position: int) -> int:
        return int(self.sequence.pages[position // 4]) * 4 + position % 4

    def advance(self) -> None:
        todo = self.attempt.advance()
        if todo is not None:
            self.follow(todo)


def told(plan: Plan) -> list[str]:
    """What a plan says of every token."""
    words = [((span.reason or span.kind).value, span.end - span.start) for span in plan.spans]
    return [word for word, num_tokens in words for _ in range(num_tokens)]


def expected(num_exact: int, recomputed: Sequence[int] = (), why: Reason = Reason.RUNG) -> list[str]:
    """The same by a rule for single tokens."""

    def of(position: int) -> str:
        if position < num_exact:
            return SpanKind.EXACT.value
        if position in recomputed:
            return why.value
        if position in MOVED:
            return SpanKind.ALIGNED.value
        return (Reason.NEW if position < 6 else Reason.GLUE).value

    return [of(position) for position in range(NUM_TOKENS)]


def everything(num_exact: int, reason: Reason) -> list[str]:
    """A plan after a retreat."""
    return [SpanKind.EXACT.value] * num_exact + [reason.value] * (NUM_TOKENS - num_exact)


def positions(stretches: Sequence[tuple[int, int]]) -> set[int]:
    """All of these stretches."""
    return {position for start, end in stretches for position in range(start, end)}


off = st.sampled_from([0.0, 0.2, 0.5])
settings_of_attempts = st.builds(
    Setting,
    st.integers(0, 6),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([0.0, 1.0, 1.1]),
    st.tuples(off, off, off),
    st.tuples(st.sampled_from([0.1, 0.3]), st.sampled_from([0.1, 0.3])),
)


class AttemptMachine(RuleBasedStateMachine):
    """Drives an attempt beside a model of it, which knows the rule and nothing of the code."""

    @initialize(setting=settings_of_attempts)
    def first_one(self, setting: Setting) -> None:
        self.plan(setting)

    def plan(self, setting: Setting) -> None:
        self.bench, self.setting = Bench(setting), setting
        self.index, self.stage = setting.index, Stage.PLANNED
        self.why, self.reason = Reason.RUNG, None
        self.is_spoiled = False
        self.num_counted, self.approximate_from = setting.num_exact, None
        self.to_compute: set[int] = set()

    @property
    def recomputed(self) -> list[int]:
        """The tokens of the rung, once they are chosen."""
        if self.index == 2 or self.stage in (Stage.PLANNED, Stage.LOOKING):
            return []
        return self.bench.chooser.chosen[(0.6, 0.3)[self.index]]

    def fixed(self) -> set[int]:
        """What every rung computes."""
        return set(range(self.setting.num_exact, NUM_TOKENS)) - set(MOVED)

    def retreat(self, reason: Reason) -> None:
        self.stage, self.reason = Stage.RETREATED, reason
        self.num_counted, self.approximate_from = self.setting.num_exact, None
        self.to_compute = set(range(self.setting.num_exact, NUM_TOKENS))

    def climb(self, why: Reason) -> None:
        self.stage, self.why = Stage.COMPUTING, why
        self.to_compute = set(self.recomputed) | set(range(27, NUM_TOKENS))  # what stands between moves stays
        self.num_counted = 6

    @precondition(lambda self: self.stage is Stage.PLANNED)
    @rule()
    def begin(self) -> None:
        self.bench.begin()
        if self.setting.distance > 1.0:
            self.retreat(Reason.OUT_OF_DISTRIBUTION)
            return
        looks = self.index < 2 and self.setting.looks
        self.stage = Stage.LOOKING if looks else Stage.COMPUTING
        self.to_compute = self.fixed() | set(self.recomputed)
        self.approximate_from = 6

    @precondition(lambda self: self.stage in (Stage.LOOKING, Stage.COMPUTING) and self.to_compute)
    @rule(num_tokens=st.integers(1, 40))
    def compute(self, num_tokens: int) -> None:
        self.bench.compute(num_tokens)
        self.to_compute -= set(sorted(self.to_compute)[:num_tokens])
        if not self.to_compute:
            self.num_counted = NUM_TOKENS

    @precondition(lambda self: self.stage in (Stage.LOOKING, Stage.COMPUTING) and not self.to_compute)
    @rule()
    def advance(self) -> None:
        self.bench.advance()
        if self.is_spoiled:
            self.retreat(Reason.FAILED)
        elif self.stage is Stage.LOOKING:
            self.stage = Stage.COMPUTING
            self.climb(Reason.RUNG)
        elif self.index == 2 or self.setting.residuals[self.index] <= self.setting.limits[self.index]:
            self.stage = Stage.ACCEPTED
        elif self.index:
            self.index -= 1
            self.climb(Reason.ESCALATED)
        else:
            self.retreat(Reason.ESCALATED)

    @precondition(lambda self: self.stage in (Stage.LOOKING, Stage.COMPUTING))
    @rule(is_rare=st.integers(0, 5))
    def fail_looking(self, is_rare: int) -> None:
        if not is_rare:
            self.bench.attempt.spoil(RuntimeError("while looking on"))
            self.is_spoiled = True

    @precondition(lambda self: self.stage in (Stage.ACCEPTED, Stage.RETREATED))
    @rule(setting=settings_of_attempts)
    def next_one(self, setting: Setting) -> None:
        self.plan(setting)

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "bench"):
            return
        bench, attempt = self.bench, self.bench.attempt
        assert attempt.stage is self.stage
        assert attempt.is_accepted is (self.stage is Stage.ACCEPTED)
        assert attempt.rung == bench.ladder[self.index]
        if self.reason is not None:
            assert told(bench.plan) == everything(self.setting.num_exact, self.reason)
        else:
            assert told(bench.plan) == expected(self.setting.num_exact, self.recomputed, self.why)
        if self.stage is not Stage.PLANNED:
            assert positions(bench.pending) == self.to_compute
        assert bench.sequence.num_computed == self.num_counted
        assert bench.sequence.approximate_from == self.approximate_from
        assert attempt.num_recomputed == (10, 5, 0)[self.index]
        assert attempt.risk == 0.1 + 0.25

    @invariant()
    def what_is_told_of_an_accepted_one_is_so(self) -> None:
        if getattr(self, "stage", None) is Stage.ACCEPTED:
            report = self.bench.attempt.report()
            assert report.distance == self.setting.distance
            assert report.share == (0.6, 0.3, 0.0)[self.index]
            if self.index == 2:
                assert report.residual is None
            else:
                assert report.residual == pytest.approx(self.setting.residuals[self.index], abs=1e-6)


TestAttempt = AttemptMachine.TestCase
TestAttempt.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)

PLAIN = Setting(4, True, 1, 0.5, (0.0, 0.0, 0.0), (0.1, 0.1))


def run_through(bench: Bench) -> list[Stage]:
    """Every stage until the end."""
    stages = [bench.attempt.stage]
    bench.begin()
    stages.append(bench.attempt.stage)
    while bench.attempt.stage in (Stage.LOOKING, Stage.COMPUTING):
        bench.compute(NUM_TOKENS)
        bench.advance()
        stages.append(bench.attempt.stage)
    return stages


def test_every_way_through() -> None:
    planned, looking, computing = Stage.PLANNED, Stage.LOOKING, Stage.COMPUTING
    assert run_through(Bench(PLAIN)) == [planned, looking, computing, Stage.ACCEPTED]
    assert run_through(Bench(PLAIN._replace(looks=False))) == [planned, computing, Stage.ACCEPTED]
    assert run_through(Bench(PLAIN._replace(index=2))) == [planned, computing, Stage.ACCEPTED]
    assert run_through(Bench(PLAIN._replace(distance=1.1))) == [planned, Stage.RETREATED]
    safer = PLAIN._replace(residuals=(0.0, 0.5, 0.0))
    assert run_through(Bench(safer)) == [planned, looking, computing, computing, Stage.ACCEPTED]
    worst = PLAIN._replace(residuals=(0.5, 0.5, 0.0))
    assert run_through(Bench(worst)) == [planned, looking, computing, computing, Stage.RETREATED]


def test_a_rung_without_a_bound_keeps_to_it_however_far_off() -> None:
    bench = Bench(PLAIN._replace(distance=9.0, residuals=(0.5, 0.5, 0.5)), forced=Rung("token", 0.3, "looking"))
    assert run_through(bench) == [Stage.PLANNED, Stage.LOOKING, Stage.COMPUTING, Stage.ACCEPTED]
    assert (bench.attempt.acceptance, bench.attempt.risk) == (None, math.inf)
    assert bench.attempt.report().residual == pytest.approx(0.5)


def test_what_the_end_of_the_prompt_attends_to_is_chosen() -> None:
    """By hand: softmax of query times key over what stands before, summed over the tail's rows, head by head."""
    bench = Bench(PLAIN)
    bench.attempt.assemble(bench.sequence)
    with torch.no_grad():
        noise = torch.from_numpy(np.random.default_rng(8).normal(size=(NUM_LAYERS, NUM_TOKENS))).float()
        for layer, keys in zip(bench.layers, noise, strict=True):
            for position in MOVED:
                layer.keys[bench.slot(position)] = keys[position]
    bench.follow(bench.attempt.begin())
    bench.compute(NUM_TOKENS)
    bench.advance()
    scores = torch.zeros(len(MOVED))
    for layer_id in (1, 2):  # from a third to five sixths
        keys = torch.tensor([float(bench.layers[layer_id].keys[bench.slot(each)]) for each in range(NUM_TOKENS)])
        paid = torch.zeros(NUM_TOKENS)
        for row in range(27, NUM_TOKENS):
            seen: Tensor = (bench.queries[row] * keys[: row + 1]).softmax(-1)
            paid[: row + 1] += seen
        moved = paid[MOVED]
        scores += moved / moved.sum()
    best = scores.argsort(descending=True)[:5].tolist()
    assert bench.chooser.chosen[0.3] == sorted(MOVED[each] for each in best)


def test_passes_are_foreseen_as_far_as_they_can_be() -> None:
    bench = Bench(PLAIN)
    first, second = passes_of(bench.moves, 0.3, NUM_TOKENS)
    assert first == [(16, 19), (27, 31)]
    assert positions(second) >= set(range(27, 31))
    assert positions(second).isdisjoint(range(16, 19))
    assert len(positions(second) - positions(first)) == int(0.3 * num_moved(bench.moves))
    assert passes_of(bench.moves, 0.0, NUM_TOKENS) == [first]
