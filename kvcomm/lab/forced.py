"""Serving a request in one given way, with no bound on what it costs: for comparisons with other methods.

Everything else is as for other requests: the same passes, the same pages, the same batches. What such a request leaves
behind has no bound either, so nobody who asked for one ever gets it moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from kvcomm.align.estimators import Correction
from kvcomm.align.groups import EdgeGroup, GroupKey
from kvcomm.align.ladder import first_tokens, top_tokens
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore
from kvcomm.engine.request import Request
from kvcomm.lab.variant import Variant
from kvcomm.memory.memory import Memory
from kvcomm.model.runner import ModelRunner, Run
from kvcomm.reuse.attempt import Approximation
from kvcomm.reuse.replay import deviations

DEVIATION_LAYER = 1


def forced(
    moves: Sequence[Move], corrections: tuple[Correction, ...], variant: Variant, num_exact: int
) -> Approximation:
    """The approximation that a variant asks for."""
    group = EdgeGroup(GroupKey.of(moves, variant.estimator, (variant.share,)), (variant.strength,))
    approximation = Approximation(tuple(moves), corrections, group, 0, math.inf, num_exact, selector=variant.selector)
    if variant.selector == "head":
        approximation.chosen = first_tokens(moves, variant.share)
    return approximation


class DeviationChooser:
    """CacheBlend's choice (arXiv 2405.16444, section 4.3): tokens whose KV in the second layer is farthest off.

    That KV needs the first layers of an exact forward over all that stands behind the prefix, which is computed here.
    """

    def __init__(self, memory: Memory, layers: Sequence[LayerStore], runner: ModelRunner) -> None:
        self._memory = memory
        self._layers = layers
        self._runner = runner

    def choose(self, request: Request, approximation: Approximation) -> None:
        """Decide what is recomputed. Writes the first layers of the request's pages, which are assembled afterwards."""
        moves, sequence = approximation.moves, request.sequence
        start, end = approximation.num_exact, moves[-1].end
        with suppress(_Stop):
            self._runner.forward([Run(sequence.token_ids[start:end], sequence.pages, start)], watch=_stop)
        scores = deviations(self._memory, self._layers, sequence, moves)
        approximation.chosen = top_tokens(moves, approximation.share, scores)


class _Stop(Exception):
    """The layers that are looked at have been computed."""


def _stop(layer_id: int, query: Tensor, scale: float) -> None:
    if layer_id >= DEVIATION_LAYER:
        raise _Stop
