"""The Triton kernels of paged attention; see `triton` beside this file for what they are launched with.

Importing this file needs triton, so only the back end's factory does it. All addresses are int64. Every access is
masked or clamped to what exists, and what a mask hides is never read: unused slots may hold anything, NaN included.
Scores, softmax and sums are float32. A tile is a block of query rows of one run and one key head; row r of a run is
token r // GROUP and query head r % GROUP of the group, so that short runs of grouped heads still fill a tile.

The kernels are checked in Triton's interpreter and compiled ahead of time; they have not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether this process runs the kernels in the interpreter, on CPU tensors; fixed by this import."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_tokens"])
def write_kv(
    key_ptr,  # [num_kv_heads, num_tokens, KEY_DIM]
    value_ptr,  # [num_kv_heads, num_tokens, VALUE_DIM]
    key_cache_ptr,  # [num_slots, num_kv_heads, KEY_DIM]
    value_cache_ptr,  # [num_slots, num_kv_heads, VALUE_DIM]
    slots_ptr,  # [num_tokens] int64
    num_tokens,
    key_stride_head,
    key_stride_token,
    key_stride_dim,
    value_stride_head,
    value_stride_token,
    value_stride_dim,
    key_cache_stride_slot,
    key_cache_stride_head,
    key_cache_stride_dim,
    value_cache_stride_slot,
    value_cache_stride_head,
    value_cache_stride_dim,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """Scatter the new keys and values of one key head to their slots; grid (token block, key head)."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = tl.program_id(1).to(tl.int64)
    in_range = tokens < num_tokens
    slots = tl.load(slots_ptr + tokens, mask=in_range, other=0)

    key_dims = tl.arange(0, BLOCK_KEY_DIM)
    key_mask = in_range[:, None] & (key_dims < KEY_DIM)[None, :]
    source = head * key_stride_head + tokens[:, None] * key_stride_token + key_dims[None, :] * key_stride_dim
    target = (
        slots[:, None] * key_cache_stride_slot + head * key_cache_stride_head + key_dims[None, :] * key_cache_stride_dim
    )
    tl.store(key_cache_ptr + target, tl.load(key_ptr + source, mask=key_mask), mask=key_mask)

    value_dims = tl.arange(0, BLOCK_VALUE_DIM)
    value_mask = in_range[:, None] & (value_dims < VALUE_DIM)[None, :]
    source = head * value_stride_head + tokens[:, None] * value_stride_token + value_dims[None, :] * value_stride_dim
    target = (
        slots[:, None] * value_cache_stride_slot
        + head * value_cache_stride_head
        + value_dims[None, :] * value_cache_stride_dim
    )
    tl.store(value_cache_ptr + target, tl.load(value_ptr + source, mask=value_mask), mask=value_mask)


