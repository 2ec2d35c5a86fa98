"""Five agents answer word problems without a cache, with exact prefixes, read along, and on moved KV, healed or not.

The ways take turns, question by question, on the same model. *no cache*: every prompt token is computed. *exact
prefixes*: what begins alike is computed once. *read along*: beside that, agents who wait read what others write while
they write it, as far as these leave time. Answers of these two must be those without a cache, and the demo fails if
they differ. *moved KV*: what one agent has read or written is moved into the prompts of others, under a bound that
rests on pairs which were measured beforehand and ship with the model, so nothing is warmed up. Every prompt into which
text was moved is audited, that is computed exactly afterwards and held against. *moved + heal*: the same, and moved KV
is replaced by exact KV while the answer's first tokens are decoded. A table, pictures and a summary tell what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

# Before anything imports torch: with threads that spin, a second process starves this one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from demo_report import (
    BLOCKS,
    LETTERS,
    Report,
    figures,
    notes,
    picture,
    raw_rows,
    seconds_table,
    summary,
)
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from kvcomm import Engine, EngineConfig, KVCommAgentGroup, KVCommError, ReusePolicy
from kvcomm.agents import (
    AgentFinished,
    AgentStarted,
    AgentText,
    GroupEvent,
    GroupFinished,
    GroupResult,
    Team,
    load_team,
)
from kvcomm.agents.comparison import Comparison, Way, in_turns
from kvcomm.agents.example_runs import examples, limited
from kvcomm.align.prior import read_prior
from kvcomm.cli.bench_reuse import agent_values
from kvcomm.errors import InvalidRequest

PIPE_WIDTH = 100
POLICY = ReusePolicy(max_divergence=0.05, confidence=0.9)
CONFIG = EngineConfig(learning_share=0.0)
"""Audits wait until the run that they are about is over: here, first tokens are timed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0 if the exact ways gave the same answers, 1 if not or on an error, 2 for wrong input, 130 on Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    try:
        return _demo(options, console)
    except KVCommError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, InvalidRequest) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Five agents: without a cache, with exact prefixes, read along, on moved KV."
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="questions, in the field question; default: packaged problems"
    )
    parser.add_argument(
        "--questions", type=int, default=3, metavar="N", help="questions to answer (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write figures, settings and raw rows there")
    parser.add_argument("--model", default="smollm2-135m", help="packaged name, folder or hub id (default %(default)s)")
    parser.add_argument("--prior", type=Path, metavar="FILE", help="a prior in place of the one that ships")
    parser.add_argument(
        "--max-new-tokens", type=int, default=48, metavar="N", help="tokens of an answer at most (default %(default)s)"
    )
    return parser


