"""What a pass tells about those that it was for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcomm.engine.engine import Engine
from kvcomm.engine.passes import Work
from kvcomm.engine.request import Branch
from kvcomm.engine.spare import Spare
from kvcomm.model.runner import Run


def branch(num_tokens: int, num_guessed: int) -> Branch:
    made: Any = Branch(0, *[None] * 3, token_ids=[7] * num_tokens, num_guessed=num_guessed)  # type: ignore[arg-type]
    return made


def work(of: Branch | None, num_rows: int, *, is_beside: bool = False) -> Work:
    run = Run(np.zeros(num_rows, dtype=np.int32), np.zeros(1, dtype=np.int32), 0, 1)
    nobody: Any = SimpleNamespace(healing=None)
    return Work(nobody, of, nobody, (run,), is_beside=is_beside)


@pytest.mark.parametrize(
    ("num_tokens", "num_guessed", "expected"), [(0, 0, 1.0), (1, 0, 1.0), (10, 0, 1.0), (10, 5, 2.0), (10, 9, 10.0)]
)
def test_tokens_a_pass_are_those_drawn_and_those_guessed(num_tokens: int, num_guessed: int, expected: float) -> None:
    assert branch(num_tokens, num_guessed).tokens_a_pass == expected


def test_the_answer_to_which_guesses_gave_least_is_what_counts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers of a pass wait for the rows beside them, so none may pay for what guesses save another one."""
    told: list[tuple[tuple[float, ...], dict[str, Any]]] = []
    monkeypatch.setattr(Spare, "passed", lambda _, *rows, **settings: told.append((rows, settings)))
    batch = [work(branch(10, 8), 4), work(branch(12, 3), 2), work(None, 20, is_beside=True)]
    engine.scheduler._batches.timed(batch, 0.05)
    ((rows, settings),) = told
    assert rows == (6, 0, 20, 0.05)
    assert (settings["num_answers"], settings["tokens_a_pass"]) == (2, 12 / 9)
