"""What healing leaves of the divergence of moved KV, measured on contexts as they are served.

A reader's prompt is put into a context whose text is moved, with nothing of it computed after all. Forks of it answer
at once, unhealed and healed after so many tokens, all made to write the exact greedy answer; what they would have drawn
from is held against what a cold context draws from. Afterwards the healed ones must hold the cold one's KV. First
tokens are timed on requests of their own, healed and unhealed in turn, each given up behind its first token.

What was measured is kept line by line, as in `replayed`.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from eval.command import note
from eval.figures import Figure
from eval.replayed import content_of
from eval.tasks.records import RecordFile
from eval.team_answers import Reading, Run, in_order
from kvcomm import Context, Engine, ReusePolicy, Rung, SamplingParams
from kvcomm.lab.forcing import cold_context, moved_context, write_answer
from kvcomm.lab.moving import NUM_CONTINUATION, Fidelity

RUNG = Rung("token")
"""Corrected by anchors, nothing computed after all."""
WITHIN = (4, 8)
"""Tokens of the answer that are drawn on moved KV."""
REPEATS = 6
"""Timed first tokens of each kind and prompt."""
MAX_ERROR = 1e-3
"""Between KV of two exact contexts, float32; passes of other sizes round differently."""
GOALS = {"heal4": "<= 0.25", "heal8": "<= 0.45", "heal_ttft": "<= 1.02", "heal_exact": "1"}


@dataclass(frozen=True)
class Healed:
    """What was measured of one reader's prompt.

    Attributes:
        num_tokens: of the answer that were looked at.
        nats: mean divergence over the answer, by tokens drawn on moved KV; of all of them first.
        errors: largest difference between KV of a healed context and the cold one's; of those that are exact.
        num_contexts: that were healed.
        ttft_s: medians: (not healed, healed).
    """

    agent: str
    num_tokens: int
    nats: Sequence[float]
    errors: Sequence[float]
    num_contexts: int
    ttft_s: Sequence[float]


@dataclass(frozen=True)
class Kept:
    """A line of the file: one run under one digest."""

    digest: str
    readers: Sequence[Mapping[str, object]]


class HealedFile:
    """Measurements of runs, made once."""

    def __init__(self, file: Path, engine: Engine, teaching: Sequence[Run]) -> None:
        """Raises InvalidRequest where the file is there and cannot be read."""
        self._file = RecordFile(file, lambda value: Kept(**value))
        self._engine = engine
        self._setting = json.dumps([engine.namespace(), str(RUNG), WITHIN, REPEATS, list(map(content_of, teaching))])
        self._known = {each.digest: each for each in self._file.read()}

    def is_whole(self, runs: Sequence[Run]) -> bool:
        """Whether nothing is left to measure of some runs."""
        return all(self._digest(run) in self._known for run in runs)

    def measure(self, runs: Sequence[Run]) -> list[Healed]:
        """Every reader of the runs; what is not known is measured now, run by run."""
        found = []
        for index, run in enumerate(runs):
            digest = self._digest(run)
            if digest not in self._known:
                note(f"healing: question {index + 1} of {len(runs)}")
                measured = [_measure(self._engine, *each) for each in in_order(self._engine, run)]
                readers = [asdict(each) for each in measured if each is not None]
                self._known[digest] = Kept(digest, readers)
                self._file.add([self._known[digest]])
            found += [Healed(**each) for each in self._known[digest].readers]
        return found

    def _digest(self, run: Run) -> str:
        return hashlib.sha256(f"{self._setting}{content_of(run)}".encode()).hexdigest()


def teach_anchors(engine: Engine, runs: Sequence[Run]) -> None:
    """Let an engine learn to correct what these runs moved."""
    for index, run in enumerate(runs):
        note(f"anchors: question {index + 1} of {len(runs)}")
        for _, reading in in_order(engine, run):
            engine.reuse.learn(reading.prompt, estimators=(RUNG.estimator,)).result()


def heal_figures(measured: Sequence[Healed]) -> list[Figure]:
    """Ratios over all prompts, and over those whose answer goes on behind the last moment of healing.

    Raises ValueError where nothing was moved.
    """
    if not measured or not sum(each.nats[0] for each in measured):
        raise ValueError("nothing was moved into any prompt of the tests; give more --tests, or more --anchors")
    total = _totals(measured)
    longer = [each for each in measured if each.num_tokens > max(WITHIN)]
    num_contexts = sum(each.num_contexts for each in measured)
    errors = [error for each in measured for error in each.errors]
    slower = statistics.median(each.ttft_s[1] / each.ttft_s[0] for each in measured)
    return [
        *(_figure(f"heal{within}", nats / total[0]) for within, nats in zip(WITHIN, total[1:], strict=True)),
        _figure("heal_ttft", slower),
        _figure("heal_exact", sum(error <= MAX_ERROR for error in errors) / num_contexts, "share"),
        _figure("heal_error", max(errors, default=0.0), "KV"),
        _figure("not healed", total[0] / len(measured), "nats"),
        *(
            _figure(f"healed within {within}", nats / len(measured), "nats")
            for within, nats in zip(WITHIN, total[1:], strict=True)
        ),
        *(
            _figure(f"heal{within} of longer answers", nats / _totals(longer)[0])
            for within, nats in zip(WITHIN, _totals(longer)[1:], strict=True)
            if _totals(longer)[0]
        ),
        _figure("prompts", len(measured), "prompts"),
        _figure("longer answers", len(longer), "prompts"),
    ]


def _totals(measured: Sequence[Healed]) -> list[float]:
    """Nats over all prompts: not healed, and healed within so many tokens."""
    return [sum(each.nats[at] for each in measured) for at in range(1 + len(WITHIN))]


def heal_samples(measured: Sequence[Healed]) -> dict[str, list[float]]:
    """Nats by agent and tokens on moved KV, prompt by prompt."""
    names = ("not healed", *(f"healed within {within}" for within in WITHIN))
    agents = dict.fromkeys(each.agent for each in measured)
    return {
        f"{agent} {name}": [each.nats[at] for each in measured if each.agent == agent]
        for agent in agents
        for at, name in enumerate(names)
    }


def _measure(engine: Engine, agent: str, reading: Reading) -> Healed | None:
    """None where nothing of the prompt was moved."""
    answer = reading.answer[:NUM_CONTINUATION]
    with ExitStack() as open_contexts:

        def entered(context: Context) -> Context:
            return open_contexts.enter_context(context)

        moved = entered(moved_context(engine, reading.prompt, RUNG))
        if moved.fidelity is Fidelity.EXACT:
            return None
        ttft_s = _first_tokens(engine, reading)
        forks = [entered(moved.fork()) for _ in (None, *WITHIN)]
        for fork, within in zip(forks[1:], WITHIN, strict=True):
            fork.policy = ReusePolicy(heal=True, heal_within=within)
        served = write_answer(engine, forks, answer)
        cold = entered(cold_context(engine, reading.prompt))
        exact = write_answer(engine, [cold], answer)[0]
        errors = [_difference(fork, cold) for fork in forks[1:] if fork.fidelity is Fidelity.EXACT]
        return Healed(agent, len(answer), [_divergence(exact, each) for each in served], errors, len(WITHIN), ttft_s)


def _first_tokens(engine: Engine, reading: Reading) -> tuple[float, float]:
    """Median seconds to the first token: not healed, healed."""
    policies = (ReusePolicy.exact(), ReusePolicy(heal=True, heal_within=NUM_CONTINUATION))
    took_s: tuple[list[float], list[float]] = ([], [])
    _first_token_s(engine, reading, policies[1])
    for index in range(REPEATS):
        for at in (0, 1) if index % 2 else (1, 0):
            took_s[at].append(_first_token_s(engine, reading, policies[at]))
    return statistics.median(took_s[0]), statistics.median(took_s[1])


def _first_token_s(engine: Engine, reading: Reading, policy: ReusePolicy) -> float:
    sampling = SamplingParams(max_new_tokens=NUM_CONTINUATION, ignore_eos=True)
    begun_s = time.perf_counter()
    handle = engine.submit(reading.prompt, sampling, policy=policy, rung=RUNG)
    chunks = iter(handle)
    next(chunks)
    seconds = time.perf_counter() - begun_s
    handle.cancel()
    handle.wait()
    return seconds


def _divergence(exact: Tensor, got: Tensor) -> float:
    """Mean KL(exact || got) over rows of log-probabilities, nats."""
    return max(0.0, float((exact.exp() * (exact - got)).sum(-1).mean()))


def _difference(one: Context, other: Context) -> float:
    """The largest difference between the KV of two contexts of the same tokens."""
    pairs = zip(one.to_hf_cache().layers, other.to_hf_cache().layers, strict=True)
    return max(
        float((mine - theirs).abs().max())
        for left, right in pairs
        for mine, theirs in ((left.keys, right.keys), (left.values, right.values))
    )


def _figure(name: str, value: float, unit: str = "x") -> Figure:
    return Figure(name, value, unit, None, GOALS.get(name, ""))
