"""HumanEval: what is run, and how it is judged."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest

from eval.sandbox import Limits
from eval.tasks.analysis import pass_at_k
from eval.tasks.humaneval import HumanEval, code_of

ROW = {
    "prompt": 'from typing import List\n\n\ndef double(x: int) -> int:\n    """ Twice x. """\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}


@pytest.mark.parametrize(
    ("answer", "right", "strict"),
    [
        ("```python\ndef double(x):\n    return 2 * x\n```", True, True),
        ("Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.", True, False),
        ("def double(x: int) -> int:\n    return x + x", True, False),
        ("    return 2 * x", True, False),
        ("return 2 * x", True, False),
        ("```python\ndef double(x):\n    return 2 * x", True, True),  # cut off behind its end
        ("```\ndef double(x):\n    return x\n```", False, False),
        ("I cannot.", False, False),
        ("", False, False),
        ("```python\nimport sys\nsys.exit(0)\n```", False, False),
        ("```python\ndef check(f): pass\ndef double(x): return 0\n```", False, False),
    ],
)
def test_score(answer: str, right: bool, strict: bool) -> None:
    score = HumanEval(Limits(seconds=5)).score(answer, {}, ROW)
    assert (score.is_right, score.is_strictly_right) == (right, strict)


def test_the_last_block_counts() -> None:
    assert code_of("```python\na = 1\n```\nbetter:\n```python\nb = 2\n```") == "b = 2"


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int) -> None:
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = list(combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, draws)), len(draws))))
    with pytest.raises(ValueError, match=f"pass@{n + 1}"):
        pass_at_k(n, c, n + 1)
