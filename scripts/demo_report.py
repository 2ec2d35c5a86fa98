"""What the demo found: a table, some sentences and figures, all from the same pairs of runs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from kvcomm import Usage
from kvcomm.agents import GroupResult

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Pair(NamedTuple):
    """One question's wanted answer, and those of the whole team without and with reuse."""

    answer: str
    cold: GroupResult
    reuse: GroupResult


class Row(NamedTuple):
    """An agent's means over some questions; counts are those with reuse."""

    agent: str
    prompt_tokens: float
    exact_tokens: float
    computed_tokens: float
    ttft_cold_s: float
    ttft_reuse_s: float
    tokens_per_s: float

    @property
    def ratio(self) -> float:
        """How many times sooner the first token comes with reuse."""
        return self.ttft_cold_s / self.ttft_reuse_s


def summarize(pairs: Sequence[Pair]) -> list[Row]:
    """A row for every agent: means over the questions."""
    return [_row(name, [(pair.cold[name].usage, pair.reuse[name].usage) for pair in pairs]) for name in pairs[0].cold]


def _row(agent: str, usages: Sequence[tuple[Usage, Usage]]) -> Row:
    cold, reuse = zip(*usages, strict=True)
    return Row(
        agent,
        prompt_tokens=statistics.fmean(usage.prompt_tokens for usage in reuse),
        exact_tokens=statistics.fmean(usage.exact_tokens for usage in reuse),
        computed_tokens=statistics.fmean(usage.computed_tokens for usage in reuse),
        ttft_cold_s=statistics.fmean(usage.ttft_s for usage in cold),
        ttft_reuse_s=statistics.fmean(usage.ttft_s for usage in reuse),
        tokens_per_s=statistics.fmean(usage.decode_tokens_per_s for usage in reuse),
    )


def total(rows: Sequence[Row]) -> Row:
    """The sum over agents; tokens/s is their mean."""
    return Row(
        "team",
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        exact_tokens=sum(row.exact_tokens for row in rows),
        computed_tokens=sum(row.computed_tokens for row in rows),
        ttft_cold_s=sum(row.ttft_cold_s for row in rows),
        ttft_reuse_s=sum(row.ttft_reuse_s for row in rows),
        tokens_per_s=statistics.fmean(row.tokens_per_s for row in rows),
    )


def num_answers(pairs: Sequence[Pair]) -> int:
    """Answers that were given in both ways."""
    return sum(len(pair.cold) for pair in pairs)


def num_equal(pairs: Sequence[Pair]) -> int:
    """Answers that are the same, token by token, to the same prompt."""
    return sum(
        (cold.token_ids, cold.prompt) == (pair.reuse[name].token_ids, pair.reuse[name].prompt)
        for pair in pairs
        for name, cold in pair.cold.items()
    )


def num_right(pairs: Sequence[Pair]) -> int:
    """Questions whose last agent's last number is the wanted one."""
    return sum(last_number(pair.reuse.final[-1].text) == last_number(pair.answer) for pair in pairs)


def last_number(text: str) -> float | None:
    """The last number of a text, None if it has none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def render(pairs: Sequence[Pair]) -> Table:
    """The table for people."""
    title = f"Mean over {len(pairs)} questions" if len(pairs) > 1 else "One question"
    view = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_footer=True,
        footer_style="bold",
    )
    rows = summarize(pairs)
    cells = [_cells(row) for row in [*rows, total(rows)]]
    columns = ("agent", "prompt tokens", "exact", "computed", "TTFT cold", "TTFT with reuse", "ratio", "tokens/s")
    for at, column in enumerate(columns):
        view.add_column(column, cells[-1][at], justify="right" if at else "left", header_style="dim")
    for row in cells[:-1]:
        view.add_row(*row)
    return view


def _cells(row: Row) -> list[str]:
    counts = [f"{count:.0f}" for count in (row.prompt_tokens, row.exact_tokens, row.computed_tokens)]
    times = [f"{row.ttft_cold_s:.2f} s", f"{row.ttft_reuse_s:.2f} s", f"{row.ratio:.1f}x"]
    return [row.agent, *counts, *times, f"{row.tokens_per_s:.1f}"]


def conclusions(pairs: Sequence[Pair]) -> list[str]:
    """What the table does not say."""
    lines = [
        "TTFT: from the complete prompt to the first token, waiting for agents beside it included; team: sum.",
        "cold: without a cache; with reuse: with a cache that is empty before question 1; same model and prompts.",
        "tokens/s: of one answer behind its first token, with reuse.",
    ]
    if len(pairs) > 1:
        first, later = (total(summarize(part)) for part in (pairs[:1], pairs[1:]))
        lines.append(
            f"Question 1 fills the cache: {first.ratio:.1f}x. From question 2 on role prompts are reused: "
            f"{later.ratio:.1f}x ({later.ttft_cold_s:.2f} s, {later.ttft_reuse_s:.2f} s)."
        )
    equal, answers = num_equal(pairs), num_answers(pairs)
    if equal == answers:
        lines.append(f"All {answers} prompts and answers are the same in both, token by token.")
    else:
        lines.append(f"ONLY {equal} OF {answers} ANSWERS ARE THE SAME IN BOTH: the comparison does not hold.")
    lines.append(f"The last number is right in {num_right(pairs)} of {len(pairs)} (a small model solves few of these).")
    return lines


def figures(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """What the table says, as id, value, unit and spread (quartiles over questions)."""
    team = [total(summarize([pair])) for pair in pairs]
    mean, later = total(summarize(pairs)), team[1:]
    found = [
        _figure("ttft_cold_s", mean.ttft_cold_s, "s", [row.ttft_cold_s for row in team]),
        _figure("ttft_reuse_s", mean.ttft_reuse_s, "s", [row.ttft_reuse_s for row in team]),
        _figure("ttft_ratio", mean.ratio, "x", [row.ratio for row in team]),
        _figure("exact_share", mean.exact_tokens / mean.prompt_tokens, "", []),
        _figure("equal_answers", num_equal(pairs) / num_answers(pairs), "", []),
        _figure("right_answers", num_right(pairs) / len(pairs), "", []),
    ]
    if later:
        ratio = total(summarize(pairs[1:])).ratio
        found.append(_figure("ttft_ratio_from_question_2", ratio, "x", [row.ratio for row in later]))
    found += [_figure(f"ttft_ratio_{row.agent}", row.ratio, "x", []) for row in summarize(pairs)]
    return found


def _figure(figure_id: str, value: float, unit: str, samples: Sequence[float]) -> dict[str, Any]:
    spread = statistics.quantiles(samples, n=4, method="inclusive")[::2] if len(samples) > 1 else None
    return {"id": figure_id, "value": value, "unit": unit, "spread": spread}


def raw_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Every answer with its counts and times."""
    return [
        {
            "question": number,
            "way": way,
            "agent": name,
            "text": result.text,
            "prompt_tokens": result.usage.prompt_tokens,
            "exact_tokens": result.usage.exact_tokens,
            "computed_tokens": result.usage.computed_tokens,
            "generated_tokens": result.usage.generated_tokens,
            "queue_s": result.usage.queue_s,
            "ttft_s": result.usage.ttft_s,
            "total_s": result.usage.total_s,
            "tokens_per_s": result.usage.decode_tokens_per_s,
            "reasons": dict(result.usage.reasons),
        }
        for number, pair in enumerate(pairs, start=1)
        for way, results in (("cold", pair.cold), ("with reuse", pair.reuse))
        for name, result in results.items()
    ]
