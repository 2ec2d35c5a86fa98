"""What anchors store: per-token offsets of keys and values, int8 with one scale per row.

A row is one token's offset in one layer, all heads, keys and values apart. Keys are un-rotated (as at position 0), so
an offset measured at one position holds at any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

CODE_RANGE = 127


class OffsetRows(NamedTuple):
    """Quantized rows; offset = code * scale.

    Attributes:
        codes: [num_tokens, num_kv_heads * dim] int8.
        scales: [num_tokens] float32.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, offsets: Tensor) -> Self:
        """From [num_tokens, num_kv_heads, dim] or [num_tokens, channels], any float dtype; rounds to nearest."""
        rows = offsets.flatten(1).float()
        scales = rows.abs().amax(-1) / CODE_RANGE
        steps = scales.where(scales > 0, torch.ones_like(scales))
        return cls((rows / steps[:, None]).round_().to(torch.int8), scales)

    @classmethod
    def empty(cls, num_channels: int, device: torch.device | str = "cpu") -> Self:
        """No tokens."""
        return cls(torch.empty(0, num_channels, dtype=torch.int8, device=device), torch.empty(0, device=device))

    def dequantize(self) -> Tensor:
        """[num_tokens, channels] float32."""
        return self.codes.float() * self.scales[:, None]

    def take(self, indices: Tensor) -> OffsetRows:
        """The rows at `indices`, [num_indices] int64, copied."""
        return OffsetRows(self.codes[indices], self.scales[indices])

    def append(self, other: OffsetRows) -> OffsetRows:
        """These rows and behind them the others."""
        return OffsetRows(torch.cat((self.codes, other.codes)), torch.cat((self.scales, other.scales)))

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True, eq=False)
class OffsetTable:
    """Offsets of the same anchor tokens in every layer; the offsets are never changed once made.

    Attributes:
        keys, values: one entry per layer; None where a layer needs no offset (layer 0: its keys and values depend on
            nothing but the token and its position).
    """

    keys: tuple[OffsetRows | None, ...]
    values: tuple[OffsetRows | None, ...]

    @property
    def num_tokens(self) -> int:
        """Anchor tokens."""
        return next((len(rows.scales) for rows in self.keys if rows is not None), 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.num_bytes for rows in (*self.keys, *self.values) if rows is not None)

    def take(self, indices: Tensor) -> OffsetTable:
        """The anchors at `indices`, [num_indices] int64, copied."""
        return OffsetTable(_each(self.keys, indices), _each(self.values, indices))

    def append(self, other: OffsetTable) -> OffsetTable:
        """These anchors and behind them the others, which have offsets in the same layers."""
        return OffsetTable(_joined(self.keys, other.keys), _joined(self.values, other.values))


def _each(rows: tuple[OffsetRows | None, ...], indices: Tensor) -> tuple[OffsetRows | None, ...]:
    return tuple(None if entry is None else entry.take(indices) for entry in rows)


def _joined(
    first: tuple[OffsetRows | None, ...], second: tuple[OffsetRows | None, ...]
) -> tuple[OffsetRows | None, ...]:
    return tuple(
        None if one is None or other is None else one.append(other) for one, other in zip(first, second, strict=True)
    )
