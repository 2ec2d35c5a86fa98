"""Letting a team work on a data set in several modes, on byte-identical prompts.

The dense run comes first and writes down every prompt. In every other mode each agent gets exactly those prompts: it
reads what the agents before it answered in the dense run. So a flip is the doing of this request's reuse and of nothing
before it. Of agents that others read only the first tokens are generated in these modes; the referee answers in full.
Sources of moved text are exact, as they are left by its first reader and its producer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from eval.tasks.modes import Mode
from eval.tasks.samples import Answer, Sample, SampleFile, batches, usage_values
from eval.tasks.task import Row, Score, Task
from kvcomm import Engine, ReusePolicy, SamplingParams
from kvcomm.agents.team import Team
from kvcomm.agents.warming import publish, run_all
from kvcomm.engine.request import NUM_CONTINUATION
from kvcomm.engine.sampling import TokenLogprob
from kvcomm.engine.variant import Variant
from kvcomm.memory.segments import Segment

BATCH = 16
"""Questions that are worked on at the same time."""

SEED_OF_SAMPLES = 1
EXACT_MODE = Mode("dense", ReusePolicy.exact())

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Work:
    """What is evaluated.

    Attributes:
        rows: the questions.
        train: further ones, for anchors and calibration.
        num_anchors: of `train`, those that teach.
        num_samples: answers of the referee that are drawn besides the greedy one.
        temperature: of those.
    """

    task: Task
    team: Team
    rows: Sequence[Row]
    train: Sequence[Row] = ()
    num_anchors: int = 0
    num_samples: int = 0
    temperature: float = 0.8

    @property
    def referee(self) -> str:
        """The agent whose answer counts."""
        return self.team.agents[-1].name

    def sampling(self, agent: str) -> SamplingParams:
        """Greedy; as long as the team says."""
        (found,) = (each.sampling for each in self.team.agents if each.name == agent)
        return found or SamplingParams()


def run_dense(engine: Engine, work: Work, rows: Sequence[Row], file: SampleFile, advance: Advance) -> None:
    """Let the team answer rows without any reuse; continues where the file ends."""
    done = file.read()
    advance(len(done))
    group = work.team.group(engine, policy=ReusePolicy.exact())
    for batch in batches((index for index in range(len(rows)) if index not in done), BATCH):
        results = run_all(group, [work.task.inputs(rows[index]) for index in batch], work.team)
        samples = []
        for index, result in zip(batch, results, strict=True):
            answers = {name: Answer.of(result[name]) for name in result}
            answers[work.referee] = _with_first(engine, work, answers[work.referee])
            score = _score(work, answers, rows[index])
            extra = _extra(engine, work, answers[work.referee].segments, rows[index], EXACT_MODE)
            samples.append(Sample(index, answers, result.total_s, score, extra))
        file.add(samples)
        advance(len(batch))


def warm_up(engine: Engine, runs: Sequence[Sample], num_anchors: int, modes: Sequence[Mode], advance: Advance) -> None:
    """Teach an engine with the first runs, and calibrate it with the others, for the modes that need it."""
    policies = [mode.policy for mode in modes if mode.variant is None and mode.moves]
    estimators = {mode.variant.estimator for mode in modes if mode.variant is not None}
    estimators |= {policy.estimator for policy in policies}
    for place, run in enumerate(runs):
        publish(engine, _pairs(run.answers))
        for answer in list(run.answers.values())[1:]:
            if place < num_anchors:
                engine.learn(answer.segments, estimators=sorted(estimators - {"rotate"})).result()
                continue
            for policy in policies:
                if answer.token_ids:
                    engine.calibrate(answer.segments, answer.token_ids, policy).result()
        engine.clear_cache()
        advance(1)


def run_mode(
    engine: Engine, work: Work, mode: Mode, dense: Mapping[int, Sample], file: SampleFile, advance: Advance
) -> None:
    """Serve the dense run's prompts in another mode; continues where the file ends."""
    done = file.read()
    advance(len(done))
    for batch in batches((index for index in dense if index not in done), BATCH):
        engine.clear_cache()
        _read_roles(engine, dense[batch[0]].answers)
        with ThreadPoolExecutor(len(batch)) as threads:
            samples = list(threads.map(lambda index: _serve(engine, work, mode, dense[index]), batch))
        file.add(samples)
        advance(len(batch))
    engine.clear_cache()


