"""The shapes of KVCOMM's second table (arXiv 2510.12872v2): roles of 64 to 1,024 tokens by outputs of 128 to 1,024.

Three agents in every cell, and a question of 1,000 tokens as in the paper setting; what is compared, and how, is said
in `eval.ttft.first_tokens`.
Deviations from the publication: real text instead of synthetic one, outputs taken from the text instead of decoded,
and exact reuse of prefixes and reading along as further columns. Every cell has roles, and so banks, of its own. Cells
whose longest prompt does not fit the model are left out and named. One dtype a run: give --dtype.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence

from eval.command import note
from eval.figures import Figure, Report
from eval.ttft.first_tokens import COLUMNS, FirstTokens, Servers, measure_first_tokens, servers, warm_up
from eval.ttft.grid import Grid, GridReport, Row
from eval.ttft.team import Sizes, Team, num_prompt_tokens, teach
from eval.workload import settings
from kvcomm import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.lab.timings import Samples, TakeTokens

ROLE_SIZES = (64, 128, 256, 512, 1024)
OUTPUT_SIZES = (128, 256, 512, 1024)

SPEEDUPS = {"kvcomm": "speedup", "along": "along"}
"""Ways that are held against dense, and what their figures are called."""


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """Every cell of an engine.

    Raises:
        InvalidRequest: not one cell fits the model, or there is one agent only.
    """
    cells, left_out = _cells(engine, options)
    rows: list[Row] = []
    figures: list[Figure] = []
    samples: dict[str, list[float]] = {}
    aligned: list[float] = []
    speedups: dict[str, list[Samples]] = {way: [] for way in SPEEDUPS}
    with servers(engine, take, cells[0]) as others:
        for index, sizes in enumerate(cells):
            note(f"cell {index + 1} of {len(cells)}: roles of {sizes.role} tokens, outputs of {sizes.output}")
            found = _cell(Team(engine, take, sizes), others, options, is_first=not index)
            cell = f"{sizes.role}_{sizes.output}"
            for way, name in SPEEDUPS.items():
                speedups[way].append(found.samples("dense", -1).per(found.samples(way, -1)))
                figures.append(_ratio(f"agent{sizes.agents}_{name}_{cell}", speedups[way][-1]))
            rows += [(f"{sizes.role}", f"{sizes.output}", *row) for row in found.rows()]
            samples |= found.raw(f"{cell}_")
            aligned += found.aligned
    figures += _overall(options.agents, speedups, aligned)
    config = settings(engine, options, left_out=left_out, num_left=others.num_left)
    return GridReport("ttft table", figures, config, samples, Grid(("role", "output", *COLUMNS), tuple(rows)))


def _cells(engine: Engine, options: Namespace) -> tuple[list[Sizes], list[str]]:
    """The cells that fit the model, and the names of those that do not."""
    if options.agents < 2:
        raise InvalidRequest(f"one agent has nobody to take text from; --agents is at least 2, got {options.agents}")
    fitting, left_out = [], []
    for role in options.role_sizes:
        for output in options.output_sizes:
            sizes = Sizes(options.agents, role, options.question_tokens, output)
            needed = num_prompt_tokens(engine, sizes, options.agents - 1) + 1
            if needed <= engine.max_context:
                fitting.append(sizes)
                continue
            room = engine.max_context
            note(f"left out: roles of {role} and outputs of {output} tokens need {needed}, the model has {room}")
            left_out.append(f"{role}_{output}")
    if not fitting:
        raise InvalidRequest(
            f"no cell fits the model's {engine.max_context} tokens; give smaller --role-sizes, --output-sizes or "
            "--question-tokens"
        )
    return fitting, left_out


def _cell(team: Team, others: Servers, options: Namespace, *, is_first: bool) -> FirstTokens:
    teach(team, options.warm)
    if is_first:
        warm_up(team, others)
    return measure_first_tokens(team, others, num_rounds=options.repeats)


def _overall(num_agents: int, speedups: Mapping[str, Sequence[Samples]], aligned: Sequence[float]) -> list[Figure]:
    """The ends of the table, and whether everything was moved that should have been."""
    figures = []
    for way, name in SPEEDUPS.items():
        medians = [each.median for each in speedups[way]]
        figures += [
            Figure(f"agent{num_agents}_{name}_least", min(medians), "x"),
            Figure(f"agent{num_agents}_{name}_most", max(medians), "x"),
        ]
    return [*figures, Figure("aligned", min(aligned), "share", goal="1")]


def _ratio(name: str, samples: Samples) -> Figure:
    return Figure(name, samples.median, "x", samples.quartiles)
