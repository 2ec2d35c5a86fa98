"""The parts of a run: their names, their shares of the time, and how one of them is done in a process of its own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from eval.gpu import compiling, kernels, paper, passes, testing
from eval.gpu.records import Clock, Recorder
from eval.workload import text_tokens
from kvcomm import Engine, EngineConfig
from kvcomm.lab.kernels import described
from kvcomm.lab.timings import TakeTokens, random_tokens, warm_up

OnEngine = Callable[[Engine, TakeTokens, Namespace, Recorder], None]


class Part(NamedTuple):
    """One of `measure` and `on_engine` is given.

    Attributes:
        share: of the time of a run with all parts; what a part does not use is for the later ones.
        measure: needs no model.
        on_engine: is given a loaded one.
    """

    share: float
    measure: Callable[[Namespace, Recorder], None] | None = None
    on_engine: OnEngine | None = None

    @property
    def is_interpreted(self) -> bool:
        """Whether its kernels are interpreted where there is no GPU."""
        return self.measure is not None


PARTS = {
    "self_test": Part(0.15, measure=testing.measure),
    "kernels": Part(0.25, measure=kernels.measure),
    "passes": Part(0.2, on_engine=passes.measure),
    "paper": Part(0.3, on_engine=paper.measure),
    "graphs": Part(0.1, on_engine=compiling.measure),
}


def run_part(name: str, options: Namespace, seconds: float, file: Path) -> None:
    """Do one part; whatever it raises is recorded behind what it has found."""
    record = Recorder(file, Clock(seconds))
    part = PARTS[name]
    try:
        if part.measure is not None:
            part.measure(options, record)
        if part.on_engine is not None:
            _with_engine(part.on_engine, options, record)
    except Exception as error:  # out of memory, a driver's error: the other parts go on
        record.failed(described(error))


def _with_engine(measure: OnEngine, options: Namespace, record: Recorder) -> None:
    config = EngineConfig(pool_tokens=options.pool_tokens, attention=options.attention)
    with Engine.load(options.model, dtype=options.dtype, device=options.device, config=config) as engine:
        record.setting(attention=engine.attention, dtype=str(engine.model.dtype).removeprefix("torch."))
        take = random_tokens(engine, seed=options.seed)
        if options.data is not None:
            take = text_tokens(engine, options.data)
        warm_up(engine, take)
        measure(engine, take, options, record)
