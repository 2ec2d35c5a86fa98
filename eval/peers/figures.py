"""From what every turn took to the figures: medians of each engine, and ratios of the same turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from eval.figures import Figure, format_number
from kvcomm.lab.timings import Samples

MEGABYTE = 1e6


class Ratio(NamedTuple):
    """A figure over two engines: what it is called, which value, who is divided, and what vLLM's is held against.

    Attributes:
        is_speedup: the other engine's value over kvcomm's; else kvcomm's over the other's.
    """

    name: str
    unit: str
    is_speedup: bool
    goal: str = ""


CPU, WALL, TTFT = "_cpu_s", "_s", "_ttft_s"

RATIOS = (
    Ratio("prefill", CPU, False, "<= 1.0"),
    Ratio("prefill4k", CPU, False),
    Ratio("hit", CPU, False, "<= 0.8"),
    Ratio("hit4k", CPU, False),
    Ratio("decode1", CPU, False, "<= 0.8"),
    Ratio("copy1", CPU, False),
    Ratio("decode8", CPU, False, "<= 1.1"),
    Ratio("copy8", CPU, False),
    Ratio("unseen8", CPU, False),
    Ratio("team", WALL, True, ">= 1.5"),
    Ratio("shifted", TTFT, True, ">= 2"),
    Ratio("shifted_rung0", TTFT, True, ">= 3.5"),
    Ratio("memory", "_mb", True, ">= 4"),
)
STOCK_GOAL = ">= 4"
START_GOAL = "<= 8"
KVCOMM = "kvcomm"

Values = Mapping[str, Sequence[float]]


def figures_of(values: Values, *, streams: Mapping[str, int], others: Sequence[str]) -> list[Figure]:
    """All figures.

    Args:
        values: name_ENGINE_unit -> one value a turn.
        streams: tokens of the answers of one turn, by name.
        others: engines besides kvcomm; those that have left before their last turn have no ratios.
    """
    own = [name for name in (KVCOMM, f"{KVCOMM}_fp32", f"{KVCOMM}_fp16") if f"start_{name}_cpu_s" in values]
    ratios = [
        figure
        for ratio in RATIOS
        for mine in own
        for other in others
        if (figure := _ratio(ratio, values, mine, other)) is not None
    ]
    starts = []
    if found := values.get(f"start_{KVCOMM}_cpu_s"):
        starts.append(_figure("start_cpu_s", Samples(tuple(found)), "s", START_GOAL))
    return [*ratios, *starts, *_plain(values), *_rates(values, streams, [*own, *others])]


def engine_table(values: Values, *, streams: Mapping[str, int], engines: Sequence[str]) -> Table:
    """Medians for people, a column for each engine: seconds by the clock, of the processor, and tokens a second."""
    names = dict.fromkeys(["start", *(ratio.name for ratio in RATIOS if ratio.name != "memory"), *streams])
    table = Table(title="seconds (of the processor), tokens/s", title_justify="left", title_style="bold", box=None)
    for column in ("", *engines):
        table.add_column(column, justify="right" if column else "left", header_style="dim")
    for name in names:
        cells = [_cell(values, name, engine, streams.get(name)) for engine in engines]
        if any(cells):
            table.add_row(name, *cells)
    memory = [values.get(f"memory_{engine}_mb") for engine in engines]
    table.add_row("memory, MB", *("" if found is None else format_number(round(found[-1])) for found in memory))
    return table


def _cell(values: Values, name: str, engine: str, num_tokens: int | None) -> str:
    wall, cpu = (values.get(f"{name}_{engine}{unit}") for unit in (WALL, CPU))
    if not wall or not cpu:
        return ""
    took, paid = Samples(tuple(wall)), Samples(tuple(cpu))
    rate = "" if num_tokens is None else f", {took.rate(num_tokens).median:.3g}"
    return f"{took.median:.3g} ({paid.median:.3g}){rate}"


def _ratio(ratio: Ratio, values: Values, mine: str, other: str) -> Figure | None:
    own, others = (values.get(f"{ratio.name}_{each}{ratio.unit}", ()) for each in (mine, other))
    if not own or len(own) != len(others) or not all([*own, *others]):
        return None
    one, two = Samples(tuple(own)), Samples(tuple(others))
    name = f"{ratio.name}{mine.removeprefix(KVCOMM)}_vs_{other}"
    goals = {"vllm": ratio.goal, "stock": STOCK_GOAL if ratio.name == "team" else ""}
    goal = goals.get(other, "") if mine == KVCOMM else ""
    return _figure(name, two.per(one) if ratio.is_speedup else one.per(two), "x", goal)


def _plain(values: Values) -> list[Figure]:
    units = {"_mb": "MB", "_moved": "share"}
    return [
        _figure(name, Samples(tuple(each)), next((unit for end, unit in units.items() if name.endswith(end)), "s"))
        for name, each in values.items()
        if not name.endswith(TTFT) or name.startswith("shifted")  # elsewhere all of it says the same, or more
    ]


def _rates(values: Values, streams: Mapping[str, int], engines: Sequence[str]) -> list[Figure]:
    return [
        _figure(f"{name}_{engine}_tokens_per_s", Samples(tuple(found)).rate(num_tokens), "tokens/s")
        for name, num_tokens in streams.items()
        for engine in engines
        if (found := values.get(f"{name}_{engine}_s"))
    ]


def _figure(name: str, samples: Samples, unit: str, goal: str = "") -> Figure:
    return Figure(name, samples.median, unit, samples.quartiles if len(samples.values) > 1 else None, goal)
