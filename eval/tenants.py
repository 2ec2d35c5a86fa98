"""Whether the time of an answer tells one tenant what another has asked: a measured attack on a real server.

    python -m eval.tenants [--model smollm2-135m] [--repeats N] [--json]

The attacker asks for one token behind a prompt and takes the time. In each pair, in random order, the victim has asked
the very same prompt just before (`sent`), or another one of the same length (`other`). If caches are shared in any way
the first is faster. `control_*` shows that the test would see it: the attacker asks the prompt again, and hits its own
cache. Times of the two kinds are compared by the Mann-Whitney test, two-sided.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

from scipy.stats import mannwhitneyu

from eval.command import note
from eval.figures import Figure, Report
from eval.served import served
from eval.workload import add_sizes, make_parser, parse, run, settings
from kvcomm import Engine
from kvcomm.lab.timings import Samples, TakeTokens

ATTACKER, VICTIM = "attacker", "victim"
NOTE_EVERY = 20


class Client:
    """One tenant, on a connection of its own."""

    def __init__(self, port: int, key: str, model: str) -> None:
        self._connection = HTTPConnection("127.0.0.1", port)
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._model = model

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def seconds(self, prompt: Sequence[int]) -> float:
        """Ask for one token behind a prompt; until all of the answer is there."""
        body = json.dumps({"model": self._model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0})
        start = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, self._headers)
        response = self._connection.getresponse()
        answer = response.read()
        elapsed_s = time.perf_counter() - start
        if response.status != 200:
            raise OSError(f"the server answered {response.status}: {answer.decode()}")
        return elapsed_s


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser("tenants", "Whether answer times tell a tenant what another one has asked.")
    add_sizes(parser, prompt_tokens=128)
    return run(parse(parser, arguments, repeats=200, quick_repeats=20), measure)


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """All figures of an engine."""
    sent: list[float] = []
    other: list[float] = []
    again: list[float] = []
    order = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder, serving(engine, Path(folder)) as (attacker, victim):
        for index in range(options.repeats):
            if index % NOTE_EVERY == 0:
                note(f"pair {index + 1} of {options.repeats}")
            for is_sent in order.sample([True, False], 2):
                prompt, unrelated = take(options.prompt_tokens), take(options.prompt_tokens)
                victim.seconds(prompt if is_sent else unrelated)
                (sent if is_sent else other).append(attacker.seconds(prompt))
            again.append(attacker.seconds(prompt))
    samples = {"sent_s": sent, "other_s": other, "again_s": again}
    return Report("tenants", figures(sent, other, again), settings(engine, options), samples)


def figures(sent: Sequence[float], other: Sequence[float], again: Sequence[float]) -> list[Figure]:
    """What the times of the three kinds say, in seconds each."""
    times = {name: Samples(tuple(1e3 * second for second in kind)) for name, kind in _named(sent, other, again)}
    return [
        *(Figure(f"{name}_ms", kind.median, "ms", kind.quartiles) for name, kind in times.items()),
        Figure("difference_ms", times["sent"].median - times["other"].median, "ms"),
        Figure("p_value", float(mannwhitneyu(sent, other).pvalue), "probability", None, "> 0.01"),
        Figure("control_difference_ms", times["again"].median - times["other"].median, "ms"),
        Figure("control_p_value", float(mannwhitneyu(again, other).pvalue), "probability", None, "< 0.01"),
    ]


def _named(*kinds: Sequence[float]) -> Iterator[tuple[str, Sequence[float]]]:
    yield from zip(("sent", "other", "again"), kinds, strict=True)


@contextmanager
def serving(engine: Engine, folder: Path) -> Iterator[tuple[Client, Client]]:
    """A server with keys on a free port of this machine, and its two tenants."""
    from kvcomm.server import add_key

    file = folder / "keys.json"
    keys = [add_key(file, name) for name in (ATTACKER, VICTIM)]
    with served(engine, keys=file) as (port, model):
        attacker, victim = (Client(port, key, model) for key in keys)
        with closing(attacker), closing(victim):
            yield attacker, victim


if __name__ == "__main__":
    sys.exit(main())
