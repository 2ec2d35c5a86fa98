"""The Pareto table as a picture: divergence against what is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvcomm.agents.tuning.profile import PointTable
from kvcomm.errors import MissingExtra

LINEAR_BELOW = 1e-4
"""Nats; divergences of 0 have a place on the axis, too."""


def save_plot(points: Sequence[PointTable], file: Path) -> None:
    """Write an SVG. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("no plot without matplotlib: pip install 'kvcomm[eval]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    front = [point for point in points if point.on_front]
    axes.scatter([100 * each.computed for each in points], [each.divergence for each in points], color="#8a8a8a", s=18)
    axes.plot([100 * each.computed for each in front], [each.divergence for each in front], "o-", color="#3d9970")
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.set_xlabel("moved tokens computed, %")
    axes.set_ylabel("mean divergence, nats")
    axes.grid(alpha=0.3)
    figure.savefig(file, format="svg", metadata={"Date": None})
