"""Asking as an agent that has read along: what is known early, and that only the rest is left."""

from __future__ import annotations

import pytest

from eval.tasks.along import NUM_LATE, ask_along, known_early
from kvcomm import Engine, SamplingParams
from kvcomm.memory.segments import Segment
from tests.tiny import TinyModel

ROLE, QUESTION = Segment(tuple(range(10, 60))), Segment(tuple(range(60, 80)), "question")
ONE, TWO = Segment(tuple(range(80, 130)), "one"), Segment(tuple(range(130, 170)), "two")
GLUE = Segment(tuple(range(170, 180)))
PROMPT = (ROLE, QUESTION, ONE, GLUE, TWO, GLUE)


@pytest.mark.parametrize(
    ("prompt", "agents", "num_late"),
    [
        (PROMPT, ["one", "two"], NUM_LATE + 10),
        (PROMPT, ["one"], NUM_LATE + 10 + 40 + 10),
        ((ROLE, Segment((1, 2), "two"), GLUE), ["two"], 2 + 10),
        ((ROLE, ONE, GLUE, Segment((), "two")), ["one", "two"], NUM_LATE + 10),
    ],
)
def test_what_is_known_early(prompt: tuple[Segment, ...], agents: list[str], num_late: int) -> None:
    tokens = [token for part in prompt for token in part.token_ids]
    assert known_early(prompt, agents) == tokens[:-num_late]


def test_nobody_is_read() -> None:
    assert known_early(PROMPT, []) == known_early((ROLE, QUESTION), ["one"]) == []


def test_the_answer_is_the_same_and_little_is_left(tiny: TinyModel) -> None:
    with Engine(tiny.model, tiny.tokenizer) as engine:
        sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
        along = ask_along(engine, PROMPT, sampling, ["one", "two"]).result()
        cold = engine.generate(PROMPT, sampling, reads_cache=False)
        assert along.token_ids == cold.token_ids
        assert along.usage.computed_tokens - along.usage.read_along_tokens == NUM_LATE + 10
        alone = ask_along(engine, (ROLE, QUESTION), sampling, ["one"]).result()
        assert alone.usage.read_along_tokens == 0
        engine.check_integrity()
