"""The command line of the task evaluations, and what follows from it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.command import add_model, positive
from eval.tasks.modes import MODES
from eval.tasks.rows import chosen, digest_of, load_rows, load_train_rows
from eval.tasks.task import Row, Task
from eval.tasks.topology import AGENTS, TOPOLOGIES, wire
from eval.tasks.work import Work
from kvcomm import EngineConfig, SamplingParams
from kvcomm.agents import Team, load_team
from kvcomm.errors import InvalidRequest
from kvcomm.lab.teams import limited

CONFIG = EngineConfig(pool_bytes=6 * 2**30, idle_after_s=0.0)
"""Of the engine that reuses. The pool holds the prompts of many questions; untouched pages cost no memory on a CPU."""
COLD_CONFIG = EngineConfig(cache=False)
"""Of the engine on which dense requests are timed."""

NOT_COMPARED = frozenset({"divergence", "timed"})
"""Settings that may change from one run in a folder to the next: they only add to what is there."""


def make_parser(name: str, limit: int, num_samples: int) -> ArgumentParser:
    """The options that all tasks have.

    Args:
        limit: questions by default.
        num_samples: answers drawn by default.
    """
    parser = ArgumentParser(
        prog=f"python -m eval.{name}", description=f"What reuse does to a team's answers on {name}."
    )
    add_model(parser)
    parser.add_argument("--agents", type=int, default=5, choices=AGENTS, help="with the referee [%(default)s]")
    parser.add_argument("--topology", default="full", choices=TOPOLOGIES, help="who reads whom [%(default)s]")
    parser.add_argument("--modes", default="dense,kvcomm,paper", help=f"some of {','.join(MODES)} [%(default)s]")
    parser.add_argument("--limit", type=positive, default=limit, metavar="N", help="questions [%(default)s]")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of questions; 0: the first ones [%(default)s]"
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="file or folder of rows [the hub]")
    parser.add_argument("--train", type=Path, metavar="FILE", help="rows for anchors and calibration [beside --data]")
    parser.add_argument("--team", help="a packaged team or a .toml file [the task's]")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="of an answer at most [the team's]")
    parser.add_argument(
        "--samples",
        type=_count,
        default=num_samples,
        metavar="N",
        help="answers to draw besides, for pass@k [%(default)s]",
    )
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="of those [%(default)s]")
    parser.add_argument("--max-divergence", type=float, default=0.02, metavar="NATS", help="of kvcomm [%(default)s]")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of kvcomm [%(default)s]")
    parser.add_argument("--anchors", type=positive, default=16, metavar="N", help="questions that teach [%(default)s]")
    parser.add_argument(
        "--calibration",
        type=positive,
        default=28,
        metavar="N",
        help="further ones that are only measured [%(default)s]",
    )
    parser.add_argument(
        "--divergence", type=_count, default=20, metavar="N", help="questions to replay for divergences [%(default)s]"
    )
    parser.add_argument(
        "--timed", type=_count, default=3, metavar="N", help="questions to time, one request at a time [%(default)s]"
    )
    parser.add_argument("--out", type=Path, default=Path(f"out/{name}"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def make_work(task: Task, options: Namespace, *, learns: bool) -> Work:
    """Team and rows.

    Args:
        learns: whether any mode needs rows to learn from.

    Raises:
        InvalidRequest: rows cannot be read or are too few, or the team does not fit.
    """
    team = wire(load_team(options.team or task.team), options.agents, options.topology)
    if options.max_new_tokens is not None:
        team = limited(team, options.max_new_tokens)
    _require_greedy(team)
    every = task.arrange(load_rows(task.source, task.source.test, options.data))
    rows = chosen(every, options.limit, options.seed)
    if not rows:
        raise InvalidRequest(f"there are no questions in {options.data or task.source.hub[0]}")
    num_train = options.anchors + options.calibration if learns else 0
    train = _train(task, options, every, rows)[:num_train] if num_train else []
    if len(train) < num_train:
        raise InvalidRequest(
            f"{len(train)} rows to learn from are too few; {num_train} are needed: give --train, or less --anchors "
            "or --calibration"
        )
    return Work(task, team, rows, train, options.anchors, options.samples, options.temperature, options.seed)


def settings_of(work: Work, options: Namespace) -> dict[str, Any]:
    """Everything that decides what is computed; without paths, which differ from machine to machine."""
    left_out = {"json", "out", "data", "train", "modes", "team"}
    return {
        **{name: value for name, value in vars(options).items() if name not in left_out},
        "team": work.team.name,
        "data": None if options.data is None else options.data.name,
        "rows": digest_of(work.rows),
        "train_rows": digest_of(work.train) if work.train else None,
        "reads": {agent.name: [slot.name for slot in agent.slots] for agent in work.team.agents},
        "tokens": {agent.name: work.sampling(agent.name).max_new_tokens for agent in work.team.agents},
    }


def _train(task: Task, options: Namespace, every: Sequence[Row], asked: Sequence[Row]) -> list[Row]:
    source = task.source
    if options.train is None and source.train == source.test:
        left_out = {digest_of([row]) for row in asked}
        return [row for row in every if digest_of([row]) not in left_out]
    return task.arrange(load_train_rows(source, options.train, options.data))


def _require_greedy(team: Team) -> None:
    for agent in team.agents:
        sampling = agent.sampling or SamplingParams()
        if not sampling.is_greedy:
            raise InvalidRequest(
                f"agent {agent.name!r} of team {team.name!r} does not decode greedily; modes could not be compared"
            )


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(f"{value} is negative")
    return value
