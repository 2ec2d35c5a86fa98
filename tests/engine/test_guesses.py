"""Guesses save passes and change nothing that is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcomm.engine.engine import Engine
from kvcomm.engine.guess_gain import GuessGain
from kvcomm.engine.guesses import MAX_MATCH, Found, repeated
from kvcomm.engine.sampling import SamplingParams
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.runner import Run, ScoreWatch
from tests.engine.conftest import SMALL, greedy, some_tokens
from tests.tiny import TinyModel

GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)

WAYS = {
    "greedy": GREEDY,
    "drawn": replace(GREEDY, temperature=0.7, top_p=0.9, seed=3),
    "penalty": replace(GREEDY, repetition_penalty=1.3),
    "ends": SamplingParams(max_new_tokens=40),
    "logprobs": replace(GREEDY, logprobs=2),
    "two answers": replace(GREEDY, n=2, temperature=0.7, seed=5),
    "one token": replace(GREEDY, max_new_tokens=1),
}


@pytest.fixture(scope="module")
def plain(shared_model: TinyModel) -> Iterator[Engine]:
    """An engine that does not guess."""
    with Engine(shared_model.model, shared_model.tokenizer, config=replace(SMALL, draft_rows=0)) as engine:
        yield engine


def naive(token_ids: list[int], num: int) -> list[int]:
    """The same search, place by place."""
    best, best_length = -1, 0
    for place in range(len(token_ids) - 1):
        length = 0
        while length < min(MAX_MATCH, place + 1) and token_ids[place - length] == token_ids[-1 - length]:
            length += 1
        if length and length >= best_length:
            best, best_length = place, length
    if best < 0:
        return []
    behind = token_ids[best + 1 :]
    return [behind[index % len(behind)] for index in range(num)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 6))
def test_the_latest_longest_match_is_continued(token_ids: list[int], num: int) -> None:
    assert repeated(np.array(token_ids, dtype=np.int32), num).token_ids.tolist() == naive(token_ids, num)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("draft_rows", [3, 9])
def test_answers_are_those_without_guesses(shared_model: TinyModel, plain: Engine, way: str, draft_rows: int) -> None:
    prompts = [some_tokens(30, seed) for seed in range(3)]
    with Engine(shared_model.model, shared_model.tokenizer, config=replace(SMALL, draft_rows=draft_rows)) as engine:
        for prompt in prompts:
            got, wanted = (each.generate(prompt, WAYS[way]) for each in (engine, plain))
            assert [choice.token_ids for choice in got.choices] == [choice.token_ids for choice in wanted.choices]
            assert [choice.finish_reason for choice in got.choices] == [each.finish_reason for each in wanted.choices]
            for mine, other in zip(got.logprobs or (), wanted.logprobs or (), strict=True):
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert wanted.usage.guessed_tokens == 0
        engine.check_integrity()


def test_right_guesses_save_their_passes(
    engine: Engine, shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = some_tokens(30)
    answer = greedy(shared_model.model, prompt, 40)
    passes: list[int] = []
    runner = engine.scheduler._runner
    forward = runner.forward

    def counted(runs: list[Run], *, watch: ScoreWatch | None = None) -> Tensor:
        passes.append(sum(len(run.token_ids) for run in runs))
        return forward(runs, watch=watch)

    def knowing(token_ids: IntArray, num: int) -> Found:
        known = len(token_ids) - len(prompt)
        return Found(np.array(answer[known : known + num], dtype=np.int32), MAX_MATCH)

    monkeypatch.setattr(runner, "forward", counted)
    monkeypatch.setattr(GuessGain, "row_cost", 0.01)  # not what the clock says
    monkeypatch.setattr("kvcomm.engine.batches.repeated", knowing)
    completion = engine.generate(prompt, GREEDY)
    assert list(completion.token_ids) == answer
    assert passes == [len(prompt), 8, 8, 8, 8, 7]  # the prompt gives the first of 40 tokens
    assert completion.usage.guessed_tokens == 34


def test_answers_have_equal_shares_of_the_guesses(
    engine: Engine, shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[int]] = []
    runner = engine.scheduler._runner
    forward = runner.forward

    def counted(runs: list[Run], *, watch: ScoreWatch | None = None) -> Tensor:
        passes.append([len(run.token_ids) for run in runs])
        return forward(runs, watch=watch)

    monkeypatch.setattr(runner, "forward", counted)
    monkeypatch.setattr(GuessGain, "row_cost", 0.01)  # not what the clock says
    monkeypatch.setattr(
        "kvcomm.engine.batches.repeated", lambda token_ids, num: Found(np.zeros(num, dtype=np.int32), MAX_MATCH)
    )
    engine.generate(some_tokens(36), replace(GREEDY, n=3))
    assert passes[1] == [3, 3, 2]


def test_what_follows_a_wrong_guess_is_cached_as_it_was_drawn(engine: Engine, plain: Engine) -> None:
    prompt = some_tokens(12) * 3
    answer = engine.generate(prompt, GREEDY)
    longer = [*prompt, *answer.token_ids, 17, 18]
    assert engine.generate(longer, GREEDY).usage.exact_tokens >= len(prompt) + 32
    assert engine.generate(longer, GREEDY).token_ids == plain.generate(longer, GREEDY).token_ids
