"""One agent: a name, what it is told, and how its answers are sampled.

An agent is a value. It holds no state, no tokens and no model; the same agent can stand in many groups. Its
templates are parsed when it is made, so that a mistake in them is reported where it was written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcomm.agents.templates import NAME_PATTERN, Part, Slot, parse_template, slots_of
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import TemplateError
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

    Raises:
        TemplateError: a bad agent name, a mistake in a template, or sampling with n other than 1.
    """

    name: str
    system: str = ""
    prompt: str = "{question}"
    sampling: SamplingParams | None = None
    adapter: str | None = None
    system_parts: tuple[Part, ...] = field(init=False, repr=False, compare=False)
    prompt_parts: tuple[Part, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise TemplateError(
                f"bad agent name {self.name!r}; names are letters, digits, '_' and '-' and start with a letter or '_'"
            )
        object.__setattr__(self, "system_parts", parse_template(self.system, agent=self.name, field="system"))
        object.__setattr__(self, "prompt_parts", parse_template(self.prompt, agent=self.name, field="prompt"))
        check_one_answer(self.sampling, owner=f"agent {self.name!r}")

    def __repr__(self) -> str:
        sampling = "" if self.sampling is None else ", own sampling"
        return f"Agent({self.name!r}, system={short(self.system)}, prompt={short(self.prompt)}{sampling})"

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot of system and prompt in order, each once."""
        return tuple(dict.fromkeys(slots_of(self.system_parts) + slots_of(self.prompt_parts)))


def check_one_answer(sampling: SamplingParams | None, *, owner: str) -> None:
    """Raise TemplateError if an agent would give more than one answer."""
    if sampling is not None and sampling.n != 1:
        raise TemplateError(f"{owner}: sampling has n={sampling.n}, but an agent gives exactly one answer; use n=1")
