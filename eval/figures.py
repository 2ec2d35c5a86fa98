"""What an evaluation reports: figures with an id, a table for people, one JSON object for machines, one file per run.

A figure knows the goal it is held against but never fails a run: that is for who reads it. The file of a run holds all
that is needed to judge it later: figures, resolved settings, where and on what it ran, and the raw samples. This module
needs neither torch nor a model.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("kvcomm", "torch", "transformers", "numpy", "safetensors", "triton")
PIPE_WIDTH = 160
"""Columns where stdout is not a terminal: wide enough that no table wraps."""


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        id: stable name, as used in issues and by CI.
        value: the number, a median where it was measured repeatedly.
        unit: "s", "ms", "bytes", "tokens/s", "x" for ratios.
        spread: first and third quartile of repeated measurements; None for what does not vary.
        goal: what it is held against, as text; empty where there is no goal.
    """

    id: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    goal: str = ""

    def to_json(self) -> dict[str, Any]:
        """id, value, unit and spread."""
        return {"id": self.id, "value": self.value, "unit": self.unit, "spread": self.spread and list(self.spread)}


@dataclass(frozen=True)
class Report:
    """All figures of one run, and how it was set up. `samples` are raw measurements by name."""

    name: str
    figures: Sequence[Figure]
    config: Mapping[str, Any]
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"figures": [figure.to_json() for figure in self.figures], "config": dict(self.config)}

    def emit(self, *, as_json: bool) -> None:
        """Print on stdout, as one JSON object or as a table."""
        if as_json:
            sys.stdout.write(json.dumps(self.to_json(), indent=2) + "\n")
            return
        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
        console.print(self.table())

    def table(self) -> Table:
        """The figures for people."""
        view = Table(title=self.name, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column, justify in (("figure", "left"), ("value", "right"), ("unit", "left"), ("quartiles", "left")):
            view.add_column(column, justify="right" if justify == "right" else "left", header_style="dim")
        view.add_column("wanted", header_style="dim")
        for figure in self.figures:
            spread = " .. ".join(map(format_number, figure.spread)) if figure.spread else ""
            view.add_row(figure.id, format_number(figure.value), figure.unit, spread, figure.goal)
        return view

    def save(self, file: Path) -> None:
        """Write figures, settings, environment and samples; the folder is made.

        Raises:
            OSError: the file cannot be written.
        """
        value = {"name": self.name, **self.to_json(), "environment": environment(), "samples": dict(self.samples)}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def format_number(value: float) -> str:
    """Whole numbers with separators, others with four significant digits."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def environment() -> dict[str, Any]:
    """When, where and on what this process runs."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "accelerator": _accelerator()},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command in this checkout; None where there is no git, no checkout or no commit."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _accelerator() -> str | None:
    torch = sys.modules.get("torch")  # whoever measures on one has imported it
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Let all that is written to stdout go to stderr, also by other code than Python's."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
