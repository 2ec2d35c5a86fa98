"""Engines over a shared tier: what a second worker still computes, and what a tier costs that becomes slow.

    python -m eval.tier_serving --url URL [--model smollm2-135m] [--tokens N] [--prompts N] [--rounds N]
                                [--json] [--out FILE]

`recomputed_tokens`: a process answers prompts and ends; another one answers them too, and this is what it computes of
what lies in whole runs of the tier. `slow_tier_cost`: an engine reads prompts from the tier; in the middle every read
takes a hundred times as long. The first tokens from then on are held against computing the same prompts exactly, in the
same process and in turn. One pass over a prompt takes a tenth longer or shorter than the next one over the same prompt
for reasons of the machine's, so all of this happens in several rounds, each with an engine and a tier that know nothing
of the former ones, and the first prompt behind the change, the second and so on have their medians over the rounds: the
longest of these is the figure. `exact_twice` is the same for the exact engine held against itself: what of the figure
is the machine's. `slow_tier_cost_cpu` is in seconds of the processor, and the share of the time to the first token that
the request waited on top, which others on the machine disturb less.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.command import note, positive
from eval.figures import Figure, Report
from kvcomm import Engine, KVCommError
from kvcomm.lab.models import load_model
from kvcomm.tiers import ObjectStore, StoredObject, Tier, open_store

SLOWDOWN = 100.0
FIRST_TOKEN, LAST_TOKEN = 1000, 40_000
"""Of the vocabulary, that prompts are drawn from."""


class SlowedStore:
    """A store whose reads take longer by what a test says for their bytes."""

    def __init__(self, store: ObjectStore) -> None:
        self.kind, self.url = store.kind, store.url
        self.byte_s = 0.0
        self._store = store

    def get(self, key: str) -> memoryview:
        """The object, late."""
        content = self._store.get(key)
        time.sleep(self.byte_s * content.nbytes)
        return content

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """The part of the object, late."""
        content = self._store.get_range(key, start, length)
        time.sleep(self.byte_s * content.nbytes)
        return content

    def put_once(self, key: str, parts: Sequence[memoryview | bytes]) -> bool:
        """As the store."""
        return self._store.put_once(key, parts)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """As the store."""
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        """As the store."""
        self._store.delete(key)

    def sweep(self) -> int:
        """As the store."""
        return self._store.sweep()

    def close(self) -> None:
        """As the store."""
        self._store.close()


class Asked(NamedTuple):
    """One prompt answered: seconds to its first token, of the processor, and waited; tokens by where they came from."""

    ttft_s: float
    cpu_s: float
    waited_s: float
    computed_tokens: int
    tier_tokens: int

    def cost(self, exact: Asked) -> float:
        """What it took over computing exactly: of the processor, and the share of its time in which it waited."""
        return self.cpu_s / exact.cpu_s + self.waited_s / self.ttft_s


class Compared(NamedTuple):
    """One prompt asked of an engine without a tier, of another one, and of the one over the tier."""

    exact: Asked
    again: Asked
    own: Asked


class Sizes(NamedTuple):
    """What is measured: the tier's URL, the model, tokens of a prompt, prompts before and behind the change, rounds."""

    url: str
    model: str = "smollm2-135m"
    num_tokens: int = 900
    num_prompts: int = 5
    num_rounds: int = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.worker is not None:
            sys.stdout.write(json.dumps([asked._asdict() for asked in _work(options)]))
            return 0
        report = measure(options)
    except KVCommError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    report.emit(as_json=options.json)
    if options.out is not None:
        report.save(options.out)
    return 0


def measure(options: Namespace) -> Report:
    """All figures."""
    sizes = Sizes(options.url, options.model, options.tokens, options.prompts, options.rounds)
    figures = [*second_worker(sizes), *slowed_tier(sizes)]
    config = {
        "model": options.model,
        "tokens": options.tokens,
        "prompts": options.prompts,
        "rounds": options.rounds,
        "slowdown": SLOWDOWN,
    }
    return Report("tier_serving", figures, config)


def second_worker(sizes: Sizes) -> list[Figure]:
    """What a process computes of prompts that another one has finished."""
    seed = int(time.time())
    first, second = (_in_process(sizes, seed) for _ in range(2))
    run_tokens = Tier.open(sizes.url).run_tokens
    num_rest = sizes.num_tokens - (sizes.num_tokens - 1) // run_tokens * run_tokens
    recomputed = sum(max(0, each.computed_tokens - num_rest) for each in second)
    ratio = float(np.median([each.cpu_s for each in second]) / np.median([each.cpu_s for each in first]))
    return [
        Figure("recomputed_tokens", recomputed, "tokens", None, "0"),
        Figure("second_worker_cpu", ratio, "x"),
    ]


