"""Layers of a float32 model on CPU that a pass computes by cheaper, equal means.

Linear layers over few rows. For 4 to 63 rows MKL's `x @ W.T` (what `nn.Linear` asks for) packs the whole weight anew in
every call; the transposed product `(W @ x.T).T` reads it once and takes about half the time (measured: 576x49152 at 16
rows 58 ms against 25 ms; from 64 rows on both are equal, below 4 the first wins). These are the sizes of batched decode
and of the short tail behind a cached prefix. Equal up to rounding.

RMS norms. transformers makes a new tensor at each of five steps; on long prompts the system spends more time on handing
out and taking back that memory than on the numbers (measured: 2,048 rows of 576, 6.5 ms against 1.0 ms). Three of the
steps can be done in place. A norm is taken only if its result is the same to the last bit.

A layer is switched by a `forward` of its own, laid over its class's and taken away again after the pass: unlike torch's
function override, which visits every operation of a pass, it costs nothing elsewhere. Whoever calls the model meanwhile
from another thread gets the same numbers, up to the rounding of the linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_ROWS = 4
MAX_ROWS = 63
"""Row counts, inclusive, for which linear layers are computed as the transposed product."""

Forward = Callable[[Tensor], Tensor]
Forwards = dict[nn.Module, Forward]


class LeanLayers:
    """The layers of one model that can be switched. They are found once, when this is made."""

    def __init__(self, model: nn.Module) -> None:
        own = [layer for layer in model.modules() if _is_float32_on_cpu(layer)]
        linears = [layer for layer in own if type(layer) is nn.Linear and torch.backends.mkl.is_available()]
        self._linears: Forwards = {layer: lean_linear(layer) for layer in linears}
        self._norms: Forwards = {layer: norm for layer in own if (norm := lean_norm(layer)) is not None}

    @contextmanager
    def switched(self, num_rows: int) -> Iterator[None]:
        """Switch what pays for a pass over this many rows, and back on leaving.

        A layer that somebody else has given a `forward` of its own keeps that.
        Not for two passes at once on one model, see `hook.pass_lock`: the first to leave would switch back for both.
        """
        is_few = MIN_ROWS <= num_rows <= MAX_ROWS
        forwards = self._norms | self._linears if is_few else self._norms
        free = [layer for layer in forwards if "forward" not in vars(layer)]
        try:
            for layer in free:
                vars(layer)["forward"] = forwards[layer]
            yield
        finally:
            for layer in free:
                vars(layer).pop("forward", None)


def lean_linear(layer: nn.Linear) -> Forward:
    """`layer.forward`, as the transposed product where there are few rows."""

    def forward(rows: Tensor) -> Tensor:
        # Not every layer sees all rows of a pass: the head computes only the wanted logits.
        num_rows = rows.numel() // rows.shape[-1]
        if MIN_ROWS <= num_rows <= MAX_ROWS:
            return transposed_linear(rows, layer.weight, layer.bias)
        return functional.linear(rows, layer.weight, layer.bias)

    return forward


def transposed_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` with the operands swapped: rows [..., in], weight [out, in] -> [..., out].

    The result is a transposed view. Making it contiguous takes a twentieth of a pass, and the next product of a
    feed-forward block wants it as it is.
    """
    out: Tensor = (weight @ rows.flatten(0, -2).t()).t()
    if bias is not None:
        out = out + bias
    return out.view(*rows.shape[:-1], weight.shape[0])


def lean_norm(layer: nn.Module) -> Forward | None:
    """`layer.forward` in place where it can be, or None if the layer is no RMS norm of the usual form.

    Whether it is one is decided by trying: the results for a few rows must be bit-identical. Rows of another dtype than
    float32 (norms are often kept in float32 within a smaller model) are left to the layer's class.
    """
    weight = layer.weight
    epsilon = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if "RMSNorm" not in type(layer).__name__ or not isinstance(epsilon, float):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None

    def forward(rows: Tensor) -> Tensor:
        if rows.dtype != torch.float32:
            out: Tensor = type(layer).forward(layer, rows)
            return out
        weight = layer.weight  # read anew: a user may load others into the model
        assert isinstance(weight, Tensor)
        scale = (rows * rows).sum(-1, keepdim=True).div_(rows.shape[-1]).add_(epsilon).rsqrt_()
        return (rows * scale).mul_(weight)

    with torch.inference_mode():
        trial = torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0))
        try:
            # Not by calling the layer: hooks on it are for passes.
            expected = type(layer).forward(layer, trial)
        except (AttributeError, RuntimeError, TypeError):
            return None  # it wants more than rows, such as a gate
        return forward if torch.equal(forward(trial), expected) else None


def _is_float32_on_cpu(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype == torch.float32 and weight.device.type == "cpu"
