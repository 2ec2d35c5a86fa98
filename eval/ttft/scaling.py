"""How first tokens grow with a shared text: 16 agents, the last of which reads a prompt of 8,192 tokens.

Every agent reads the question and all outputs before its own, so one team gives both curves: seconds to the first token
against the prompt's tokens, and the sum over a team against its number of agents. What is compared, and how, is said in
`eval.ttft.first_tokens`. Outputs are as long as the wanted prompt leaves them room to be. The engine has a pool that
holds all prompts of a round, so nothing is evicted in between. A curve's exponent is the slope of a line through the
logarithms, fitted in every round to all agents with something to move; a first token that costs a constant has exponent
0, one that costs the same for each token 1. A constant part, as of glue, makes an exponent smaller than the end of its
curve is steep: the curves are in the JSON.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eval.command import note
from eval.figures import Figure, Report
from eval.ttft.first_tokens import COLUMNS, WAYS, FirstTokens, measure_first_tokens, servers, warm_up
from eval.ttft.grid import Grid, GridReport
from eval.ttft.team import Sizes, Team, num_prompt_tokens, num_team_tokens, teach
from eval.workload import settings
from kvcomm import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.lab.timings import Samples, TakeTokens

MIN_AGENTS = 3
"""Two points with something to move."""

NUM_SPARE_PROMPTS = 4
"""Of the longest prompts, beside all prompts of a round: what is being served and what it leaves for others to move."""


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """The curves of an engine.

    Raises:
        InvalidRequest: too few agents, or no room for outputs.
    """
    sizes = team_sizes(engine, options)
    pool_tokens = NUM_SPARE_PROMPTS * options.prompt_tokens + num_team_tokens(engine, sizes)
    roomy = replace(engine.config, pool_tokens=max(pool_tokens, engine.config.pool_tokens or 0))
    with Engine(engine.model, engine.tokenizer, config=roomy) as own, servers(own, take, sizes) as others:
        team = Team(own, take, sizes)
        teach(team, options.warm)
        warm_up(team, others)
        found = measure_first_tokens(team, others, num_rounds=options.repeats)
    config = settings(
        engine, options, output_tokens=sizes.output, longest_prompt=found.num_tokens[-1], pool_tokens=roomy.pool_tokens
    )
    return GridReport("ttft scaling", _figures(found), config, found.raw(), Grid(COLUMNS, tuple(found.rows())))


def team_sizes(engine: Engine, options: Namespace) -> Sizes:
    """Sizes with outputs as long as the longest prompt leaves room for.

    Raises:
        InvalidRequest: too few agents, or no room for outputs; gives the numbers.
    """
    num_readers = options.agents - 1
    if options.agents < MIN_AGENTS:
        raise InvalidRequest(f"a curve needs at least {MIN_AGENTS} agents, got --agents {options.agents}")
    wanted = min(options.prompt_tokens, engine.max_context - 1)  # and room for the first token
    if options.prompt_tokens > engine.max_context:
        note(f"prompts of {options.prompt_tokens} tokens do not fit the model; the longest has {wanted}")
    sizes = Sizes(options.agents, options.role_tokens, options.question_tokens, 0)
    fixed = num_prompt_tokens(engine, sizes, num_readers)
    output = (wanted - fixed) // num_readers
    if output < 1:
        raise InvalidRequest(
            f"role, question and glue of agent {options.agents} take {fixed} of {wanted} tokens, which leaves none for "
            f"{num_readers} outputs; raise --prompt-tokens or lower --role-tokens, --question-tokens or --agents"
        )
    return sizes._replace(output=output)


def _figures(found: FirstTokens) -> list[Figure]:
    last = len(found.num_tokens)
    figures = []
    for way in WAYS:
        first = [found.samples(way, agent) for agent in range(1, last)]
        figures.append(_exponent(f"exponent_{way}", found.num_tokens[1:], first))
    for way in WAYS:
        counts = range(2, last + 1)
        figures.append(_exponent(f"exponent_agents_{way}", counts, [found.sums(way, count) for count in counts]))
    endings = {"kvcomm": "speedup", "exact": "speedup_exact", "along": "along"}
    ratios = {
        f"agent{last}_{end}": found.samples("dense", -1).per(found.samples(way, -1)) for way, end in endings.items()
    }
    ratios |= {f"sum_{end}": found.sums("dense").per(found.sums(way)) for way, end in endings.items()}
    figures += [Figure(name, ratio.median, "x", ratio.quartiles) for name, ratio in ratios.items()]
    return [*figures, Figure("aligned", min(found.aligned), "share", goal="1")]


def _exponent(name: str, sizes: Sequence[int], seconds: Sequence[Samples]) -> Figure:
    """The exponent over rounds; `seconds` has one entry per size."""
    rounds = zip(*(each.values for each in seconds), strict=True)
    fitted = Samples(tuple(power_law(sizes, values) for values in rounds))
    return Figure(name, fitted.median, "", fitted.quartiles)


def power_law(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Exponent b of a * size^b, by least squares of the logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)
