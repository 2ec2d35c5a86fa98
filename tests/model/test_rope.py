"""Rotation against its second derivation: multiplication by unit complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcomm.model.rope import RopeGeometry, rotate

DELTAS = (0, 1, -1, 37, -200, 4096)


def make_rope(rotary_dim: int, *, interleaved: bool, attention_scaling: float = 1.0) -> RopeGeometry:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    inv_freq = tuple((10000.0**-exponents).float().tolist())
    return RopeGeometry("default", inv_freq, interleaved=interleaved, attention_scaling=attention_scaling)


def random_keys(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotate_by_complex(keys: Tensor, delta: int, rope: RopeGeometry) -> Tensor:
    """Each pair of channels is a complex number, turned by e^(i * delta * inv_freq)."""
    turned = keys[..., : rope.rotary_dim].double()
    half = rope.rotary_dim // 2
    if rope.interleaved:
        real, imaginary = turned[..., 0::2], turned[..., 1::2]
    else:
        real, imaginary = turned[..., :half], turned[..., half:]
    angle = delta * torch.tensor(rope.inv_freq, dtype=torch.float64)
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    out = keys.double().clone()
    if rope.interleaved:
        out[..., 0 : rope.rotary_dim : 2], out[..., 1 : rope.rotary_dim : 2] = product.real, product.imag
    else:
        out[..., :half], out[..., half : rope.rotary_dim] = product.real, product.imag
    return out


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 16])
def test_equals_complex_multiplication(rotary_dim: int, interleaved: bool, delta: int) -> None:
    rope = make_rope(rotary_dim, interleaved=interleaved)
    keys = random_keys(5, 3, 16)
    # float32 angles: up to half an ulp of delta * inv_freq
    atol = max(1e-6, abs(delta) * 2**-23) * float(keys.abs().max())
    torch.testing.assert_close(
        rotate(keys, delta, rope).double(), rotate_by_complex(keys, delta, rope), rtol=0, atol=atol
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_leaves_the_other_channels_bit_identical(interleaved: bool) -> None:
    keys = random_keys(4, 2, 16)
    moved = rotate(keys, 19, make_rope(6, interleaved=interleaved))
    assert torch.equal(moved[..., 6:], keys[..., 6:])
    assert bool((moved[..., :6] != keys[..., :6]).all())


@pytest.mark.parametrize("interleaved", [False, True])
def test_moves_add_up_and_go_back(interleaved: bool) -> None:
    rope = make_rope(12, interleaved=interleaved)
    keys = random_keys(4, 2, 16)
    torch.testing.assert_close(rotate(rotate(keys, 50, rope), -80, rope), rotate(keys, -30, rope))
    torch.testing.assert_close(rotate(rotate(keys, 123, rope), -123, rope), keys)
    assert torch.equal(rotate(keys, 0, rope), keys)


def test_scores_depend_on_the_distance_only() -> None:
    """RoFormer's defining property: moving query and key by the same amount changes no score."""
    rope = make_rope(16, interleaved=False)
    query, key = random_keys(7, 16), random_keys(7, 16, seed=1)
    before = (query * rotate(key, 5, rope)).sum(-1)
    after = (rotate(query, 90, rope) * rotate(key, 95, rope)).sum(-1)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
    assert bool(((query * rotate(key, 6, rope)).sum(-1) - before).abs().max() > 0.1)


def test_attention_scaling_cancels_in_a_move() -> None:
    keys = random_keys(3, 2, 8)
    plain, scaled = make_rope(8, interleaved=False), make_rope(8, interleaved=False, attention_scaling=1.3)
    assert torch.equal(rotate(keys, 11, plain), rotate(keys, 11, scaled))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype, interleaved: bool) -> None:
    rope = make_rope(12, interleaved=interleaved)
    keys = random_keys(4, 2, 16).to(dtype)
    moved = rotate(keys, -61, rope)
    assert moved.dtype == dtype
    assert torch.equal(moved, rotate(keys.float(), -61, rope).to(dtype))


def test_input_is_unchanged_and_strided_views_are_taken() -> None:
    rope = make_rope(8, interleaved=True)
    whole = random_keys(2, 6, 10)
    view = whole.transpose(0, 1)[::2, :, :8]
    before = whole.clone()
    moved = rotate(view, 7, rope)
    assert torch.equal(whole, before)
    assert moved.data_ptr() != whole.data_ptr()
    assert torch.equal(moved, rotate(view.clone(), 7, rope))


def test_rotary_dim_counts_both_channels_of_a_pair() -> None:
    assert make_rope(6, interleaved=True).rotary_dim == 6
