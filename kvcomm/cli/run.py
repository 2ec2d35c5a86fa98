"""`kvcomm run`: a team of agents from a TOML file, or one prompt, on one engine."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcomm.cli.options import (
    AdapterFlag,
    EngineOptions,
    SamplingOptions,
    adapter_folders,
    require_adapters,
    with_adapters,
)
from kvcomm.cli.output import JsonFlag, emit, table
from kvcomm.cli.spread import spread
from kvcomm.cli.text import printable, usage_values
from kvcomm.errors import EmptyPrompt, InvalidRequest

if TYPE_CHECKING:
    from kvcomm.agents.results import AgentResult, GroupEvent, GroupResult
    from kvcomm.agents.team import Team
    from kvcomm.cli.progress import ProgressView
    from kvcomm.config import EngineConfig
    from kvcomm.engine.engine import Engine
    from kvcomm.reuse.policy import ReusePolicy

ALONE = "answer"
"""The name of the agent that answers a single prompt."""

COUNTS = ("prompt tokens", "exact", "moved", "computed", "read along", "generated")
"""Columns of tokens."""
LEGEND = (
    "exact: kept from a prompt that begins alike. moved: taken from the same text in another prompt, and corrected. "
    "computed: by the model. read along: of these, computed before the prompt was complete. tokens/s: of the answer."
)
"""What the table's columns mean."""

EPILOG = 'Examples: kvcomm run gsm8k --input question="What is 17 * 4?"; kvcomm run --prompt "Say hello."'