@triton.jit(do_not_specialize=["sliding_window", "softcap"])
def attend(
    query_ptr,  # [num_heads, num_tokens, KEY_DIM]
    key_cache_ptr,  # [num_slots, num_kv_heads, KEY_DIM]
    value_cache_ptr,  # [num_slots, num_kv_heads, VALUE_DIM]
    page_table_ptr,  # [num_table_pages] int32, the page tables of all runs, one after the other
    tiles_ptr,  # [num_tiles, 8] int32, see TILE_FIELDS
    out_ptr,  # [num_out_tokens, num_heads, VALUE_DIM]
    lse_ptr,  # [num_out_tokens, num_heads] float32
    scale,
    sliding_window,
    softcap,
    query_stride_head,
    query_stride_token,
    query_stride_dim,
    key_stride_slot,
    key_stride_head,
    key_stride_dim,
    value_stride_slot,
    value_stride_head,
    value_stride_dim,
    out_stride_token,
    out_stride_head,
    out_stride_dim,
    lse_stride_token,
    lse_stride_head,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DOT_FLOAT32: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """Attend one tile of query rows to its range of keys; grid (tile, key head).

    Source: FlashAttention-2, arXiv:2307.08691v1, Alg. 1 forward, base 2 instead of e. Deviation: keys are
    found through a page table, and the range of keys is the tile's, which is shorter than the run under a
    window or a split.
    """
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 8
    kv_head = tl.program_id(1).to(tl.int64)
    query_token = tl.load(tile_ptr).to(tl.int64)
    out_token = tl.load(tile_ptr + 1).to(tl.int64)
    first_row = tl.load(tile_ptr + 2)
    num_rows = tl.load(tile_ptr + 3)
    run_start = tl.load(tile_ptr + 4)
    keys_begin = tl.load(tile_ptr + 5)
    keys_end = tl.load(tile_ptr + 6)
    table_ptr = page_table_ptr + tl.load(tile_ptr + 7).to(tl.int64)

    is_row = first_row + tl.arange(0, BLOCK_ROWS) < num_rows
    # Rows past the end of the run repeat its last row: they read what it reads and are not stored.
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), num_rows - 1)
    row_tokens = rows // GROUP
    row_positions = run_start + row_tokens
    last_seen = tl.minimum(row_positions, keys_end - 1)
    row_heads = kv_head * GROUP + rows % GROUP
    key_dims = tl.arange(0, BLOCK_KEY_DIM)
    value_dims = tl.arange(0, BLOCK_VALUE_DIM)
    is_key_dim = key_dims < KEY_DIM
    is_value_dim = value_dims < VALUE_DIM

    query_offsets = row_heads * query_stride_head + (query_token + row_tokens) * query_stride_token
    query = tl.load(
        query_ptr + query_offsets[:, None] + key_dims[None, :] * query_stride_dim,
        mask=is_key_dim[None, :],
        other=0.0,
    )
    if DOT_FLOAT32:
        query = query.to(tl.float32)
    log2_scale = scale * LOG2_E
    key_head_ptr = key_cache_ptr + kv_head * key_stride_head
    value_head_ptr = value_cache_ptr + kv_head * value_stride_head

    row_max = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], tl.float32)
    for block_begin in range(keys_begin, keys_end, BLOCK_KEYS):
        positions = block_begin + tl.arange(0, BLOCK_KEYS)
        is_key = positions < keys_end
        pages = tl.load(table_ptr + positions // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        slots = pages * PAGE_SIZE + positions % PAGE_SIZE

        key = tl.load(
            key_head_ptr + slots[:, None] * key_stride_slot + key_dims[None, :] * key_stride_dim,
            mask=is_key[:, None] & is_key_dim[None, :],
            other=0.0,
        )
        if DOT_FLOAT32:
            key = key.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)), which is 1 long before the power would overflow.
            power = tl.exp2(tl.minimum(scores * (2.0 * log2_scale / softcap), 126.0))
            scores = (softcap * LOG2_E) * (1.0 - 2.0 / (1.0 + power))
        else:
            scores = scores * log2_scale
        visible = positions[None, :] <= last_seen[:, None]
        if HAS_WINDOW:
            visible &= positions[None, :] > row_positions[:, None] - sliding_window
        scores = tl.where(visible, scores, -float("inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row may see nothing of this block, nor of any before it: keep -inf - -inf out of the exponent.
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max

        value = tl.load(
            value_head_ptr + slots[:, None] * value_stride_slot + value_dims[None, :] * value_stride_dim,
            mask=is_key[:, None] & is_value_dim[None, :],
            other=0.0,
        )
        if DOT_FLOAT32:
            value = value.to(tl.float32)
        total = tl.dot(weights.to(value.dtype), value, total * rescale[:, None], input_precision="ieee")

    out_offsets = (out_token + row_tokens) * out_stride_token + row_heads * out_stride_head
    tl.store(
        out_ptr + out_offsets[:, None] + value_dims[None, :] * out_stride_dim,
        total / row_sum[:, None],
        mask=is_row[:, None] & is_value_dim[None, :],
    )
    lse_offsets = (out_token + row_tokens) * lse_stride_token + row_heads * lse_stride_head
    tl.store(lse_ptr + lse_offsets, (row_max + tl.log2(row_sum)) * LN_2, mask=is_row)


@triton.jit
def merge_splits(
    part_out_ptr,  # [num_parts, num_heads, VALUE_DIM] float32
    part_lse_ptr,  # [num_parts, num_heads] float32
    splits_ptr,  # [num_split_tokens, 3] int32, see SPLIT_FIELDS
    out_ptr,  # [num_out_tokens, num_heads, VALUE_DIM]
    lse_ptr,  # [num_out_tokens, num_heads] float32
    part_out_stride_part,
    part_out_stride_head,
    part_out_stride_dim,
    part_lse_stride_part,
    part_lse_stride_head,
    out_stride_token,
    out_stride_head,
    out_stride_dim,
    lse_stride_token,
    lse_stride_head,
    VALUE_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """Merge the parts of one token and head by their log-sum-exp; grid (split token, head)."""
    split_ptr = splits_ptr + tl.program_id(0).to(tl.int64) * 3
    head = tl.program_id(1).to(tl.int64)
    out_token = tl.load(split_ptr).to(tl.int64)
    first_part = tl.load(split_ptr + 1).to(tl.int64)
    num_parts = tl.load(split_ptr + 2)

    parts = tl.arange(0, BLOCK_PARTS)
    dims = tl.arange(0, BLOCK_VALUE_DIM)
    is_part = parts < num_parts
    is_dim = dims < VALUE_DIM
    part_lse = tl.load(
        part_lse_ptr + (first_part + parts) * part_lse_stride_part + head * part_lse_stride_head,
        mask=is_part,
        other=-float("inf"),
    )
    part_out = tl.load(
        part_out_ptr
        + (first_part + parts)[:, None] * part_out_stride_part
        + head * part_out_stride_head
        + dims[None, :] * part_out_stride_dim,
        mask=is_part[:, None] & is_dim[None, :],
        other=0.0,
    )
    largest = tl.max(part_lse, 0)
    weights = tl.exp2((part_lse - largest) * LOG2_E)
    weight_sum = tl.sum(weights, 0)
    out = tl.sum(weights[:, None] * part_out, 0) / weight_sum
    tl.store(
        out_ptr + out_token * out_stride_token + head * out_stride_head + dims * out_stride_dim,
        out,
        mask=is_dim,
    )
    lse = largest + tl.log2(weight_sum) * LN_2
    tl.store(lse_ptr + out_token * lse_stride_token + head * lse_stride_head, lse)