def slowed_tier(sizes: Sizes) -> list[Figure]:
    """What a tier costs that becomes slow while it is used."""
    loaded = load_model(sizes.model)
    known = {"weights_id": loaded.weights_digest}
    prompts = _prompts(sizes.num_rounds * 2 * sizes.num_prompts, sizes.num_tokens, int(time.time()) + 1)
    with Engine(loaded.model, loaded.tokenizer, **known, tier=sizes.url) as first:
        for index, prompt in enumerate(prompts):
            note(f"computing prompt {index + 1} of {len(prompts)}")
            _ask(first, prompt)
            first.tiering.flush()
    rounds: list[list[Compared]] = []
    with (
        Engine(loaded.model, loaded.tokenizer, **known) as exact,
        Engine(loaded.model, loaded.tokenizer, **known) as again,
    ):
        for start in range(0, len(prompts), 2 * sizes.num_prompts):
            note(f"round {len(rounds) + 1} of {sizes.num_rounds}")
            store = SlowedStore(open_store(sizes.url))
            tier = Tier(store)
            with Engine(loaded.model, loaded.tokenizer, **known, tier=tier) as second:
                rounds.append(_slowed(sizes, store, tier, (exact, again, second), prompts[start:]))
            tier.close()
    quick = [each for compared in rounds for each in compared[: sizes.num_prompts]]
    slow = [compared[sizes.num_prompts :] for compared in rounds]
    read = sum(own.tier_tokens for _, _, own in quick) / (len(quick) * sizes.num_tokens)
    return [
        Figure("tier_over_exact_cpu", float(np.median([own.cpu_s / exact.cpu_s for exact, _, own in quick])), "x"),
        Figure("tier_share", read, "share"),
        _longest("slow_tier_cost", slow, lambda each: each.own.ttft_s / each.exact.ttft_s, "<= 1.05"),
        _longest("slow_tier_cost_cpu", slow, lambda each: each.own.cost(each.exact), "<= 1.05"),
        _longest("exact_twice", slow, lambda each: each.again.ttft_s / each.exact.ttft_s),
    ]


def _slowed(
    sizes: Sizes, store: SlowedStore, tier: Tier, engines: tuple[Engine, Engine, Engine], prompts: list[list[int]]
) -> list[Compared]:
    """One round: prompts from the tier, and as many after every read takes so much longer."""
    compared = []
    for index, prompt in enumerate(prompts[: 2 * sizes.num_prompts]):
        if index == sizes.num_prompts:
            store.byte_s = (SLOWDOWN - 1) * tier.reads.byte_s
        # Who comes first has the machine as others left it: each does so in turn.
        order = [(index + turn) % len(engines) for turn in range(len(engines))]
        asked = {which: _ask(engines[which], prompt) for which in order}
        compared.append(Compared(asked[0], asked[1], asked[2]))
    return compared


def _longest(
    figure_id: str, rounds: list[list[Compared]], ratio: Callable[[Compared], float], goal: str = ""
) -> Figure:
    """Of the prompts behind the change, the one with the largest median over rounds; its spread are its quartiles."""
    ratios = np.array([[ratio(each) for each in compared] for compared in rounds])
    longest = int(np.median(ratios, axis=0).argmax())
    low, value, high = np.percentile(ratios[:, longest], [25, 50, 75])
    return Figure(figure_id, float(value), "x", (float(low), float(high)), goal)


def _in_process(sizes: Sizes, seed: int) -> list[Asked]:
    note("a worker answers")
    command = [sys.executable, "-m", "eval.tier_serving", "--url", sizes.url, "--model", sizes.model]
    numbers = ["--tokens", str(sizes.num_tokens), "--prompts", str(sizes.num_prompts), "--worker", str(seed)]
    done = subprocess.run([*command, *numbers], stdout=subprocess.PIPE, text=True, check=True)
    return [Asked(**each) for each in json.loads(done.stdout)]


def _work(options: Namespace) -> list[Asked]:
    with Engine.load(options.model, tier=options.url) as engine:
        asked = [_ask(engine, prompt) for prompt in _prompts(options.prompts, options.tokens, options.worker)]
        engine.tiering.flush()
    return asked


def _prompts(count: int, num_tokens: int, seed: int) -> list[list[int]]:
    drawn = np.random.default_rng(seed).integers(FIRST_TOKEN, LAST_TOKEN, (count, num_tokens))
    return [list(map(int, row)) for row in drawn]


def _ask(engine: Engine, prompt: Sequence[int]) -> Asked:
    start_s = time.process_time()
    usage = engine.generate(prompt, max_new_tokens=1, temperature=0).usage
    cpu_s = time.process_time() - start_s
    return Asked(usage.ttft_s, cpu_s, usage.queue_s, usage.computed_tokens, usage.tier_tokens)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.tier_serving", description="Engines over a shared tier.")
    parser.add_argument("--url", required=True, help="of the tier: a folder, s3://bucket/prefix, redis://host/0")
    parser.add_argument("--model", default="smollm2-135m", help="[%(default)s]")
    parser.add_argument("--tokens", type=positive, default=900, metavar="N", help="of each prompt [%(default)s]")
    parser.add_argument("--prompts", type=positive, default=5, metavar="N", help="before and behind [%(default)s]")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="of that [%(default)s]")
    parser.add_argument("--worker", type=int, metavar="SEED", help="answer prompts and print what that took")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the whole run to a file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