@spread
def run(
    *,
    team: Annotated[
        str | None, typer.Argument(metavar="TEAM", help="A packaged team, such as gsm8k, or a TOML file.")
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=TEXT", help="A team's input; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="One prompt, without a team.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="With --prompt: continue the text, without chat template.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, metavar="N", help="Rounds to run; by default as the team says.")
    ] = None,
    read_along: Annotated[
        bool | None,
        typer.Option(
            "--read-along/--no-read-along",
            help="Let agents that wait read what others are still writing; by default as the team says.",
        ),
    ] = None,
    sampling: SamplingOptions,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="PROFILE", help="Reuse as `kvcomm tune` found best for this team."),
    ] = None,
    loading: EngineOptions,
    adapters: AdapterFlag = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Show answers as they come; with --json on stderr, off by default."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a team of agents answer, or answer one prompt.

    Agents of a team name their adapters; one prompt is answered by the adapter that is given with it.
    Ends with a table of where each agent's prompt tokens came from and how long its first token took.
    """
    folders = adapter_folders(adapters)
    if profile is not None and not profile.is_file():
        raise InvalidRequest(f"--profile {profile} is no file; `kvcomm tune` writes one")
    wanted = _team(team, prompt, inputs, raw=raw, rounds=rounds, read_along=read_along, adapters=tuple(folders))
    require_adapters(folders, loading.weights)
    tuned = wanted
    wanted = _with_sampling(wanted, sampling.settings)
    if read_along is not None:
        wanted = replace(wanted, read_along=read_along)
    values = {**wanted.inputs, **_inputs(inputs)}
    if prompt is not None:
        values["prompt"] = prompt
    _require_inputs(wanted, values)
    num_rounds = rounds or wanted.rounds
    is_streamed = not as_json if stream is None else stream
    engine, policy = (loading.load(), None) if profile is None else _tuned(profile, tuned, loading)
    with with_adapters(engine, folders):
        events = _events(engine, wanted, values, num_rounds, raw=raw, policy=policy)
        with _view(wanted, num_rounds, is_streamed=is_streamed, as_json=as_json) as view:
            result = _follow(events, view)
    answers = [answer for answers in result.rounds for answer in answers.values()]
    if not as_json:
        answers_at_end = [] if is_streamed else [printable(answer.text).strip() for answer in result.final]
        sys.stdout.write("".join(f"{text}\n" for text in [*answers_at_end, ""]))
    value = {"team": None if prompt is not None else wanted.name, "model": loading.model, **_values(result)}
    emit(value, _table(answers, num_rounds), Text(LEGEND, style="dim"), as_json=as_json)


def _team(
    team: str | None,
    prompt: str | None,
    inputs: list[str] | None,
    *,
    raw: bool,
    rounds: int | None,
    read_along: bool | None,
    adapters: Sequence[str],
) -> Team:
    from kvcomm.agents.agent import Agent
    from kvcomm.agents.team import Team, load_team

    if (team is None) == (prompt is None):
        raise InvalidRequest("give either a team or --prompt; `kvcomm run --help` has examples")
    if team is not None:
        if raw:
            raise InvalidRequest("--raw goes with --prompt; a team's prompts are made by the chat template")
        return load_team(team)
    if inputs or rounds or read_along is not None:
        raise InvalidRequest("--input, --rounds and --read-along go with a team, not with --prompt")
    if not prompt or not prompt.strip():
        raise EmptyPrompt(f"the prompt is empty: {prompt!r}")
    if len(adapters) > 1:
        raise InvalidRequest(f"one prompt is answered by one adapter, not by {', '.join(adapters)}")
    return Team(ALONE, (Agent(ALONE, prompt="{prompt}", adapter=next(iter(adapters), None)),))


def _tuned(profile: Path, team: Team, loading: EngineOptions) -> tuple[Engine, ReusePolicy]:
    from kvcomm.agents.tuning import apply_profile

    def make(config: EngineConfig) -> Engine:
        return loading.load(config=config)

    applied = apply_profile(make, profile, team=team)
    return applied.engine, applied.policy


def _with_sampling(team: Team, settings: dict[str, int | float | None]) -> Team:
    """The team with what the command line says about sampling, for every agent."""
    from kvcomm.engine.sampling import SamplingParams

    given: dict[str, Any] = settings
    agents = (replace(agent, sampling=replace(agent.sampling or SamplingParams(), **given)) for agent in team.agents)
    return replace(team, agents=tuple(agents))


def _inputs(given: Sequence[str] | None) -> dict[str, str]:
    values: dict[str, str] = {}
    for item in given or ():
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise InvalidRequest(f"--input {item!r} is not of the form NAME=TEXT")
        if name in values:
            raise InvalidRequest(f"--input {name!r} is given twice")
        values[name] = text
    return values


def _require_inputs(team: Team, values: dict[str, str]) -> None:
    """Find a mistake before a model is loaded; the run itself checks the rest."""
    if missing := [name for name in team.required_inputs if name not in values]:
        options = " ".join(f"--input {name}=TEXT" for name in missing)
        raise InvalidRequest(f"team {team.name!r} needs {options}")


def _events(
    engine: Engine, team: Team, values: dict[str, str], num_rounds: int, *, raw: bool, policy: ReusePolicy | None
) -> Generator[GroupEvent, None, None]:
    if raw:
        return _raw_events(engine, values["prompt"], team)
    return team.group(engine, policy=policy).stream(num_rounds, **values)


def _raw_events(engine: Engine, prompt: str, team: Team) -> Generator[GroupEvent, None, None]:
    """A prompt that no chat template touches, as a run of one agent."""
    from kvcomm.agents.results import AgentFinished, AgentResult, AgentStarted, AgentText, GroupFinished, GroupResult
    from kvcomm.engine.sampling import SamplingParams

    segments = engine.read_prompt(prompt, is_start=True)
    agent = team.agents[0]
    handle = engine.submit(segments, agent.sampled_by(SamplingParams()), adapter=agent.adapter)
    yield AgentStarted(ALONE, 1, sum(len(segment.token_ids) for segment in segments))
    for chunk in handle:
        yield AgentText(ALONE, 1, chunk.text, chunk.token_ids)
    done = handle.result()
    answer = AgentResult(
        name=ALONE,
        round=1,
        text=done.text,
        token_ids=done.token_ids,
        prompt=segments,
        usage=done.usage,
        finish_reason=done.finish_reason,
        started_s=0.0,
        finished_s=done.usage.total_s,
    )
    yield AgentFinished(ALONE, 1, answer)
    yield GroupFinished(GroupResult(({ALONE: answer},), (ALONE,), done.usage.total_s))


def _follow(events: Generator[GroupEvent, None, None], view: ProgressView) -> GroupResult:
    from kvcomm.agents.results import GroupFinished

    with closing(events):
        for event in events:
            view.show(event)
            if isinstance(event, GroupFinished):
                return event.result
    raise AssertionError("a run ended without a result or an error")


def _view(team: Team, num_rounds: int, *, is_streamed: bool, as_json: bool) -> ProgressView:
    from kvcomm.cli.progress import Lines, OneText, Panels, Silent

    stream = sys.stderr if as_json else sys.stdout
    if not is_streamed:
        return Silent()
    if len(team.agents) == 1 and num_rounds == 1:
        return OneText(stream)
    if stream.isatty():
        return Panels(Console(file=stream, highlight=False), num_rounds=num_rounds)
    return Lines(stream, [agent.name for agent in team.agents])


def _values(result: GroupResult) -> dict[str, Any]:
    return {
        "rounds": [{name: _answer_values(answer) for name, answer in answers.items()} for answers in result.rounds],
        "final": [answer.name for answer in result.final],
        "total_s": result.total_s,
    }


def _answer_values(answer: AgentResult) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "started_s": answer.started_s,
        "finished_s": answer.finished_s,
        "usage": usage_values(answer.usage),
    }


def _table(answers: Sequence[AgentResult], num_rounds: int) -> Table:
    columns = ["agent", *COUNTS, "first token", "tokens/s"]
    numeric = set(columns[1:])
    rows = [[answer.name, *_cells(answer)] for answer in answers]
    if num_rounds > 1:
        columns.insert(1, "round")
        for row, answer in zip(rows, answers, strict=True):
            row.insert(1, answer.round)
    if len(answers) > 1:
        counts = [sum(counted) for counted in zip(*(_counts(answer) for answer in answers), strict=True)]
        rows.append(["all", *[None] * (num_rounds > 1), *counts, None, None])
    return table(columns, rows, numeric=numeric)


def _cells(answer: AgentResult) -> list[object]:
    usage = answer.usage
    return [*_counts(answer), f"{usage.ttft_s:.3f} s", f"{usage.decode_tokens_per_s:.1f}"]


def _counts(answer: AgentResult) -> tuple[int, ...]:
    usage = answer.usage
    return (
        usage.prompt_tokens,
        usage.exact_tokens,
        usage.aligned_tokens,
        usage.computed_tokens,
        usage.read_along_tokens,
        usage.generated_tokens,
    )
