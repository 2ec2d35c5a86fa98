"""`kvcomm bench serve`: load on a server over HTTP, its own or any that speaks OpenAI's chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console

from kvcomm import __version__
from kvcomm.cli.options import DEFAULT_MODEL, ModelFlag, WeightsFlag, load_engine
from kvcomm.cli.output import JsonFlag, emit, figure_table
from kvcomm.errors import InvalidRequest
from kvcomm.figures import Figure

if TYPE_CHECKING:
    from kvcomm.lab.load.client import Client
    from kvcomm.lab.load.running import LoadResult
    from kvcomm.lab.load.workloads import Session, WorkloadSizes

EPILOG = (
    "Examples: kvcomm bench serve; kvcomm bench serve --dataset-name multi-turn --turns 6 --json; "
    "kvcomm bench serve --dataset-name agentic --dataset-path sessions.jsonl.gz --num-prompts 100; "
    "kvcomm bench serve --dataset-name teams --branches 3; "
    "kvcomm bench serve --url http://127.0.0.1:8000 --max-concurrency 8"
)


class Dataset(StrEnum):
    """Workloads by name."""

    SHARED_PREFIX = "shared-prefix"
    MULTI_TURN = "multi-turn"
    FAN_OUT = "fan-out"
    MOONCAKE = "mooncake"
    AGENTIC = "agentic"
    TEAMS = "teams"


TRACES = frozenset({Dataset.MOONCAKE, Dataset.AGENTIC})


class Replay(NamedTuple):
    """How a trace is replayed."""

    file: Path | None
    block_len: int
    max_input_len: int
    slowdown: float | None


def serve_command(
    dataset_name: Annotated[
        Dataset, typer.Option("--dataset-name", help="What is asked: made-up requests, or a trace (mooncake, agentic).")
    ] = Dataset.SHARED_PREFIX,
    dataset_path: Annotated[
        Path | None, typer.Option("--dataset-path", metavar="FILE", help="The trace, as .jsonl or .jsonl.gz.")
    ] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, metavar="N", help="How many requests.")] = 200,
    max_concurrency: Annotated[
        int,
        typer.Option(
            "--max-concurrency", min=1, metavar="N", help="How many clients ask at once; with teams, how many teams."
        ),
    ] = 16,
    request_rate: Annotated[
        float | None,
        typer.Option(
            "--request-rate", min=0.001, metavar="R", help="Sessions that begin in a second; by default all at once."
        ),
    ] = None,
    prefix_len: Annotated[
        int, typer.Option("--prefix-len", min=1, metavar="N", help="Words of a shared beginning; about as many tokens.")
    ] = 1024,
    num_prefixes: Annotated[
        int, typer.Option("--num-prefixes", min=1, metavar="N", help="How many different shared beginnings.")
    ] = 1,
    input_len: Annotated[
        int, typer.Option("--input-len", min=1, metavar="N", help="Words of a request behind the shared beginning.")
    ] = 32,
    output_len: Annotated[int, typer.Option("--output-len", min=1, metavar="N", help="Tokens of an answer.")] = 64,
    turns: Annotated[int, typer.Option("--turns", min=1, metavar="N", help="Turns of a conversation or session.")] = 4,
    branches: Annotated[
        int,
        typer.Option("--branches", min=1, metavar="N", help="Requests that go on from one beginning, of a fan-out."),
    ] = 8,
    block_len: Annotated[
        int, typer.Option("--block-len", min=1, metavar="N", help="Words that stand for one block of a trace.")
    ] = 16,
    max_input_len: Annotated[
        int,
        typer.Option(
            "--max-input-len",
            min=1,
            metavar="N",
            help="Words of a trace's longest prompt; others are shortened in proportion.",
        ),
    ] = 1024,
    slowdown_factor: Annotated[
        float | None,
        typer.Option(
            "--slowdown-factor",
            min=0.0,
            metavar="X",
            help="Ask at a trace's own times, made so many times slower; by default as soon as may be.",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="A running server; by default one is started.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", envvar="OPENAI_API_KEY", metavar="KEY", help="The API key for a running server."),
    ] = None,
    overhead_pairs: Annotated[
        int,
        typer.Option(
            "--overhead-pairs",
            min=0,
            metavar="N",
            help="Requests that are also given to the engine without the server; not with --url.",
        ),
    ] = 40,
    along_pairs: Annotated[
        int,
        typer.Option(
            "--along-pairs", min=1, metavar="N", help="With teams: how often they run with reading along and without."
        ),
    ] = 5,
    stock_requests: Annotated[
        int,
        typer.Option(
            "--stock-requests",
            min=0,
            metavar="N",
            help="Requests that transformers alone answers as well; not with --url.",
        ),
    ] = 8,
    seed: Annotated[int, typer.Option("--seed", metavar="SEED", help="Seed of texts and arrivals.")] = 0,
    model: ModelFlag = DEFAULT_MODEL,
    weights: WeightsFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Put load on a server over HTTP: its throughput and latencies, and those of transformers for comparison.

    overhead_ms: how much later the first token comes through the server than from the engine alone, with one client.
    throughput_speedup: output tokens a second, over those of transformers that answers one request after the other.
    along_load_cost: with teams, output tokens a second when agents read answers along while these are written, over
    output tokens a second when they wait for them.
    """
    from kvcomm.lab.load.summary import summarise
    from kvcomm.lab.load.workloads import WorkloadSizes

    shape = WorkloadSizes(num_prompts, prefix_len, input_len, output_len, num_prefixes, turns, branches, seed)
    if dataset_name is Dataset.TEAMS:
        if dataset_path is not None or request_rate is not None:
            raise InvalidRequest("teams are made up and all there from the start: no --dataset-path, no --request-rate")
        _teams(shape, along_pairs, max_concurrency, url=url, key=key, model=model, weights=weights, as_json=as_json)
        return
    replay = Replay(dataset_path, block_len, max_input_len, slowdown_factor)
    sessions = _sessions(dataset_name, shape, replay, request_rate)
    figures: list[Figure] = []
    with Console(stderr=True).status("starting a server") as status, _client(url, key, model, weights) as client:
        if url is None and overhead_pairs:
            figures += _overhead(client, model, weights, replace(shape, num_requests=overhead_pairs), status.update)
        load = _load(client, sessions, max_concurrency, status.update)
    figures += summarise([each.sample for each in load.sent], load.duration_s)
    if url is None and stock_requests:
        figures += _against_stock(load, model, stock_requests)
    config = {
        "dataset_name": dataset_name.value,
        "dataset_path": None if dataset_path is None else dataset_path.name,
        "max_concurrency": max_concurrency,
        "request_rate": request_rate,
        **asdict(shape),
        "block_len": block_len,
        "max_input_len": max_input_len,
        "slowdown_factor": slowdown_factor,
        "model": model if url is None else None,
        "url": url,
        "versions": {"kvcomm": __version__},
    }
    title = f"{dataset_name.value}: {len(load.sent)} requests, {max_concurrency} at once"
    value = {"figures": [figure._asdict() for figure in figures], "config": config, "errors": _errors(load)}
    emit(value, figure_table(title, figures), as_json=as_json)


