"""Linear layers that read the same rows, by the means that was measured to be quickest: all together, if that is it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvcomm.model.choice import ProductChoice
from kvcomm.model.linear import TileProduct, product


class Joined:
    """Linear layers that read the same rows."""

    def __init__(self, layers: Sequence[nn.Linear], choice: ProductChoice) -> None:
        self._layers, self._choice = layers, choice
        self._by_tiles = TileProduct(choice.memory)
        self.widths = [layer.out_features for layer in layers]

    def __call__(self, rows: Tensor) -> list[Tensor]:
        """[num_rows, in] -> [num_rows, out] of each, or one [num_rows, sum of outs] for all: by what was chosen.

        Dtype of the weights. Outputs that were made apart are not put together: whoever reads them next takes either.
        """
        weights = [layer.weight for layer in self._layers]
        num_rows = rows.shape[0]
        names = {self._choice.name(weight, num_rows) for weight in weights}
        if names == {"tiles"}:
            return [self._by_tiles(rows, weights, self._bias())]
        return [
            product(self._choice.name(weight, num_rows), rows, weight.detach(), layer.bias)
            for weight, layer in zip(weights, self._layers, strict=True)
        ]

    def exactly(self, rows: Tensor) -> list[Tensor]:
        """The stock products."""
        return [functional.linear(rows, layer.weight, layer.bias) for layer in self._layers]

    def _bias(self) -> np.ndarray | None:
        biases: list[Tensor | None] = [getattr(layer, "bias", None) for layer in self._layers]
        if all(bias is None for bias in biases):
            return None
        parts = [
            layer.weight.new_zeros(layer.out_features) if bias is None else bias
            for layer, bias in zip(self._layers, biases, strict=True)
        ]
        whole: np.ndarray = torch.cat(parts).float().numpy()
        return whole
