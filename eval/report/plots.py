"""The plots of a report, as SVG text.

Lines and letters take the color of the text around the picture, so that they can be read on a light and on a dark page;
the modes have colors that stand out on both. Nothing is written into the picture but numbers: what lies close together
would overlap.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullFormatter

from eval.tasks.analysis import ModeResult
from eval.tasks.modes import DENSE, MODES
from eval.tasks.timing import Timed

TEXT = "#010203"
"""Stands for the color of the text around until the picture is written."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvcomm",
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
    "grid.color": TEXT,
}
COLORS = (
    "#8a8a8a",
    "#3d9970",
    "#0f7b8a",
    "#d9480f",
    "#f08c00",
    "#b58900",
    "#a04fc4",
    "#2a9fd6",
    "#d6336c",
    "#6a7bd6",
    "#7a9a01",
)
MARKERS = ("s", "D", "d", "o", "X", "v", "^", "<", ">", "p", "h")
LINEAR_BELOW = 1e-4
"""Nats; divergences of 0 have a place on the axis, too."""

Draw = Callable[[Axes], None]


class Plot(NamedTuple):
    """A picture and what is to be said about it."""

    svg: str
    caption: str


def all_plots(results: Sequence[ModeResult], times: Sequence[Timed]) -> list[Plot]:
    """Every picture that there is something to show in."""
    plots = [
        Plot(
            accuracy_plot(results),
            "Right answers against what was computed. The line joins what nothing beats in both.",
        ),
        Plot(change_plot(results[1:]), "How long answers stay the dense one's."),
    ]
    if any(each.damage.divergences for each in results):
        plots.insert(
            1,
            Plot(divergence_plot(results), "Divergence against what was computed; the line joins what nothing beats."),
        )
    if times:
        plots.append(Plot(ttft_plot(times), "First tokens by length of the prompt, one request at a time."))
    if moved := [each for each in results if each.damage.by_position]:
        plots += [
            Plot(position_plot(moved), "Divergence by token of the answer, of requests that moved text."),
            Plot(layer_plot(moved), "How far moved KV is off, layer by layer: keys as lines, values dashed."),
        ]
    plots += [
        Plot(reliability_plot(each), "Reliability of the bound: what calibration promises, and what came of it.")
        for each in results
        if each.damage.reliability
    ]
    plots += [
        Plot(
            prediction_plot(each), "Nats expected at the confidence in force, and measured; below the line: within it."
        )
        for each in results
        if each.damage.predictions
    ]
    return plots


def accuracy_plot(results: Sequence[ModeResult]) -> str:
    """Accuracy with its interval against the share of prompt tokens computed, and the front of what is not beaten."""

    def draw(axes: Axes) -> None:
        for each in results:
            share = each.outcome.accuracy
            spread = [[share.value - share.low], [share.high - share.value]]
            look = _look(each.mode)
            axes.errorbar(
                each.reuse.computed_share,
                share.value,
                yerr=spread,
                fmt=look["marker"],
                capsize=3,
                **_color(each.mode),
                label=each.mode,
            )
        front = pareto([(each.reuse.computed_share, -each.outcome.accuracy.value) for each in results])
        _join([(at, -value) for at, value in front], axes)
        _label(axes, "share of prompt tokens computed", "right answers, 95 % interval")
        axes.set_xlim(0, 1.05)

    return _svg(draw)


def divergence_plot(results: Sequence[ModeResult]) -> str:
    """Mean divergence against the share of prompt tokens computed, and the front of what is not beaten in both."""

    def draw(axes: Axes) -> None:
        points = [
            (each.reuse.computed_share, each.damage.mean_divergence or 0.0, each.mode)
            for each in results
            if each.mode == DENSE or each.damage.mean_divergence is not None
        ]
        for at, divergence, mode in points:
            axes.plot(at, divergence, linestyle="", **_look(mode), label=mode)
        _join(pareto([(at, divergence) for at, divergence, _ in points]), axes)
        _label(axes, "share of prompt tokens computed", "mean divergence, nats")
        _log_from_zero(axes)
        axes.set_ylim(bottom=-LINEAR_BELOW / 5)
        axes.set_xlim(0, 1.05)

    return _svg(draw)


