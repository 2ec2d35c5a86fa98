"""Offsets: what quantization keeps."""

from __future__ import annotations

import torch

from kvcomm.align.offsets import OffsetRows, OffsetTable


def test_a_row_keeps_its_offsets_to_half_a_step() -> None:
    offsets = (
        torch.randn(50, 3, 8, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, 50)[:, None, None]
    )
    rows = OffsetRows.quantize(offsets)
    assert rows.codes.dtype == torch.int8
    error = (rows.dequantize() - offsets.flatten(1)).abs()
    assert bool((error <= 0.5001 * rows.scales[:, None]).all())
    assert torch.allclose(rows.scales, offsets.flatten(1).abs().amax(1) / 127)


def test_a_row_of_zeros_stays_zero() -> None:
    rows = OffsetRows.quantize(torch.zeros(2, 4))
    assert not rows.dequantize().any()


def test_taking_and_appending_are_inverse() -> None:
    rows = OffsetRows.quantize(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)))
    table = OffsetTable((None, rows), (None, rows))
    joined = table.take(torch.arange(2)).append(table.take(torch.arange(2, 6)))
    assert joined.num_tokens == 6
    assert joined.keys[0] is None
    assert joined.keys[1] is not None
    assert torch.equal(joined.keys[1].codes, rows.codes)
    assert joined.num_bytes == table.num_bytes == 2 * (6 * 4 + 6 * 4)