def _serve(engine: Engine, work: Work, mode: Mode, dense: Sample) -> Sample:
    began_s = time.monotonic()
    answers = {}
    for name, truth in dense.answers.items():
        sampling = work.sampling(name)
        if name == work.referee:
            sampling = replace(sampling, logprobs=work.task.num_logprobs)
        else:
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, NUM_CONTINUATION))
        served = engine.generate(truth.segments, sampling, policy=mode.policy, variant=mode.variant)
        answers[name] = Answer(
            served.token_ids, served.text, usage_values(served.usage), first=first_tokens(engine, served.logprobs)
        )
        if mode.moves and name != work.referee:
            publish(engine, _pairs({name: truth}))
    total_s, row = time.monotonic() - began_s, work.rows[dense.index]
    extra = _extra(engine, work, dense.answers[work.referee].segments, row, mode)
    return Sample(dense.index, answers, total_s, _score(work, answers, row), extra)


def _with_first(engine: Engine, work: Work, answer: Answer) -> Answer:
    """The referee's dense answer with the log-probabilities that the task looks at; a group gives none."""
    if work.task.num_logprobs is None:
        return answer
    sampling = SamplingParams(max_new_tokens=1, logprobs=work.task.num_logprobs, ignore_eos=True)
    again = engine.generate(answer.segments, sampling, policy=ReusePolicy.exact())
    return replace(answer, first=first_tokens(engine, again.logprobs))


def first_tokens(engine: Engine, logprobs: Sequence[TokenLogprob] | None) -> dict[str, float]:
    """Log-probabilities of the most probable first tokens by their text; of equal texts the larger one."""
    found: dict[str, float] = {}
    for token_id, logprob in logprobs[0].top if logprobs else ():
        text = str(engine.tokenizer.decode([token_id])).strip()
        found.setdefault(text, logprob)
    return found


def _extra(engine: Engine, work: Work, prompt: tuple[Segment, ...], row: Row, mode: Mode) -> dict[str, Any]:
    """The row's group, and how many of further answers that were drawn are right."""
    extra: dict[str, Any] = {"group": work.task.group(row)}
    if work.num_samples:
        sampling = replace(
            work.sampling(work.referee), n=work.num_samples, temperature=work.temperature, seed=SEED_OF_SAMPLES
        )
        drawn = engine.generate(prompt, sampling, policy=mode.policy, variant=mode.variant)
        extra["drawn"] = work.num_samples
        extra["right"] = sum(work.task.score(choice.text, {}, row).is_right for choice in drawn.choices)
    return extra


def _score(work: Work, answers: Mapping[str, Answer], row: Row) -> Score:
    answer = answers[work.referee]
    return work.task.score(answer.text, answer.first, row)


def measure_divergences(
    engine: Engine, mode: Mode, dense: Sequence[Sample], file: SampleFile, advance: Advance
) -> None:
    """Replay what a mode served, on some of the questions, against the dense answers; written into the samples."""
    samples = file.read()
    for truth in dense:
        sample = samples[truth.index]
        publish(engine, _pairs(truth.answers))
        answers = {name: _measured(engine, mode, each, truth.answers[name]) for name, each in sample.answers.items()}
        samples[truth.index] = replace(sample, answers=answers)
        engine.clear_cache()
        advance(1)
    file.replace(samples.values())


def _measured(engine: Engine, mode: Mode, served: Answer, truth: Answer) -> Answer:
    if served.divergence is not None or not truth.token_ids:
        return served
    moved = served.usage["moved"]
    if moved is None:
        return replace(served, divergence=0.0, agreement=1.0)
    variant = mode.variant
    if variant is None:
        (strength,) = (group.strength for group in engine.edge_groups() if group.key.digest == moved["group"])
        variant = Variant(mode.policy.estimator, moved["rung"], strength=strength)
    (outcome,) = engine.measure(truth.segments, truth.token_ids, [variant]).result()
    return replace(served, divergence=outcome.divergence, agreement=outcome.agreement)


def _pairs(answers: Mapping[str, Answer]) -> list[tuple[tuple[Segment, ...], tuple[int, ...]]]:
    return [(answer.segments, answer.token_ids) for answer in answers.values()]


def _read_roles(engine: Engine, answers: Mapping[str, Answer]) -> None:
    """Leave the agents' role prompts in the cache, as in a team at work."""
    for answer in answers.values():
        engine.context(answer.segments[:1], policy=ReusePolicy.exact()).release()
