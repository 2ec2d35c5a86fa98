"""What a tier holds and for whom: KV, the space that it belongs to, and why it is not given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvcomm.memory.fidelity import Fidelity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvcomm.memory.pool import LayerShape
    from kvcomm.memory.segments import Segment

DEFAULT_TENANT = "default"
"""Whose KV a tier without a secret keeps; the engine's tenant where nobody names one."""


class TierMiss(StrEnum):
    """Why a tier gave nothing. Every one of them means: compute."""

    ABSENT = "absent"
    """Nothing is there under that name, or not any more."""
    CORRUPT = "corrupt"
    """What is there is torn, truncated, altered, not finite or no record; it was removed where that was possible."""
    FOREIGN = "foreign"
    """What is there belongs to another model, dtype, producer or tenant, to other tokens, or to another name."""
    TOO_NEW = "too_new"
    """What is there was written by a newer version."""
    FAILED = "failed"
    """The store cannot be reached, or does not do what it is asked."""
    SLOW = "slow"
    """It was not there by the deadline, or too many reads are late already."""
    REFUSED = "refused"
    """The tier has no secret, and the tenant is not the default one; or the tier is closed."""


class KV(NamedTuple):
    """Keys and values of consecutive tokens, on the CPU: per layer [num_tokens, num_kv_heads, dim]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens that it covers."""
        return int(self.keys[0].shape[0]) if self.keys else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in (*self.keys, *self.values))

    def part(self, start: int, end: int) -> KV:
        """The tokens [start, end) of it; views."""
        return KV([each[start:end] for each in self.keys], [each[start:end] for each in self.values])

    def is_finite(self) -> bool:
        """Whether all numbers are; a sum shows it in a fraction of the time, unless it overflows."""
        return all(_is_finite(each) for each in (*self.keys, *self.values))


@dataclass(frozen=True)
class TierSpace:
    """Everything that must agree before KV may be used by another process.

    Attributes:
        namespace: digest of weights, dtype, rope and attention settings, tokenizer and chat template; without tenant.
        producer: whose kernels computed it, such as "kvcomm" or "vllm-cpu/0.32.0"; two producers never share an object.
        tenant: whose KV it is.
        shapes: of each layer.
        dtype: of keys and values.
        vocab_size: tokens that the model knows.
    """

    namespace: str
    producer: str
    tenant: str
    shapes: tuple[LayerShape, ...]
    dtype: torch.dtype
    vocab_size: int

    @property
    def token_bytes(self) -> int:
        """That the KV of one token takes."""
        return sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in self.shapes) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """As headers have it."""
        return str(self.dtype).removeprefix("torch.")

    def fits(self, kv: KV, num_tokens: int) -> bool:
        """Whether KV has the shapes and the dtype of this space, on the CPU, for so many tokens."""
        if len(kv.keys) != len(self.shapes) or len(kv.values) != len(self.shapes):
            return False
        return all(
            self._is_like(key, num_tokens, shape.num_kv_heads, shape.key_dim)
            and self._is_like(value, num_tokens, shape.num_kv_heads, shape.value_dim)
            for key, value, shape in zip(kv.keys, kv.values, self.shapes, strict=True)
        )

    def knows(self, token_ids: Sequence[int]) -> bool:
        """Whether all tokens are in the vocabulary."""
        ids = np.asarray(token_ids)
        return ids.size == 0 or bool(ids.min() >= 0 and ids.max() < self.vocab_size)

    def _is_like(self, tensor: Tensor, *shape: int) -> bool:
        return tuple(tensor.shape) == shape and tensor.dtype == self.dtype and tensor.device.type == "cpu"


class RenditionName(NamedTuple):
    """What a rendition is found by.

    Attributes:
        digest: of the segment: `Segment.digest(space.namespace)`, where the namespace has no tenant in it.
        signature: of the static text before it where it was computed.
        position: of its first token there.
    """

    digest: str
    signature: str
    position: int


class StoredRendition(NamedTuple):
    """A rendition as a tier gives it; see `kvcomm.memory.renditions.Rendition`.

    Attributes:
        slot: name of the segment in that context.
        before: the named segments before it there.
        risk: nats of divergence to be expected of it at most; 0 for exact KV.
    """

    name: RenditionName
    token_ids: tuple[int, ...]
    kv: KV
    fidelity: Fidelity
    slot: str = ""
    before: tuple[Segment, ...] = ()
    risk: float = 0.0


class PrefixRead(NamedTuple):
    """What was read of a prefix.

    Attributes:
        runs: its leading runs of tokens, each as it lies in the tier.
        miss: why there are no more; None: all that was asked for is there.
    """

    runs: list[KV]
    miss: TierMiss | None

    @property
    def num_tokens(self) -> int:
        """Leading tokens that were read."""
        return sum(each.num_tokens for each in self.runs)

    def joined(self) -> KV:
        """All runs as one; a copy, unless there is only one. There must be one."""
        if len(self.runs) == 1:
            return self.runs[0]
        import torch

        keys = [torch.cat(parts) for parts in zip(*(run.keys for run in self.runs), strict=True)]
        return KV(keys, [torch.cat(parts) for parts in zip(*(run.values for run in self.runs), strict=True)])


def _is_finite(tensor: Tensor) -> bool:
    import torch

    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return math.isfinite(total) or bool(tensor.isfinite().all())
