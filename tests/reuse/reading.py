"""Two agents who read the same questions: what tests of approximate reuse work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.ladder import Rung
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import some_tokens
from tests.limits import PATIENCE_S

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)
LOOSE = ReusePolicy(max_divergence=50.0, confidence=0.5, audit=0.0)
"""A bound that a random model keeps: what is tested here is who may be served, not how well."""
TOKEN = replace(LOOSE, rungs=(Rung("token"),))
"""The same, where all that is moved is corrected by anchors."""
SMALL_BANKS = EngineConfig(anchor_bytes=475_000)
"""Banks of about 300 tokens, full after a few questions."""
ROLE_A, ROLE_B, TAIL = (tuple(some_tokens(number, seed=number)) for number in (21, 34, 5))


def prompt(role: tuple[int, ...], seed: int, length: int = 90) -> list[Segment]:
    """What an agent reads: its role, a question, and a tail."""
    text = tuple(some_tokens(length, seed=1000 + seed))
    return [Segment(role), Segment(text, "question"), Segment(TAIL)]


def tokens_of(segments: list[Segment]) -> list[int]:
    """All of a prompt in a row."""
    return [token for segment in segments for token in segment.token_ids]


def ask(engine: Engine, role: tuple[int, ...], seed: int, policy: ReusePolicy, length: int = 90) -> Completion:
    """Let an agent read a question."""
    return engine.generate(prompt(role, seed, length), SAMPLING, policy=policy)


def earn(engine: Engine, policy: ReusePolicy, rounds: int = 6) -> None:
    """Let A and B read the same questions, exactly, until enough is known about moving them."""
    learning = replace(policy, max_divergence=1e-12)
    for seed in range(rounds):
        for role in (ROLE_A, ROLE_B):
            assert not ask(engine, role, seed, learning).usage.aligned_tokens
        assert engine.wait_idle(PATIENCE_S)
    widen(engine)


def widen(engine: Engine) -> None:
    """A few random texts say little about how far the next one may be from them: let any distance pass."""
    rewrite(engine, lambda pair: measured_as(pair, distance=10.0, residual=10.0))


def measured_as(pair: Pair, *, distance: float | None = None, residual: float | None = None) -> Pair:
    """A pair whose distances and residuals, where it has any, are others."""
    measured = {
        rung: Measured(each.divergence, residual if None not in (residual, each.residual) else each.residual)
        for rung, each in pair.measured.items()
    }
    return Pair(measured, {name: old if distance is None else distance for name, old in pair.distances.items()})


def rewrite(engine: Engine, change: Callable[[Pair], Pair]) -> None:
    """Put other pairs in place of all that are known, reader by reader."""
    book, namespace = engine.reuse.parts.book, engine.namespace()
    with engine.lock:
        known = book.knowledge(namespace)
        book.forget(namespace)
        readers = tuple((reader, tuple(change(pair) for pair in pairs)) for reader, pairs in known.readers)
        book.put(namespace, known._replace(readers=readers))
