"""Figures of a first day, from the records of its requests alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from eval.figures import Figure
from eval.firstday.records import Call, Part, Served
from kvcomm.lab.bounds import violation_limit, wilson

EARLY, LATE = (3, 12), (21, 40)
"""Requests of which shares are taken, first and last."""
LEVELS = ("prior", "pool", "own")
FEW = 300
"""Approximate requests of a level that its share of violations is held against."""

Parts = Mapping[Part, Sequence[Served]]


def figures_of(parts: Parts) -> list[Figure]:
    """Of all parts together first, then of each; with one part its figures need no name before them."""
    found = [*violations(parts), *times([served for each in parts.values() for served in each])]
    for part, requests in parts.items():
        named = f"{part.label} " if len(parts) > 1 else ""
        found += [_renamed(figure, named) for figure in [*_moving(part, requests), *_counts(requests)]]
        if len(parts) > 1:
            found += [_renamed(figure, named) for figure in times(requests)]
        found += [_renamed(figure, named) for figure in methods(requests)]
    return found


def samples_of(parts: Parts) -> dict[str, list[float]]:
    """Raw measurements of every part, call by call: tokens, seconds and divergences (-1: nothing was moved)."""
    found: dict[str, list[float]] = {}
    for part, requests in parts.items():
        calls = _calls(requests)
        found[f"{part.label} movable"] = [call.movable for call in calls]
        found[f"{part.label} moved"] = [call.moved for call in calls]
        found[f"{part.label} ttft_s"] = [call.ttft_s for call in calls]
        found[f"{part.label} exact_ttft_s"] = [call.exact_ttft_s for call in calls]
        found[f"{part.label} divergence"] = [-1.0 if c.divergence is None else c.divergence for c in calls]
    return found


def first_moved(requests: Sequence[Served]) -> int:
    """Number of the first request in which text is moved; one more than there are if there is none."""
    return next((request.number for request in requests if request.moves), len(requests) + 1)


def moved_share(requests: Sequence[Served], between: tuple[int, int]) -> Figure | None:
    """Share of the movable tokens that is not computed, with the quartiles over requests; None: there are none."""
    chosen = _between(requests, between)
    tokens = [(sum(c.moved for c in each.calls), sum(c.movable for c in each.calls)) for each in chosen]
    shares = [moved / movable for moved, movable in tokens if movable]
    if not shares:
        return None
    value = sum(moved for moved, _ in tokens) / sum(movable for _, movable in tokens)
    return Figure(f"moved_{between[0]}_{between[1]}", value, "share", _quartiles(shares))


def violations(parts: Parts) -> list[Figure]:
    """Share of the approximate calls that broke the bound, by level and, where that differs, by confidence.

    Calls whose exact answer is empty have no divergence and do not count. The spread is the 95 % Wilson interval.
    """
    found: dict[float, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for part, requests in parts.items():
        for call in _calls(requests):
            if call.level is not None and call.divergence is not None:
                broken = call.divergence > part.bound.max_divergence
                found[round(part.bound.delta, 6)][call.level].append(broken)
    figures = []
    for delta, levels in found.items():
        behind = f" at {1 - delta:g}" if len(found) > 1 else ""
        for level in sorted(levels, key=LEVELS.index):
            count = len(levels[level])
            share = wilson(sum(levels[level]), count)
            limit = f"<= {violation_limit(delta, count):.3g}"
            figures.append(Figure(f"violations_{level}{behind}", share.value, "share", (share.low, share.high), limit))
            figures.append(Figure(f"approximate_{level}{behind}", count, "requests", goal=f">= {FEW}"))
    return figures


def times(requests: Sequence[Served]) -> list[Figure]:
    """First tokens against exact reuse, and the share of all time that was spent on learning."""
    late = _between(requests, LATE)
    found = []
    if late:
        sums = [(sum(c.exact_ttft_s for c in each.calls), sum(c.ttft_s for c in each.calls)) for each in late]
        gain = sum(exact for exact, _ in sums) / sum(own for _, own in sums)
        spread = _quartiles([exact / own for exact, own in sums])
        found.append(Figure("ttft_gain", gain, "x", spread, ">= 1.5"))
    all_s = sum(each.seconds for each in requests)
    if all_s:
        found.append(Figure("learning_share", sum(e.learning_s for e in requests) / all_s, "share", goal="<= 0.12"))
    return found


def methods(requests: Sequence[Served]) -> list[Figure]:
    """Mean nats of each published method, and of what was served in its place, over the calls it could be used for."""
    found = []
    calls = _calls(requests)
    for name in dict.fromkeys(name for call in calls for name in call.methods):
        among = [call for call in calls if name in call.methods and call.divergence is not None]
        ours = [call.divergence for call in among if call.divergence is not None]
        theirs = [call.methods[name] for call in among]
        found.append(Figure(f"nats_{name}", float(np.mean(theirs)), "nats", _quartiles(theirs)))
        goal = f"< nats_{name}"
        found.append(Figure(f"nats_ours_beside_{name}", float(np.mean(ours)), "nats", _quartiles(ours), goal))
        found.append(Figure(f"compared_{name}", len(among), "calls"))
    return found


def _moving(part: Part, requests: Sequence[Served]) -> list[Figure]:
    is_rag = part.workload == "rag"
    goals = {"first_moved": "<= 2", f"moved_{EARLY[0]}_{EARLY[1]}": ">= 0.25" if is_rag else ">= 0.4"}
    if not part.uses_prior:
        goals = {"first_moved": "<= 12", f"moved_{LATE[0]}_{LATE[1]}": ">= 0.4" if is_rag else ">= 0.6"}
    found = [Figure("first_moved", first_moved(requests), "request")]
    found += [figure for each in (EARLY, LATE) if (figure := moved_share(requests, each)) is not None]
    return [Figure(each.id, each.value, each.unit, each.spread, goals.get(each.id, "")) for each in found]


def _counts(requests: Sequence[Served]) -> list[Figure]:
    calls = _calls(requests)
    approximate = [call for call in calls if call.aligned]
    found = [
        Figure("requests", len(requests), "requests"),
        Figure("calls", len(calls), "calls"),
        Figure("calls_approximate", len(approximate), "calls"),
        Figure(
            "prompt_tokens_computed", sum(c.computed for c in calls) / max(1, sum(c.prompt for c in calls)), "share"
        ),
    ]
    measured = [call.divergence for call in approximate if call.divergence is not None]
    if measured:
        found.append(Figure("divergence_mean", float(np.mean(measured)), "nats", _quartiles(measured)))
    return found


def _calls(requests: Sequence[Served]) -> list[Call]:
    return [call for request in requests for call in request.calls]


def _between(requests: Sequence[Served], between: tuple[int, int]) -> list[Served]:
    return [request for request in requests if between[0] <= request.number <= between[1]]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [25, 75])
    return float(low), float(high)


def _renamed(figure: Figure, before: str) -> Figure:
    return Figure(f"{before}{figure.id}", figure.value, figure.unit, figure.spread, figure.goal)