def _demo(options: argparse.Namespace, console: Console) -> int:
    began_s = time.monotonic()
    if options.questions < 1:
        raise InvalidRequest(f"--questions must be at least 1, not {options.questions}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InvalidRequest(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    team = limited(load_team("gsm8k"), options.max_new_tokens)
    inputs = examples(team, options.data)[: options.questions]
    if not inputs:
        raise InvalidRequest(f"--data {options.data} is empty")
    console.print(Text(f"Questions: {len(inputs)} {_origin(options)}"))
    prior = "shipped" if options.prior is None else read_prior(options.prior)
    with Engine.load(options.model, config=CONFIG, progress=True, prior=prior) as engine:
        settings = describe(engine, options, team, len(inputs))
        console.print(
            Text(
                f"Model: {options.model} ({settings['architecture']}, {settings['dtype']}, {settings['device']}); "
                f"greedy answers of at most {options.max_new_tokens} tokens\n"
            )
        )
        report = run_all(engine, team, inputs, console)
        engine.check_integrity()
    show(report, console)
    elapsed_s = time.monotonic() - began_s
    console.print(Text(f"\nThis took {elapsed_s:.0f} s.", style="dim"))
    if options.json is not None:
        write_json(options.json, report, settings | {"elapsed_s": elapsed_s})
    return 0 if report.num_equal == report.num_answers else 1


def _origin(options: argparse.Namespace) -> str:
    return "word problems that come with kvcomm" if options.data is None else f"from {options.data}"


# -- running ----------------------------------------------------------------------------------------------------------


def run_all(engine: Engine, team: Team, inputs: Sequence[Mapping[str, str]], console: Console) -> Report:
    """Every question in every way, and the audits of what was moved."""

    def run(group: KVCommAgentGroup, given: Mapping[str, str], index: int, way: Way) -> GroupResult:
        title = f"question {index + 1} of {len(inputs)}, {way}"
        with shown(console, title) as see, closing(group.stream(team.rounds, **given)) as events:
            for event in events:
                see(event)
                if isinstance(event, GroupFinished):
                    console.print(_finished_line(title, event.result))
                    return event.result
        raise AssertionError("a run ended without a result or an error")

    console.print(Text("Getting ready: role prompts are read once, in every way.", style="dim"))
    comparison = Comparison(engine, team)
    runs = []
    for results in in_turns(engine, team, inputs, POLICY, run):
        comparison.add(results)
        runs.append(results)
    return Report(runs, comparison.agents, POLICY)


@contextmanager
def shown(console: Console, title: str) -> Iterator[Callable[[GroupEvent], None]]:
    """On a terminal, show the end of every answer as it grows."""
    texts: dict[str, str] = {}

    def see(event: GroupEvent) -> None:
        if isinstance(event, AgentStarted):
            texts[event.agent] = ""
        elif isinstance(event, AgentText):
            texts[event.agent] += event.text
        elif isinstance(event, AgentFinished):
            texts.pop(event.agent)

    def growing() -> Group:
        width = max(20, console.width - 16)
        lines = [Text(f"{agent:>12}  {_tail(text, width)}", style="dim") for agent, text in list(texts.items())]
        return Group(Text(title, style="dim"), *lines)

    if not console.is_terminal:
        yield see
        return
    with Live(console=console, get_renderable=growing, refresh_per_second=8, transient=True):
        yield see


def _tail(text: str, width: int) -> str:
    flat = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return flat[-width:]


def _finished_line(title: str, result: GroupResult) -> Text:
    usages = [answer.usage for answer in result.values()]
    computed, first_s = sum(usage.computed_tokens for usage in usages), sum(usage.ttft_s for usage in usages)
    return Text.assemble((f"{title:<32}", "dim"), f"first tokens {first_s:6.2f} s, {computed:>5} tokens computed")


# -- telling ----------------------------------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Print the table, the pictures and the summary."""
    symbols = BLOCKS if console.encoding.lower().startswith("utf") else LETTERS
    console.print()
    console.print(seconds_table(report, console.width))
    console.print()
    for line in notes(report):
        console.print(Text(line, style="dim"))
    console.print()
    console.print(Text("Where the tokens of the prompts came from, mean of the questions (along: read along):"))
    for way in (Way.ALONG, Way.MOVED):
        for drawn in picture(report, console.width, symbols, way):
            console.print(drawn, no_wrap=True)
        console.print()
    console.print(Text(summary(report), style="bold"))


def describe(engine: Engine, options: argparse.Namespace, team: Team, num_questions: int) -> dict[str, Any]:
    """The settings of the demo as JSON values."""
    return {
        "model": options.model,
        "architecture": engine.geometry.architecture,
        "dtype": str(engine.geometry.dtype).removeprefix("torch."),
        "device": str(engine.model.device),
        "page_size": engine.config.page_size,
        "team": team.name,
        "num_questions": num_questions,
        "questions": _origin(options),
        "max_new_tokens": options.max_new_tokens,
        "bound": {"max_divergence": POLICY.max_divergence, "confidence": POLICY.confidence},
    }


def write_json(file: Path, report: Report, settings: Mapping[str, Any]) -> None:
    """Write figures, settings, one raw row for each question, way and agent, and what moved KV gave each agent.

    Raises:
        InvalidRequest: the file cannot be written.
    """
    value = {
        "figures": figures(report),
        "config": dict(settings),
        "rows": raw_rows(report),
        "moved": [agent_values(agent) for agent in report.agents],
        "summary": summary(report),
    }
    try:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"--json {file} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
