"""What it costs answers to be followed: seconds per token of the same answers, followed by three readers or by nobody.

Producers are the agents of a team that wait for nobody; they decode together. Each reader has a role of the team and
the question to read, and follows all producers. Roles are cached, nothing else is; both ways take turns, and readers
are given up when the last producer has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from eval.command import note
from kvcomm import Engine, OpenPrompt, ReusePolicy, SamplingParams, Segment, Usage
from kvcomm.agents import AgentResult
from kvcomm.lab.timings import Samples

NUM_READERS = 3


@dataclass
class Slowdown:
    """One entry per question.

    Attributes:
        alone_s, followed_s: seconds per decoded token, median of the producers.
        read: share of the readers' known tokens that they had read when the last producer ended, roles left out.
    """

    alone_s: list[float] = field(default_factory=list)
    followed_s: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> Samples:
        """Followed over not followed."""
        return Samples(tuple(self.followed_s)).per(Samples(tuple(self.alone_s)))


def measure_slowdown(
    engine: Engine, runs: Sequence[Sequence[AgentResult]], num_tokens: int, forget: Callable[[], None]
) -> Slowdown:
    """Let the producers of every run answer once more, alone and followed.

    Args:
        runs: all answers of a team to a question each, in order.
        num_tokens: of every answer; at least two.
        forget: leaves nothing but roles in the cache.
    """
    found = Slowdown()
    for index, answers in enumerate(runs):
        for is_followed in (False, True) if index % 2 else (True, False):
            forget()
            if is_followed:
                found.followed_s.append(_followed(engine, answers, num_tokens, found))
            else:
                found.alone_s.append(_per_token_s(_answer(engine, answers, num_tokens, followed_by=0)[0]))
        note(
            f"followed: question {index + 1} of {len(runs)}: {1e3 * found.followed_s[-1]:.1f} ms a token, "
            f"{1e3 * found.alone_s[-1]:.1f} ms alone"
        )
    return found


def _followed(engine: Engine, answers: Sequence[AgentResult], num_tokens: int, found: Slowdown) -> float:
    usages, readers = _answer(engine, answers, num_tokens, followed_by=NUM_READERS)
    num_role = sum(len(role.token_ids) for role in islice(cycle(_roles(answers)), NUM_READERS))
    num_read, num_known = (sum(getattr(each, count) for each in readers) for count in ("num_read", "num_tokens"))
    found.read.append((num_read - num_role) / (num_known - num_role))
    for reader in readers:
        reader.cancel()
    engine.wait_idle()
    return _per_token_s(usages)


def _answer(
    engine: Engine, answers: Sequence[AgentResult], num_tokens: int, *, followed_by: int
) -> tuple[list[Usage], list[OpenPrompt]]:
    """Of all producers together; and the prompts of their readers, which are the caller's."""
    sampling, exact = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True), ReusePolicy.exact()
    producers = _producers(answers)
    with engine.held():  # nobody decodes before all are in
        handles = [engine.submit(each.prompt, sampling, policy=exact) for each in producers]
        readers = [
            engine.open_prompt((role, *producers[0].prompt[1:]), policy=exact)
            for role in islice(cycle(_roles(answers)), followed_by)
        ]
        for reader in readers:
            for producer, handle in zip(producers, handles, strict=True):
                reader.follow(handle, name=producer.name)
    return [handle.result().usage for handle in handles], readers


def _producers(answers: Sequence[AgentResult]) -> list[AgentResult]:
    """Those that had begun before any had ended."""
    first_s = min(each.finished_s for each in answers)
    return [each for each in answers if each.started_s < first_s]


def _roles(answers: Sequence[AgentResult]) -> list[Segment]:
    """What prompts begin with, those of readers first."""
    return [each.prompt[0] for each in reversed(answers)]


def _per_token_s(usages: Sequence[Usage]) -> float:
    steps = [(usage.total_s - usage.ttft_s) / (usage.generated_tokens - 1) for usage in usages]
    return Samples(tuple(steps)).median
