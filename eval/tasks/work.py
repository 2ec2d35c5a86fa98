"""What is evaluated: a task's rows, the team that works on them, and how its answers are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eval.tasks.task import Row, Score, Task
from kvcomm import SamplingParams
from kvcomm.agents import Team
from kvcomm.lab.moving import NUM_CONTINUATION

NUM_LOGPROBS = 100
"""First tokens among which a task's texts are looked for."""


@dataclass(frozen=True)
class Work:
    """One evaluation.

    Attributes:
        rows: the questions.
        train: further ones, to learn from.
        num_anchors: of `train`, those that teach anchors when they have been measured.
        num_samples: answers of the referee that are drawn besides the greedy one.
        temperature: of those.
        seed: of those.
    """

    task: Task
    team: Team
    rows: Sequence[Row]
    train: Sequence[Row] = ()
    num_anchors: int = 0
    num_samples: int = 0
    temperature: float = 0.8
    seed: int = 0

    @property
    def referee(self) -> str:
        """The agent whose answer counts."""
        return self.team.agents[-1].name

    def sampling(self, agent: str) -> SamplingParams:
        """Greedy; as long as the team says. Of the referee with what the task looks at."""
        (found,) = (each.sampling for each in self.team.agents if each.name == agent)
        sampling = found or SamplingParams()
        wants_first = agent == self.referee and self.task.first_texts
        return replace(sampling, logprobs=NUM_LOGPROBS if wants_first else None)

    def first_sampling(self, agent: str) -> SamplingParams:
        """As `sampling`, but of agents that others read only the tokens at which divergences are looked at."""
        sampling = self.sampling(agent)
        if agent == self.referee:
            return sampling
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, NUM_CONTINUATION))

    def drawing(self) -> SamplingParams:
        """Of the further answers of the referee."""
        sampling = self.sampling(self.referee)
        return replace(sampling, n=self.num_samples, temperature=self.temperature, seed=self.seed, logprobs=None)

    def score(self, answer: str, first: Mapping[str, float], row: Row) -> Score:
        """Judge the referee's answer."""
        return self.task.score(answer, first, row)
