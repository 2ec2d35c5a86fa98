"""Whether greedy answers depend on how they came about: with and without cache, other answers beside them, guesses.

One engine of this process for each way; the same prompts, one by one without any of the three as the answers that the
rest is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from eval.command import note
from eval.figures import Figure
from eval.peers.bench import Sizes
from eval.peers.prompts import Texts
from kvcomm import Engine, EngineConfig, SamplingParams

Answers = list[tuple[int, ...]]

BATCH = 8
SHARED = 0.75
"""Of a prompt, that has been read before where answers are to come from the cache."""


def same_token_figures(model: str, dtype: str, texts: Texts, sizes: Sizes) -> list[Figure]:
    """Prompts whose answer is the same, token by token, as computed alone, without cache and without guesses.

    Every fourth prompt repeats itself, so that there is something to guess.
    """
    prompts = [
        texts.copying(sizes.prompt) if index % 4 == 3 else texts.tokens(sizes.prompt) for index in range(sizes.checked)
    ]
    sampling = SamplingParams(max_new_tokens=sizes.checked_new, ignore_eos=True)
    plain = EngineConfig(cache=False, draft_rows=0)
    ways: dict[str, tuple[EngineConfig, Callable[[Engine], Answers]]] = {
        "alone": (plain, lambda engine: _one_by_one(engine, prompts, sampling)),
        "cache": (EngineConfig(draft_rows=0), lambda engine: _cached(engine, prompts, sampling)),
        "batch": (plain, lambda engine: _together(engine, prompts, sampling)),
        "guesses": (EngineConfig(cache=False), lambda engine: _one_by_one(engine, prompts, sampling)),
    }
    answers: dict[str, Answers] = {}
    for way, (config, answer) in ways.items():
        note(f"answers whose tokens are compared: {way}")
        with Engine.load(model, dtype=dtype, config=config) as engine:
            answers[way] = answer(engine)
    truth = answers.pop("alone")
    return [_figure(way, given, truth) for way, given in answers.items()]


def _figure(way: str, given: Answers, truth: Answers) -> Figure:
    num_same = sum(own == true for own, true in zip(given, truth, strict=True))
    return Figure(f"same_tokens_{way}", num_same, "prompts", None, str(len(truth)))


def _one_by_one(engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams) -> Answers:
    return [engine.generate(prompt, sampling).token_ids for prompt in prompts]


def _cached(engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams) -> Answers:
    answers = []
    for prompt in prompts:
        engine.generate(prompt[: int(SHARED * len(prompt))], SamplingParams(max_new_tokens=1))
        completion = engine.generate(prompt, sampling)
        assert completion.usage.exact_tokens, completion.usage
        answers.append(completion.token_ids)
    return answers


def _together(engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams) -> Answers:
    def batch(some: Sequence[list[int]]) -> Answers:
        with engine.held():  # no step starts before all are in
            handles = [engine.submit(prompt, sampling) for prompt in some]
        return [handle.result().token_ids for handle in handles]

    return list(chain.from_iterable(batch(prompts[at : at + BATCH]) for at in range(0, len(prompts), BATCH)))
