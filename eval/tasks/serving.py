"""Serving a team's requests in every mode that the engine serves, dense among them.

In every mode each agent gets exactly the dense run's prompt: it reads what the agents before it answered there. So a
flip is the doing of this request's reuse and of nothing before it. Of agents that others read only the first tokens are
generated; the referee answers in full. Sources of moved text are exact: as its first reader and its producer leave it.

Modes are served together, prompt by prompt. They do not see one another: approximate KV enters no tree, and a source
that is exact is preferred to one that is not. What one of them had to compute exactly the next one finds cached; it
would have been computed, and that is what is written down. Dense comes last at every prompt: it reads nothing from the
cache, answers in full, and leaves the exact KV that the next agents' prompts are moved from. So this is computed once.
A mode begins when the one before it has its first token: by then what that one reads is settled. All decode together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from eval.baselines.stock import StockServer
from eval.tasks.along import ask_along
from eval.tasks.answering import DENSELY, AnsweringTeam, drawn, first_texts, probable_texts, publish_answer
from eval.tasks.at_once import at_once
from eval.tasks.modes import ALONG, DENSE, EXACT, HEAL, KVCOMM, Mode
from eval.tasks.samples import Answer, Sample, SampleFile, usage_values
from eval.tasks.work import NUM_LOGPROBS, Work
from kvcomm import Chunk, Completion, Engine, RequestHandle, ReusePolicy, Segment
from kvcomm.lab.answers import token_logprob

WIDTH = 16
"""Questions that are served at the same time at most."""
ORDER = {KVCOMM: 1, HEAL: 2, ALONG: 3, EXACT: 4, DENSE: 5}
"""Those that may compute a prompt exactly come last: what they leave in the cache is then in nobody's way."""
READ_S = 1.0
"""Seconds that a prompt is given to be read along, while other questions are answered."""
POOL_SHARE = 0.5
"""Of the engine's pool, what the exact prompts of those may take: sources must not be evicted before they are read."""

Advance = Callable[[int], None]
Samples = Mapping[int, Sample]


def serve_by_engine(
    engine: Engine, work: Work, modes: Sequence[Mode], files: Mapping[str, SampleFile], advance: Advance
) -> None:
    """Serve dense and other modes; continues where their files end. Advances by one for a question in one mode.

    Raises:
        InvalidRequest: a prompt is too long, or a row lacks a field; names the question.
    """
    modes = sorted(modes, key=lambda mode: ORDER.get(mode.name, 0))
    dense, team = files[DENSE].by_index(), AnsweringTeam(engine, work, DENSELY)
    done = {mode.name: files[mode.name].by_index().keys() for mode in modes}
    advance(sum(map(len, done.values())))
    missing = {index: [mode for mode in modes if index not in done[mode.name]] for index in range(len(work.rows))}
    sizes = {
        index: _num_tokens(dense[index]) if index in dense else team.num_tokens_at_most(index, work.rows[index])
        for index, wanted in missing.items()
        if wanted
    }
    for batch in batches(engine, sizes):
        engine.cache.clear()
        read_roles(engine, team.roles)

        def serve(index: int) -> dict[str, Sample]:
            return _serve_question(team, Reading(engine, work, index, missing[index]), dense.get(index))

        for served in at_once(engine, serve, batch, WIDTH):
            for name, sample in served.items():
                files[name].add([sample])
            advance(len(served))
    engine.cache.clear()


def serve_stock(
    engine: Engine, server: StockServer, work: Work, dense: Samples, file: SampleFile, advance: Advance
) -> None:
    """Serve with transformers, one request after the other; continues where the file ends.

    Args:
        engine: whose tokenizer reads the answers; it computes nothing.
    """
    done = file.by_index()
    advance(len(done))
    for index, truth in dense.items():
        if index in done:
            continue
        answers = {}
        for name, whole in truth.answers.items():
            asked = work.first_sampling(name)
            served = server.answer(whole.segments, asked.max_new_tokens, ignore_eos=asked.ignore_eos)
            first = {}
            if asked.logprobs:
                looked_at = token_logprob(served.first_logits, 0, NUM_LOGPROBS)
                first = probable_texts(engine, work.task.first_texts, [looked_at])
            usage = stock_usage(whole, served.num_cached, len(served.token_ids))
            text = str(engine.tokenizer.decode(list(served.token_ids), skip_special_tokens=True))
            answers[name] = Answer(served.token_ids, text, usage, first=first)
        last = answers[work.referee]
        extra = {"group": truth.extra.get("group", "")}
        file.add([Sample(index, answers, work.score(last.text, last.first, work.rows[index]), extra)])
        advance(1)


def stock_usage(whole: Answer, num_cached: int, num_generated: int) -> dict[str, Any]:
    """As `usage_values`."""
    num_prompt = sum(len(token_ids) for token_ids, _ in whole.prompt)
    computed = num_prompt - num_cached
    counts = {"prompt": num_prompt, "exact": num_cached, "aligned": 0, "computed": computed}
    return {**counts, "generated": num_generated, "reasons": {"new": computed}, "moved": None}


