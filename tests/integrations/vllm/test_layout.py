"""Layouts against memories that are packed by hand, in ways that kernels have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvcomm.errors import UnsupportedModel
from kvcomm.integrations.vllm.layout import Write, measure

BLOCKS, SIZE, HEADS, DIM = 5, 4, 3, 8
Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Write]]


def both_in_a_row(dtype: torch.dtype) -> tuple[Tensor, Write]:
    """[blocks, heads, tokens, key and value]: keys of a block before its values, by head."""
    memory = torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM, dtype=dtype)
    flat = memory.view(BLOCKS, HEADS, 2 * SIZE, DIM)

    def write(key: Tensor, value: Tensor, slots: Tensor) -> None:
        for at, slot in enumerate(slots.tolist()):
            flat[slot // SIZE, :, slot % SIZE] = key[at]
            flat[slot // SIZE, :, SIZE + slot % SIZE] = value[at]

    return memory, write


def keys_on_end(dtype: torch.dtype) -> tuple[Tensor, Write]:
    """Keys transposed within their block, [dim, tokens], values not."""
    memory = torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM, dtype=dtype)
    flat = memory.view(BLOCKS, HEADS, 2, SIZE * DIM)

    def write(key: Tensor, value: Tensor, slots: Tensor) -> None:
        for at, slot in enumerate(slots.tolist()):
            flat[slot // SIZE, :, 0].view(HEADS, DIM, SIZE)[:, :, slot % SIZE] = key[at]
            flat[slot // SIZE, :, 1].view(HEADS, SIZE, DIM)[:, slot % SIZE] = value[at]

    return memory, write


def keys_apart(dtype: torch.dtype) -> tuple[Tensor, Write]:
    """[2, blocks, tokens, heads, dim], in a storage that begins with something else."""
    memory = torch.zeros(7 + 2 * BLOCKS * SIZE * HEADS * DIM, dtype=dtype)[7:].view(2, BLOCKS, SIZE, HEADS, DIM)

    def write(key: Tensor, value: Tensor, slots: Tensor) -> None:
        memory[0].view(-1, HEADS, DIM)[slots] = key
        memory[1].view(-1, HEADS, DIM)[slots] = value

    return memory, write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packing", [both_in_a_row, keys_on_end, keys_apart])
def test_what_is_written_is_read(packing: Callable[[torch.dtype], tuple[Tensor, Write]], dtype: torch.dtype) -> None:
    memory, write = packing(dtype)
    layout = measure(memory, BLOCKS, SIZE, HEADS, DIM, write)
    key, value = (torch.randn(SIZE * BLOCKS, HEADS, DIM).to(dtype) for _ in "kv")
    blocks = torch.tensor([3, 0, 4, 2, 1])
    slots = (blocks[:, None] * SIZE + torch.arange(SIZE)).flatten()
    write(key, value, slots)
    for start, end in ((0, 20), (5, 6), (3, 17), (8, 12)):
        got_key, got_value = layout.read(blocks, start, end)
        assert torch.equal(got_key, key[start:end])
        assert torch.equal(got_value, value[start:end])
    assert got_key.data_ptr() != memory.data_ptr()
    got_key += 1
    assert torch.equal(layout.read(blocks, 8, 12)[0], key[8:12])


def test_a_packing_without_order_is_refused() -> None:
    memory, plain = keys_apart(torch.float32)
    shuffled = torch.randperm(DIM, generator=torch.Generator().manual_seed(3))
    with pytest.raises(UnsupportedModel, match="no regular order"):
        measure(memory, BLOCKS, SIZE, HEADS, DIM, lambda k, v, slots: plain(k[..., shuffled], v, slots))


def test_numbers_that_are_lost_are_noticed() -> None:
    memory, plain = keys_apart(torch.float32)
    with pytest.raises(UnsupportedModel, match="were found again"):
        measure(memory, BLOCKS, SIZE, HEADS, DIM, lambda k, v, slots: plain(k[:-1], v[:-1], slots[:-1]))


def test_a_quantized_cache_is_refused() -> None:
    memory, plain = keys_apart(torch.float32)
    with pytest.raises(UnsupportedModel):
        measure(memory, BLOCKS, SIZE, HEADS, DIM, lambda k, v, slots: plain((k / 3).round(), v, slots))
