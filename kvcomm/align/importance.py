"""Which moved tokens are worth recomputing: those that the answer will read, the more the further off they may be.

What the answer will read is not known when a rung is chosen. The tail of the prompt looks at much of it already, some
heads more than others; how much each head tells is learned from exact answers: a ridge regression of what their tokens
attended to on what the tail of the prompt attended to. How far off a token may be, its neighbors among the
anchors tell (`anchor_errors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 0.03
"""Of the mean of the diagonal, added to it."""
EPOCHS = (8, 16, 32, 64)
"""Prompts after which the weights are learned anew; before the first, all heads count alike."""


def importance(attention: Tensor, errors: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Scores of moved tokens, [num_tokens] float32; only compared.

    Args:
        attention: [num_heads, num_tokens], of the prompt's tail to each, by the heads that are looked at.
        errors: [num_tokens], expected, in any unit.
        weights: one per head, as `HeadFit` learns them; None: all heads alike.
    """
    if weights is None:
        return _shares(attention).mean(0) * errors
    learned = attention.new_tensor(weights).float()
    return (learned @ _features(attention)).clamp_min(0).square() * errors


class HeadFit:
    """What heads tell, from the prompts seen so far. Guarded by its owner's lock.

    The weights stay as they are between epochs, so that rungs choose alike from prompt to prompt; each epoch ends with
    twice as many prompts as the one before it, and with the last one learning ends.

    Attributes:
        weights: one per head; None while there are too few prompts: all heads alike.
        num_prompts: how many those are.
    """

    def __init__(self, weights: tuple[float, ...] | None = None) -> None:
        """Make one.

        Args:
            weights: those to begin with, as they come with a model; then nothing is learned.
        """
        self.weights = weights
        self.num_prompts = 0
        self.is_learning = weights is None
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, attention: Tensor, attended: Tensor) -> None:
        """Add one prompt, unless learning has ended or a number of it is none.

        Args:
            attention: [num_heads, num_tokens], of the prompt's tail.
            attended: [num_tokens], what the exact answer's tokens attended to.
        """
        features, target = _features(attention).double().cpu(), _features(attended[None])[0].double().cpu()
        if not (self.is_learning and features.isfinite().all() and target.isfinite().all()):
            return
        gram, cross = features @ features.T, features @ target
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross
        self.num_prompts += 1
        if self.num_prompts in EPOCHS:
            import torch

            ridge = RIDGE * self._gram.diag().mean().clamp_min(1) * torch.eye(len(self._gram), dtype=torch.float64)
            self.weights = tuple(torch.linalg.solve(self._gram + ridge, self._cross).tolist())
            self.is_learning = self.num_prompts < EPOCHS[-1]


def _shares(attention: Tensor) -> Tensor:
    """Shares of each head's attention to all of these tokens."""
    import torch

    return attention / attention.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _features(attention: Tensor) -> Tensor:
    """Roots of shares: a few tokens with most of the attention would drown the others. 1 where all get the same."""
    return (_shares(attention) * attention.shape[1]).sqrt()
