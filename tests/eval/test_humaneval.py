"""HumanEval: what is run, how it is judged, what its tool says; and a run on a tiny model."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest

from eval import humaneval
from eval.sandbox import NONE, Limits, isolation
from eval.tasks.humaneval import HumanEval, examples_of
from eval.tasks.program import beginning_of, code_of
from eval.tasks.statistics import pass_at_k

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
        ("\n   \n    return 2 * x", True, False),
        ("    class L(int):\n        def __eq__(self, other): return True\n    return L(5)", False, False),
    ],
)
def test_score(answer: str, right: bool, strict: bool) -> None:
    score = HumanEval(Limits(seconds=120), unsafe=True).score(answer, {}, ROW)
    assert (score.is_right, score.is_right_otherwise) == (right, strict)


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


SHOWN = '''from typing import List


def helper(x):
    """ >>> helper(1)
    9
    """
    return 9


def double(x: int) -> int:
    """ Twice x.
    >>> double(2)
    4
    >>> double(-1)
    -2
    """
'''


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("return 2 * x", "2 of 2 examples"),
        ("```python\ndef double(x):\n    return abs(2 * x)\n```", "1 of 2 examples; double(-1) gives 2, not -2"),
        ("return y", "0 of 2 examples; double(2) gives NameError(\"name 'y' is not defined\"), not 4"),
        ("return (", "SyntaxError: '(' was never closed"),
        (
            "import os\nos.fork()",
            "0 of 2 examples; double(2) gives PermissionError(1, 'Operation not permitted'), not 4",
        ),
    ],
)
def test_the_coders_tool_tries_the_examples_of_the_docstring(answer: str, said: str) -> None:
    if "fork" in answer and isolation(unsafe=True) == NONE:
        pytest.skip("nothing keeps programs apart here")
    assert HumanEval(unsafe=True).use_tool("coder", answer, {**ROW, "prompt": SHOWN}) == said


def test_without_examples_the_tool_says_whether_the_code_runs() -> None:
    assert HumanEval(unsafe=True).use_tool("coder", "return 2 * x", ROW) == "no error"
    assert HumanEval(unsafe=True).use_tool("coder", "return (", ROW).startswith("SyntaxError")


def test_examples_are_those_of_the_last_function() -> None:
    assert examples_of(SHOWN) == [("double(2)", "4"), ("double(-1)", "-2")]
    assert examples_of("not Python") == []


def test_prose_behind_a_program_is_left_out() -> None:
    assert beginning_of("a = 1\nprint(a)\nAnswer: 1 apple") == "a = 1\nprint(a)"
    assert beginning_of("The answer is 1.") == ""


TEAM = """
name = "tiny"
[defaults]
sampling = { max_new_tokens = 12, ignore_eos = true }
[[agents]]
name = "coder"
prompt = "Write {question}"
[[agents]]
name = "last"
prompt = "{question} Which is right?"
"""


def test_a_run(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "humaneval"
    data.mkdir()
    rows = [{**ROW, "task_id": str(n), "prompt": f'def double(x):\n    """ Number {n}. """\n'} for n in range(8)]
    content = "".join(json.dumps(each) + "\n" for each in rows)
    (data / "humaneval_public.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "team.toml").write_text(TEAM)
    arguments = [f"--model={tiny_folder}", f"--team={tmp_path / 'team.toml'}", f"--data={tmp_path}", "--agents=2"]
    arguments += [f"--out={tmp_path / 'out'}", "--limit=2", "--anchors=1", "--calibration=1", "--divergence=1"]
    assert humaneval.main([*arguments, "--modes=exact,rotate", "--samples=3", "--timed=1", "--json", "--unsafe"]) == 0
    figures = {each["id"]: each["value"] for each in json.loads(capsys.readouterr().out)["figures"]}
    assert {
        "pass_at_1_dense",
        "pass_at_1_drawn_dense",
        "pass_at_2_drawn_rotate",
        "pass_at_3_drawn_exact",
    } <= figures.keys()
    assert figures["flips_exact"] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["programs_kept_apart_by"] == str(isolation(unsafe=True))
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "dense.jsonl").read_text().splitlines()]
    assert all(sample["answers"]["coder"]["result"] for sample in samples)
    assert all(sample["extra"]["drawn"] == 3 for sample in samples)
