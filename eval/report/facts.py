"""What a run was made with: versions, machine, model, resolved configuration, digests of data and templates, seeds."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from eval.figures import environment
from eval.tasks.modes import Mode
from eval.tasks.options import COLD_CONFIG
from eval.tasks.rows import digest_of, split_file
from eval.tasks.work import Work
from kvcomm import Engine
from kvcomm.agents import packaged_teams
from kvcomm.lab.files import read_bytes

PACKAGES = ("datasets", "tokenizers", "faiss-cpu", "numba", "statsmodels", "matplotlib")
"""Besides those of every evaluation."""


def facts_of(engine: Engine, work: Work, modes: Sequence[Mode], options: Namespace) -> dict[str, Any]:
    """All facts, as JSON values."""
    return {
        "environment": _environment(),
        "model": {
            "name": str(options.model),
            "namespace": engine.namespace(),
            "dtype": str(engine.dtype),
            "device": str(engine.model.device),
            "attention": engine.attention,
            "torch_threads": torch.get_num_threads(),
        },
        "modes": {mode.name: mode.describe() for mode in modes},
        "engine": asdict(engine.config),
        "timed_dense_engine": asdict(COLD_CONFIG),
        "digests": {
            "rows": digest_of(work.rows),
            "train_rows": digest_of(work.train),
            "data_file": None if options.data is None else _file_digest(_test_file(work, options.data)),
            "train_file": None if options.train is None else _file_digest(options.train),
            "team": _team_digest(options.team or work.task.team),
            "prompts": _digest([[agent.name, agent.system, agent.prompt] for agent in work.team.agents]),
            "chat_template": _digest(getattr(engine.tokenizer, "chat_template", None)),
        },
        "seeds": {"questions": options.seed, "drawn_answers": options.seed},
        "pool_bytes": engine.cache.num_pages * engine.cache.page_bytes,
    }


def _environment() -> dict[str, Any]:
    found = environment()
    return {**found, "packages": found["packages"] | dict(_versions(PACKAGES))}


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, None


def _test_file(work: Work, data: Path) -> Path:
    return split_file(work.task.source, work.task.source.test, data)


def _file_digest(file: Path) -> str:
    return hashlib.sha256(read_bytes(file)).hexdigest()


def _team_digest(team: str) -> str:
    if team not in packaged_teams():
        return _file_digest(Path(team))
    return hashlib.sha256((files("kvcomm.agents") / "teams" / f"{team}.toml").read_bytes()).hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
