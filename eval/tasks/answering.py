"""Letting a team answer questions, agent by agent, with its tools: the dense run, and exact ones to learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from eval.tasks.modes import DENSE, EXACT, Mode
from eval.tasks.samples import Answer, Sample, usage_values
from eval.tasks.task import Row
from eval.tasks.topology import role_of
from eval.tasks.work import Work
from kvcomm import Completion, Engine, ReusePolicy, Segment
from kvcomm.agents import Slot
from kvcomm.errors import InvalidRequest
from kvcomm.lab.answers import ANSWER, TokenLogprob
from kvcomm.lab.teams import Filling, PromptRenderer

DENSELY, EXACTLY = Mode(DENSE, ReusePolicy.exact()), Mode(EXACT, ReusePolicy.exact())

Around = Callable[[str, Sequence[Segment]], AbstractContextManager[None]]
"""Given an agent and its prompt: entered before the agent answers, left when it has."""


class AnsweringTeam:
    """A team on one engine with a cache. Several questions may be answered at the same time, from several threads.

    Args:
        mode: how its requests are served: one that moves nothing.
    """

    def __init__(self, engine: Engine, work: Work, mode: Mode = EXACTLY) -> None:
        self._engine = engine
        self._work = work
        self._mode = mode
        self._renderer = PromptRenderer(engine)
        self._prompts = {agent.name: self._renderer.render(agent) for agent in work.team.agents}

    @property
    def roles(self) -> list[Segment]:
        """What the agents' prompts begin with, of those that begin with text of their own."""
        return [prompt.parts[0] for prompt in self._prompts.values() if isinstance(prompt.parts[0], Segment)]

    def num_tokens_at_most(self, index: int, row: Row) -> int:
        """Of all prompts and answers of a question; what tools make of answers comes on top.

        Raises:
            InvalidRequest: the row lacks a field; names the question.
        """
        with _naming(index):
            values = self._inputs(row)
        num_answered = 0
        for agent in self._work.team.agents:
            longest = self._work.sampling(agent.name).max_new_tokens
            values[Slot(agent.name)] = ((0,) * longest,)
            num_answered += longest
        prompts = [prompt.fill(values) for prompt in self._prompts.values()]
        return num_answered + sum(len(segment.token_ids) for prompt in prompts for segment in prompt)

    def answer(self, index: int, row: Row, around: Around = lambda agent, prompt: nullcontext()) -> Sample:
        """Let every agent answer, in the team's order.

        Agents find in the cache what those before them were given and answered.

        Raises:
            InvalidRequest: a prompt is too long, or the row lacks a field; names the question.
        """
        with _naming(index):
            answers = self._answers(row, around)
        last = answers[self._work.referee]
        extra = {"group": self._work.task.group(row), **drawn(self._engine, self._work, self._mode, last.segments, row)}
        return Sample(index, answers, self._work.score(last.text, last.first, row), extra)

    def _inputs(self, row: Row) -> dict[Slot, Filling]:
        texts = {**self._work.team.inputs, **self._work.task.inputs(row)}
        return {Slot(name): self._renderer.read_input(name, text) for name, text in texts.items()}

    def _answers(self, row: Row, around: Around) -> dict[str, Answer]:
        values = self._inputs(row)
        answers: dict[str, Answer] = {}
        for agent in self._work.team.agents:
            sampling = self._work.sampling(agent.name)
            prompt = self._prompts[agent.name].fill(values)
            with around(agent.name, prompt):
                completion = self._engine.generate(
                    prompt, sampling, policy=self._mode.policy, reads_cache=self._mode.reads_cache
                )
            token_ids = self._renderer.strip_end(completion.token_ids, sampling.stop_token_ids)
            result = self._result(agent.name, completion.text, row)
            parts = tuple((segment.token_ids, segment.name) for segment in prompt)
            usage, first = usage_values(completion.usage), first_texts(self._engine, self._work, completion)
            answers[agent.name] = Answer(token_ids, completion.text, usage, parts, result, first)
            values[Slot(agent.name)] = (answers[agent.name].passed_on,)
            if agent.name != self._work.referee:
                publish_answer(self._engine, answers[agent.name])
        return answers

    def _result(self, agent: str, answer: str, row: Row) -> tuple[int, ...]:
        """What the agent's tool makes of an answer, as it is read; nothing if it has none."""
        role = role_of(agent)
        if role not in self._work.task.tools:
            return ()
        text = f"\n{self._work.task.tools[role]}: {self._work.task.use_tool(role, answer, row)}"
        return self._renderer.encode_input(agent, text)


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Errors in here name the question."""
    try:
        yield
    except (InvalidRequest, KeyError) as error:
        raise InvalidRequest(
            f"question {index}: {error}; have fewer agents or shorter answers (--agents, --max-new-tokens)"
        ) from error


def drawn(engine: Engine, work: Work, mode: Mode, prompt: Sequence[Segment], row: Row) -> dict[str, int]:
    """How many further answers of the referee are drawn in a mode, and how many of them are right."""
    if not work.num_samples:
        return {}
    completion = engine.generate(
        prompt, work.drawing(), policy=mode.policy, rung=mode.rung, reads_cache=mode.reads_cache
    )
    right = sum(work.score(choice.text, {}, row).is_right for choice in completion.choices)
    return {"drawn": work.num_samples, "right": right}


def first_texts(engine: Engine, work: Work, completion: Completion) -> dict[str, float]:
    """Log-probabilities of the texts that the task looks at, as first token."""
    return probable_texts(engine, work.task.first_texts, completion.logprobs)


def probable_texts(engine: Engine, wanted: Iterable[str], logprobs: Sequence[TokenLogprob] | None) -> dict[str, float]:
    """Of those wanted, with spaces around or not, the log-probability as first token; the larger one of several."""
    texts, found = frozenset(wanted), dict[str, float]()
    for token_id, logprob in logprobs[0].top if logprobs and texts else ():  # the most probable one first
        text = str(engine.tokenizer.decode([token_id])).strip()
        if text in texts:
            found.setdefault(text, logprob)
    return found


def publish_answer(engine: Engine, answer: Answer) -> None:
    """Compute a prompt and what is passed on exactly: those that read it can move it from here."""
    behind = [Segment(answer.passed_on, ANSWER)] if answer.passed_on else []
    engine.context((*answer.segments, *behind), policy=EXACTLY.policy).release()


def publish_all(engine: Engine, answers: Mapping[str, Answer]) -> None:
    """`publish_answer` for a whole team, in its order: the first reader of a text is the source for the others."""
    for answer in answers.values():
        publish_answer(engine, answer)
