"""Whether anything that one caller does, or that fails on its behalf, harms another or changes an exact answer.

    python -m eval.engine_faults [--operations 20000] [--seed 0] [--without adapters,threads] [--json]
    python -m eval.engine_faults --replay out/engine_faults/FINDING.json

Episodes of random operations on small pools: requests with every setting, good and bad, streams and event loops left
early, open prompts that follow answers and each other, contexts, snapshots, pins, quotas, clearing, threads, adapters
switched, engines closed while they work; and
exceptions thrown into every call of a choice's code, of the model and of the memory. A finding is *wrong* if an answer
given as exact is not what a stock model answers, or if somebody meets an error that is not theirs; pages are *leaked*
if they are not free once everything is given back; an engine is *lost* if it closes by itself or gives no answer.
For each kind of finding the operations that lead there are cut down and written to a file. How threads interleave is
not drawn: what needs a certain moment may take several replays.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eval.command import add_outputs, note
from eval.ending import ended_in_order
from eval.engine_faults.episode import Episode, Runner
from eval.engine_faults.faults import POINTS
from eval.engine_faults.findings import Finding, Findings, Harm
from eval.engine_faults.operations import GROUPS, num_of
from eval.engine_faults.subject import has_peft
from eval.figures import Figure, Report
from kvcomm import KVCommError

PER_EPISODE = 200
MAX_SHRINK_RUNS = 60
OPERATIONS_PER_FIRING = 2000
"""Every point must fire once for so many operations, and at least once."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 where a point was never reached, so that nothing is known about it."""
    parser = argparse.ArgumentParser(prog="python -m eval.engine_faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=20_000, metavar="N", help="at least so many [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of model and operations [%(default)s]")
    parser.add_argument("--episode", type=int, metavar="N", help="this one of the run alone")
    parser.add_argument("--without", type=_groups, default=(), metavar="GROUP,GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="perform the operations of a file instead")
    parser.add_argument("--shrink", type=int, default=MAX_SHRINK_RUNS, metavar="N", help="replays per finding at most")
    add_outputs(parser, "engine_faults")
    options = parser.parse_args(arguments)
    try:
        episodes = _episodes(options)
        runner = Runner(options.seed, with_adapters="adapters" not in options.without)
        run = Run(runner, options.out.with_suffix(""), options.shrink)
        with ended_in_order():
            for index, episode in episodes.items():
                run.perform(index, episode)
        is_whole = options.replay is None and options.episode is None and "faults" not in options.without
        needed = max(1, run.num_operations // OPERATIONS_PER_FIRING) if is_whole else 0
        settings = {**vars(options), "out": None, "replay": options.replay and options.replay.name}
        settings |= {"episodes": len(episodes), "adapters": has_peft() and "adapters" not in options.without}
        report = Report("engine_faults", run.figures(needed), settings, run.samples())
        report.emit(as_json=options.json)
        report.save(options.out)
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    missed = [point for point in POINTS if runner.faults.fired[point] < needed]
    for point in missed:
        sys.stderr.write(f"error: {point} met {runner.faults.fired[point]} faults, wanted at least {needed}\n")
    return 1 if missed else 0


class Run:
    """Episodes performed one after the other, and what they found."""

    def __init__(self, runner: Runner, folder: Path, max_shrink_runs: int) -> None:
        self.num_operations = 0
        self._runner = runner
        self._folder = folder
        self._max_shrink_runs = max_shrink_runs
        self._found: list[Finding] = []
        self._kinds: Counter[tuple[Harm, str]] = Counter()
        self._counts: Counter[str] = Counter()

    def perform(self, index: int, episode: Episode) -> None:
        """Perform one, and keep what leads to findings of a new kind."""
        findings = self._runner.run(episode)
        self.num_operations += sum(num_of(operation) for operation in episode.operations)
        self._counts += findings.counts
        fresh = [kind for kind in findings.by_kind() if kind not in self._kinds]
        self._found += findings.all
        self._kinds += findings.by_kind()
        for kind in fresh:
            self._keep(index, episode, findings, kind)

    def figures(self, needed: int) -> list[Figure]:
        """Findings first, then what they rest on, then every point."""
        counts, faults = self._counts, self._runner.faults
        totals = {harm: sum(each.amount for each in self._found if each.harm is harm) for harm in Harm}
        figures = [
            Figure("operations", self.num_operations, "operations", None, ">= 20,000"),
            Figure("wrong", totals[Harm.WRONG], "answers", None, "0"),
            Figure("leaked", totals[Harm.LEAKED], "pages", None, "0"),
            Figure("engines_lost", totals[Harm.LOST], "engines", None, "0"),
            Figure("answers_compared", counts["compared"], "answers"),
            Figure("tokens_compared", counts["compared_tokens"], "tokens"),
            Figure("ties", counts["ties"], "tokens"),
            Figure("answers_approximate", counts["approximate"], "answers"),
            Figure("answers_of_followers", counts["followers"], "answers"),
            Figure("tokens_read_along", counts["read_along_tokens"], "tokens"),
            Figure("answers_unseeded", counts["unseeded"], "answers"),
            Figure("errors_judged", counts["errors"], "errors"),
            Figure("faults_fired", sum(faults.fired.values()), "faults"),
        ]
        goal = f">= {needed}" if needed else ""
        return figures + [Figure(f"fired_{point}", faults.fired[point], "faults", None, goal) for point in POINTS]

    def samples(self) -> dict[str, list[float]]:
        """How often code came by each point, in the points' order, and what became of errors."""
        reached: dict[str, list[float]] = {f"reached_{point}": [self._runner.faults.reached[point]] for point in POINTS}
        return reached | {name: [number] for name, number in sorted(self._counts.items())}

    def _keep(self, index: int, episode: Episode, findings: Findings, kind: tuple[Harm, str]) -> None:
        harm, what = kind
        finding = next(each for each in findings.all if (each.harm, each.what) == kind)
        note(f"{harm}: {what}\n  {finding.detail}")
        shorter = self._runner.shrink(episode, finding, self._max_shrink_runs) if self._max_shrink_runs else episode
        file = self._folder / f"{harm}-{re.sub('[^a-z0-9]+', '-', what.lower()).strip('-')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        value = {"finding": what, "detail": finding.detail, "episode": index, **shorter.to_json()}
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        note(f"  episode {index}, {len(shorter.operations)} operations: --replay {file}")


def _episodes(options: argparse.Namespace) -> dict[int, Episode]:
    if options.replay is not None:
        return {0: Episode.from_json(json.loads(options.replay.read_text(encoding="utf-8")))}
    number = max(1, -(-options.operations // PER_EPISODE))
    size = min(PER_EPISODE, options.operations)
    wanted = range(number) if options.episode is None else [options.episode]
    return {index: Episode.draw(options.seed, index, size, options.without) for index in wanted}


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(GROUPS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(GROUPS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
