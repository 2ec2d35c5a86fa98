"""One agent: a name, what it is told, and how its answers are sampled.

An agent is a value. It holds no state, no tokens and no model; the same agent can stand in many groups. Its
templates are parsed when it is made, so that a mistake in them is reported where it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvcomm.agents.templates import NAME_PATTERN, Slot, TemplatePart, parse_template, slots_of
from kvcomm.engine.grammar import Grammar
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, TemplateError
from kvcomm.plain import short


@dataclass(frozen=True)
class Agent:
    """A role in a group.

    Both texts are templates: `{question}` is an input of the run or, if an agent has that name, that agent's
    answer; `{critic@previous}` is critic's answer of the round before (in round 1: nothing). `{{` and `}}`
    are braces.

    Attributes:
        name: unique in its group; letters, digits, '_' and '-'.
        system: the system turn; empty: none is given to the chat template.
        prompt: the user turn.
        sampling: how answers are sampled; None: as the group says.
        adapter: that computes its answers, by a name that the engine knows; None: the model as its user has left it.
        json_schema: that its answers validate against; they are JSON then, whoever reads them. None: they are free.
        grammar: the same as what constrains its answers; None: what its sampling says.

    Raises:
        TemplateError: a bad agent name, a mistake in a template, or sampling with n other than 1.
        InvalidRequest: the schema is none, or the sampling has a grammar already.
    """

    name: str
    system: str = ""
    prompt: str = "{question}"
    sampling: SamplingParams | None = None
    adapter: str | None = None
    json_schema: Mapping[str, object] | bool | str | None = field(default=None, compare=False)
    grammar: Grammar | None = field(init=False, repr=False)
    system_parts: tuple[TemplatePart, ...] = field(init=False, repr=False, compare=False)
    prompt_parts: tuple[TemplatePart, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise TemplateError(
                f"bad agent name {self.name!r}; names are letters, digits, '_' and '-' and start with a letter or '_'"
            )
        object.__setattr__(self, "system_parts", parse_template(self.system, agent=self.name, field="system"))
        object.__setattr__(self, "prompt_parts", parse_template(self.prompt, agent=self.name, field="prompt"))
        check_one_answer(self.sampling, owner=f"agent {self.name!r}")
        grammar = None if self.json_schema is None else Grammar.json_schema(self.json_schema)
        if grammar is not None and self.sampling is not None and self.sampling.grammar is not None:
            raise InvalidRequest(
                f"agent {self.name!r}: give either a json_schema or a sampling with a grammar, not both"
            )
        object.__setattr__(self, "grammar", grammar)

    def __repr__(self) -> str:
        sampling = "" if self.sampling is None else ", own sampling"
        form = "" if self.grammar is None else ", JSON by a schema"
        return f"Agent({self.name!r}, system={short(self.system)}, prompt={short(self.prompt)}{sampling}{form})"

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot of system and prompt in order, each once."""
        return tuple(dict.fromkeys(slots_of(self.system_parts) + slots_of(self.prompt_parts)))

    def sampled_by(self, default: SamplingParams) -> SamplingParams:
        """How its answers are sampled where agents that bring nothing of their own are sampled by `default`."""
        sampling = self.sampling or default
        return sampling if self.grammar is None else replace(sampling, grammar=self.grammar)


def check_one_answer(sampling: SamplingParams | None, *, owner: str) -> None:
    """Raise TemplateError if an agent would give more than one answer."""
    if sampling is not None and sampling.n != 1:
        raise TemplateError(f"{owner}: sampling has n={sampling.n}, but an agent gives exactly one answer; use n=1")
