"""The loop of gates against torch, wherever it is told to write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kvcomm.model import compiled
from kvcomm.model.compiled import numbers
from kvcomm.model.row_loops import gate

SIZE = 37
"""No multiple of what the processor takes at once."""


def gates_and_ups(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gates, ups = (3 * torch.randn(5, SIZE, generator=generator) for _ in "gu")
    gates[0, :4] = torch.tensor([0.0, -0.0, -300.0, 300.0])
    return gates.to(dtype), ups.to(dtype)


def computed(gates: Tensor, ups: Tensor, out: Tensor) -> Tensor:
    with compiled.threads():
        gate(numbers(gates), numbers(ups), numbers(out))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_are_opened_in_new_memory_in_their_own_and_out_of_one_array(dtype: torch.dtype) -> None:
    gates, ups = gates_and_ups(dtype)
    expected = functional.silu(gates) * ups
    apart = computed(gates, ups, torch.empty_like(gates))
    torch.testing.assert_close(apart, expected, rtol=2e-6 if dtype == torch.float32 else 2**-6, atol=1e-30)
    both = torch.cat([gates, ups], 1)
    assert torch.equal(computed(both, both, torch.empty_like(gates)), apart)
    assert torch.equal(both, torch.cat([gates, ups], 1))  # which is not changed
    assert torch.equal(computed(gates, ups, gates), apart)