def _teams(
    shape: WorkloadSizes,
    num_pairs: int,
    concurrency: int,
    *,
    url: str | None,
    key: str | None,
    model: str,
    weights: str | None,
    as_json: bool,
) -> None:
    """Teams that read along, and such that wait."""
    from kvcomm.lab.load.teams import measure_along, teams

    list(teams(shape))  # what is wrong with it is told before a server is started
    with Console(stderr=True).status("starting a server") as status, _client(url, key, model, weights) as client:
        figures = measure_along(client, shape, num_pairs=num_pairs, concurrency=concurrency, tell=status.update)
    config = {
        "dataset_name": Dataset.TEAMS.value,
        "max_concurrency": concurrency,
        "along_pairs": num_pairs,
        **asdict(shape),
        "model": model if url is None else None,
        "url": url,
        "versions": {"kvcomm": __version__},
    }
    title = f"teams: {concurrency} at once, {num_pairs} pairs of runs"
    value = {"figures": [figure._asdict() for figure in figures], "config": config, "errors": []}
    emit(value, figure_table(title, figures), as_json=as_json)


def _sessions(name: Dataset, shape: WorkloadSizes, replay: Replay, rate: float | None) -> list[Session]:
    """The workload of a name."""
    from kvcomm.lab.load import workloads

    if (name in TRACES) != (replay.file is not None):
        raise InvalidRequest(f"--dataset-path goes with the workloads {', '.join(sorted(TRACES))}, each needs one")
    if name is Dataset.SHARED_PREFIX:
        made = workloads.shared_prefix(shape)
    elif name is Dataset.MULTI_TURN:
        made = workloads.multi_turn(shape)
    elif name is Dataset.FAN_OUT:
        made = workloads.fan_out(shape)
    else:
        made = _replayed(name, shape, replay)
    return list(made if rate is None else workloads.arriving(made, rate=rate, seed=shape.seed))


