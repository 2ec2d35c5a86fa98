"""Five agents answer word problems, without and with KV reuse, and tables show what reuse saves.

Every question is answered by the same team on the same model in two ways. *cold*: an engine whose cache is off, so
every prompt token is computed. *with reuse*: an engine whose cache is on and empty before the first question. Both
start the agents in the same order and batch them in the same way, and greedy answers must come out the same, so both
see the same prompts; the demo checks that and fails if they differ. Which of the two goes first alternates.

Then *moved KV*: the team warms up on other problems, which teaches how to move text from one agent's prompt into
another's and what that costs, and answers the same questions once more under a bound. So few examples allow no sure
promise: the bound holds with a confidence of 0.65 here. Every approximated answer is audited.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

# Before anything imports torch: with threads that spin, a second process starves this one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from demo_report import Pair, conclusions, figures, num_answers, num_equal, raw_rows, render
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from kvcomm import Engine, EngineConfig, KVCommAgentGroup, KVCommError, ReusePolicy
from kvcomm.agents import (
    AgentFinished,
    AgentResult,
    AgentStarted,
    AgentText,
    GroupEvent,
    GroupFinished,
    GroupResult,
    Team,
    load_team,
)
from kvcomm.agents.comparison import AgentReuse, Comparison, read_roles, watched
from kvcomm.agents.example_runs import examples, limited, warm_up
from kvcomm.cli.bench_reuse import agent_values, conclusion, reuse_table
from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import BadContent, read_lines

PIPE_WIDTH = 200
POLICY = ReusePolicy(max_divergence=0.05, confidence=0.65, rungs=(0.0, 0.25, 0.5))
"""With a rung less than usual: every rung is one more thing to calibrate."""
NUM_ANCHORS = 3
"""Of the problems to warm up on, those that teach."""
HUB_DATASET = "openai/gsm8k"
HUB_TIMEOUT_S = 5.0
WARM_UP = "This text only makes the first measured pass as quick as the second one. " * 12


class Question(NamedTuple):
    """A word problem and its worked answer, whose last number is the result."""

    question: str
    answer: str


OWN_QUESTIONS = (
    Question(
        "A library lends 45 books on Monday and twice as many on Tuesday. On Wednesday 38 of these books come back. "
        "How many of them are still out?",
        "45 + 2 * 45 = 135 books were lent. 135 - 38 = 97 are still out.\n#### 97",
    ),
    Question(
        "A ferry carries 14 cars on each trip and makes 6 trips a day. On Saturdays it makes 3 extra trips. "
        "How many cars can it carry on a Saturday?",
        "On a Saturday it makes 6 + 3 = 9 trips. It can carry 9 * 14 = 126 cars.\n#### 126",
    ),
    Question(
        "Nadia earns 12 dollars an hour for the first 8 hours of a day and half as much again for every further hour. "
        "How many dollars does she earn on a day of 11 hours?",
        "8 * 12 = 96 dollars. A further hour brings 12 + 6 = 18 dollars. 96 + 3 * 18 = 150.\n#### 150",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if both ways gave the same answers, 1 if not or on an error, 2 for wrong input, 130 on Ctrl-C."""
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
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Five agents, with and without KV reuse.")
    parser.add_argument("--data", type=Path, metavar="FILE.jsonl", help="questions: fields question and answer")
    parser.add_argument("--questions", type=int, default=3, metavar="N", help="questions to answer (default 3)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write figures, settings and raw rows there")
    parser.add_argument("--model", default="smollm2-135m", help="packaged name, folder or hub id (default %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=48, metavar="N", help="tokens of an answer at most (default %(default)s)"
    )
    parser.add_argument(
        "--warm", type=int, default=9, metavar="N", help="problems to warm up on for moved KV; 0: skip that part"
    )
    return parser


