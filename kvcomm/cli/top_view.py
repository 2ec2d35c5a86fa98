"""What `kvcomm top` draws: a tenant's stats as tables and bars.

Every source has a letter and a shade of its own, so that a terminal without colours tells as much. Texts come from
prompts: they are made printable and never read as markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvcomm.cli.output import format_bytes, table
from kvcomm.cli.text import printable
from kvcomm.server.schemas.stats import Curves, LastMinute, Stats, TokensBySource, TtftHistogram, WatchedBound

BAR_WIDTH = 60
SHADES = {"exact": ("█", "blue"), "aligned": ("▒", "yellow"), "computed": ("░", "bright_black")}
BLOCKS = " ▁▂▃▄▅▆▇█"
NUM_REQUESTS, NUM_REASONS, NUM_REFUSED, NUM_BOUNDS, NUM_EVICTIONS = 6, 6, 4, 6, 6
QUANTILES = (0.5, 0.9, 0.99)


def view(stats: Stats, *, before: Stats | None = None) -> RenderableType:
    """Everything; with rates since an earlier look, if there is one."""
    parts: list[RenderableType] = [
        _head(stats, before),
        _sources(stats.tokens),
        *([_curves(stats.curves)] if stats.curves is not None else []),
        Columns([_reasons(stats), _endings(stats), _times(stats.ttft), _cache(stats)], padding=(0, 4)),
        _recent(stats),
        *([_refused(stats)] if stats.refused else []),
        *([_bounds(stats)] if stats.bounds else []),
        *([_evictions(stats)] if stats.evictions else []),
    ]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def format_seconds(value: float) -> str:
    """Three digits in the unit that suits."""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 120 else f"{value / 60:.0f} min"


def quantile(ttft: TtftHistogram, share: float) -> float | None:
    """The upper end of the bucket in which a share of the requests is reached; infinite in the last one.

    None where there are no requests.
    """
    below = list(accumulate(ttft.counts))
    if not below[-1]:
        return None
    index = next(index for index, number in enumerate(below) if number >= share * below[-1])
    return ttft.bounds_s[index] if index < len(ttft.bounds_s) else math.inf


def _head(stats: Stats, before: Stats | None) -> Text:
    text = Text(f"kvcomm {printable(stats.model)}", style="bold")
    text.append(f"  up {format_seconds(stats.uptime_s)}, {stats.requests} requests", style="not bold")
    text.append(f", {stats.requests_in_flight} in flight", style="not bold")
    if stats.last_minute is not None:
        text.append(_last_minute(stats.last_minute), style="not bold")
    seconds = 0.0 if before is None else stats.uptime_s - before.uptime_s
    if before is not None and seconds > 0:  # less: another server has taken its place
        prompt = (_total(stats.tokens) - _total(before.tokens)) / seconds
        generated = (stats.generated_tokens - before.generated_tokens) / seconds
        text.append(f"; now {prompt:.0f} prompt and {generated:.1f} generated tokens/s", style="not bold")
    return text


def _last_minute(minute: LastMinute) -> str:
    rates = [f"{value / max(1.0, minute.seconds):.3g}" for value in (minute.prompt_tokens, minute.generated_tokens)]
    words = f"\nlast minute: {minute.requests} requests, {rates[0]} prompt and {rates[1]} generated tokens/s"
    return words + (f", {minute.refused} refused" if minute.refused else "")


def _curves(curves: Curves) -> Table:
    """Columns of blocks, the newest at the right, each row up to its own largest step."""
    view = Table(box=None, pad_edge=False, show_header=False)
    rows = {"requests": curves.requests, "prompt tokens": curves.prompt_tokens, "generated": curves.generated_tokens}
    for name, steps in rows.items():
        view.add_row(Text(name, style="dim"), Text(sparkline(steps), style="blue"), f"at most {max(steps, default=0)}")
    span = format_seconds(curves.step_s * len(curves.requests))
    view.add_row("", Text(f"last {span}, steps of {format_seconds(curves.step_s)}", style="dim"), "")
    return view


def sparkline(steps: Sequence[int]) -> str:
    """A block for each number, as high as it is beside the largest; what is not 0 never looks like 0."""
    most = max(steps, default=0)
    return "".join(BLOCKS[math.ceil((len(BLOCKS) - 1) * step / most)] if step else BLOCKS[0] for step in steps)


def _total(tokens: TokensBySource) -> int:
    return tokens.exact + tokens.aligned + tokens.computed


def _bar(tokens: TokensBySource, width: int) -> Text:
    """One row of blocks; ends are rounded, so that the blocks are always `width`."""
    total, bar, end = _total(tokens), Text(), 0
    for source, below in zip(SHADES, accumulate(getattr(tokens, source) for source in SHADES), strict=True):
        shade, colour = SHADES[source]
        start, end = end, round(width * below / total) if total else 0
        bar.append(shade * (end - start), style=colour)
    return bar


def _sources(tokens: TokensBySource) -> Group:
    legend = Text()
    for source, (shade, colour) in SHADES.items():
        number = getattr(tokens, source)
        share = number / max(1, _total(tokens))
        legend.append(shade * 2, style=colour).append(f" {source} {share:.1%} ({number})   ")
    if tokens.tier:
        legend.append(f"of the exact, {tokens.tier} from the tier", style="dim")
    return Group(_bar(tokens, BAR_WIDTH), legend)


def _reasons(stats: Stats) -> Table:
    rows = sorted(stats.miss_reasons.items(), key=lambda entry: -entry[1])[:NUM_REASONS]
    columns = ["computed because", "tokens"]
    return table(columns, [[printable(reason), number] for reason, number in rows], numeric=columns[1:])


def _endings(stats: Stats) -> Table:
    rows = sorted(stats.finish_reasons.items(), key=lambda entry: -entry[1])[:NUM_REASONS]
    columns = ["ended with", "answers"]
    return table(columns, [[printable(reason), number] for reason, number in rows], numeric=columns[1:])


def _times(ttft: TtftHistogram) -> Table:
    rows = []
    for share in QUANTILES:
        bound = quantile(ttft, share)
        if bound is not None:
            rows.append([f"{share:.0%}", f"<= {format_seconds(bound)}" if math.isfinite(bound) else "slower"])
    return table(["first token", "after"], rows, numeric=["after"])


def _cache(stats: Stats) -> Table:
    cache = stats.cache
    quota = "none" if cache.quota_tokens is None else f"{cache.quota_tokens} tokens"
    values: dict[str, object] = {"size": format_bytes(cache.bytes), "quota": quota}
    dropped = {"evicted": cache.evicted_tokens, "expired": cache.expired_tokens, "over quota": cache.over_quota_tokens}
    values |= {f"{reason} so far": number for reason, number in dropped.items() if number}
    if (kept := stats.kept) is not None and kept.contexts:
        values["contexts"] = f"{kept.contexts} of {kept.max_contexts}, {kept.context_tokens} tokens"
        values["their texts"] = f"{format_bytes(kept.conversation_bytes)} of {format_bytes(kept.max_kept_bytes)}"
    return table(["cached tokens", str(cache.tokens)], values.items(), numeric=[str(cache.tokens)])


def _recent(stats: Stats) -> Table:
    view = Table(title="latest requests", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("ago", "prompt", "first token", "generated", "source"):
        view.add_column(name, header_style="dim", justify="left" if name == "source" else "right")
    for each in stats.recent[:NUM_REQUESTS]:
        cells = [format_seconds(each.ago_s), str(_total(each.tokens)), format_seconds(each.ttft_s)]
        view.add_row(*cells, str(each.generated_tokens), _bar(each.tokens, BAR_WIDTH // 2))
    return view


def _refused(stats: Stats) -> Table:
    rows = [
        [
            format_seconds(each.ago_s),
            _on_one_line(f"{each.method} {each.path}"),
            each.status,
            printable(each.code),
            _on_one_line(each.message),
        ]
        for each in stats.refused[:NUM_REFUSED]
    ]
    return table(["ago", "request", "status", "code", "why"], rows, title="refused", numeric=["ago", "status"])


def _bounds(stats: Stats) -> Table:
    rows = [
        [
            "all" if each.reader is None else printable(" ".join([each.reader[:8], ", ".join(each.slots)])),
            each.level,
            f"{each.max_divergence:g}",
            f"{each.confidence:.4g}",
            f"{each.num_pairs} of {each.num_needed}" if each.num_pairs < each.num_needed else each.num_pairs,
            each.num_audited,
            each.num_violations,
            _state(each),
        ]
        for each in stats.bounds[:NUM_BOUNDS]
    ]
    columns = ["kind of prompt", "level", "bound", "confidence", "pairs", "audits", "above", "state"]
    return table(columns, rows, title="bounds", numeric=columns[2:7])


def _state(bound: WatchedBound) -> str:
    if bound.tripped:
        return "tripped"
    return "holds" if bound.working_delta > 0 else "paused"


def _evictions(stats: Stats) -> Table:
    rows = [
        [format_seconds(each.ago_s), each.tokens, printable(each.reason), _on_one_line(each.label)]
        for each in stats.evictions[:NUM_EVICTIONS]
    ]
    return table(["ago", "tokens", "why", "text"], rows, title="dropped", numeric=["ago", "tokens"])


def _on_one_line(text: str) -> str:
    return " ".join(printable(text).split())
