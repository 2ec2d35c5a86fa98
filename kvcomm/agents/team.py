"""Teams: agents read from a TOML file.

    name = "reviewers"                    # optional, and so are description and the next two tables
    [defaults]
    rounds = 2
    read_along = false                    # agents that wait do not read what others are still writing
    sampling = { max_new_tokens = 128 }   # fields of SamplingParams
    [inputs]
    style = "short"                       # values of placeholders that a run may leave out
    [[agents]]
    name = "solver"
    system = "You solve ..."
    prompt = "Question: {question}"
    sampling = { temperature = 0.7 }      # over the defaults, field by field
    adapter = "poet"                      # optional: one that the engine has loaded under this name

A key that is not listed here fails with file, table and key. A team is a value; it knows no engine until it
is asked for a group.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Any, Unpack, get_args, get_origin, get_type_hints

from kvcomm.agents.agent import Agent
from kvcomm.agents.graph import AgentGraph
from kvcomm.agents.group import GroupSettings, KVCommAgentGroup
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, TemplateError
from kvcomm.files.reading import BadContent, parse_toml, read_toml

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcomm.engine.engine import Engine

Table = dict[str, Any]
_TOP_KEYS = {
    "name": str,
    "description": str,
    "defaults": dict[str, Any],
    "inputs": dict[str, Any],
    "agents": list[Any],
}
_DEFAULT_KEYS = {"rounds": int, "read_along": bool, "sampling": dict[str, Any]}
_AGENT_KEYS: Mapping[str, Any] = {
    "name": str,
    "system": str,
    "prompt": str,
    "sampling": dict[str, Any],
    "adapter": str,
    "json_schema": dict[str, Any] | str,
}
_CODE_ONLY = {"grammar", "logit_bias"}
"""Settings of an answer that TOML has no words for."""


@dataclass(frozen=True)
class Team:
    """Agents that belong together, with the defaults of their runs.

    Attributes:
        name, description: for people.
        agents: in the order of the file.
        rounds: rounds of a run that does not say otherwise.
        inputs: values of inputs that a run may leave out.
        read_along: whether agents that wait read what others write while they write it.
    """

    name: str
    agents: tuple[Agent, ...]
    description: str = ""
    rounds: int = 1
    inputs: Mapping[str, str] = field(default_factory=dict)
    read_along: bool = True

    def __reduce__(self) -> tuple[type[Team], tuple[Any, ...]]:
        # A read-only view of the inputs cannot be pickled or copied.
        values = (self.name, self.agents, self.description, self.rounds, dict(self.inputs), self.read_along)
        return type(self), values

    @property
    def required_inputs(self) -> tuple[str, ...]:
        """Inputs that every run has to be given."""
        return tuple(name for name in AgentGraph(self.agents).inputs if name not in self.inputs)

    def group(
        self,
        engine_or_model: Engine | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        read_along: bool | None = None,
        **settings: Unpack[GroupSettings],
    ) -> KVCommAgentGroup:
        """A group of the team's agents. Give its runs `rounds=team.rounds, **{**team.inputs, ...}`.

        Args:
            read_along: None: as the team says; the others as `KVCommAgentGroup` takes them.
        """
        reads = self.read_along if read_along is None else read_along
        group = KVCommAgentGroup(engine_or_model, tokenizer, read_along=reads, **settings)
        for agent in self.agents:
            group.add(agent)
        return group


def packaged_teams() -> tuple[str, ...]:
    """Names of the teams that come with kvcomm."""
    names = (entry.name for entry in _packaged_folder().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def load_team(source: str | Path) -> Team:
    """Read a team.

    Args:
        source: the name of a packaged team, or the path of a TOML file.

    Raises:
        InvalidRequest: no such team or file, not TOML, or a missing, unknown or ill-typed key; names file,
            table, key.
        TemplateError: agents and placeholders do not fit together; names file, agent and placeholder.
    """
    name = str(source)
    if name in packaged_teams():
        packaged = (_packaged_folder() / f"{name}.toml").read_bytes()
        return _team_from(parse_toml(packaged), name, fallback_name=name)
    return _team_from(_read(Path(source), name), name, fallback_name=Path(source).stem)


def _packaged_folder() -> Traversable:
    return files("kvcomm.agents") / "teams"


def _read(file: Path, name: str) -> Table:
    try:
        return read_toml(file)
    except FileNotFoundError as error:
        known = ", ".join(packaged_teams())
        raise InvalidRequest(f"no team {name!r}: neither a packaged team ({known}) nor a TOML file") from error
    except OSError as error:
        raise InvalidRequest(f"{name}: cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise InvalidRequest(f"{name}: not a TOML file: {error}") from error


def _team_from(table: Table, file: str, *, fallback_name: str) -> Team:
    _check_table(table, _TOP_KEYS, file, "the top level", required=("agents",))
    defaults = table.get("defaults", {})
    _check_table(defaults, _DEFAULT_KEYS, file, "[defaults]")
    rounds = defaults.get("rounds", 1)
    if rounds < 1:
        raise InvalidRequest(f"{file}, [defaults]: rounds must be at least 1, got {rounds}")
    agents = tuple(
        _agent_from(agent, number, defaults.get("sampling", {}), file)
        for number, agent in enumerate(table["agents"], start=1)
    )
    _check_graph(agents, table.get("inputs", {}), file)
    return Team(
        name=table.get("name", fallback_name),
        description=table.get("description", ""),
        agents=agents,
        rounds=rounds,
        inputs=MappingProxyType(table.get("inputs", {})),
        read_along=defaults.get("read_along", True),
    )


def _agent_from(table: object, number: int, defaults: Table, file: str) -> Agent:
    where = f"[[agents]] number {number}"
    if not isinstance(table, dict):
        raise InvalidRequest(f"{file}, {where}: must be a table, got {type(table).__name__}")
    _check_table(table, _AGENT_KEYS, file, where, required=("name",))
    where = f"{where} ({table['name']!r})"
    sampling = _sampling_from(defaults, file, "[defaults], sampling", {})
    if "sampling" in table:
        sampling = _sampling_from(table["sampling"], file, f"{where}, sampling", defaults)
    texts = {key: table[key] for key in ("system", "prompt", "adapter", "json_schema") if key in table}
    try:
        return Agent(table["name"], sampling=sampling, **texts)
    except InvalidRequest as error:  # of a template, or of a schema
        raise type(error)(f"{file}, {where}: {error}") from error


def _sampling_from(table: Table, file: str, where: str, defaults: Table) -> SamplingParams | None:
    known = {key: hint for key, hint in get_type_hints(SamplingParams).items() if key not in _CODE_ONLY}
    _check_table(table, known, file, where)
    values: Table = {
        key: tuple(value) if isinstance(value, list) else value for key, value in (defaults | table).items()
    }
    try:
        return SamplingParams(**values) if values else None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InvalidRequest(f"{file}, {where}: {error}") from error


def _check_graph(agents: tuple[Agent, ...], inputs: Table, file: str) -> None:
    """Check everything about the agents that does not depend on the inputs of a run."""
    try:
        graph = AgentGraph(agents)
        _check_table(inputs, dict.fromkeys(graph.inputs, str), file, "[inputs]")
        graph.check_inputs(dict.fromkeys(graph.inputs, ""))
    except TemplateError as error:
        raise TemplateError(f"{file}: {error}") from error


def _check_table(table: Table, known: Mapping[str, Any], file: str, where: str, required: tuple[str, ...] = ()) -> None:
    for key, value in table.items():
        if key not in known:
            listed = ", ".join(known) or "none"
            raise InvalidRequest(f"{file}, {where}: unknown key {key!r}; known here: {listed}")
        if not _is_a(value, known[key]):
            raise InvalidRequest(f"{file}, {where}: {key} must be {_named(known[key])}, got {reprlib.repr(value)}")
    for key in required:
        if not table.get(key):
            raise InvalidRequest(f"{file}, {where}: {key!r} is missing or empty")


def _is_a(value: object, hint: Any) -> bool:
    """Whether a TOML value has a type. Whole numbers are floats too; truth values are no numbers."""
    if isinstance(hint, UnionType):
        return any(_is_a(value, option) for option in get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_a(item, get_args(hint)[0]) for item in value)
    return isinstance(value, get_origin(hint) or hint)


def _named(hint: Any) -> str:
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        dict: "a table",
        list: "an array",
    }
    if isinstance(hint, UnionType):
        return " or ".join(_named(option) for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is tuple:
        return f"an array, each item {_named(get_args(hint)[0])}"
    return names[get_origin(hint) or hint]
