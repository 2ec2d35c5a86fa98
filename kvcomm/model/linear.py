"""Products of linear layers on the CPU, by whichever of several means is quickest for so many rows.

float32: `torch` is what `nn.Linear` asks for (MKL mostly, which packs the weight anew in every call), `onednn` is what
torch's own compiler calls; `outputs` and `blocks` are compiled loops that read the weight once, which is all that few
rows need. bfloat16: `torch` is oneDNN, which packs as well; `tiles` reads weights where they lie, and a row's result is
the same whatever rows come with it; `outputs` serves processors without tiles. All are equal up to rounding; which one
serves how many rows of which weight is measured, see `choice`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvcomm.model import compiled

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Loop = Callable[[np.ndarray, np.ndarray, np.ndarray], None]

CANDIDATES = {
    torch.float32: ("outputs", "blocks", "onednn", "torch"),
    torch.bfloat16: ("tiles", "torch", "outputs"),
}
"""Products by dtype of weights and rows, those that are preferred where others are hardly faster first."""

LOOPS = ("outputs", "blocks")
"""Those that are made for few rows."""

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
"""Numbers of rows that a product is chosen for; others are served like the next larger one, or like the largest."""

NUM_TILE_IN, NUM_TILE_OUT = 32, 32
"""Tiles serve weights with a multiple of so many inputs and at least so many outputs."""


def can_compute(name: str, weight: Tensor) -> bool:
    """Whether a product serves this weight here."""
    if name not in CANDIDATES.get(weight.dtype, ("torch",)):  # a model may be given another dtype afterwards
        return False
    if name == "onednn":
        return bool(torch.backends.mkldnn.is_available())
    if name != "tiles":
        return True
    from kvcomm.model.tiles import are_there

    num_out, num_in = weight.shape
    return num_out >= NUM_TILE_OUT and num_in % NUM_TILE_IN == 0 and weight.is_contiguous() and are_there()


def product(name: str, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` by name: [num_rows, in], [out, in], [out] -> [num_rows, out], dtype of all of them.

    Call `compiled.share_threads` before, on the same thread. No gradients.
    """
    return PRODUCTS[name](rows, weight, bias)


def onednn_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32; in eager mode torch takes MKL for it."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


def outputs_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By a loop over outputs; float32 or bfloat16."""
    from kvcomm.model.row_loops import sums_by_outputs

    return _by_loop(sums_by_outputs, rows, weight, bias)


def blocks_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By a loop over blocks of outputs and rows; float32."""
    from kvcomm.model.row_loops import sums_by_tiles

    return _by_loop(sums_by_tiles, rows, weight, bias)


