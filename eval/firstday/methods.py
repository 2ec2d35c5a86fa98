"""Published methods on the prompts of a run, each with as much computed as the request of the run had computed.

They are measured on an engine of their own, which reads every prompt exactly once its turn is over. So a text's sources
are the contexts of earlier prompts, as they are for the request that is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvcomm import Engine, ReusePolicy, Segment
from kvcomm.errors import InvalidRequest
from kvcomm.lab.methods import METHODS, add_to

PAPER = "paper"
"""The estimator that needs anchors; it learns them from every prompt."""


class Laboratory:
    """An engine on which methods are measured."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        """Make one.

        Args:
            engine: to be used by nobody else.

        Raises:
            InvalidRequest: an unknown method; lists the known ones.
        """
        require_known(names)
        self._engine = engine
        self._names = tuple(names)
        add_to(engine)

    def measure(self, prompt: Sequence[Segment], answer: Sequence[int], share: float) -> dict[str, float]:
        """Nats from the exact answer, by method; those that know nothing about some of the prompt are left out.

        Args:
            answer: token ids of the exact greedy continuation.
            share: of the moved tokens that are computed.
        """
        try:
            return self._measure(self._names, prompt, answer, share)
        except InvalidRequest:  # no anchors on one of its edges yet
            return self._measure([name for name in self._names if name != PAPER], prompt, answer, share)

    def _measure(
        self, names: Sequence[str], prompt: Sequence[Segment], answer: Sequence[int], share: float
    ) -> dict[str, float]:
        rungs = [replace(METHODS[name], share=share) for name in names]
        outcomes = self._engine.reuse.measure(prompt, answer, rungs).result()
        if not outcomes:  # nothing of the prompt can be moved here
            return {}
        return {name: outcome.divergence for name, outcome in zip(names, outcomes, strict=True)}

    def read(self, prompt: Sequence[Segment]) -> None:
        """Read a prompt exactly: its texts can be moved from here, and the method with anchors learns from it."""
        if PAPER in self._names:
            self._engine.reuse.learn(prompt, estimators=(PAPER,)).result()
        self._engine.context(prompt, policy=ReusePolicy.exact()).release()


def require_known(names: Sequence[str]) -> None:
    """Raises InvalidRequest for a method that there is none of."""
    if unknown := [name for name in names if name not in METHODS]:
        raise InvalidRequest(f"unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
