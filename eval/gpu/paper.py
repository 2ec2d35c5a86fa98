"""Part `paper`: first tokens in the setting of KVCOMM's tables (arXiv 2510.12872v2), as far as the time goes.

First five agents with roles and outputs of 512 tokens and a question of 1,024, then cells of its second table, three
agents each, the middle and the ends before the rest. What is compared, and how, is said in `eval.ttft.first_tokens`.
"""

from __future__ import annotations

from argparse import Namespace

from eval.command import note
from eval.gpu.records import Recorder
from eval.ttft.first_tokens import FirstTokens, measure_first_tokens, servers, warm_up
from eval.ttft.table import OUTPUT_SIZES, ROLE_SIZES
from eval.ttft.team import Sizes, Team, num_prompt_tokens, teach
from kvcomm import Engine
from kvcomm.lab.timings import TakeTokens

SPEEDUPS = {"kvcomm": "speedup", "along": "along", "exact": "exact"}
"""Ways that are held against dense, and what their figures are called."""

CELL_AGENTS = 3
FIRST_CELLS = ((512, 512), (64, 128), (1024, 1024))


def settings_of(options: Namespace) -> list[Sizes]:
    """Teams in the order in which they are measured."""
    own = Sizes(options.agents, options.role_tokens, options.question_tokens, options.output_tokens)
    if options.small:
        return [own]
    grid = [(role, output) for role in ROLE_SIZES for output in OUTPUT_SIZES]
    ordered = [*FIRST_CELLS, *(cell for cell in grid if cell not in FIRST_CELLS)]
    return [own, *(Sizes(CELL_AGENTS, role, options.question_tokens, output) for role, output in ordered)]


def measure(engine: Engine, take: TakeTokens, options: Namespace, record: Recorder) -> None:
    """Rows of every team, and the last agent's speedups."""
    teams = settings_of(options)
    with servers(engine, take, teams[0]) as others:
        record.setting(num_left=others.num_left)
        is_warm = False
        for sizes in teams:
            name = f"{sizes.agents}x{sizes.role}_{sizes.output}"
            if record.is_over:
                record.cut(f"team {name}")
                return
            if num_prompt_tokens(engine, sizes, sizes.agents - 1) + 1 > engine.max_context:
                record.skipped(f"team {name}: longer than the model's {engine.max_context} tokens")
                continue
            note(f"team {name}")
            team = Team(engine, take, sizes)
            teach(team, options.warm)
            if not is_warm:
                warm_up(team, others)
                is_warm = True
            _record(name, sizes, measure_first_tokens(team, others, num_rounds=options.rounds), record)


def _record(name: str, sizes: Sizes, found: FirstTokens, record: Recorder) -> None:
    for row in found.rows():
        record.row((name, *row))
    for way, called in SPEEDUPS.items():
        record.samples(f"{called}_{name}", found.samples("dense", -1).per(found.samples(way, -1)).values, "x")
        record.samples(f"sum_{called}_{name}", found.sums("dense").per(found.sums(way)).values, "x")
    record.figure(f"aligned_{name}", min(found.aligned), "share", goal="1")
