"""The plots of a report, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from eval.tasks.analysis import ModeResult

matplotlib.rcParams.update(
    {"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
)
Draw = Callable[[Axes], None]


def accuracy_plot(results: Sequence[ModeResult]) -> str:
    """Accuracy with its interval against the share of prompt tokens computed."""

    def draw(axes: Axes) -> None:
        for each in results:
            low, high = each.accuracy.value - each.accuracy.low, each.accuracy.high - each.accuracy.value
            axes.errorbar(each.computed_share, each.accuracy.value, yerr=[[low], [high]], fmt="o", capsize=3)
            axes.annotate(each.mode, (each.computed_share, each.accuracy.value), (6, 4), textcoords="offset points")
        _label(axes, "share of prompt tokens computed", "right answers, 95 % interval")
        axes.set_xlim(0, 1.08)

    return _svg(draw)


def divergence_plot(results: Sequence[ModeResult]) -> str:
    """Mean divergence against the share of prompt tokens computed; the front of what is not beaten in both."""

    def draw(axes: Axes) -> None:
        points = [(each.computed_share, each.mean_divergence, each.mode) for each in results if each.mean_divergence]
        for at, divergence, mode in points:
            axes.plot(at, divergence, "o")
            axes.annotate(mode, (at, divergence), (6, 4), textcoords="offset points")
        front = pareto([(at, divergence) for at, divergence, _ in points])
        axes.plot([at for at, _ in front], [divergence for _, divergence in front], "--", color="gray", linewidth=1)
        _label(axes, "share of prompt tokens computed", "mean divergence, nats")
        if points:
            axes.set_yscale("log")
        axes.set_xlim(0, 1.08)

    return _svg(draw)


def ttft_plot(points: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Seconds to the first token against prompt tokens, request by request."""

    def draw(axes: Axes) -> None:
        for mode, found in points.items():
            axes.plot([tokens for tokens, _ in found], [seconds for _, seconds in found], ".", alpha=0.5, label=mode)
        _label(axes, "prompt tokens", "seconds to the first token")
        axes.legend(frameon=False)

    return _svg(draw)


def reliability_plot(result: ModeResult) -> str:
    """What was predicted of every approximated request, and what was measured."""

    def draw(axes: Axes) -> None:
        if result.predictions:
            predicted, measured = (np.maximum(values, 1e-6) for values in np.array(result.predictions).T)
            axes.loglog(predicted, measured, ".", alpha=0.6)
            ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
            axes.plot(ends, ends, "--", color="gray", linewidth=1)
        _label(axes, "predicted at the confidence, nats", "measured, nats")

    return _svg(draw)


def change_plot(results: Sequence[ModeResult]) -> str:
    """Share of requests that have not yet left the dense answer, token by token."""

    def draw(axes: Axes) -> None:
        for each in results:
            count = len(each.first_change) / max(1e-9, 1 - each.same) if each.same < 1 else 1
            places = np.arange(1, 33)
            left = [1 - sum(at < place for at in each.first_change) / count for place in places]
            axes.step(places, left, where="post", label=each.mode)
        _label(axes, "token of the answer", "answers that are still the dense one's")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False)

    return _svg(draw)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, by the first; less is better."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)


def _svg(draw: Draw) -> str:
    canvas = Canvas(figsize=(5.6, 3.6), layout="constrained")
    draw(canvas.subplots())
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
