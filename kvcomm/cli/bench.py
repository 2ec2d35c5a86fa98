"""`kvcomm bench`: what reuse is worth with your model on your machine, in a minute or less.

Prompts are random tokens, engines are fresh, everything runs in this process. Each command prints figures with an id,
the median and the quartiles of a few repetitions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvcomm import __version__
from kvcomm.cli.bench_reuse import reuse_command
from kvcomm.cli.bench_serve import EPILOG as SERVE_EPILOG
from kvcomm.cli.bench_serve import serve_command
from kvcomm.cli.options import EngineOptions
from kvcomm.cli.output import JsonFlag, emit, figure_table
from kvcomm.cli.spread import spread
from kvcomm.errors import InvalidRequest
from kvcomm.figures import Figure

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine
    from kvcomm.lab.timings import Samples, TakeTokens

app = typer.Typer(
    help="Measure what reuse is worth with your model on your machine.",
    no_args_is_help=True,
    epilog="Values are medians with quartiles. Leave the machine alone meanwhile.",
)

app.command("reuse", epilog="Example: kvcomm bench reuse --runs 5 --save anchors/")(reuse_command)
app.command("serve", epilog=SERVE_EPILOG)(serve_command)

DEFAULT_STREAMS = "1,2,4,8"

RepeatsFlag = Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="How often each figure is measured.")]
ContextFlag = Annotated[
    int, typer.Option("--context-tokens", min=1, metavar="N", help="Length of a context in tokens.")
]


@app.command("prefix", epilog="Example: kvcomm bench prefix --prefix-tokens 2048")
@spread
def prefix_command(
    *,
    prefix_tokens: Annotated[
        int, typer.Option("--prefix-tokens", min=1, metavar="N", help="Cached tokens at the beginning of a prompt.")
    ] = 1024,
    tail_tokens: Annotated[int, typer.Option("--tail-tokens", min=1, metavar="N", help="New tokens behind them.")] = 32,
    repeats: RepeatsFlag = 3,
    loading: EngineOptions,
    as_json: JsonFlag = False,
) -> None:
    """Time to the first token of a new prompt, and of one whose beginning is in the cache."""
    from kvcomm.lab.timings import Samples, measure_prefix_hit

    with _engine(loading) as (engine, take):
        hits = [
            measure_prefix_hit(engine, take, num_prefix_tokens=prefix_tokens, num_tail_tokens=tail_tokens)
            for _ in range(repeats)
        ]
        config = _config(engine, loading, repeats, prefix_tokens=prefix_tokens, tail_tokens=tail_tokens)
    cold_s = Samples(tuple(hit.cold_s for hit in hits))
    cached_s = Samples(tuple(hit.cached_s for hit in hits))
    figures = [
        _figure("hit_speedup", cold_s.per(cached_s), "x"),
        _figure("ttft_cold_s", cold_s, "s"),
        _figure("ttft_cached_s", cached_s, "s"),
    ]
    _print(f"First token of a prompt of {prefix_tokens} + {tail_tokens} tokens", figures, config, as_json=as_json)


@app.command("decode", epilog="Example: kvcomm bench decode --streams 1,16")
@spread
def decode_command(
    *,
    streams: Annotated[
        str,
        typer.Option(
            "--streams",
            metavar="N,N,...",
            help="How many answers are generated side by side; measured for each number.",
        ),
    ] = DEFAULT_STREAMS,
    context_tokens: ContextFlag = 1024,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, metavar="N", help="Tokens of each answer.")] = 32,
    repeats: RepeatsFlag = 3,
    loading: EngineOptions,
    as_json: JsonFlag = False,
) -> None:
    """Tokens per second while several answers are generated side by side, each behind a context of its own."""
    counts = _counts(streams)
    from kvcomm.lab.timings import Samples, prefilled, time_decode_step

    steps_s: dict[int, list[float]] = {count: [] for count in counts}
    sizes = {"num_contexts": max(counts), "num_tokens": context_tokens, "num_room_tokens": new_tokens}
    with _engine(loading) as (engine, take), prefilled(engine, take, **sizes) as contexts:
        for _ in range(repeats):
            for count in counts:
                steps_s[count].append(time_decode_step(engine, contexts[:count], num_new_tokens=new_tokens))
        config = _config(
            engine,
            loading,
            repeats,
            streams=counts,
            context_tokens=context_tokens,
            new_tokens=new_tokens,
        )
    samples = {count: Samples(tuple(values)) for count, values in steps_s.items()}
    figures = [_figure(f"decode_{count}_tokens_per_s", step.rate(count), "tokens/s") for count, step in samples.items()]
    figures += [_figure(f"step_{count}_ms", step.scaled(1e3), "ms") for count, step in samples.items()]
    _print(f"Decoding behind {context_tokens} tokens", figures, config, as_json=as_json)


@app.command("fork", epilog="Example: kvcomm bench fork --context-tokens 8192")
@spread
def fork_command(
    *,
    context_tokens: ContextFlag = 2048,
    forks: Annotated[int, typer.Option("--forks", min=1, metavar="N", help="How many forks are timed.")] = 200,
    loading: EngineOptions,
    as_json: JsonFlag = False,
) -> None:
    """Time that it takes to fork a context, and the bytes of KV that forks copy."""
    from kvcomm.lab.timings import measure_forks

    with _engine(loading) as (engine, take), engine.context(take(context_tokens)) as context:
        cost = measure_forks(engine, context, num_forks=forks)
        config = _config(engine, loading, forks, context_tokens=context_tokens)
    figures = [
        _figure("fork_ms", cost.fork_s.scaled(1e3), "ms"),
        Figure("fork_bytes", cost.bytes_copied, "bytes"),
    ]
    _print(f"Forks of a context of {context_tokens} tokens", figures, config, as_json=as_json)


@app.command("restore", epilog="Example: kvcomm bench restore --context-tokens 4096")
@spread
def restore_command(
    *,
    context_tokens: ContextFlag = 1024,
    repeats: RepeatsFlag = 3,
    loading: EngineOptions,
    as_json: JsonFlag = False,
) -> None:
    """Time to restore a context from a snapshot, against computing it again."""
    from kvcomm.lab.timings import Samples, measure_restore

    with _engine(loading) as (engine, take), tempfile.TemporaryDirectory() as folder:
        costs = [measure_restore(engine, take(context_tokens), Path(folder)) for _ in range(repeats)]
        config = _config(engine, loading, repeats, context_tokens=context_tokens)
    recompute_s = Samples(tuple(cost.recompute_s for cost in costs))
    restore_s = Samples(tuple(cost.restore_s for cost in costs))
    figures = [
        _figure("restore_speedup", recompute_s.per(restore_s), "x"),
        _figure("recompute_s", recompute_s, "s"),
        _figure("restore_s", restore_s, "s"),
        Figure("snapshot_bytes", costs[0].file_bytes, "bytes"),
    ]
    _print(f"A context of {context_tokens} tokens from a snapshot", figures, config, as_json=as_json)


@contextmanager
def _engine(loading: EngineOptions) -> Iterator[tuple[Engine, TakeTokens]]:
    """A warm engine and its prompts; a terminal shows that something is going on."""
    from kvcomm.lab.timings import random_tokens, warm_up

    with loading.load() as engine, Console(stderr=True).status("measuring"):
        take = random_tokens(engine)
        warm_up(engine, take)
        yield engine, take


def _counts(streams: str) -> list[int]:
    parts = [part.strip() for part in streams.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidRequest(f"--streams takes positive numbers separated by commas, not {streams!r}")
    return sorted({int(part) for part in parts})


def _config(engine: Engine, loading: EngineOptions, repeats: int, **sizes: object) -> dict[str, Any]:
    import torch

    return {
        "model": loading.model,
        "dtype": str(engine.geometry.dtype).removeprefix("torch."),
        "device": str(engine.model.device),
        "attention": engine.backend.name,
        "torch_threads": torch.get_num_threads(),
        "versions": {"kvcomm": __version__, "torch": torch.__version__},
        "repeats": repeats,
        "weights": loading.weights,
        **sizes,
    }


def _figure(name: str, samples: Samples, unit: str) -> Figure:
    return Figure(name, samples.median, unit, samples.quartiles)


def _print(title: str, figures: Sequence[Figure], config: dict[str, Any], *, as_json: bool) -> None:
    view = figure_table(title, figures)
    emit({"figures": [figure._asdict() for figure in figures], "config": config}, view, as_json=as_json)
