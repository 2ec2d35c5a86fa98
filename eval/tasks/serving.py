"""Serving the dense run's prompts in other modes.

In every mode each agent gets exactly the dense run's prompt: it reads what the agents before it answered there. So a
flip is the doing of this request's reuse and of nothing before it. Of agents that others read only the first tokens are
generated; the referee answers in full. Sources of moved text are exact: as its first reader and its producer leave it.

Modes are served together, prompt by prompt, and only then is the prompt computed exactly for those that read it: once
for all modes instead of once for each. They do not see one another: approximate KV enters no tree, and a source that is
exact is preferred to one that is not. What one of them had to compute exactly the next one finds cached; it would have
been computed, and that is what is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from eval.baselines.stock import StockServer
from eval.tasks.answering import drawn, first_texts, probable_texts, publish_answer
from eval.tasks.at_once import at_once
from eval.tasks.modes import EXACT, KVCOMM, Mode
from eval.tasks.samples import Answer, Sample, SampleFile, usage_values
from eval.tasks.work import NUM_LOGPROBS, Work
from kvcomm import Engine, ReusePolicy, SamplingParams
from kvcomm.engine.sampling import token_logprob
from kvcomm.memory.segments import Segment

WIDTH = 16
"""Questions that are served at the same time at most."""
ORDER = {KVCOMM: 1, EXACT: 2}
"""Those that may compute a prompt exactly come last: what they leave in the cache is then in nobody's way."""
POOL_SHARE = 0.3
"""Of the engine's pool, what the exact prompts of those may take: sources must not be evicted before they are read."""

Advance = Callable[[int], None]
Samples = Mapping[int, Sample]


def serve_by_engine(
    engine: Engine, work: Work, modes: Sequence[Mode], dense: Samples, files: Mapping[str, SampleFile], advance: Advance
) -> None:
    """Serve modes other than dense; continues where their files end. Advances by one for a question in one mode."""
    modes = sorted(modes, key=lambda mode: ORDER.get(mode.name, 0))
    done = {mode.name: files[mode.name].by_index().keys() for mode in modes}
    advance(sum(map(len, done.values())))
    missing = {index: [mode for mode in modes if index not in done[mode.name]] for index in dense}
    for batch in batches(engine, [dense[index] for index, wanted in missing.items() if wanted]):
        engine.clear_cache()
        read_roles(engine, batch[0])

        def serve(truth: Sample) -> dict[str, Sample]:
            return _serve_question(engine, work, missing[truth.index], truth)

        for served in at_once(engine, serve, batch, WIDTH):
            for name, sample in served.items():
                files[name].add([sample])
            advance(len(served))
    engine.clear_cache()


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


def read_roles(engine: Engine, sample: Sample) -> None:
    """Leave the agents' role prompts in the cache, as in a team at work: whole ones, with other text behind."""
    for answer in sample.answers.values():
        role = answer.segments[0]
        if role.name is None:
            behind = Segment(role.token_ids[-1:] * engine.config.page_size)  # only whole pages are kept
            engine.context((role, behind), policy=ReusePolicy.exact()).release()


def batches(engine: Engine, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Consecutive groups of which all prompts find room in the pool at the same time; of one sample at least."""
    room = POOL_SHARE * engine.pool.num_pages * engine.pool.page_size
    batch: list[Sample] = []
    taken = 0
    for sample in samples:
        size = sum(_num_tokens(answer) for answer in sample.answers.values())
        if batch and (len(batch) == WIDTH or taken + size > room):
            yield batch
            batch, taken = [], 0
        batch.append(sample)
        taken += size
    if batch:
        yield batch


def _num_tokens(answer: Answer) -> int:
    return sum(len(token_ids) for token_ids, _ in answer.prompt) + len(answer.passed_on)


def _serve_question(engine: Engine, work: Work, modes: Sequence[Mode], truth: Sample) -> dict[str, Sample]:
    answers: dict[str, dict[str, Answer]] = {mode.name: {} for mode in modes}
    served: dict[str, Sample] = {}
    for name, whole in truth.answers.items():
        computed: Answer | None = None
        for mode in modes:
            answer = _serve(engine, work, mode, whole.segments, work.first_sampling(name))
            if answer.usage["moved"] is None:
                computed = computed or answer
                answer = replace(answer, usage=_usage_of(mode, computed))
            answers[mode.name][name] = answer
            if name == work.referee:
                served[mode.name] = _sample(engine, work, mode, truth, answers[mode.name])
        if name != work.referee and any(mode.moves for mode in modes):
            publish_answer(engine, whole)
    return served


def _usage_of(mode: Mode, computed: Answer) -> dict[str, Any]:
    """Of a request that moved nothing, as if it had been the one that computed its prompt."""
    usage = dict(computed.usage)
    return usage if mode.moves else {**usage, "reasons": {"new": usage["computed"]}}


def _serve(engine: Engine, work: Work, mode: Mode, prompt: Sequence[Segment], sampling: SamplingParams) -> Answer:
    served = engine.generate(prompt, sampling, policy=mode.policy, variant=mode.variant)
    return Answer(served.token_ids, served.text, usage_values(served.usage), first=first_texts(engine, work, served))


def _sample(engine: Engine, work: Work, mode: Mode, truth: Sample, answers: Mapping[str, Answer]) -> Sample:
    """Judge the referee's answer and draw further ones, while what they are drawn from is there."""
    row, last = work.rows[truth.index], answers[work.referee]
    prompt = truth.answers[work.referee].segments
    extra = {"group": work.task.group(row), **drawn(engine, work, mode, prompt, row)}
    return Sample(truth.index, answers, work.score(last.text, last.first, row), extra)
