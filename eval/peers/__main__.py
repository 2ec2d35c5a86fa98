"""kvcomm beside vLLM and llama.cpp, as servers on this machine: the same prompts, in turns.

    python -m eval.peers [--only PART,...] [--vllm-python PATH] [--llama-server PATH] [--gguf FILE]
                         [--kvcomm-dtypes DTYPE,...] [--turns N] [--quick] [--json] [--out FILE]

Parts: `first` (first tokens of unseen prompts and of hits), `streams` (one and eight answers, drawn and copied),
`shifted` (a text behind another prefix), `team` (five agents, end to end, transformers alone beside them), `tokens`
(whether kvcomm's greedy answers depend on cache, batch or guesses). Start and memory are measured always. Who is not
installed is left out, and the report says so. docs/peers.md says how to install the others and how to read it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from eval.command import add_outputs, note
from eval.ending import ended_in_order
from eval.figures import PIPE_WIDTH, Report
from eval.peers import parts
from eval.peers.bench import QUICK, Bench, Sizes
from eval.peers.engines import SHORT_DTYPES, Peer, Plan, kvcomm_plan, llama_plan, started, stock_plan, vllm_plan
from eval.peers.figures import MEGABYTE, engine_table, figures_of
from eval.peers.gguf_file import half_precision_file
from eval.peers.prompts import ROLES, Texts
from eval.peers.same_tokens import same_token_figures
from kvcomm import KVCommError
from kvcomm.errors import InvalidRequest, ServerError
from kvcomm.lab.models import PACKAGED, fetch_model

PARTS = ("first", "streams", "shifted", "team", "tokens")
SERVED = PARTS[:-1]
ENGINES = ("kvcomm", "vllm", "llama")
SETTLE_S = 300.0
"""After a start: for what an engine still does in the background, such as compiling."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parse(arguments)
    try:
        with ended_in_order():
            report = measure(options)
        report.save(options.out)
        emit(report, options)
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def emit(report: Report, options: Namespace) -> None:
    """Print on stdout: everything as JSON; for people the engines side by side, then what has no engine's name."""
    if options.json:
        report.emit(as_json=True)
        return
    engines = report.config.get("engines", {})
    if engines:
        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
        console.print(engine_table(report.samples, streams=_streams(options.sizes), engines=list(engines)))
    chosen = [figure for figure in report.figures if figure.goal or figure.unit in ("x", "share")]
    replace(report, figures=chosen).emit(as_json=False)
    for name, why in report.config.get("skipped", {}).items():
        sys.stdout.write(f"{name} is left out: {why}\n")


def measure(options: Namespace) -> Report:
    """All figures of the parts that are asked for.

    Raises:
        KVCommError: kvcomm cannot be started, or does not answer.
    """
    folder = fetch_model(options.model, progress=True) if options.model in PACKAGED else Path(options.model)
    texts = Texts(folder / "tokenizer.json")
    sizes = options.sizes
    config = {
        **{name: str(value) for name, value in vars(options).items() if name not in ("json", "out", "sizes")},
        "sizes": asdict(sizes),
        "bound": parts.BOUND,
    }
    figures, values = [], {}
    if set(options.only) & set(SERVED):
        plans, skipped = find_engines(options, folder)
        bench = serve(plans, texts, options, skipped)
        values = bench.values
        config["engines"] = {plan.name: plan.version for plan in plans}
        config["skipped"] = {**skipped, **bench.left}
        config["idle_share"] = {peer.name: peer.idle_share for peer in bench.peers}
        others = [plan.name for plan in plans if not plan.is_kvcomm]
        figures += figures_of(values, streams=_streams(sizes), others=others)
    if "tokens" in options.only:
        figures += same_token_figures(options.model, options.kvcomm_dtypes[0], texts, sizes)
    return Report("peers", figures, config, values)


def find_engines(options: Namespace, folder: Path) -> tuple[list[Plan], dict[str, str]]:
    """Those that can be started here, kvcomm first; why others cannot, by name."""
    threads, skipped = options.threads, {}
    plans = [kvcomm_plan(options.model, dtype, threads) for dtype in options.kvcomm_dtypes]
    ways = {
        "vllm": lambda: vllm_plan(options.vllm_python, folder, threads),
        "llama": lambda: llama_plan(options.llama_server, _weights(options), threads, options.sizes.streams),
    }
    if "team" in options.only:
        ways["stock"] = lambda: stock_plan(folder, threads)
    for name, find in ways.items():
        if name in ENGINES and name not in options.engines:
            continue
        try:
            plans.append(find())
        except KVCommError as error:
            note(f"{name} is left out: {error}")
            skipped[name] = str(error)
    return plans, skipped