def ttft_plot(times: Sequence[Timed]) -> str:
    """Seconds to the first token against prompt tokens, request by request."""

    def draw(axes: Axes) -> None:
        for mode in _modes_of([each.mode for each in times]):
            own = sorted((each.prompt, each.ttft_s) for each in times if each.mode == mode)
            axes.plot(
                [at for at, _ in own],
                [seconds for _, seconds in own],
                linestyle="",
                alpha=0.8,
                **_look(mode),
                label=mode,
            )
        _label(axes, "prompt tokens", "seconds to the first token")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)

    return _svg(draw)


def position_plot(results: Sequence[ModeResult]) -> str:
    """Mean divergence at every token of the continuation."""

    def draw(axes: Axes) -> None:
        for each in results:
            places = np.arange(1, len(each.damage.by_position) + 1)
            axes.plot(places, each.damage.by_position, **_look(each.mode, size=3), label=each.mode)
        _label(axes, "token of the answer", "divergence, nats")
        _log_from_zero(axes)
        axes.set_ylim(bottom=0)

    return _svg(draw)


def layer_plot(results: Sequence[ModeResult]) -> str:
    """Relative error of moved keys and values, layer by layer."""

    def draw(axes: Axes) -> None:
        for each in results:
            layers = np.arange(len(each.damage.key_errors))
            axes.plot(layers, each.damage.key_errors, **_color(each.mode), label=each.mode)
            axes.plot(layers, each.damage.value_errors, "--", **_color(each.mode))
        _label(axes, "layer", "relative error")
        axes.set_ylim(bottom=0)

    return _svg(draw)


def reliability_plot(result: ModeResult) -> str:
    """At every confidence: the share of requests that stay within what calibration predicts at it."""

    def draw(axes: Axes) -> None:
        levels = [level for level, _ in result.damage.reliability]
        found = [share for _, share in result.damage.reliability]
        spread = [[share.value - share.low for share in found], [share.high - share.value for share in found]]
        axes.errorbar(
            levels,
            [share.value for share in found],
            yerr=spread,
            fmt="o",
            capsize=3,
            **_color(result.mode),
            label=result.mode,
        )
        axes.plot([0, 1], [0, 1], "--", color=TEXT, alpha=0.5, linewidth=1)
        _label(axes, "confidence of the prediction", "requests within it, 95 % interval")
        axes.set_xlim(min(levels) - 0.05, 1)
        axes.set_ylim(0, 1.02)

    return _svg(draw)


def prediction_plot(result: ModeResult) -> str:
    """What was predicted of every request that moved text, and what was measured."""

    def draw(axes: Axes) -> None:
        predicted, measured = (np.maximum(values, 1e-6) for values in np.array(result.damage.predictions).T)
        axes.plot(predicted, measured, linestyle="", alpha=0.6, **_look(result.mode, size=4), label=result.mode)
        ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
        axes.plot(ends, ends, "--", color=TEXT, alpha=0.5, linewidth=1)
        _label(axes, "predicted, nats", "measured, nats")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())

    return _svg(draw)


def change_plot(results: Sequence[ModeResult]) -> str:
    """Share of requests that have not yet left the dense answer, token by token."""

    def draw(axes: Axes) -> None:
        for each in results:
            changes, same = each.damage.first_change, each.damage.same
            count = len(changes) / (1 - same) if same < 1 else 1
            places = np.arange(1, 33)
            left = [1 - sum(at < place for at in changes) / count for place in places]
            axes.step(places, left, where="post", **_color(each.mode), label=each.mode)
        _label(axes, "token of the answer", "share of answers unchanged")
        axes.set_ylim(0, 1.02)

    return _svg(draw)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, by the first; less is better."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _join(front: Sequence[tuple[float, float]], axes: Axes) -> None:
    axes.plot([at for at, _ in front], [value for _, value in front], "--", color=TEXT, alpha=0.5, linewidth=1)


def _modes_of(names: Sequence[str]) -> list[str]:
    return [mode for mode in MODES if mode in names]


def _color(mode: str) -> dict[str, Any]:
    return {"color": COLORS[MODES.index(mode)]}


def _look(mode: str, size: float = 6) -> dict[str, Any]:
    return {**_color(mode), "marker": MARKERS[MODES.index(mode)], "markersize": size}


def _log_from_zero(axes: Axes) -> None:
    """Divergences by their size, down to 0."""
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.yaxis.set_major_formatter("{x:g}")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.15)


def _svg(draw: Draw) -> str:
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(5.0, 3.9), layout="constrained")
        canvas.patch.set_alpha(0)
        axes = canvas.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            canvas.legend(loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=1.0)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(TEXT, "currentColor")
