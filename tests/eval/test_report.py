"""Reports: statistics by hand, plots' fronts, and `python -m eval.report A B`."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import pytest

from eval.report.__main__ import main
from eval.report.plots import pareto
from eval.tasks.analysis import analyse, mcnemar, wilson
from eval.tasks.samples import Answer, Sample, SampleFile
from eval.tasks.task import Score


def usage(aligned: int = 0, predicted: float = 0.01) -> dict[str, object]:
    moved = {"group": "g", "rung": 0.15, "predicted": predicted, "distance": 0.1, "residual": None} if aligned else None
    counts = {"prompt": 10, "exact": 4, "aligned": aligned, "computed": 6 - aligned, "generated": 3}
    return {**counts, "reasons": {"glue": 6 - aligned}, "ttft_s": 0.5, "total_s": 1.0, "moved": moved}


def sample(index: int, found: str, right: bool, tokens: tuple[int, ...], divergence: float | None = None) -> Sample:
    aligned = 0 if divergence is None else 5
    answers = {
        "first": Answer((1,), "a", usage()),
        "last": Answer(tokens, "b", usage(aligned), divergence=divergence, agreement=divergence and 0.9),
    }
    return Sample(index, answers, 2.0, Score(found, right, right))


def test_a_mode_against_dense() -> None:
    dense = {index: sample(index, "7", index % 2 == 0, (1, 2, 3)) for index in range(4)}
    own = {
        0: sample(0, "7", True, (1, 2, 3), 0.001),
        1: sample(1, "8", True, (1, 9), 0.01),
        2: sample(2, "9", False, (1, 2, 9, 9), 0.5),
        3: sample(3, "7", False, (1, 2)),
    }
    result = analyse("kvcomm", own, dense, epsilon=0.02)
    assert (result.lost, result.won) == (1, 1)
    assert result.flips.value == result.changed.value == 0.5
    assert result.first_change == (1, 2)
    assert result.same == 0.5
    assert result.tokens == {"exact": 32, "aligned": 15, "computed": 33}
    assert result.rungs == {"15%": 3}
    assert result.approximated.value == 0.75
    assert result.violations is not None
    assert result.violations.value == pytest.approx(1 / 3)
    assert result.team_ttft_s == 1.0
    assert result.predictions == ((0.01, 0.001), (0.01, 0.01), (0.01, 0.5))


def test_wilson_solves_its_equation() -> None:
    """The ends are the shares p with |x - p| = z sqrt(p (1 - p) / n)."""
    for count, total in ((0, 10), (3, 10), (99, 100)):
        value, *ends = wilson(count, total)
        for end in ends:
            assert (value - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / total, abs=1e-6)
    assert wilson(0, 0) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (5, 2), (4, 4)])
def test_mcnemar_is_a_coin(lost: int, won: int) -> None:
    count = lost + won
    tail = sum(comb(count, each) for each in range(min(lost, won) + 1)) / 2**count
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail))


def test_pareto() -> None:
    assert pareto([(0.5, 1.0), (0.2, 3.0), (0.6, 2.0), (0.9, 0.5)]) == [(0.2, 3.0), (0.5, 1.0), (0.9, 0.5)]


def test_samples_survive_a_file_and_a_cut(tmp_path: Path) -> None:
    file = SampleFile(tmp_path / "a.jsonl")
    kept = [sample(0, "7", True, (1, 2), 0.5), sample(1, "", False, ())]
    file.add(kept)
    assert list(file.read().values()) == kept
    file.file.write_text(file.file.read_text()[:-30])
    assert list(file.read().values()) == kept[:1]
    file.add(kept[1:])
    assert list(file.read().values()) == kept


def report(folder: Path, value: float, spread: list[float], **settings: object) -> Path:
    folder.mkdir()
    figure = {"id": "flips_kvcomm", "value": value, "unit": "share", "spread": spread}
    settings = {"rows": "abc", **settings}
    (folder / "report.json").write_text(json.dumps({"name": "gsm8k", "figures": [figure], "settings": settings}))
    return folder


def test_two_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = report(tmp_path / "a", 0.1, [0.05, 0.15], agents=3)
    other = report(tmp_path / "b", 0.3, [0.2, 0.4], agents=5, rows="xyz")
    assert main([str(one), str(other / "report.json")]) == 0
    out = capsys.readouterr().out
    assert "+0.2" in out
    assert "intervals do not overlap" in out
    assert "not the same questions" in out
    assert "agents: 3 in A, 5 in B" in out
    assert main([str(one), str(tmp_path)]) == 1
    assert "is no report" in capsys.readouterr().err
