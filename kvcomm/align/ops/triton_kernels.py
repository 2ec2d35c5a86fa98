"""The Triton kernel that moves spans of KV; see `triton_launch` for what it is launched with.

Importing this file needs triton, so only the factory does it. One program moves a block of tokens of one head in one
layer. Addresses are int64. Every access is masked to what exists, and what a mask hides is never read. Sums and
rotations are float32, each result is rounded once. Angles come as tables: sines of large angles would take local
memory.

The kernel is checked in Triton's interpreter and compiled ahead of time; it has not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether this process runs the kernel in the interpreter, on CPU tensors; fixed by this import."""

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

NO_ROPE = tl.constexpr(0)
HALVES = tl.constexpr(1)
INTERLEAVED = tl.constexpr(2)


@triton.jit(do_not_specialize=["num_tokens"])
def move_rows(
    stored_ptr,  # [num_layers] int64, addresses of [num_slots, num_heads, DIM] ELEMENT: keys, or values
    codes_ptr,  # [num_layers] int64, addresses of [num_anchors, num_heads * DIM] int8
    scales_ptr,  # [num_layers] int64, addresses of [num_anchors] float32
    groups_ptr,  # [num_layers] int32, which neighbors a layer uses
    ropes_ptr,  # [num_layers] int32, which rotations a layer uses
    sources_ptr,  # [num_tokens] int64 slots
    targets_ptr,  # [num_tokens] int64 slots
    indices_ptr,  # [num_groups, num_tokens, K] int32, rows of the anchors
    weights_ptr,  # [num_groups, num_tokens, K] float32
    move_ptr,  # [num_ropes, 2, ROTARY / 2] float32, cos and sin from the source's positions to the target's
    place_ptr,  # [num_ropes, num_tokens, 2, ROTARY / 2] float32, cos and sin from position 0 to each token's own
    num_tokens,
    stored_stride_slot,
    stored_stride_head,
    codes_stride_row,
    ELEMENT: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    ROPE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """x' = R(move) x + R(place) sum of weight * scale * code; grid (token block, head, layer). K = 0: no offsets.

    With NO_ROPE nothing is rotated (values, and keys of layers without positions). BLOCK_REST = 0: all is rotated.
    """
    head = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < num_tokens
    stored = tl.multiple_of(tl.load(stored_ptr + layer).to(tl.pointer_type(ELEMENT)), 16) + head * stored_stride_head
    sources = stored + tl.load(sources_ptr + tokens, mask=is_token, other=0)[:, None] * stored_stride_slot
    targets = stored + tl.load(targets_ptr + tokens, mask=is_token, other=0)[:, None] * stored_stride_slot

    codes = sources  # without offsets nothing is read from it
    scales = scales_ptr
    indices = indices_ptr
    weights = weights_ptr
    if K > 0:
        codes = tl.multiple_of(tl.load(codes_ptr + layer).to(tl.pointer_type(tl.int8)), 16) + head * DIM
        scales = tl.load(scales_ptr + layer).to(tl.pointer_type(tl.float32))
        chosen = (tl.load(groups_ptr + layer).to(tl.int64) * num_tokens + tokens) * K
        indices = indices_ptr + chosen
        weights = weights_ptr + chosen

    if ROPE != NO_ROPE:
        HALF: tl.constexpr = ROTARY // 2
        pairs = tl.arange(0, BLOCK_HALF)
        is_pair = pairs < HALF
        rope = tl.load(ropes_ptr + layer).to(tl.int64)
        move = move_ptr + rope * ROTARY + pairs
        place = place_ptr + (rope * num_tokens + tokens[:, None]) * ROTARY + pairs[None, :]
        is_in = is_token[:, None] & is_pair[None, :]
        move_cos = tl.load(move, mask=is_pair, other=0.0)[None, :]
        move_sin = tl.load(move + HALF, mask=is_pair, other=0.0)[None, :]
        if ROPE == HALVES:
            first = tl.load(sources + pairs[None, :], mask=is_in).to(tl.float32)
            second = tl.load(sources + HALF + pairs[None, :], mask=is_in).to(tl.float32)
        else:
            channels = tl.arange(0, 2 * BLOCK_HALF)
            is_channel = is_token[:, None] & (channels < ROTARY)[None, :]
            whole = tl.load(sources + channels[None, :], mask=is_channel).to(tl.float32)
            first, second = tl.split(tl.reshape(whole, [BLOCK_TOKENS, BLOCK_HALF, 2]))
        new_first = first * move_cos - second * move_sin
        new_second = second * move_cos + first * move_sin
        if K > 0:
            if ROPE == HALVES:
                added_first = _weighted(
                    codes + pairs[None, :], scales, indices, weights, codes_stride_row, is_token, is_in, K
                )
                added_second = _weighted(
                    codes + HALF + pairs[None, :], scales, indices, weights, codes_stride_row, is_token, is_in, K
                )
            else:
                added = _weighted(
                    codes + channels[None, :], scales, indices, weights, codes_stride_row, is_token, is_channel, K
                )
                added_first, added_second = tl.split(tl.reshape(added, [BLOCK_TOKENS, BLOCK_HALF, 2]))
            place_cos = tl.load(place, mask=is_in, other=0.0)
            place_sin = tl.load(place + HALF, mask=is_in, other=0.0)
            new_first += added_first * place_cos - added_second * place_sin
            new_second += added_second * place_cos + added_first * place_sin
        if ROPE == HALVES:
            tl.store(targets + pairs[None, :], new_first.to(ELEMENT), mask=is_in)
            tl.store(targets + HALF + pairs[None, :], new_second.to(ELEMENT), mask=is_in)
        else:
            joined = tl.reshape(tl.join(new_first, new_second), [BLOCK_TOKENS, 2 * BLOCK_HALF])
            tl.store(targets + channels[None, :], joined.to(ELEMENT), mask=is_channel)

    if BLOCK_REST > 0:
        rest = ROTARY + tl.arange(0, BLOCK_REST)
        is_rest = is_token[:, None] & (rest < DIM)[None, :]
        kept = tl.load(sources + rest[None, :], mask=is_rest).to(tl.float32)
        if K > 0:
            kept += _weighted(codes + rest[None, :], scales, indices, weights, codes_stride_row, is_token, is_rest, K)
        tl.store(targets + rest[None, :], kept.to(ELEMENT), mask=is_rest)


@triton.jit
def _weighted(codes, scales, indices, weights, stride_row, is_token, is_in, K: tl.constexpr):
    """Sum over K neighbors of weight * scale * code, float32 like `is_in`; `codes` points at the columns of row 0."""
    total = tl.zeros(is_in.shape, tl.float32)
    for neighbor in tl.static_range(K):
        row = tl.load(indices + neighbor, mask=is_token, other=0).to(tl.int64)
        weight = tl.load(weights + neighbor, mask=is_token, other=0.0) * tl.load(scales + row, mask=is_token, other=0.0)
        code = tl.load(codes + row[:, None] * stride_row, mask=is_in, other=0)
        total += weight[:, None] * code.to(tl.float32)
    return total