def _demo(options: argparse.Namespace, console: Console) -> int:
    began_s = time.monotonic()
    if options.questions < 1:
        raise InvalidRequest(f"--questions must be at least 1, not {options.questions}")
    fewest = NUM_ANCHORS + 2
    if options.warm and options.warm < fewest:
        raise InvalidRequest(f"--warm must be 0 or at least {fewest}, not {options.warm}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InvalidRequest(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    team = limited(load_team("gsm8k"), options.max_new_tokens)
    questions, source = choose_questions(options.data, options.questions)
    console.print(Text(f"Questions: {len(questions)} {source}"))
    with Engine.load(options.model, config=EngineConfig(contest_prompts=2), progress=True) as engine:
        settings = describe(engine, options, team, questions, source)
        console.print(
            Text(
                f"Model: {options.model} ({settings['architecture']}, {settings['dtype']}, {settings['device']}); "
                f"greedy answers of at most {options.max_new_tokens} tokens\n"
            )
        )
        pairs = answer_all(engine, team, questions, console)
        console.print()
        console.print(render(pairs))
        console.print()
        for line in conclusions(pairs):
            console.print(Text(line))
        agents = []
        if options.warm:
            console.print()
            agents = move_all(engine, team, questions, pairs, options.warm, console)
            console.print()
            console.print(reuse_table(agents, POLICY))
            console.print()
            console.print(conclusion(agents))
    elapsed_s = time.monotonic() - began_s
    console.print(Text(f"This took {elapsed_s:.0f} s."))
    if options.json is not None:
        write_json(options.json, pairs, agents, settings | {"elapsed_s": elapsed_s})
    return 0 if num_equal(pairs) == num_answers(pairs) else 1


# -- questions --------------------------------------------------------------------------------------------------------


def choose_questions(data: Path | None, num_questions: int) -> tuple[list[Question], str]:
    """The questions, and where they come from in words: a file, else the hub, else this script.

    Raises:
        InvalidRequest: the file given cannot be used.
    """
    if data is not None:
        return read_questions(data, num_questions), f"from {data}"
    found, why_not = questions_from_hub(num_questions)
    if found:
        return found, f"from {HUB_DATASET} on the hub"
    return list(OWN_QUESTIONS[:num_questions]), f"written for this demo (GSM8K from the hub: {why_not}; see --data)"


def read_questions(file: Path, num_questions: int) -> list[Question]:
    """The first questions of a JSON-lines file.

    Raises:
        InvalidRequest: not readable, empty, or a line without the fields question and answer; names file and line.
    """
    try:
        lines = islice(read_lines(file), num_questions)
        questions = [_question(value, f"{file}, line {number}") for number, value in lines]
    except OSError as error:
        raise InvalidRequest(f"--data {file} cannot be read: {error}") from error
    except BadContent as error:
        raise InvalidRequest(f"--data {file} cannot be read: {error}") from error
    if not questions:
        raise InvalidRequest(f"--data {file} is empty")
    return questions


def _question(fields: Any, where: str) -> Question:
    texts = [fields.get(name) for name in Question._fields] if isinstance(fields, dict) else [None]
    if not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequest(f'{where}: needs an object with the texts "question" and "answer"')
    return Question(*texts)


def questions_from_hub(num_questions: int) -> tuple[list[Question], str]:
    """Questions of the GSM8K test split, or none and the reason; gives up at once without a network."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return [], "HF_HUB_OFFLINE is set"
    try:
        from datasets import load_dataset
        from huggingface_hub import constants
    except ImportError:
        return [], "the datasets package is not installed"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
        rows = load_dataset(HUB_DATASET, "main", split=f"test[:{num_questions}]")
        return [Question(row["question"], row["answer"]) for row in rows], ""
    except (URLError, TimeoutError):
        return [], "not reachable"
    except (OSError, ValueError, RuntimeError) as error:
        return [], f"refused with {type(error).__name__}"


# -- running ----------------------------------------------------------------------------------------------------------


def answer_all(engine: Engine, team: Team, questions: Sequence[Question], console: Console) -> list[Pair]:
    """Every question twice, on `engine` and on one that shares its model and has no cache."""
    pairs = []
    with Engine(engine.model, engine.tokenizer, config=EngineConfig(cache=False)) as cold_engine:
        for each in (cold_engine, engine):
            each.generate(WARM_UP, max_new_tokens=8)
            each.clear_cache()
        groups = {"cold": team.group(cold_engine), "with reuse": team.group(engine)}
        for number, question in enumerate(questions, start=1):
            results = {}
            for way in sorted(groups, reverse=number % 2 == 0):
                title = f"question {number} of {len(questions)}, {way}"
                results[way] = answer(groups[way], question.question, title, console)
            pairs.append(Pair(question.answer, results["cold"], results["with reuse"]))
        cold_engine.check_integrity()
        engine.check_integrity()
    return pairs


def move_all(
    engine: Engine,
    team: Team,
    questions: Sequence[Question],
    pairs: Sequence[Pair],
    num_warm: int,
    console: Console,
) -> list[AgentReuse]:
    """Warm up, and answer every question once more on moved KV."""
    warm = [each for each in examples(team) if each["question"] not in {each.question for each in questions}]
    if num_warm > len(warm):
        raise InvalidRequest(f"--warm {num_warm}: there are {len(warm)} problems to warm up on")
    with console.status("warming up") as status:
        warm_up(engine, team, warm[:num_warm], POLICY, num_anchors=NUM_ANCHORS, note=status.update)
        read_roles(engine, team, warm[0])
    console.print(Text(f"Warmed up on {num_warm} problems."))
    comparison = Comparison(engine, team)
    group = team.group(engine, policy=watched(POLICY))
    for number, (question, pair) in enumerate(zip(questions, pairs, strict=True), start=1):
        moved = answer(group, question.question, f"question {number} of {len(questions)}, moved KV", console)
        comparison.add(pair.cold, pair.reuse, moved)
    engine.check_integrity()
    return comparison.agents


def answer(group: KVCommAgentGroup, question: str, title: str, console: Console) -> GroupResult:
    """One run of the team, shown while it goes on."""
    with shown(console, title) as show, closing(group.stream(question=question)) as events:
        for event in events:
            show(event)
            if isinstance(event, GroupFinished):
                return event.result
    raise AssertionError("a run ended without a result or an error")


@contextmanager
def shown(console: Console, title: str) -> Iterator[Callable[[GroupEvent], None]]:
    """Show a run: a line for every agent that has finished and, on a terminal, the end of every text as it grows."""
    texts: dict[str, str] = {}

    def show(event: GroupEvent) -> None:
        if isinstance(event, AgentStarted):
            texts[event.agent] = ""
        elif isinstance(event, AgentText):
            texts[event.agent] += event.text
        elif isinstance(event, AgentFinished):
            texts.pop(event.agent)
            console.print(_finished_line(title, event.result))

    def growing() -> Group:
        width = max(20, console.width - 16)
        return Group(*(Text(f"{agent:>12}  {_tail(text, width)}", style="dim") for agent, text in list(texts.items())))

    if not console.is_terminal:
        yield show
        return
    with Live(console=console, get_renderable=growing, refresh_per_second=8, transient=True):
        yield show


def _tail(text: str, width: int) -> str:
    flat = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return flat[-width:]


def _finished_line(title: str, result: AgentResult) -> Text:
    usage = result.usage
    moved = f"and {usage.aligned_tokens} moved, " if usage.aligned_tokens else ""
    return Text.assemble(
        (f"{title:<29}", "dim"),
        f"{result.name:<11} {usage.exact_tokens:>4} of {usage.prompt_tokens:>4} prompt tokens reused, {moved}"
        f"first token {usage.ttft_s:.2f} s",
    )


def describe(
    engine: Engine, options: argparse.Namespace, team: Team, questions: Sequence[Question], source: str
) -> dict[str, Any]:
    """The settings of the demo as JSON values."""
    return {
        "model": options.model,
        "architecture": engine.geometry.architecture,
        "dtype": str(engine.geometry.dtype).removeprefix("torch."),
        "device": str(engine.model.device),
        "page_size": engine.config.page_size,
        "team": team.name,
        "num_questions": len(questions),
        "questions": source,
        "max_new_tokens": options.max_new_tokens,
    }


def write_json(file: Path, pairs: Sequence[Pair], agents: Sequence[AgentReuse], settings: Mapping[str, Any]) -> None:
    """Write figures, settings, one raw row for each question, way and agent, and what moved KV gave each agent.

    Raises:
        InvalidRequest: the file cannot be written.
    """
    value = {
        "figures": figures(pairs),
        "config": dict(settings),
        "rows": raw_rows(pairs),
        "moved": [agent_values(agent) for agent in agents],
    }
    try:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"--json {file} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
