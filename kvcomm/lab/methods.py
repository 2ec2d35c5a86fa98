"""Published ways to move KV, handed to an engine so that it can measure them and serve at them, without a bound.

- `paper`: KVCOMM's estimator (arXiv 2510.12872v2, Eq. 5-7), its entropy gate open as in its own timings; the gate does
  not tell bad prompts from good ones.
- `deviation` (CacheBlend, arXiv 2405.16444, Section 4.3): keys turned, the tokens computed whose KV in the second layer
  is furthest off.
- `head` (EPIC, arXiv 2410.15332): keys turned, the first tokens of every segment computed; a share here, where it is a
  fixed number there.
- `influence`: whole segments, those with the largest mean score first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from kvcomm.align.ladder import Rung, first_tokens, top_segments, top_tokens
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore
from kvcomm.align.spans import layer_stores, place_of, read_span
from kvcomm.engine.engine import Engine
from kvcomm.lab.paper import PaperEstimator
from kvcomm.memory.memory import Memory
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.runner import ModelRunner, Run
from kvcomm.reuse.choosing import View

METHODS = {
    "rotate": Rung("rotate"),
    "cacheblend": Rung("rotate", 0.15, "deviation"),
    "epic": Rung("rotate", 0.15, "head"),
    "paper": Rung("paper"),
}

DEVIATION_LAYER = 1


def add_to(engine: Engine) -> None:
    """Let an engine know every method of this file; once."""
    layers = layer_stores(engine.pool, engine.geometry)
    engine.reuse.parts.add_estimator(PaperEstimator())
    for chooser in (InfluenceChooser(), HeadChooser(), DeviationChooser(engine.memory, layers, engine.runner)):
        engine.reuse.parts.add_chooser(chooser)


class InfluenceChooser:
    """Whole segments, the most important first."""

    name = "influence"
    looks = True

    def choose(self, view: View, share: float) -> IntArray:
        """See `Chooser`."""
        assert view.scores is not None
        return top_segments(view.moves, share, view.scores)


class HeadChooser:
    """The first tokens of every segment."""

    name = "head"
    looks = False

    def choose(self, view: View, share: float) -> IntArray:
        """See `Chooser`."""
        return first_tokens(view.moves, share)


class DeviationChooser:
    """The tokens whose KV in the second layer is furthest off.

    That KV needs the first layers of an exact forward over all that stands behind the prefix. For a request they are
    computed here, into its own pages, before its moved KV is written; in a replay the exact sequence has it.
    """

    name = "deviation"
    looks = False

    def __init__(self, memory: Memory, layers: Sequence[LayerStore], runner: ModelRunner) -> None:
        self._memory = memory
        self._layers = layers
        self._runner = runner

    def choose(self, view: View, share: float) -> IntArray:
        """See `Chooser`."""
        if view.exact is None:
            start, end = view.num_exact, view.moves[-1].end
            with suppress(_Stop):
                self._runner.forward([Run(view.sequence.token_ids[start:end], view.sequence.pages, start)], watch=_stop)
        exact = view.exact if view.exact is not None else view.sequence
        return top_tokens(view.moves, share, self._deviations(exact, view.moves))

    def _deviations(self, exact: KVSequence, moves: Sequence[Move]) -> Tensor:
        """Distances of every moved token's KV in the second layer from that of a sequence, [number of moved tokens]."""
        scores = []
        for move in moves:
            truth = place_of(self._memory.pool, exact.pages, move.start, move.num_tokens, position=move.start)
            true, moved = (read_span(self._layers, place, [DEVIATION_LAYER]) for place in (truth, move.source))
            difference = torch.cat((true.keys[0] - moved.keys[0], true.values[0] - moved.values[0]), dim=-1)
            scores.append(difference.flatten(1).norm(dim=-1))
        return torch.cat(scores)


class _Stop(Exception):
    """The layers that are looked at have been computed."""


def _stop(layer_id: int, query: Tensor, scale: float) -> None:
    if layer_id >= DEVIATION_LAYER:
        raise _Stop
