"""Which moved tokens are worth recomputing: those that the answer will read, the more the further off they may be.

What the answer will read is not known when a rung is chosen. The prompt's last token looks at much of it already, some
heads more than others; how much each head tells is learned from exact answers: a ridge regression of what their tokens
attended to on what the last token of the prompt attended to. How far off a token may be, its neighbors among the
anchors tell (`anchor_errors`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 0.03
"""Of the mean of the diagonal, added to it."""
MIN_PROMPTS = 8
"""Below that all heads count alike."""


def importance(attention: Tensor, errors: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Scores of moved tokens, [num_tokens] float32; only compared.

    Args:
        attention: [num_heads, num_tokens], of the prompt's last token to each, by the heads that are looked at.
        errors: [num_tokens], expected, in any unit.
        weights: one per head, as `ImportanceFit` learns them; None: all heads alike.
    """
    if weights is None:
        return _shares(attention).mean(0) * errors
    learned = torch.tensor(weights, dtype=torch.float32, device=attention.device)
    return (learned @ _features(attention)).clamp_min(0).square() * errors


class ImportanceFit:
    """What heads tell, from the prompts seen so far. Guarded by its owner's lock.

    Attributes:
        num_prompts: how many those are.
    """

    def __init__(self) -> None:
        self.num_prompts = 0
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, attention: Tensor, attended: Tensor) -> None:
        """Add one prompt.

        Args:
            attention: [num_heads, num_tokens], of the prompt's last token.
            attended: [num_tokens], what the exact answer's tokens attended to.
        """
        features, target = _features(attention).double().cpu(), _features(attended[None])[0].double().cpu()
        gram, cross = features @ features.T, features @ target
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross
        self.num_prompts += 1

    def weights(self) -> tuple[float, ...] | None:
        """One per head; None while there are too few prompts."""
        if self.num_prompts < MIN_PROMPTS or self._gram is None or self._cross is None:
            return None
        ridge = RIDGE * self._gram.diag().mean() * torch.eye(len(self._gram), dtype=torch.float64)
        return tuple(torch.linalg.solve(self._gram + ridge, self._cross).tolist())


def _shares(attention: Tensor) -> Tensor:
    """Of each head's attention to all of these tokens."""
    return attention / attention.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _features(attention: Tensor) -> Tensor:
    """Roots of shares: a few tokens with most of the attention would drown the others. 1 where all get the same."""
    return (_shares(attention) * attention.shape[1]).sqrt()
