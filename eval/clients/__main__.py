"""What unchanged clients and agent frameworks get from a server, and what its grammars are worth.

    python -m eval.clients [--python PATH ...] [--client NAME ...] [--parts PART,...] [--model smollm2-135m] [--json]

`clients`: each client runs its own documentation's hello against a real server: a tool (call, result, last answer;
whole and streamed) and structured output. The model served recites what its chat template says, so that it calls (see
`eval.clients.reciter`). `schemas`: answers of the real model to forty JSON schemas, validated. `overhead`: a masked
step against a plain one. `likelihoods`: lm-evaluation-harness through HTTP against the same model in process.

No single interpreter has all ten clients: some of them disagree about versions. --python names one and may come again;
each client runs in the first that has it. This makes the two that have them all:

    python -m venv A && A/bin/pip install 'openai>=3' anthropic langgraph langchain langchain-openai openai-agents \
        'pydantic-ai-slim[openai]' instructor 'smolagents[openai]' 'lm-eval[api]' transformers
    python -m venv B && B/bin/pip install 'crewai>=1.15' 'llama-index-llms-openai-like>=0.5'
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.clients import answers, likelihoods
from eval.clients.reciter import make_engine
from eval.clients.running import CLIENTS, Hello, Interpreter, place_of
from eval.command import add_model, add_outputs, finish, note
from eval.figures import Figure, Report
from eval.served import served
from kvcomm import Engine, EngineConfig
from kvcomm.errors import InvalidRequest
from kvcomm.lab.timings import Samples, random_tokens, warm_up

PARTS = ("clients", "schemas", "overhead", "likelihoods")
NUM_PROMPT_TOKENS = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(arguments)
    return finish(lambda: evaluate(options), options)


def evaluate(options: Namespace) -> Report:
    """All parts that are asked for.

    Raises:
        InvalidRequest: an unknown part or client, or an interpreter that does not run.
    """
    parts = _checked(options.parts.split(","), PARTS, "--parts")
    clients = _checked(options.client or list(CLIENTS), CLIENTS, "--client")
    interpreters = [Interpreter(path) for path in options.python or [Path(sys.executable)]]
    places = {client: place for client in clients if (place := place_of(client, interpreters)) is not None}
    figures: list[Figure] = []
    config: dict[str, Any] = {"model": options.model, "parts": parts, "repeats": options.repeats, "seed": options.seed}
    samples: dict[str, list[float]] = {}
    # Guesses would be counted as steps; forced tokens are none that a mask has to be made for.
    with Engine.load(options.model, progress=True, config=EngineConfig(draft_rows=0)) as engine:
        with tempfile.TemporaryDirectory() as folder:
            engine.tokenizer.save_pretrained(folder)
            if "clients" in parts:
                hellos = say_hello(engine, places, Path(folder))
                figures += client_figures(hellos, len(clients))
                config["clients"] = {hello.client: hello.to_json() for hello in hellos}
                config["not_installed"] = sorted(set(clients) - set(places))
            if "likelihoods" in parts:
                samples["loglikelihood_errors"] = loglikelihood_errors(engine, places, Path(folder))
        if "schemas" in parts:
            with served(engine) as (port, model):
                found = answers.ask_all(port, model, options.answers, options.seed)
            valid = sum(answer.error is None for answer in found) / len(found)
            figures.append(Figure("schema_valid", valid, "share", None, "= 1"))
            figures.append(Figure("schema_cut", sum(answer.num_cut for answer in found), "answers", None))
            config["invalid"] = [answer._asdict() for answer in found if answer.error is not None]
        if "overhead" in parts:
            warm_up(engine, take := random_tokens(engine, seed=options.seed))
            samples["grammar_overheads"] = answers.overheads(engine, take(NUM_PROMPT_TOKENS), options)
            ratios = Samples(tuple(samples["grammar_overheads"]))
            figures.append(Figure("grammar_overhead", ratios.median, "x", ratios.quartiles, "<= 1.05"))
    if samples.get("loglikelihood_errors"):
        worst = max(samples["loglikelihood_errors"])
        figures.append(Figure("loglikelihood_error", worst, "nats", None, "<= 0.001"))
    return Report("clients", figures, config, samples)


def say_hello(engine: Engine, places: dict[str, Interpreter], tokenizer: Path) -> list[Hello]:
    """What each client finds at a server whose model calls tools; tells it on stderr as it comes."""
    hellos = []
    with make_engine(engine.tokenizer) as reciting, served(reciting) as (port, model):
        for client, place in places.items():
            hello = place.hello(client, f"http://127.0.0.1:{port}", model, tokenizer)
            hellos.append(hello)
            versions = ", ".join(f"{name} {version}" for name, version in hello.versions.items())
            note(f"{client} ({versions})")
            for check in hello.checks:
                note(f"  {check.name}: {'works' if check.error is None else check.error}")
    for client in CLIENTS.keys() - places.keys():
        note(f"{client}: not installed")
    return hellos


def client_figures(hellos: Sequence[Hello], num_clients: int) -> list[Figure]:
    """How many clients there are, and for how many all of a kind works."""
    return [
        Figure("clients_installed", len(hellos), "clients", None, f"= {num_clients}"),
        Figure("clients_tools", sum(each.works("tool") for each in hellos), "clients", None, ">= 9"),
        Figure("clients_structured", sum(each.works("structured") for each in hellos), "clients", None, ">= 9"),
    ]


def loglikelihood_errors(engine: Engine, places: dict[str, Interpreter], tokenizer: Path) -> list[float]:
    """How far the harness's log-likelihoods through HTTP are from the model's own; none where it is not installed.

    Raises:
        OSError: the harness could not run.
    """
    place = places.get("lm-eval")
    if place is None:
        note("lm-eval is not installed: no log-likelihoods")
        return []
    with served(engine) as (port, model):
        hello = place.hello("lm-eval", f"http://127.0.0.1:{port}", model, tokenizer)
    check = next(each for each in hello.checks if each.name == "tool")
    if check.error is not None:
        raise OSError(f"lm-eval failed: {check.error}")
    return likelihoods.errors_of(engine, check.found)


def _checked(given: Sequence[str], known: Sequence[str] | dict[str, Any], option: str) -> list[str]:
    for name in given:
        if name not in known:
            raise InvalidRequest(f"{option} {name!r}: there are {', '.join(known)}")
    return list(given)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.clients", description="What unchanged clients get from a server.")
    add_model(parser)
    parser.add_argument(
        "--python", action="append", type=Path, metavar="PATH", help="an interpreter that has clients; may come again"
    )
    parser.add_argument("--client", action="append", metavar="NAME", help=f"of {', '.join(CLIENTS)} [all]")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="PART,...", help="[%(default)s]")
    parser.add_argument("--answers", type=int, default=200, metavar="N", help="to schemas [%(default)s]")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="of the overhead's pairs [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of answers and prompts [%(default)s]")
    add_outputs(parser, "clients")
    return parser


if __name__ == "__main__":
    sys.exit(main())
