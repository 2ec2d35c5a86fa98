"""What a shared tier costs, and what a killed writer leaves in it.

    python -m eval.tier --url URL [--moto] [--model smollm2-135m] [--kills N] [--repeats N] [--json]

`get_over_compute`: seconds of the processor of getting KV of 1,024 tokens from the tier, every byte of it checked, over
those of computing them. `put_over_compute` likewise; what is got must equal what was computed. `torn_reads` and
`wrong_reads`: a process writes and is killed at a random moment, again and again; another one reads all that it has
written: what is there must be whole and right. What a second worker computes again, and what a tier costs that becomes
slow: see `eval.tier_serving`. `--moto` serves `s3://` from this machine, in a process of its own, whose work then
counts as the tier's.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import NamedTuple

import torch
from torch import Tensor

from eval.command import note
from eval.figures import Figure, Report
from eval.moto import s3_running
from eval.tier_serving import Sizes, second_worker, slowed_tier
from eval.workload import add_sizes, make_parser, parse, run, settings
from kvcomm import Engine
from kvcomm.errors import TierError
from kvcomm.lab.timings import Samples, TakeTokens
from kvcomm.tiers import KV, LayerShape, Tier, TierMiss, TierSpace, open_store, sweep

GOALS = {"folder": "<= 0.05", "s3": "<= 0.15"}
VICTIM = TierSpace("eval", "eval", "default", (LayerShape(4, 64, 64),) * 4, torch.float32, 2**16)
"""What the killed process writes: objects of 2 MB."""
VICTIM_RUNS = 4
LONGEST_S = 0.4
"""Until a writer is killed, after its first write has begun."""


class Opened(NamedTuple):
    """A tier to be measured.

    Attributes:
        url: of it.
        cpu_s: seconds of the processor that this process, and the tier's own if it is here, have used.
    """

    url: str
    cpu_s: Callable[[], float]


class Kills(NamedTuple):
    """What was read after writers were killed: objects by what they turned out to be."""

    whole: int = 0
    torn: int = 0
    wrong: int = 0
    leftovers: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser("tier", "What a shared tier costs, and what a killed writer leaves in it.")
    parser.add_argument("--url", help="of the tier: a folder, s3://bucket/prefix, redis://host/0")
    parser.add_argument("--moto", action="store_true", help="start an S3 server here, and use that")
    add_sizes(parser, prompt_tokens=1024, kills=100, served_prompts=5)
    options = parse(parser, arguments, repeats=5, quick_repeats=2)
    if bool(options.url) is options.moto:
        parser.error("give --url or --moto")
    try:
        with _opened(options) as opened:
            return run(options, lambda engine, take, options: measure(engine, take, options, opened))
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def measure(engine: Engine, take: TakeTokens, options: Namespace, opened: Opened) -> Report:
    """All figures of a tier."""
    with closing(Tier.open(opened.url)) as tier:
        get, put, compute = costs(engine, take, options, tier, opened.cpu_s)
        kind, shown = tier.kind, tier.url
    kills = killed_writers(opened.url, options.kills, options.seed)
    sizes = Sizes(opened.url, options.model, options.prompt_tokens, options.served_prompts)
    figures = [
        _ratio("get_over_compute", get.per(compute), GOALS.get(kind, "")),
        _ratio("put_over_compute", put.per(compute)),
        Figure("get_cpu_s", get.median, "s", get.quartiles),
        Figure("compute_cpu_s", compute.median, "s", compute.quartiles),
        Figure("kills", options.kills, "", None, ">= 100"),
        Figure("whole_reads", kills.whole, ""),
        Figure("torn_reads", kills.torn, "", None, "0"),
        Figure("wrong_reads", kills.wrong, "", None, "0"),
        Figure("leftovers", kills.leftovers, ""),
        *second_worker(sizes),
        *slowed_tier(sizes),
    ]
    samples = {"get_cpu_s": get.values, "put_cpu_s": put.values, "compute_cpu_s": compute.values}
    return Report("tier", figures, settings(engine, options, url=shown, kind=kind), samples)


def costs(
    engine: Engine, take: TakeTokens, options: Namespace, tier: Tier, cpu_s: Callable[[], float]
) -> tuple[Samples, Samples, Samples]:
    """Seconds of the processor of getting, putting and computing, one after the other each time."""
    got, written, computed = [], [], []
    for index in range(options.repeats):
        note(f"prompt {index + 1} of {options.repeats}")
        prompt = take(options.prompt_tokens)
        start_s = cpu_s()
        with engine.context(prompt) as context:
            computed.append(cpu_s() - start_s)
            kv = _kv_of(context.to_hf_cache(whole=True).layers)
        space = _space(engine, kv)
        start_s = cpu_s()
        tier.put_prefix(space, prompt, kv)
        written.append(cpu_s() - start_s)
        start_s = cpu_s()
        read = tier.read_prefix(space, prompt, 0, len(prompt) // tier.run_tokens * tier.run_tokens)
        answer = read.miss or read.joined()
        got.append(cpu_s() - start_s)
        _require_same(kv, answer)
    return Samples(tuple(got)), Samples(tuple(written)), Samples(tuple(computed))


def killed_writers(url: str, num_kills: int, seed: int) -> Kills:
    """Kill a writer again and again, and read what it has written.

    Writers are forked from a process that has no threads of its own, so that starting one takes no time.
    """
    order = random.Random(seed)
    first = int(time.time()) * 1000
    with closing(Tier.open(url)) as tier:
        found = Kills()
        for kill in range(num_kills):
            if kill % 20 == 0:
                note(f"kill {kill + 1} of {num_kills}")
            _kill_one(url, first + kill, order.uniform(0, LONGEST_S))
            found = _read_all(tier, first + kill, found)
    with closing(open_store(url)) as store:
        return found._replace(leftovers=sweep(store).leftovers)


def _kill_one(url: str, seed: int, after_s: float) -> None:
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    began = context.Event()
    writer = context.Process(target=_write, args=(url, seed, began), daemon=True)
    writer.start()
    began.wait()
    time.sleep(after_s)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()


def _write(url: str, seed: int, began: Event) -> None:
    """Write one prefix after the other, until killed."""
    torch.set_num_threads(1)
    tier = Tier.open(url)
    began.set()
    for index in range(1000):
        token_ids, kv = _victim(tier, seed, index)
        tier.put_prefix(VICTIM, token_ids, kv)


def _read_all(tier: Tier, seed: int, found: Kills) -> Kills:
    """All that a killed writer has written, up to the first prefix of which nothing is there."""
    whole, torn, wrong, leftovers = found
    for index in range(1000):
        token_ids, kv = _victim(tier, seed, index)
        read = tier.read_prefix(VICTIM, token_ids, 0, len(token_ids))
        for number, run_kv in enumerate(read.runs):
            is_right = _is_same(run_kv, kv.part(number * tier.run_tokens, (number + 1) * tier.run_tokens))
            whole, wrong = whole + is_right, wrong + (not is_right)
        torn += read.miss not in (None, TierMiss.ABSENT)
        if read.miss is not None:
            break
    return Kills(whole, torn, wrong, leftovers)


def _victim(tier: Tier, seed: int, index: int) -> tuple[list[int], KV]:
    """What a writer writes: told by seed and index, so that whoever reads it knows it."""
    generator = torch.Generator().manual_seed(seed * 1000 + index)
    num_tokens = VICTIM_RUNS * tier.run_tokens
    token_ids = torch.randint(VICTIM.vocab_size, (num_tokens,), generator=generator).tolist()
    tensors = [torch.rand(num_tokens, 4, 64, generator=generator) for _ in range(2 * len(VICTIM.shapes))]
    return token_ids, KV(tensors[::2], tensors[1::2])


def _kv_of(layers: Sequence[object]) -> KV:
    """Of layers of a transformers cache, [1, num_kv_heads, num_tokens, dim]."""

    def turned(tensor: Tensor) -> Tensor:
        return tensor[0].transpose(0, 1).contiguous().cpu()

    keys = [turned(layer.keys) for layer in layers]  # type: ignore[attr-defined]  # layers have no common type
    return KV(keys, [turned(layer.values) for layer in layers])  # type: ignore[attr-defined]


def _space(engine: Engine, kv: KV) -> TierSpace:
    shapes = tuple(
        LayerShape(key.shape[1], key.shape[2], value.shape[2]) for key, value in zip(kv.keys, kv.values, strict=True)
    )
    vocab_size = engine.model.config.get_text_config().vocab_size
    return TierSpace(engine.namespace(), "eval", "default", shapes, kv.keys[0].dtype, vocab_size)


def _require_same(kv: KV, answer: KV | TierMiss) -> None:
    if isinstance(answer, TierMiss):
        raise TierError(f"what was just put is a miss: {answer}")
    if not _is_same(answer, kv.part(0, answer.num_tokens)):
        raise TierError("what was got is not what was put")


def _is_same(left: KV, right: KV) -> bool:
    pairs = zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _ratio(name: str, ratios: Samples, goal: str = "") -> Figure:
    return Figure(name, ratios.median, "x", ratios.quartiles, goal)


@contextmanager
def _opened(options: Namespace) -> Iterator[Opened]:
    if not options.moto:
        yield Opened(options.url, time.process_time)
        return
    with s3_running() as server:
        options.url = server.url.partition("?")[0]
        yield Opened(server.url, lambda: time.process_time() + server.cpu_s())


if __name__ == "__main__":
    sys.exit(main())