def _replayed(name: Dataset, shape: WorkloadSizes, replay: Replay) -> Iterator[Session]:
    from kvcomm.lab.load.trace_file import TraceError, read_trace
    from kvcomm.lab.load.workloads import replayed

    assert replay.file is not None
    try:
        trace = read_trace(replay.file)
    except (TraceError, OSError) as error:
        raise InvalidRequest(f"--dataset-path: {error}") from error
    if trace.format != name.value:
        raise InvalidRequest(f"--dataset-path: {replay.file} is a trace of the format {trace.format}, not {name.value}")
    return replayed(
        trace, shape, block_len=replay.block_len, max_input_len=replay.max_input_len, slowdown=replay.slowdown
    )


@contextmanager
def _client(url: str | None, key: str | None, model: str, weights: str | None) -> Iterator[Client]:
    """A client of the running server, or of one that runs meanwhile."""
    from kvcomm.lab.load.client import Client
    from kvcomm.lab.load.process import ServerProcess

    if url is not None:
        yield Client(url, key=key)
        return
    with ServerProcess("--model", model, *(("--weights", weights) if weights else ())) as server:
        yield Client(server.url)


def _overhead(
    client: Client, model: str, weights: str | None, shape: WorkloadSizes, tell: Callable[[str], None]
) -> list[Figure]:
    """What the server adds to the engine's time, at one client."""
    from kvcomm.lab.load.comparison import NUM_WARM, measure_overhead
    from kvcomm.lab.load.summary import median_ms
    from kvcomm.lab.load.workloads import shared_prefix

    # Texts of its own: the load is to find none of them in the cache.
    shape = replace(shape, num_requests=shape.num_requests + NUM_WARM, num_prefixes=1, seed=shape.seed + 1)
    tell("loading an engine to compare with")
    with load_engine(model, weights=weights) as engine:
        pairs = measure_overhead(client, engine, [session.first_chat for session in shared_prefix(shape)], tell=tell)
    return [
        median_ms("overhead_ms", [pair.server_s - pair.engine_s for pair in pairs]),
        median_ms("server_ttft_ms", [pair.server_s for pair in pairs]),
        median_ms("engine_ttft_ms", [pair.engine_s for pair in pairs]),
        median_ms("outside_engine_ms", [pair.server_s - pair.inside_s for pair in pairs]),
    ]


def _load(client: Client, sessions: Sequence[Session], concurrency: int, tell: Callable[[str], None]) -> LoadResult:
    from kvcomm.lab.load.running import run_load

    total = sum(session.num_requests for session in sessions)
    return run_load(client, sessions, concurrency=concurrency, tell=lambda done: tell(f"{done} of {total} requests"))


def _against_stock(load: LoadResult, model: str, num_requests: int) -> list[Figure]:
    """Throughput and answers beside those of transformers alone, on some of the requests."""
    from kvcomm.lab.load.comparison import StockLoop

    done = [each for each in load.sent if each.sample.error is None]
    chosen = done[:: max(1, len(done) // num_requests)][:num_requests]
    if not chosen:
        return []
    with Console(stderr=True).status("transformers alone"):
        stock = StockLoop(model)
        stock.answer(chosen[0].messages, 2)  # what happens once in a process does not count
        answers = [stock.answer(each.messages, each.max_tokens) for each in chosen]
    stock_rate = sum(answer.num_tokens for answer in answers) / sum(answer.seconds for answer in answers)
    rate = sum(each.sample.output_tokens for each in done) / load.duration_s
    differ = sum(each.sample.text != answer.text for each, answer in zip(chosen, answers, strict=True))
    return [
        Figure("throughput_speedup", rate / stock_rate, "x"),
        Figure("stock_output_throughput", stock_rate, "tokens/s"),
        Figure("different_answers", differ, "requests"),
    ]


def _errors(load: LoadResult) -> list[str]:
    """What requests failed of, each once."""
    return sorted({each.sample.error for each in load.sent if each.sample.error is not None})
