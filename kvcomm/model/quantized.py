"""Weights of linear layers kept in 8 or 4 bits, which opt-in: less memory, and less to read in decode.

`int8`: every output of a layer has a scale of its own, and codes from -127 to 127. `int4`: every 32 inputs of an output
have a scale and a least value, and codes from 0 to 15; the embedding and the head keep 8 bits, since an error in them
weighs most. An embedding that is tied to the head shares its codes. Norms, biases, layers of a class of their own and
embeddings of another kind stay as they are. Only weights are rounded: activations and KV keep the model's dtype, so
what a row becomes depends on no other row.

Few rows are multiplied with the codes themselves by a compiled loop; more rows with the weight as it was before, made
anew for each product. Both compute with the same dequantized numbers.

Libraries were tried first. torchao 0.18 dequantizes in every call on CPU (measured, the layers of smollm2-135m in
bfloat16, one row: 75 ms against 40 without it; its int4 has no layout for CPUs), and torch's own operators are private,
slow in float32 (80 ms), and keep 4 bits in an order that differs between processors, so that the same weights would
have several identities. The loop takes 16 ms for int8, and 36 for int4.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from kvcomm.errors import UnsupportedModel
from kvcomm.model import compiled
from kvcomm.model.names import WeightsKind

GROUP = 32
"""Inputs that share a scale in 4 bits."""
MAX_ROWS = 16
"""Rows up to which the compiled loop is used: there it takes 93 ms for int8, dequantizing for a library's product 40
more than that product."""


class Bytes(NamedTuple):
    """A weight [num_out, num_in] as codes [num_out, num_in] int8 times scales [num_out] float32."""

    codes: Tensor
    scales: Tensor


class Nibbles(NamedTuple):
    """A weight [num_out, num_in] as codes times scales plus lows.

    Attributes:
        codes: [num_out, num_in / 2] uint8; the low half of byte k is input k, the high one input num_in / 2 + k.
        scales, lows: [num_out, num_in / GROUP] float32.
    """

    codes: Tensor
    scales: Tensor
    lows: Tensor


def to_bytes(weight: Tensor) -> Bytes:
    """The nearest numbers that 8 bits can hold; a copy."""
    exact = weight.detach().float()
    scales = exact.abs().amax(1).div_(127)
    steps = scales.where(scales > 0, torch.ones_like(scales))
    return Bytes(exact.div(steps[:, None]).round_().to(torch.int8), scales)


def to_nibbles(weight: Tensor) -> Nibbles:
    """The nearest numbers that 4 bits can hold; a copy. `num_in` must be a multiple of two groups."""
    num_out, num_in = weight.shape
    groups = weight.detach().float().reshape(num_out, -1, GROUP)
    lows, highs = groups.amin(2), groups.amax(2)
    scales = (highs - lows).div_(15)
    steps = scales.where(scales > 0, torch.ones_like(scales))
    codes = (groups - lows[..., None]).div_(steps[..., None]).round_().to(torch.uint8).reshape(num_out, num_in)
    half = num_in // 2
    return Nibbles(codes[:, :half] | (codes[:, half:] << 4), scales, lows)


def from_bytes(kept: Bytes, dtype: torch.dtype) -> Tensor:
    """The weight [num_out, num_in] again, rounded once to `dtype`."""
    if dtype == torch.float32:
        return kept.codes.to(dtype).mul_(kept.scales[:, None])
    return (kept.codes * kept.scales[:, None]).to(dtype)


def from_nibbles(kept: Nibbles, dtype: torch.dtype) -> Tensor:
    """The weight [num_out, num_in] again, rounded once to `dtype`."""
    codes = torch.cat((kept.codes & 15, kept.codes >> 4), 1).float()
    groups = codes.view(len(codes), -1, GROUP).mul_(kept.scales[..., None]).add_(kept.lows[..., None])
    return groups.view_as(codes).to(dtype)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept in 8 bits, or in 4 if there are `lows`. For inference."""

    codes: Tensor
    scales: Tensor
    lows: Tensor | None
    bias: Tensor | None

    def __init__(self, kept: Bytes | Nibbles, bias: Tensor | None) -> None:
        super().__init__()
        is_bytes = isinstance(kept, Bytes)
        self.out_features = len(kept.codes)
        self.in_features = kept.codes.shape[1] * (1 if is_bytes else 2)
        self.register_buffer("codes", kept.codes)
        self.register_buffer("scales", kept.scales)
        self.register_buffer("lows", None if isinstance(kept, Bytes) else kept.lows)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return 8 if self.lows is None else 4

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features]; a copy."""
        if self.lows is None:
            return from_bytes(Bytes(self.codes, self.scales), dtype)
        return from_nibbles(Nibbles(self.codes, self.scales, self.lows), dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of the rows."""
        needs_gradient = rows.requires_grad and torch.is_grad_enabled()
        is_few = rows.device.type == "cpu" and rows.numel() <= MAX_ROWS * self.in_features
        if needs_gradient or not is_few:
            return functional.linear(rows, self.dequantized(rows.dtype), self.bias)
        out = self._few_rows_product(rows.detach().float().numpy()).to(rows.dtype)
        return out if self.bias is None else out.add_(self.bias)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.num_bits}"

    def _few_rows_product(self, rows: np.ndarray) -> Tensor:
        from kvcomm.model.quantized_loops import sums_of_bytes, sums_of_nibbles

        flat = np.ascontiguousarray(rows).reshape(-1, self.in_features)
        out = np.empty((*rows.shape[:-1], self.out_features), np.float32)
        flat_out = out.reshape(-1, self.out_features)
        with compiled.one_caller:
            compiled.share_threads()
            if self.lows is None:
                sums_of_bytes(flat, self.codes.numpy(), self.scales.numpy(), flat_out)
            else:
                sums_of_nibbles(flat, self.codes.numpy(), self.scales.numpy(), self.lows.numpy(), flat_out)
        return torch.from_numpy(out)


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are kept in 8 bits."""

    codes: Tensor
    scales: Tensor

    def __init__(self, kept: Bytes, dtype: torch.dtype) -> None:
        """Make one.

        Args:
            dtype: of the rows that are looked up.
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = kept.codes.shape
        self.dtype = dtype
        self.register_buffer("codes", kept.codes)
        self.register_buffer("scales", kept.scales)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] ids -> [..., embedding_dim]."""
        return (self.codes[token_ids] * self.scales[token_ids][..., None]).to(self.dtype)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits=8"


def quantize(model: PreTrainedModel, kind: WeightsKind) -> None:
    """Keep the weights of a model's linear layers, embedding and head in fewer bits, in place; the former ones go.

    The model cannot be trained or saved afterwards, and PEFT puts no adapters into it.

    Raises:
        UnsupportedModel: it has no linear layers of the usual class.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    kept = to_bytes(embedding.weight) if type(embedding) is nn.Embedding else None
    replaced: dict[nn.Module, nn.Module] = {}
    if kept is not None:
        replaced[embedding] = QuantizedEmbedding(kept, model.dtype)
    if type(head) is nn.Linear and (kept is not None or not is_tied):
        tied = kept if is_tied else None
        replaced[head] = QuantizedLinear(tied or to_bytes(head.weight), head.bias)
    found = False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                found = True
                setattr(parent, name, _quantized(child, kind))
            elif child in replaced:
                setattr(parent, name, replaced[child])
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no linear layers whose weights could be kept as {kind}")
    for parameter in model.parameters():
        # What is left may be mapped from the checkpoint's file, all of which it would keep in memory.
        parameter.data = parameter.data.clone()
    if model.device.type == "cpu":
        _compile()


def is_quantized(model: nn.Module) -> bool:
    """Whether weights of it are kept in fewer bits by `quantize`."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def _quantized(layer: nn.Linear, kind: WeightsKind) -> QuantizedLinear:
    takes_nibbles = kind == "int4" and layer.in_features % (2 * GROUP) == 0
    return QuantizedLinear((to_nibbles if takes_nibbles else to_bytes)(layer.weight), layer.bias)


def _compile() -> None:
    """Compile the loops now, or load them, not within a pass."""
    with compiled.threads():
        for kept in (to_bytes(torch.zeros(1, 2 * GROUP)), to_nibbles(torch.zeros(1, 2 * GROUP))):
            QuantizedLinear(kept, None)(torch.zeros(1, 2 * GROUP))
