"""The loops of alignment on the CPU, compiled by numba: one pass over source and target, offsets from the cache.

Importing this file needs numba, see `kvcomm.model.compiled`. Rows are one token's channels of all heads, float32. NaN
stays NaN: what the compiler may assume of numbers is said loop by loop.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from kvcomm.model.compiled import F, jit

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
Indices = NDArray[np.int32]
Longs = NDArray[np.int64]

BATCH = 4
"""Neighbors that one loop over the channels adds; their number is a multiple of it, filled up with weight 0."""


def _inlined(function: F) -> F:
    return jit(function, fastmath={"contract"}, inline="always")


def _inlined_sums(function: F) -> F:
    return jit(function, fastmath={"contract", "reassoc"}, inline="always")


def _compiled(function: F) -> F:
    return jit(function, parallel=True, fastmath={"contract"})


def _compiled_sums(function: F) -> F:
    """Sums over channels may be reordered: else they are one long chain of additions."""
    return jit(function, parallel=True, fastmath={"contract", "reassoc"})


@_inlined
def _add_weighted(row: Floats, codes: Codes, scales: Floats, indices: Indices, weights: Floats) -> None:
    """Add the weighted offsets of one token to a row, [channels]."""
    for first in range(0, len(indices), BATCH):
        a, b, c, d = indices[first], indices[first + 1], indices[first + 2], indices[first + 3]
        weight_a, weight_b = weights[first] * scales[a], weights[first + 1] * scales[b]
        weight_c, weight_d = weights[first + 2] * scales[c], weights[first + 3] * scales[d]
        row_a, row_b, row_c, row_d = codes[a], codes[b], codes[c], codes[d]
        for channel in range(len(row)):
            row[channel] += (
                weight_a * np.float32(row_a[channel])
                + weight_b * np.float32(row_b[channel])
                + weight_c * np.float32(row_c[channel])
                + weight_d * np.float32(row_d[channel])
            )


@_compiled
def add_offsets(
    source: Floats,
    from_rows: Longs,
    out: Floats,
    to_rows: Longs,
    codes: Codes,
    scales: Floats,
    indices: Indices,
    weights: Floats,
) -> None:
    """out = source + the weighted offsets.

    Args:
        source, out: [num_rows, channels], which may be one; only `to_rows` of `out` are written.
        from_rows, to_rows: [num_tokens], where each token is read and written; none is in both.
        codes, scales: [num_anchors, channels] and [num_anchors].
        indices, weights: [num_tokens, k], k a multiple of BATCH.
    """
    for token in numba.prange(len(from_rows)):
        old, new = source[from_rows[token]], out[to_rows[token]]
        for channel in range(len(new)):
            new[channel] = old[channel]
        _add_weighted(new, codes, scales, indices[token], weights[token])


@_compiled
def turn_and_add(
    source: Floats,
    from_rows: Longs,
    out: Floats,
    to_rows: Longs,
    codes: Codes,
    scales: Floats,
    indices: Indices,
    weights: Floats,
    move: Floats,
    place: Floats,
    dim: int,
    interleaved: bool,
) -> None:
    """out = R(move) source + R(place) the weighted offsets, head by head.

    Args:
        source, from_rows, out, to_rows, codes, scales, indices, weights: as in `add_offsets`; k may be 0.
        move: [2, rotary_dim / 2], cos and sin from the source's positions to the target's.
        place: [num_tokens, 2, rotary_dim / 2], cos and sin from position 0 to each token's own; of no token if k is 0.
        dim: channels of a head; those behind rotary_dim are not rotated.
        interleaved: pairs are neighbors instead of halves of the rotated channels.
    """
    num_channels, half, k = source.shape[1], move.shape[1], indices.shape[1]
    for token in numba.prange(len(from_rows)):
        old, new = source[from_rows[token]], out[to_rows[token]]
        # The sums lie in the target's row until they are turned: nothing is allocated here.
        for channel in range(num_channels):
            new[channel] = 0
        _add_weighted(new, codes, scales, indices[token], weights[token])
        for start in range(0, num_channels, dim):
            # One loop per case, so that each has a stride the compiler knows and no branch inside.
            if k and interleaved:
                for pair in range(half):
                    one, two = start + 2 * pair, start + 2 * pair + 1
                    x, y, dx, dy = old[one], old[two], new[one], new[two]
                    cos, sin = place[token, 0, pair], place[token, 1, pair]
                    new[one] = x * move[0, pair] - y * move[1, pair] + dx * cos - dy * sin
                    new[two] = y * move[0, pair] + x * move[1, pair] + dy * cos + dx * sin
            elif k:
                for pair in range(half):
                    one, two = start + pair, start + half + pair
                    x, y, dx, dy = old[one], old[two], new[one], new[two]
                    cos, sin = place[token, 0, pair], place[token, 1, pair]
                    new[one] = x * move[0, pair] - y * move[1, pair] + dx * cos - dy * sin
                    new[two] = y * move[0, pair] + x * move[1, pair] + dy * cos + dx * sin
            elif interleaved:
                for pair in range(half):
                    one, two = start + 2 * pair, start + 2 * pair + 1
                    x, y = old[one], old[two]
                    new[one] = x * move[0, pair] - y * move[1, pair]
                    new[two] = y * move[0, pair] + x * move[1, pair]
            else:
                for pair in range(half):
                    one, two = start + pair, start + half + pair
                    x, y = old[one], old[two]
                    new[one] = x * move[0, pair] - y * move[1, pair]
                    new[two] = y * move[0, pair] + x * move[1, pair]
            for channel in range(start + 2 * half, start + dim):
                new[channel] += old[channel]


@_compiled
def turn_rows(source: Floats, out: Floats, turns: Floats, dim: int, interleaved: bool) -> None:
    """out = R(turns) source, every token by its own turn.

    Args:
        source, out: [num_tokens, channels]; `out` is overwritten.
        turns: [num_tokens, 2, rotary_dim / 2], cos and sin.
        dim, interleaved: as in `turn_and_add`.
    """
    num_channels, half = source.shape[1], turns.shape[2]
    for token in numba.prange(source.shape[0]):
        for start in range(0, num_channels, dim):
            for pair in range(half):
                one = start + 2 * pair if interleaved else start + pair
                two = one + 1 if interleaved else one + half
                x, y = source[token, one], source[token, two]
                cos, sin = turns[token, 0, pair], turns[token, 1, pair]
                out[token, one] = x * cos - y * sin
                out[token, two] = y * cos + x * sin
            for channel in range(start + 2 * half, start + dim):
                out[token, channel] = source[token, channel]


@_inlined_sums
def _squared_distance(one: Floats, other: Floats) -> np.float32:
    total = np.float32(0)
    for channel in range(len(one)):
        difference = one[channel] - other[channel]
        total += difference * difference
    return total


@_inlined
def _insert(values: Floats, chosen: Longs, last: int, value: np.float32, row: int) -> None:
    """Put a row in its place among those before `last`, ascending by value, equal ones by row."""
    at = last
    while at > 0 and (value < values[at - 1] or (value == values[at - 1] and row < chosen[at - 1])):
        values[at], chosen[at] = values[at - 1], chosen[at - 1]
        at -= 1
    values[at], chosen[at] = value, row


@_inlined
def _smallest(rough: Floats, values: Floats, rows: Longs) -> None:
    """The smallest values of a row of `rough` and where they are, as many as `values` holds."""
    filled, count = 0, len(values)
    for row in range(len(rough)):
        if filled < count:
            _insert(values, rows, filled, rough[row], row)
            filled += 1
        elif rough[row] < values[count - 1]:
            _insert(values, rows, count - 1, rough[row], row)


@_inlined
def _measure(query: Floats, rows: Floats, row: int, num_known: int, values: Floats, near: Longs) -> None:
    """Take a row in among the nearest, of which `num_known` are known by now."""
    value, last = _squared_distance(query, rows[row]), min(num_known, len(near) - 1)
    if num_known < len(near) or value < values[last] or (value == values[last] and row < near[last]):
        _insert(values, near, last, value, row)


@_compiled_sums
def nearest(
    rough: Floats, squares: Floats, queries: Floats, rows: Floats, distances: Floats, found: Longs, num_spare: int
) -> None:
    """The nearest rows of every query.

    Args:
        rough: [num_queries, num_rows], at most the squared distances less `squares`: they choose whom to measure.
        squares: [num_queries].
        queries, rows: [num_queries, dim] and [num_rows, dim].
        distances, found: [num_queries, k]; overwritten with squared distances, ascending, and row numbers, equal ones
            by row; 1 <= k <= num_rows.
        num_spare: rows beyond k that are measured at once.
    """
    num_rows, k = rows.shape[0], found.shape[1]
    count = min(k + num_spare, num_rows)
    for query in numba.prange(queries.shape[0]):
        chosen, smallest = np.empty(count, np.int64), np.empty(count, np.float32)
        _smallest(rough[query], smallest, chosen)
        for index in range(count):
            _measure(queries[query], rows, chosen[index], index, distances[query], found[query])
        limit = smallest[count - 1]
        if distances[query, k - 1] - squares[query] >= limit:
            # Rows that were not chosen, and may still be nearer than the last of the k.
            for row in range(num_rows):
                value = rough[query, row]
                if value >= limit and value <= distances[query, k - 1] - squares[query]:
                    is_measured = False
                    for index in range(count):
                        is_measured |= chosen[index] == row
                    if not is_measured:
                        _measure(queries[query], rows, row, k, distances[query], found[query])


@jit
def longest_matches(tokens: Indices, text: Indices, num_free: int, longest: int, found: Indices) -> None:
    """How long a text ending with each token stands elsewhere, in tokens.

    Args:
        tokens: [num_tokens].
        text: where to look; token i may match anywhere before `num_free + i`.
        longest: length beyond which none is told from another.
        found: [num_tokens]; overwritten.
    """
    # Lengths of the matches that end with a token and, one to the left, at each place; those of the token before.
    lengths, before = np.zeros(len(text) + 1, np.int32), np.zeros(len(text) + 1, np.int32)
    for token in range(len(tokens)):
        lengths, before = before, lengths
        best = 0
        for place in range(min(len(text), num_free + token)):
            length = min(int(before[place]) + 1, longest) if text[place] == tokens[token] else 0
            lengths[place + 1] = length
            best = max(best, length)
        found[token] = best