def _by_loop(loop: Loop, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = rows.new_empty(len(rows), len(weight))
    if out.numel():
        with compiled.one_caller:
            loop(rows.float().contiguous().numpy(), compiled.numbers(weight.contiguous()), compiled.numbers(out))
    return out if bias is None else out.add_(bias)


def tile_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By tiles of bfloat16."""
    return TileProduct()(rows, [weight.contiguous()], None if bias is None else bias.float().numpy())


PRODUCTS: dict[str, Product] = {
    "torch": functional.linear,
    "onednn": onednn_product,
    "outputs": outputs_product,
    "blocks": blocks_product,
    "tiles": tile_product,
}


class TileMemory:
    """What the loop over tiles writes on its way; one for all weights of a model. Hold `compiled.one_caller`."""

    def __init__(self) -> None:
        self._packed, self._sums = np.empty(0, np.int64), np.empty((0, 4, 256), np.float32)

    def take(self, num_packed: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """[>= num_packed] int64 and [>= num_blocks, 4, 256] float32, valid until the next call."""
        if len(self._packed) < num_packed:
            self._packed = np.empty(num_packed, np.int64)
        if len(self._sums) < num_blocks:
            self._sums = np.empty((num_blocks, 4, 256), np.float32)
        return self._packed, self._sums


class TileProduct:
    """The product of rows with several weights of as many inputs, one beside the other, by tiles.

    Remembers where the blocks of the weights begin, for as long as they are the same ones.
    """

    def __init__(self, memory: TileMemory | None = None) -> None:
        self._memory = memory or TileMemory()
        self._places: tuple[int, ...] = ()
        self._blocks = np.empty((0, 2), np.int64)
        self._configuration: np.ndarray | None = None

    def __call__(self, rows: Tensor, weights: Sequence[Tensor], bias: np.ndarray | None) -> Tensor:
        """[num_rows, in], [out, in] each, [sum of outs] float32 -> [num_rows, sum of outs] bfloat16."""
        from kvcomm.model import tile_products, tiles

        if self._configuration is None:
            if not tiles.are_there():  # which also asks the system for them: else the first one ends the process
                raise RuntimeError("this processor has no tiles for bfloat16: choose another product")
            self._configuration = tiles.configuration()
        places = tuple(weight.data_ptr() for weight in weights)
        if places != self._places:
            self._places, self._blocks = places, _blocks(weights)
        num_rows, num_in = rows.shape
        num_groups = -(-num_rows // tiles.SIDE)
        if num_rows % tiles.SIDE or not rows.is_contiguous():
            given, rows = rows, rows.new_zeros(num_groups * tiles.SIDE, num_in)
            rows[:num_rows] = given
        width = sum(weight.shape[0] for weight in weights)
        out = rows.new_empty(num_groups * tiles.SIDE, width)
        num_packed = num_groups * tiles.SIDE * num_in // 4
        with compiled.one_caller:
            packed, sums = self._memory.take(num_packed, len(self._blocks))
            tile_products.tile_sums(
                rows.data_ptr(),
                num_in,
                num_groups,
                self._blocks,
                _NO_BIAS if bias is None else bias,
                packed,
                sums,
                self._configuration,
                out.data_ptr(),
                width,
            )
        return out[:num_rows]


_NO_BIAS = np.empty(0, np.float32)


def _blocks(weights: Sequence[Tensor]) -> np.ndarray:
    """[num_blocks, 2] int64: the address of each block of outputs, and its column. The last of a weight may overlap."""
    blocks, column = [], 0
    for weight in weights:
        num_out, num_in = weight.shape
        assert weight.is_contiguous()
        for start in range(0, num_out, NUM_TILE_OUT):
            first = min(start, num_out - NUM_TILE_OUT)
            blocks.append((weight.data_ptr() + 2 * first * num_in, column + first))
        column += num_out
    return np.array(blocks, np.int64)


class Joined:
    """Linear layers that read the same rows: computed together, if that is what was chosen."""

    def __init__(self, layers: Sequence[nn.Linear], names: Sequence[Sequence[str]], memory: TileMemory) -> None:
        """Make one.

        Args:
            names: of each layer's products, for each number of `ROWS`.
        """
        self._layers = layers
        self._dtype = layers[0].weight.dtype
        self._names = list(zip(*names, strict=True))  # by number of rows, for all layers
        self._by_tiles = TileProduct(memory)
        self.widths = [layer.out_features for layer in layers]

    def __call__(self, rows: Tensor) -> list[Tensor]:
        """[num_rows, in] -> [num_rows, out] of each, or one [num_rows, sum of outs] for all: by what was chosen.

        Dtype of the weights. Outputs that were made apart are not put together: whoever reads them next takes either.
        """
        weights = [layer.weight for layer in self._layers]
        names = self._names[min(bisect_left(ROWS, rows.shape[0]), len(ROWS) - 1)]
        if any(weight.dtype != self._dtype for weight in weights):  # of a model that was given another one since
            names = ("torch",) * len(weights)
        if all(name == "tiles" and weight.is_contiguous() for name, weight in zip(names, weights, strict=True)):
            return [self._by_tiles(rows, weights, self._bias())]
        return [
            product(name, rows, weight.detach(), layer.bias)
            for name, weight, layer in zip(names, weights, self._layers, strict=True)
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
