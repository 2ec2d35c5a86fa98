"""Linear layers that read the same rows, as one product each time: by the means that was measured to be quickest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvcomm.model.choice import Choice
from kvcomm.model.linear import TileProduct, product


class Joined:
    """Linear layers that read the same rows, computed together: their outputs lie one beside the other."""

    def __init__(self, layers: Sequence[nn.Linear], choice: Choice) -> None:
        self._layers, self._choice = layers, choice
        self._by_tiles = TileProduct(choice.memory)
        self.widths = [layer.out_features for layer in layers]

    def __call__(self, rows: Tensor) -> Tensor:
        """[num_rows, in] -> [num_rows, sum of outs] by what was chosen; dtype of the weights."""
        weights = [layer.weight for layer in self._layers]
        num_rows = rows.shape[0]
        names = {self._choice.name(weight, num_rows) for weight in weights}
        if names == {"tiles"}:
            return self._by_tiles(rows, weights, self._bias())
        parts = [
            product(self._choice.name(weight, num_rows), rows, weight.detach(), layer.bias)
            for weight, layer in zip(weights, self._layers, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

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