def read_roles(engine: Engine, roles: Iterable[Segment]) -> None:
    """Leave the agents' role prompts in the cache, as in a team at work: whole ones, with other text behind.

    Args:
        roles: what prompts begin with; those with a name are none.
    """
    for role in roles:
        if role.name is None:
            behind = Segment(role.token_ids[-1:] * engine.config.page_size)  # only whole pages are kept
            engine.context((role, behind), policy=ReusePolicy.exact()).release()


def batches(engine: Engine, sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Consecutive groups of questions of which all prompts find room in the pool at the same time; of one at least.

    Args:
        sizes: tokens of every question, by its index.
    """
    room = POOL_SHARE * engine.cache.num_pages * engine.cache.page_size
    batch: list[int] = []
    taken = 0
    for index, size in sizes.items():
        if batch and (len(batch) == WIDTH or taken + size > room):
            yield batch
            batch, taken = [], 0
        batch.append(index)
        taken += size
    if batch:
        yield batch


def _num_tokens(sample: Sample) -> int:
    answers = sample.answers.values()
    return sum(len(answer.passed_on) + sum(len(ids) for ids, _ in answer.prompt) for answer in answers)


class Begun(NamedTuple):
    """One mode's request while it decodes.

    Attributes:
        chunks: what is yet to come; nobody listening to it would cancel the request.
        extra: of the sample.
    """

    mode: Mode
    handle: RequestHandle
    chunks: Iterator[Chunk]
    extra: Mapping[str, Any]

    def result(self) -> Completion:
        """Wait for the end."""
        for _ in self.chunks:
            pass
        return self.handle.result()


class Reading:
    """One question in modes other than dense, prompt by prompt.

    Args:
        modes: in the order in which they are served; dense is passed over.
    """

    def __init__(self, engine: Engine, work: Work, index: int, modes: Sequence[Mode]) -> None:
        self.engine = engine
        self.work = work
        self.index = index
        self.row = work.rows[index]
        self.modes = [mode for mode in modes if mode.name != DENSE]
        self.samples: dict[str, Sample] = {}
        self._answers: dict[str, dict[str, Answer]] = {mode.name: {} for mode in self.modes}

    @contextmanager
    def serve(self, agent: str, prompt: Sequence[Segment]) -> Iterator[None]:
        """One agent's prompt in every mode, begun on entering and ended on leaving.

        In between the prompt may be computed exactly. With the referee's prompt the samples are complete.
        """
        begun = [self._begin(mode, agent, prompt) for mode in self.modes]
        yield
        computed: Answer | None = None
        for each in begun:
            mode, answer = each.mode, self._answer(each.result())
            if answer.usage["moved"] is None:
                computed = computed or answer
                answer = replace(answer, usage=_usage_of(mode, computed))
            self._answers[mode.name][agent] = answer
            if agent == self.work.referee:
                score = self.work.score(answer.text, answer.first, self.row)
                self.samples[mode.name] = Sample(self.index, self._answers[mode.name], score, each.extra)

    def _begin(self, mode: Mode, agent: str, prompt: Sequence[Segment]) -> Begun:
        """Wait for the first token; of the referee draw further answers while what they are drawn from is there."""
        sampling = self.work.first_sampling(agent)
        if mode.reads_along:
            names = [each.name for each in self.work.team.agents]
            handle = ask_along(self.engine, prompt, sampling, names, READ_S)
        else:
            handle = self.engine.submit(prompt, sampling, policy=mode.policy, rung=mode.rung)
        chunks = iter(handle)
        next(chunks, None)
        extra: dict[str, Any] = {"group": self.work.task.group(self.row)}
        if agent == self.work.referee:
            extra |= drawn(self.engine, self.work, mode, prompt, self.row)
        return Begun(mode, handle, chunks, extra)

    def _answer(self, served: Completion) -> Answer:
        first = first_texts(self.engine, self.work, served)
        return Answer(served.token_ids, served.text, usage_values(served.usage), first=first)


def _serve_question(team: AnsweringTeam, reading: Reading, truth: Sample | None) -> dict[str, Sample]:
    """The samples that are missing, dense first.

    Args:
        truth: the dense one, if it is known.
    """
    if truth is None:
        return {DENSE: team.answer(reading.index, reading.row, reading.serve), **reading.samples}
    for name, whole in truth.answers.items():
        with reading.serve(name, whole.segments):
            if name != reading.work.referee and any(mode.moves for mode in reading.modes):
                publish_answer(reading.engine, whole)
    return reading.samples


def _usage_of(mode: Mode, computed: Answer) -> dict[str, Any]:
    """Of a request that moved nothing, as if it had been the one that computed its prompt."""
    usage = dict(computed.usage)
    return usage if mode.moves else {**usage, "reasons": {"new": usage["computed"]}}
