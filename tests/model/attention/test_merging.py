"""Merging partial results: the compiled loop and the steps of torch against attention over all slots at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcomm.model.attention.merging import Merge, compile_loop, merge_by_loop, merge_into
from kvcomm.model.attention.merging_loop import merge
from kvcomm.model.attention.pieces import Index

MERGES: list[Merge] = [merge_into, merge_by_loop]
NUM_TOKENS = 12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [heads, rows, dim] with its log-sum-exp, in float64 and rounded once."""
    exact = scores.double()
    return (exact.softmax(-1) @ values.double()).float(), exact.logsumexp(-1).float()


def whole(num_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Room for all rows, as the back end makes it."""
    return torch.zeros(NUM_TOKENS, num_heads, dim).transpose(0, 1), torch.zeros(num_heads, NUM_TOKENS)


def as_is(part: Tensor) -> Tensor:
    return part.contiguous()


def rows_first(part: Tensor) -> Tensor:
    return part.transpose(0, 1).contiguous().transpose(0, 1)


def channels_apart(part: Tensor) -> Tensor:
    return torch.stack([part, part], -1)[..., 0]


def within_more(part: Tensor) -> Tensor:
    return torch.cat([part, part, part], 1)[:, part.shape[1] : 2 * part.shape[1]]


@pytest.mark.parametrize("merge_one", MERGES)
@given(
    rows=st.sampled_from([slice(0, NUM_TOKENS), slice(3, 5), torch.tensor([7, 0, 11]), torch.tensor([4])]),
    sizes=st.sampled_from([(1, 1), (9, 64), (3, 7)]),
    layout=st.sampled_from([as_is, rows_first, channels_apart, within_more]),
    scale=st.sampled_from([1.0, 300.0]),
    cut=st.integers(1, 39),
)
def test_two_parts_are_the_attention_over_both(
    merge_one: Merge,
    rows: Index,
    sizes: tuple[int, int],
    layout: Callable[[Tensor], Tensor],
    scale: float,
    cut: int,
) -> None:
    num_heads, dim = sizes
    scores, values = scale * random(num_heads, NUM_TOKENS, 40), random(num_heads, 40, dim, seed=1)
    out, lse = whole(num_heads, dim)
    first, first_lse = attended(scores[..., :cut], values[:, :cut])
    out.copy_(first)
    lse.copy_(first_lse)
    second, second_lse = attended(scores[:, rows, cut:], values[:, cut:])
    merge_one(out, lse, rows, layout(second), layout(second_lse[..., None])[..., 0])
    expected, expected_lse = attended(scores, values)
    merged = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    merged[rows] = True
    # A weight is as exact as the difference of two log-sum-exps: half a unit of their last place.
    tolerance = 1e-5 if scale == 1 else 3e-4
    torch.testing.assert_close(out[:, merged], expected[:, merged], rtol=0, atol=tolerance)
    torch.testing.assert_close(lse[:, merged], expected_lse[:, merged], rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, ~merged], first[:, ~merged])
    assert torch.equal(lse[:, ~merged], first_lse[:, ~merged])


@pytest.mark.parametrize("merge_one", MERGES)
def test_what_is_not_a_number_stays_so_in_its_row_alone(merge_one: Merge) -> None:
    out, lse = whole(2, 4)
    part, part_lse = random(2, 3, 4), random(2, 3)
    part_lse[1, 2] = torch.nan
    merge_one(out, lse, slice(5, 8), part, part_lse)
    assert out[1, 7].isnan().all()
    assert int(out.isnan().sum()) == 4
    assert int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("layout", [as_is, rows_first, channels_apart, within_more])
def test_bfloat16_is_rounded_once_as_the_steps_of_torch_do(layout: Callable[[Tensor], Tensor]) -> None:
    rows = torch.tensor([7, 0, 11])
    part, part_lse = random(9, 3, 64).bfloat16(), random(9, 3, seed=1)
    outs = []
    for merge_one in MERGES:
        out, lse = whole(9, 64)
        out = out.bfloat16()
        out += random(9, NUM_TOKENS, 64, seed=2).bfloat16()
        merge_one(out, lse, rows, layout(part), part_lse)
        outs.append(out)
    # In float32 both differ in the last bit, which now and then decides to which side is rounded.
    apart = (outs[0].view(torch.int16).int() - outs[1].view(torch.int16).int()).abs()
    assert int(apart.max()) <= 1
    assert int((apart > 0).sum()) <= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pass_waits_for_the_compiler(dtype: torch.dtype) -> None:
    compile_loop(dtype)
    before = len(merge.signatures)
    out, lse = whole(9, 64)
    out = out.to(dtype)
    for rows in (slice(0, 3), torch.tensor([7, 0, 11])):
        for layout in (as_is, rows_first, channels_apart, within_more):
            merge_by_loop(out, lse, rows, layout(random(9, 3, 64).to(dtype)), layout(random(9, 3, 1))[..., 0])
    assert len(merge.signatures) == before
