"""`kvcomm bench reuse`: what reading along and moved KV are worth to a team of agents, agent by agent."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from kvcomm.cli.options import DEFAULT_MODEL, ModelFlag, WeightsFlag, load_engine
from kvcomm.cli.output import JsonFlag, emit, table
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from kvcomm.agents.comparison import AgentReuse
    from kvcomm.reuse.policy import ReusePolicy

SOURCES = ("agent", "prompt tokens", "exact", "moved", "computed", "runs that moved text", "computed because")
SECONDS = ("agent", "no cache", "exact prefix", "read along", "moved", "moved, healed")
NATS = ("agent", "expected at most", "measured", "moved text computed", "healed after")
MOST_REASONS = 2
"""Reasons that are told of an agent."""


def reuse_command(
    team: Annotated[str, typer.Option("--team", metavar="TEAM", help="A packaged team or a .toml file.")] = "gsm8k",
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="One input a line, as text or .jsonl with 'question'.")
    ] = None,
    runs: Annotated[
        int, typer.Option("--runs", min=1, metavar="N", help="How many inputs the ways are compared on.")
    ] = 3,
    warm: Annotated[
        int,
        typer.Option("--warm", min=0, metavar="N", help="How many inputs, those after them, are learned from before."),
    ] = 12,
    load: Annotated[
        Path | None, typer.Option("--load", metavar="DIR", help="Anchors learned before, instead of warming up.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="DIR", help="Keep what was learned in this folder.")
    ] = None,
    max_divergence: Annotated[
        float,
        typer.Option(
            "--max-divergence", min=0, metavar="NATS", help="The bound: how far answers on moved text may be off."
        ),
    ] = 0.05,
    confidence: Annotated[
        float,
        typer.Option(
            "--confidence",
            metavar="P",
            help="The share of cases in which it has to hold; few inputs suffice for little.",
        ),
    ] = 0.9,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens of an answer at most.")
    ] = 48,
    model: ModelFlag = DEFAULT_MODEL,
    weights: WeightsFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """What reuse gives a team of agents: seconds to first tokens in five ways, and how far moved text is off.

    no cache: every prompt token is computed. exact prefix: what prompts begin with alike is computed once. read along:
    beside that, agents that wait read what others write while they write it. moved: text that another prompt holds is
    moved from there, under a bound. moved, healed: the same, replaced by exact KV while the answer begins.
    """
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
    emit(value, *reuse_views(agents, policy), as_json=as_json)


def reuse_views(agents: Sequence[AgentReuse], policy: ReusePolicy) -> list[RenderableType]:
    """Agent by agent: where tokens came from, first tokens in every way, divergence; and what it adds up to."""
    runs = len(agents[0].usages)
    tokens = table(
        SOURCES,
        [_tokens_row(agent, runs) for agent in agents],
        title=f"Where prompt tokens came from where text moves (mean of {runs} runs)",
        numeric=set(SOURCES[1:-1]),
    )
    seconds = table(
        SECONDS,
        [(agent.agent, *(f"{statistics.fmean(each):.2f} s" for each in agent.ways_s)) for agent in agents],
        title="Time to the first token (mean)",
        numeric=set(SECONDS[1:]),
    )
    nats = table(
        NATS,
        [_nats_row(agent) for agent in agents],
        title=f"Largest error in nats (allowed: {policy.max_divergence:g} in {policy.confidence:.0%} of cases)",
        numeric=set(NATS[1:]),
    )
    return [tokens, seconds, nats, conclusion(agents)]


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


def _tokens_row(agent: AgentReuse, runs: int) -> tuple[object, ...]:
    from kvcomm.reuse.plan import Reason

    value = agent_values(agent)
    counts = [f"{value[name]:.0f}" for name in ("prompt_tokens", "exact_tokens", "aligned_tokens", "computed_tokens")]
    because = "; ".join(Reason(reason).words for reason, _ in agent.reasons.most_common(MOST_REASONS))
    return (agent.agent, *counts, f"{len(agent.rungs)} of {runs}", because)


def _nats_row(agent: AgentReuse) -> tuple[object, ...]:
    nats = [f"{max(each):.4f}" if each else "" for each in (agent.predicted, agent.audited)]
    share = f"{statistics.fmean(agent.rungs):.0%}" if agent.rungs else ""
    return (agent.agent, *nats, share, f"{max(agent.healed)} tokens" if agent.healed else "")


def conclusion(agents: Sequence[AgentReuse]) -> Text:
    """What the tables add up to, and what their words mean."""
    dense, exact, along, moved, healed = (
        sum(map(statistics.fmean, way)) for way in zip(*(agent.ways_s for agent in agents), strict=True)
    )
    return Text(
        f"The team's first tokens: {dense:.2f} s without a cache, {exact:.2f} s with exact prefixes, {along:.2f} s "
        f"read along and as exact ({dense / along:.1f}x and {exact / along:.1f}x), {moved:.2f} s with moved text "
        f"({dense / moved:.1f}x and {exact / moved:.1f}x), {healed:.2f} s where that is healed.\n"
        "exact: cached from a prompt that begins alike. moved: taken from another prompt and corrected. error in "
        "nats: how far the probabilities of the answer's tokens are from the exact ones (0: not at all); measured "
        "by computing the prompt exactly afterwards. moved text computed: its share that was computed after all. "
        "healed after: tokens of the answer until all was exact."
    )
