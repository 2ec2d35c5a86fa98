"""Layers of a float32 model on CPU that a pass computes by cheaper, equal means.

Linear layers over few rows, as in decode and in the short tail behind a cached prefix. All that such a product has to
do is to read the weight, and MKL's `x @ W.T` (what `nn.Linear` asks for) packs it anew in every call. A compiled loop
reads it once (measured, all weights of smollm2-135m at 1, 4, 8, 16 and 32 rows: 67, 143, 89, 122 and 184 ms against 45,
46, 47, 64 and 98; reading alone took 49). Equal up to rounding.

Linear layers over more rows, where a pass need not be the stock forward to the last bit: oneDNN instead of MKL
(measured on AMD Zen 4, the layers of smollm2-135m in turns at 64, 128, 256, 512 and 2,048 rows: 0.82, 0.86, 0.87, 0.90
and 0.92 of MKL's time; other makers' processors have not been measured). Equal up to rounding.

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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvcomm.model import compiled

MAX_ROWS = 63
"""Rows up to which linear layers are computed by a compiled loop, which is ahead up to about 100."""

FEWEST_ROWS = 12
"""Rows up to which that loop takes one output after the other; above it tiles of outputs are ahead."""

Forward = Callable[[Tensor], Tensor]
Forwards = dict[nn.Module, Forward]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class LeanLayers:
    """The layers of one model that can be switched. They are found once, when this is made."""

    def __init__(self, model: nn.Module) -> None:
        own = [layer for layer in model.modules() if _is_float32_on_cpu(layer)]
        linears = [layer for layer in own if type(layer) is nn.Linear]
        self._few: Forwards = {layer: lean_linear(layer) for layer in linears}
        self._many: Forwards = {layer: lean_linear(layer, linear_by_onednn) for layer in linears}
        if linears:
            with compiled.threads():
                for num_rows in (1, MAX_ROWS):  # compiled now, not within a pass
                    few_rows_product(torch.zeros(num_rows, 1), torch.zeros(1, 1))
        self._norms: Forwards = {layer: norm for layer in own if (norm := lean_norm(layer)) is not None}

    @contextmanager
    def switched(self, num_rows: int, *, up_to_rounding: bool = False) -> Iterator[None]:
        """Switch what pays for a pass over this many rows, and back on leaving.

        A pass over more than `MAX_ROWS` rows keeps the stock products unless `up_to_rounding` is enough.

        A layer that somebody else has given a `forward` of its own keeps that.
        Not for two passes at once on one model, see `hook.pass_lock`: the first to leave would switch back for both.
        """
        forwards = self._norms
        if self._few and (num_rows <= MAX_ROWS or up_to_rounding):
            compiled.share_threads()
            forwards = self._norms | (self._few if num_rows <= MAX_ROWS else self._many)
        free = [layer for layer in forwards if "forward" not in vars(layer)]
        try:
            for layer in free:
                vars(layer)["forward"] = forwards[layer]
            yield
        finally:
            for layer in free:
                vars(layer).pop("forward", None)


def lean_linear(layer: nn.Linear, many_rows_product: Product = functional.linear) -> Forward:
    """`layer.forward`: few rows by the compiled loop, more by `many_rows_product`.

    Callers from elsewhere that may want gradients, or bring another dtype, get the stock product.
    """

    def forward(rows: Tensor) -> Tensor:
        weight = layer.weight
        is_plain = rows.dtype == weight.dtype == torch.float32
        if rows.requires_grad or not (is_plain and torch.is_inference_mode_enabled()):
            return functional.linear(rows, weight, layer.bias)
        if rows.numel() > MAX_ROWS * rows.shape[-1]:
            return many_rows_product(rows, weight, layer.bias)
        out = few_rows_product(rows, weight.detach())
        if layer.bias is not None:
            out += layer.bias
        return out

    return forward


def linear_by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear` of float32 on CPU by oneDNN, or the stock product in builds of torch without it."""
    if not torch.backends.mkldnn.is_available():
        return functional.linear(rows, weight, bias)
    # What torch's own compiler calls; in eager mode float32 goes to MKL.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


def few_rows_product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` of [..., in] and [out, in], float32 on CPU -> [..., out]."""
    # Operands are prepared by numpy: calls of torch take several times as long, and a pass has hundreds of products.
    from kvcomm.model.products import sums_by_outputs, sums_by_tiles

    num_out, num_in = weight.shape
    flat = np.ascontiguousarray(rows.numpy()).reshape(-1, num_in)
    out = np.empty((*rows.shape[:-1], num_out), np.float32)
    sums = sums_by_outputs if len(flat) <= FEWEST_ROWS else sums_by_tiles
    with compiled.one_caller:
        sums(flat, np.ascontiguousarray(weight.numpy()), out.reshape(-1, num_out))
    return torch.from_numpy(out)


def lean_norm(layer: nn.Module) -> Forward | None:
    """`layer.forward` in place where it can be, or None if the layer is no RMS norm of the usual form.

    Whether it is one is decided by trying: the results for a few rows must be bit-identical. Rows of another dtype than
    float32 (norms are often kept in float32 within a smaller model) are left to the layer's class.
    """
    weight = layer.weight
    epsilon = "variance_epsilon" if hasattr(layer, "variance_epsilon") else "eps"
    if "RMSNorm" not in type(layer).__name__ or not isinstance(getattr(layer, epsilon, None), float):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None

    def forward(rows: Tensor) -> Tensor:
        if rows.dtype != torch.float32:
            out: Tensor = type(layer).forward(layer, rows)
            return out
        weight = layer.weight  # read anew, as epsilon: a user may load others into the model
        assert isinstance(weight, Tensor)
        scale = (rows * rows).sum(-1, keepdim=True).div_(rows.shape[-1]).add_(getattr(layer, epsilon)).rsqrt_()
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
