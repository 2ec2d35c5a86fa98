"""The phases of a run, in order; each goes on where an earlier run has left it.

First what modes that move text need to learn. Then every mode on the prompts that the dense run fixes, then times, then
divergences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from eval.baselines.stock import StockServer
from eval.tasks.analysis import ModeResult, analyse
from eval.tasks.modes import DENSE, STOCK_PREFIX, Mode
from eval.tasks.progress import Phases
from eval.tasks.replays import replay
from eval.tasks.run_folder import RunFolder
from eval.tasks.serving import Samples, serve_by_engine, serve_stock
from eval.tasks.teaching import teach
from eval.tasks.timing import Servers, time_modes
from eval.tasks.work import Work
from kvcomm import Engine
from kvcomm.lab.models import end_token_ids


class Run:
    """One evaluation on two engines, one of which caches nothing."""

    def __init__(
        self, engine: Engine, cold: Engine, work: Work, modes: Sequence[Mode], folder: RunFolder, phases: Phases
    ) -> None:
        self._engine = engine
        self._cold = cold
        self._work = work
        self._modes = list(modes)
        self._folder = folder
        self._phases = phases

    def compute(self, *, num_timed: int, num_replayed: int) -> None:
        """Everything that is missing."""
        if self._moving and self._is_missing(num_timed, num_replayed):
            with self._phases.phase("anchors and calibration", len(self._work.train)) as advance:
                train = self._folder.samples("train")
                held = teach(self._engine, self._work, self._moving, train, self._folder.anchors, advance)
                self._folder.keep_bytes(self._folder.held_bytes() | held)
        self._serve()
        timed, replayed = self._first(num_timed), self._first(num_replayed)
        with self._phases.phase("times", len(timed) * len(self._modes)) as advance:
            servers = Servers(self._cold, self._engine, self._stock)
            time_modes(servers, self._work, self._modes, timed, self._folder.times, advance)
        with self._phases.phase("divergences", len(replayed)) as advance:
            samples = {mode.name: self._folder.samples(mode.name).by_index() for mode in self._modes}
            replay(self._engine, self._stock, self._modes, replayed, samples, self._folder.divergences, advance)

    def results(self) -> dict[str, ModeResult]:
        """Every mode, held against dense."""
        times, divergences = self._folder.times.read(), self._folder.divergences.read()
        held = self._folder.held_bytes()
        return {
            mode.name: analyse(
                mode.name,
                self._folder.samples(mode.name).by_index(),
                self.dense,
                divergences=[each for each in divergences if each.mode == mode.name],
                times=[each for each in times if each.mode == mode.name],
                bound=None if mode.heals else mode.bound,  # which is one for what is never healed
                anchor_bytes=sum(held.get(name, 0) for name in mode.estimators),
            )
            for mode in self._modes
        }

    @cached_property
    def dense(self) -> Samples:
        """The dense run, by index of its rows."""
        found = self._folder.samples(DENSE).by_index()
        return {index: found[index] for index in sorted(found)}

    @property
    def _moving(self) -> list[Mode]:
        return [mode for mode in self._modes if mode.moves]

    @cached_property
    def _stock(self) -> Mapping[str, StockServer]:
        ends = end_token_ids(self._engine.model, self._engine.tokenizer)
        return {
            mode.name: StockServer(self._engine.model, ends, keeps_prefixes=mode.name == STOCK_PREFIX)
            for mode in self._modes
            if mode.is_stock
        }

    def _serve(self) -> None:
        by_engine = [mode for mode in self._modes if not mode.is_stock]
        title = ", ".join(mode.name for mode in by_engine)
        with self._phases.phase(title, len(by_engine) * len(self._work.rows)) as advance:
            files = {mode.name: self._folder.samples(mode.name) for mode in by_engine}
            serve_by_engine(self._engine, self._work, by_engine, files, advance)
        for name, server in self._stock.items():
            with self._phases.phase(name, len(self.dense)) as advance:
                file = self._folder.samples(name)
                serve_stock(self._engine, server, self._work, self.dense, file, advance)

    def _first(self, count: int) -> Samples:
        return {index: self.dense[index] for index in list(self.dense)[:count]}

    def _is_missing(self, num_timed: int, num_replayed: int) -> bool:
        """Whether anything is left for which text is moved."""
        rows = range(len(self._work.rows))
        names = {mode.name: mode.heals for mode in self._moving}
        times = {(each.index, each.mode) for each in self._folder.times.read()}
        divergences = {(each.index, each.mode) for each in self._folder.divergences.read()}
        return any(
            self._folder.samples(name).by_index().keys() < set(rows)
            or any((index, name) not in times for index in rows[:num_timed])
            or (not is_healed and any((index, name) not in divergences for index in rows[:num_replayed]))
            for name, is_healed in names.items()
        )
