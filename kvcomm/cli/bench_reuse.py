"""`kvcomm bench reuse`: what reading along and moved KV are worth to a team of agents, agent by agent."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcomm.cli.options import DEFAULT_MODEL, ModelFlag, WeightsFlag, load_engine
from kvcomm.cli.output import JsonFlag, emit, table
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from kvcomm.agents.comparison import AgentReuse
    from kvcomm.reuse.policy import ReusePolicy

COLUMNS = (
    "agent",
    "prompt",
    "exact",
    "aligned",
    "computed",
    "approximated",
    "rung",
    "TTFT dense",
    "exact prefix",
    "read along",
    "moved",
    "+ heal",
    "exact after",
    "predicted",
    "audited",
    "computed because",
)


def reuse_command(
    team: Annotated[str, typer.Option("--team", metavar="TEAM", help="A packaged team or a .toml file.")] = "gsm8k",
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="One input a line, as text or .jsonl with 'question'.")
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="Inputs to compare on.")] = 3,
    warm: Annotated[
        int, typer.Option("--warm", min=0, metavar="N", help="Inputs to learn from before, behind those.")
    ] = 12,
    load: Annotated[
        Path | None, typer.Option("--load", metavar="DIR", help="Anchors learned before, instead of warming up.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="DIR", help="Keep what was learned.")] = None,
    max_divergence: Annotated[float, typer.Option("--max-divergence", min=0, metavar="NATS", help="The bound.")] = 0.05,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="P", help="How surely it holds; few inputs allow little.")
    ] = 0.9,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens of an answer at most.")
    ] = 48,
    model: ModelFlag = DEFAULT_MODEL,
    weights: WeightsFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """First tokens of a team: no cache, exact prefixes, read along, moved, moved + heal; moved answers are audited."""
    if load is not None and not load.is_dir():
        raise InvalidRequest(f"--load {load} is no folder of anchors; --save writes one")
    from kvcomm.agents.comparison import compare
    from kvcomm.agents.example_runs import examples, limited
    from kvcomm.agents.team import load_team
    from kvcomm.cli.store import folder_errors
    from kvcomm.reuse.policy import ReusePolicy

    policy = ReusePolicy(max_divergence=max_divergence, confidence=confidence)
    chosen = limited(load_team(team), max_new_tokens)
    inputs = examples(chosen, data)
    wanted = runs + (0 if load is not None else warm)
    if len(inputs) < wanted:
        raise InvalidRequest(f"{len(inputs)} inputs are too few for --runs {runs} and --warm {warm}; give --data")
    if save is not None:  # before anything is computed
        with folder_errors("write", save):
            save.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with load_engine(model, weights=weights) as engine, console.status("") as status:
        note = status.update
        if load is not None:
            engine.reuse.load(load)
        elif warm:
            known = [{**chosen.inputs, **each} for each in inputs[runs:wanted]]
            chosen.group(engine, policy=policy).warm(
                known,
                rounds=chosen.rounds,
                progress=lambda done: note(f"{done.text}: {done.num_done} of {done.num_total}"),
            )
        if save is not None:
            engine.reuse.save(save)
        agents = compare(engine, chosen, inputs[:runs], policy, note=note)
    value = {
        "agents": [agent_values(agent) for agent in agents],
        "config": {
            "model": model,
            "team": chosen.name,
            "runs": runs,
            "bound": {"max_divergence": max_divergence, "delta": 1 - confidence},
        },
    }
    emit(value, reuse_table(agents, policy), conclusion(agents), as_json=as_json)


def reuse_table(agents: Sequence[AgentReuse], policy: ReusePolicy) -> Table:
    """Agent by agent: where tokens came from, first tokens in every way, divergence, reasons."""
    runs = len(agents[0].usages)
    title = f"Mean over {runs} runs, at most {policy.max_divergence:g} nats with confidence {policy.confidence:g}"
    return table(COLUMNS, [_row(agent, runs) for agent in agents], title=title, numeric=set(COLUMNS[1:-1]))


def agent_values(agent: AgentReuse) -> dict[str, Any]:
    """One agent as JSON values: means of token counts, everything else run by run."""
    return {
        "agent": agent.agent,
        "prompt_tokens": agent.mean(lambda usage: usage.prompt_tokens),
        "exact_tokens": agent.mean(lambda usage: usage.exact_tokens),
        "aligned_tokens": agent.mean(lambda usage: usage.aligned_tokens),
        "computed_tokens": agent.mean(lambda usage: usage.computed_tokens),
        "rungs": agent.rungs,
        "ttft_dense_s": agent.dense_s,
        "ttft_exact_s": agent.exact_s,
        "ttft_along_s": agent.along_s,
        "ttft_kvcomm_s": agent.kvcomm_s,
        "ttft_healed_s": agent.healed_s,
        "read_along_tokens": agent.read,
        "healed_after_tokens": agent.healed,
        "predicted": agent.predicted,
        "audited": agent.audited,
        "reasons": dict(agent.reasons),
    }


def _row(agent: AgentReuse, runs: int) -> tuple[object, ...]:
    value = agent_values(agent)
    counts = [f"{value[name]:.0f}" for name in ("prompt_tokens", "exact_tokens", "aligned_tokens", "computed_tokens")]
    times = [f"{statistics.fmean(each):.2f} s" for each in agent.ways_s]
    rung = f"{statistics.fmean(agent.rungs):.0%}" if agent.rungs else ""
    healed = f"{max(agent.healed)} tokens" if agent.healed else ""
    nats = [f"{max(each):.4f}" if each else "" for each in (agent.predicted, agent.audited)]
    because = ", ".join(reason for reason, _ in agent.reasons.most_common(3))
    return (agent.agent, *counts, f"{len(agent.rungs)} of {runs}", rung, *times, healed, *nats, because)


def conclusion(agents: Sequence[AgentReuse]) -> Text:
    """What the table adds up to."""
    dense, exact, along, moved, healed = (
        sum(map(statistics.fmean, way)) for way in zip(*(agent.ways_s for agent in agents), strict=True)
    )
    return Text(
        f"The team's first tokens: {dense:.2f} s without a cache, {exact:.2f} s with exact prefixes, {along:.2f} s "
        f"read along and as exact ({dense / along:.1f}x and {exact / along:.1f}x), {moved:.2f} s with moved KV "
        f"({dense / moved:.1f}x and {exact / moved:.1f}x), {healed:.2f} s where that is healed. "
        "predicted, audited: the largest, in nats."
    )
