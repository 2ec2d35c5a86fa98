"""A team of any size on one engine: agents with fixed roles that read a question and all outputs before their own.

Roles, questions and outputs are cut from what the run is given as text. Outputs are taken from it as well instead of
being decoded, which a first token does not depend on. What is published here is what a team at work leaves behind:
every agent's exact prompt and, behind it, its output, from where later agents move it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from eval.command import note
from kvcomm import Engine, RequestHandle, ReusePolicy, SamplingParams, Segment
from kvcomm.errors import InvalidRequest
from kvcomm.lab.moving import NUM_CONTINUATION
from kvcomm.lab.teams import publish
from kvcomm.lab.timings import TakeTokens

ONE_TOKEN = SamplingParams(max_new_tokens=1, ignore_eos=True)


class Sizes(NamedTuple):
    """How many agents, and tokens of each one's role, of the question and of each output."""

    agents: int
    role: int
    question: int
    output: int


@dataclass
class Texts:
    """One question and what every agent answers to it."""

    question: Segment
    outputs: list[Segment]


@dataclass
class Team:
    """Agents with fixed roles on one engine."""

    engine: Engine
    take: TakeTokens
    sizes: Sizes

    def __post_init__(self) -> None:
        roles = [self.take(self.sizes.role) for _ in self.agents]
        self._roles = [Segment(tuple(role)) for role in roles]

    @property
    def agents(self) -> range:
        """Their indices, in the order in which they answer."""
        return range(self.sizes.agents)

    def texts(self) -> Texts:
        """New ones."""
        question = Segment(tuple(self.take(self.sizes.question)), "question")
        outputs = [Segment(tuple(self.take(self.sizes.output)), f"agent{agent + 1}") for agent in self.agents]
        return Texts(question, outputs)

    def prompt(self, agent: int, texts: Texts) -> tuple[Segment, ...]:
        """What an agent reads: role, question, all outputs before its own."""
        parts = [self._roles[agent]]
        for glue, slot in zip(_glue(self.engine, agent), (texts.question, *texts.outputs[:agent], None), strict=True):
            parts += [glue] if slot is None else [glue, slot]
        return tuple(parts)

    def publish(self, agent: int, texts: Texts) -> None:
        """Compute an agent's prompt exactly, and its output if anybody reads it: the next ones move it from here.

        What the engine does with it beside requests is done when this returns, so nothing is timed together with it.
        """
        output = texts.outputs[agent].token_ids if agent < self.agents[-1] else ()
        publish(self.engine, [(self.prompt(agent, texts), output)])
        self.engine.wait_idle()

    def learn(self) -> None:
        """Teach the banks one run."""
        texts = self.texts()
        for agent in self.agents:
            if agent:
                self.engine.reuse.learn(self.prompt(agent, texts)).result()
            self.publish(agent, texts)
        self.restart()

    def calibrate(self, policy: ReusePolicy) -> None:
        """Measure one run at a policy's rungs: a pair for every reader. Each sees what ran before it and no more."""
        texts = self.texts()
        prompts = [self.prompt(agent, texts) for agent in self.agents]
        answers = [answer.result().token_ids for answer in [self._answer(prompt) for prompt in prompts[1:]]]
        self.restart()
        for agent in self.agents:
            if agent and self.engine.reuse.calibrate(prompts[agent], answers[agent - 1], policy).result() is None:
                raise InvalidRequest(f"nothing of agent {agent + 1}'s prompt can be moved")
            self.publish(agent, texts)
        self.restart()

    def continuation(self, prompt: Sequence[Segment]) -> tuple[int, ...]:
        """The exact greedy answer's first tokens."""
        return self._answer(prompt).result().token_ids

    def restart(self) -> None:
        """Forget everything but the roles."""
        self.engine.cache.clear()
        for agent in self.agents:
            self.read_role(agent)

    def read_role(self, agent: int) -> None:
        """Have a role in the cache, as the one used last."""
        self.engine.context((self._roles[agent],), policy=ReusePolicy.exact()).release()

    def _answer(self, prompt: Sequence[Segment]) -> RequestHandle:
        sampling = SamplingParams(max_new_tokens=NUM_CONTINUATION, ignore_eos=True)
        return self.engine.submit(list(prompt), sampling, policy=ReusePolicy.exact())


def teach(team: Team, num_texts: int) -> None:
    """Teach the banks of a team so many runs, and say so."""
    for index in range(num_texts):
        note(f"anchors: text {index + 1} of {num_texts}")
        team.learn()


def num_prompt_tokens(engine: Engine, sizes: Sizes, agent: int) -> int:
    """Tokens of an agent's prompt in a team of these sizes, whatever the texts."""
    num_glue = sum(len(glue.token_ids) for glue in _glue(engine, agent))
    return sizes.role + sizes.question + agent * sizes.output + num_glue


def num_team_tokens(engine: Engine, sizes: Sizes) -> int:
    """Tokens of all agents' prompts and outputs: what the cache holds at the end of a round."""
    prompts = sum(num_prompt_tokens(engine, sizes, agent) for agent in range(sizes.agents))
    return prompts + sizes.agents * sizes.output


def tokens_of(prompt: Sequence[Segment]) -> list[int]:
    """Token ids of a whole prompt."""
    return [token for segment in prompt for token in segment.token_ids]


def num_slot_tokens(prompt: Sequence[Segment]) -> int:
    """Tokens of what could be moved: question and outputs."""
    return sum(len(segment.token_ids) for segment in prompt if segment.name is not None)


def _glue(engine: Engine, agent: int) -> list[Segment]:
    """Template text of an agent's prompt: before the question, before each output it reads, and at the end."""
    outputs = [f"\n\nAgent {index + 1}: " for index in range(agent)]
    return [engine.segment(text) for text in ("\n\nQuestion: ", *outputs, "\n\nYour answer: ")]
