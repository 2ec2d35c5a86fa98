"""Divergences: what some of the questions' requests were served is replayed against the dense answer, token by token.

An audit of the bound, and for the other methods what theirs costs. Sources are those that the request had: what agents
before it read and wrote. Modes served by transformers are held against the same exact log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eval.baselines.stock import StockServer
from eval.tasks.answering import publish_answer
from eval.tasks.modes import DENSE, Mode
from eval.tasks.records import RecordFile
from eval.tasks.samples import Answer, Sample
from eval.tasks.serving import Advance, Samples
from kvcomm import Engine, Rung, Segment
from kvcomm.lab.anatomy import Anatomy, Dissection, dissect
from kvcomm.lab.bounds import Calibration, Level, pairs_of
from kvcomm.lab.moving import NUM_CONTINUATION

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Confidences at which what calibration predicts is held against what is measured."""
WORST = 1e6
"""Nats that are written down where the divergence is not finite."""


@dataclass(frozen=True)
class Divergence:
    """One request of one mode, held against the dense answer.

    Attributes:
        index, mode, agent: the request.
        divergences: nats, at every token of the dense answer's beginning; 0 where nothing was moved.
        agreement: share of those tokens that would have been the most probable ones.
        is_moved: whether text was moved into its prompt.
        key_errors, value_errors: relative, layer by layer, over tokens that could be moved; empty where nothing was.
        predicted: confidence -> nats that calibration expects it to stay within; only where a bound was kept.
    """

    index: int
    mode: str
    agent: str
    divergences: tuple[float, ...]
    agreement: float
    is_moved: bool
    key_errors: tuple[float, ...] = ()
    value_errors: tuple[float, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)

    @property
    def divergence(self) -> float:
        """Mean, nats."""
        return max(0.0, sum(self.divergences) / len(self.divergences))


class DivergenceFile(RecordFile[Divergence]):
    """All requests that were replayed."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, _divergence)


class Served(NamedTuple):
    """What a mode did with a request."""

    mode: Mode
    answer: Answer


def replay(
    engine: Engine,
    stock: Mapping[str, StockServer],
    modes: Sequence[Mode],
    questions: Samples,
    samples: Mapping[str, Samples],
    file: DivergenceFile,
    advance: Advance,
) -> None:
    """Replay questions in every mode but dense; continues where the file ends. Advances by one for a question.

    What moved KV does before it is healed says little about an answer that is: such modes are left out, `eval.fidelity
    --heal` measures them.

    Args:
        stock: servers of the modes that transformers serve.
        samples: what was served, by mode.
    """
    done = {(each.index, each.mode) for each in file.read()}
    for index, truth in questions.items():
        replayed = [mode for mode in modes if mode.name != DENSE and not mode.heals]
        missing = [mode for mode in replayed if (index, mode.name) not in done]
        if missing:
            file.add(_replayed(engine, stock, missing, truth, samples))
            engine.cache.clear()
        advance(1)


def _replayed(
    engine: Engine,
    stock: Mapping[str, StockServer],
    modes: Sequence[Mode],
    truth: Sample,
    samples: Mapping[str, Samples],
) -> Iterator[Divergence]:
    last = list(truth.answers)[-1]
    for name, whole in truth.answers.items():
        if whole.token_ids:
            served = [Served(mode, samples[mode.name][truth.index].answers[name]) for mode in modes]
            for mode, found in _request(engine, stock, served, whole):
                yield Divergence(truth.index, mode.name, name, **found)
        if name != last:
            publish_answer(engine, whole)


def _request(
    engine: Engine, stock: Mapping[str, StockServer], served: Sequence[Served], whole: Answer
) -> Iterator[tuple[Mode, dict[str, Any]]]:
    """What each mode did with one request, held against the dense answer."""
    moved = [each for each in served if each.answer.usage["moved"] is not None]
    others = [each for each in served if each.answer.usage["moved"] is None]
    by_stock = [each for each in others if each.mode.is_stock]
    continuation = whole.token_ids[:NUM_CONTINUATION]
    if moved or by_stock:
        rungs = [_rung(each) for each in moved]
        dissection = dissect(engine, whole.segments, continuation, rungs).result()
        for each, anatomy in zip(moved, dissection.anatomies, strict=True):
            # A text that other questions had, too, may have been moved from one of those; that is not to be had again.
            if anatomy is not None:
                yield each.mode, {**_values(anatomy), "predicted": _predicted(engine, each)}
        for each in by_stock:
            yield each.mode, _stock_values(stock[each.mode.name], whole.segments, continuation, dissection)
    for each in others:
        if not each.mode.is_stock:  # the engine computed it exactly: the dense answer's own KV
            yield each.mode, {"divergences": (0.0,) * len(continuation), "agreement": 1.0, "is_moved": False}


def _rung(served: Served) -> Rung:
    """The one that a request was served at."""
    return next(rung for rung in served.mode.rungs if str(rung) == served.answer.usage["moved"]["rung"])


def _predicted(engine: Engine, served: Served) -> dict[str, float]:
    """What the pairs that decided about a request expect at its rung, by confidence."""
    if served.mode.bound is None:
        return {}
    moved, rung = served.answer.usage["moved"], _rung(served)
    (ladder,) = (ladder for ladder in served.mode.policy.ladders if rung in ladder)
    calibration = Calibration(ladder, pairs_of(engine, Level(moved["level"]), moved["reader"]))
    return {str(level): calibration.predicted(ladder.index(rung), level) for level in LEVELS}


def _values(anatomy: Anatomy) -> dict[str, Any]:
    return {
        "divergences": tuple(min(each, WORST) for each in anatomy.divergences),
        "agreement": anatomy.agreement,
        "is_moved": True,
        "key_errors": anatomy.key_errors,
        "value_errors": anatomy.value_errors,
    }


def _stock_values(
    server: StockServer, prompt: Sequence[Segment], continuation: Sequence[int], dissection: Dissection
) -> dict[str, Any]:
    exact = dissection.exact
    got = server.log_probs(prompt, continuation).to(exact.device)
    return {
        "divergences": tuple((exact.exp() * (exact - got)).sum(-1).tolist()),
        "agreement": float((exact.argmax(-1) == got.argmax(-1)).float().mean()),
        "is_moved": False,
    }


def _divergence(value: dict[str, Any]) -> Divergence:
    lists = ("divergences", "key_errors", "value_errors")
    values: dict[str, Any] = {name: tuple(found) if name in lists else found for name, found in value.items()}
    return Divergence(**values)