def _weights(options: Namespace) -> Path:
    """For llama.cpp."""
    if options.gguf is not None:
        return Path(options.gguf)
    if options.model not in PACKAGED:
        raise InvalidRequest(f"llama.cpp wants a file that is named by --gguf where the model is {options.model}")
    return half_precision_file(options.model)


def serve(plans: Sequence[Plan], texts: Texts, options: Namespace, skipped: dict[str, str]) -> Bench:
    """Start all engines, measure the parts that are asked for, and end them."""
    sizes = options.sizes
    first_prompt = texts.tokens(sizes.tail)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        bench = Bench([], texts, sizes)
        stock: list[Peer] = []
        for plan in plans:
            log = Path(logs) / f"{plan.name}.log"
            for again in range(sizes.turns - 1 if plan.is_kvcomm else 0):
                with started(plan, log, first_prompt) as peer:
                    _keep_start(bench, peer)
                    note(f"{plan.name} again: {again + 1} of {sizes.turns - 1}")
            try:
                peer = stack.enter_context(started(plan, log, first_prompt))
            except ServerError as error:
                if plan.is_kvcomm:
                    raise
                note(f"{plan.name} is left out: {error}")
                skipped[plan.name] = str(error)
                continue
            _keep_start(bench, peer)
            peer.tree.settle(SETTLE_S)
            (stock if plan.name == "stock" else bench.peers).append(peer)
        bench.warm_up()
        _measure_parts(bench, stock, options.only)
        for peer in bench.peers:
            bench.keep(f"memory_{peer.name}_mb", peer.tree.memory_bytes() / MEGABYTE)
        return bench


def _keep_start(bench: Bench, peer: Peer) -> None:
    bench.keep(f"start_{peer.name}_s", peer.start_s)
    bench.keep(f"start_{peer.name}_cpu_s", peer.start_cpu_s)
    note(f"{peer.name}: first answer after {peer.start_s:.1f} s, {peer.start_cpu_s:.1f} s of the processor")


def _measure_parts(bench: Bench, stock: Sequence[Peer], wanted: Sequence[str]) -> None:
    if "first" in wanted:
        parts.first_tokens(bench)
    if "streams" in wanted:
        parts.streams(bench)
    if "shifted" in wanted:
        parts.shifted(bench)
    if "team" in wanted:
        parts.team(bench, stock)


def _streams(sizes: Sizes) -> dict[str, int]:
    """Tokens of all answers of one turn, by what was measured."""
    many = sizes.streams * sizes.stream_new
    return {
        "decode1": sizes.new,
        "copy1": sizes.new,
        f"decode{sizes.streams}": many,
        f"copy{sizes.streams}": many,
        f"unseen{sizes.streams}": many,
        "team": len(ROLES) * sizes.answer,
    }


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="python -m eval.peers", description="kvcomm beside the engines people use.")
    parser.add_argument("--model", default="smollm2-135m", help="a packaged name or a folder [%(default)s]")
    parser.add_argument(
        "--vllm-python", type=Path, metavar="PATH", help="interpreter with vLLM [of .integrations/vllm]"
    )
    parser.add_argument(
        "--llama-server", type=Path, metavar="PATH", help="or interpreter with xllamacpp [of .integrations/llama]"
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model for llama.cpp [made of the packaged one]")
    parser.add_argument(
        "--engines", type=_list, default=list(ENGINES), metavar="NAME,...", help=f"of {','.join(ENGINES)}"
    )
    parser.add_argument("--kvcomm-dtypes", type=_list, default=["bfloat16"], metavar="DTYPE,...", help="[bfloat16]")
    parser.add_argument(
        "--only", type=_list, default=list(PARTS), metavar="PART,...", help=f"of {','.join(PARTS)} [all]"
    )
    parser.add_argument(
        "--turns", type=int, metavar="N", help=f"of every engine [{Sizes().turns}; --quick {QUICK.turns}]"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of every engine [the cores that there are]")
    parser.add_argument("--quick", action="store_true", help="small sizes and one turn: for a first impression")
    add_outputs(parser, "peers")
    options = parser.parse_args(arguments)
    for name, known in (("only", PARTS), ("engines", ENGINES), ("kvcomm_dtypes", SHORT_DTYPES)):
        for given in getattr(options, name):
            if given not in known:
                parser.error(f"--{name.replace('_', '-')} {given!r}: there are {', '.join(known)}")
    for name in ("turns", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    if "kvcomm" not in options.engines:
        parser.error("--engines needs kvcomm, which the others are held against")
    options.threads = options.threads or len(os.sched_getaffinity(0))
    sizes = QUICK if options.quick else Sizes()
    options.sizes = sizes if options.turns is None else replace(sizes, turns=options.turns)
    return options


def _list(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


if __name__ == "__main__":
    sys.exit(main())
