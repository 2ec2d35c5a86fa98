"""The costs of one real worker: an engine on this machine, alone.

Seconds of CPU, of one thread: they stay what they are when others use the machine as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from eval.cluster.costs import SMOLLM2, Costs
from kvcomm import Engine, SamplingParams
from kvcomm.lab.timings import TakeTokens, random_tokens, warm_up

LENGTHS = (512, 1024, 2048)
"""Of prompts."""

NUM_STREAMS = 4
NUM_STEPS = 32
REPEATS = 2


def measured(model: str, lengths: Sequence[int] = LENGTHS) -> Costs:
    """What a worker with this model takes on this machine; tier and network stay as they are in `SMOLLM2`.

    Raises:
        KVCommError: the model cannot be loaded, or is too small for these prompts.
    """
    torch.set_num_threads(1)
    with Engine.load(model, dtype="float32", progress=True) as engine:
        take = random_tokens(engine)
        warm_up(engine, take)
        token_s, pair_s = _prefill(engine, take, lengths)
        one, many = (_step(engine, take, num_streams) for num_streams in (1, NUM_STREAMS))
        return replace(
            SMOLLM2,
            token_s=token_s,
            pair_s=pair_s,
            step_s=one,
            stream_s=max((many - one) / (NUM_STREAMS - 1), 0.0),
            token_bytes=engine.cache.page_bytes // engine.cache.page_size,
        )


def _prefill(engine: Engine, take: TakeTokens, lengths: Sequence[int]) -> tuple[float, float]:
    """Seconds per token, and per pair of tokens of which one attends to the other."""
    rows, seconds = [], []
    for length in lengths:
        rows.append((length, length * (length + 1) / 2))
        seconds.append(min(_seconds(engine, [take(length)], 1) for _ in range(REPEATS)))
    (token_s, pair_s), *_ = np.linalg.lstsq(np.array(rows, dtype=float), np.array(seconds), rcond=None)
    return max(float(token_s), 0.0), max(float(pair_s), 0.0)


def _step(engine: Engine, take: TakeTokens, num_streams: int) -> float:
    """Seconds of a decode step of so many answers at once."""
    prompts = [take(64) for _ in range(num_streams)]
    took = [_seconds(engine, prompts, num_tokens) for num_tokens in (1, 1 + NUM_STEPS)]
    return max((took[1] - took[0]) / NUM_STEPS, 0.0)


def _seconds(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
    """CPU seconds of answers of so many tokens to prompts that nobody has seen."""
    engine.cache.clear()
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    started = time.process_time()
    handles = [engine.submit(prompt, sampling) for prompt in prompts]
    for handle in handles:
        handle.result()
    return time.process_time() - started
