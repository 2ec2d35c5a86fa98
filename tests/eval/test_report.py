"""Reports: what is read out of records by hand, statistics, plots' fronts, and `python -m eval.report A B`."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import pytest

from eval.report.__main__ import main
from eval.report.contents import bound_figures
from eval.report.plots import all_plots, change_plot, pareto
from eval.tasks.analysis import analyse
from eval.tasks.replays import Divergence, DivergenceFile
from eval.tasks.samples import Answer, Sample, SampleFile
from eval.tasks.statistics import mcnemar
from eval.tasks.task import Score
from eval.tasks.timing import Timed, TimesFile
from kvcomm.align.intervals import violation_limit
from kvcomm.errors import InvalidRequest


def usage(aligned: int = 0, predicted: float = 0.01) -> dict[str, object]:
    report = {"reader": "r", "rung": "token 15 % attention", "share": 0.15, "level": "own", "predicted": predicted}
    moved = {**report, "distance": 0.1, "residual": None} if aligned else None
    counts = {"prompt": 10, "exact": 4, "aligned": aligned, "computed": 6 - aligned, "generated": 3}
    return {**counts, "reasons": {"glue": 6 - aligned}, "moved": moved}


def sample(index: int, found: str, right: bool, tokens: tuple[int, ...], moves: bool = False) -> Sample:
    answers = {"first": Answer((1,), "a", usage()), "last": Answer(tokens, "b", usage(5 if moves else 0))}
    return Sample(index, answers, Score(found, right, False), {"group": "odd" if index % 2 else "even"})


def divergence(index: int, mean: float, agent: str = "last", is_moved: bool = True) -> Divergence:
    """Twice the mean at the first token, nothing at the second one."""
    errors = ((0.0, 0.1 * index), (0.0, 0.2)) if is_moved else ((), ())
    return Divergence(
        index, "kvcomm", agent, (2 * mean, 0.0), 0.5, is_moved, *errors, predicted={"0.5": 0.005, "0.9": 0.1}
    )


DENSE = {index: sample(index, "7", index % 2 == 0, (1, 2, 3)) for index in range(4)}
OWN = {
    0: sample(0, "7", True, (1, 2, 3), moves=True),
    1: sample(1, "8", True, (1, 9), moves=True),
    2: sample(2, "9", False, (1, 2, 9, 9), moves=True),
    3: sample(3, "7", False, (1, 2)),
}
REPLAYED = [
    divergence(0, 0.001),
    divergence(1, 0.01),
    divergence(2, 0.5),
    divergence(3, 0.0, is_moved=False),
    divergence(0, 9.0, agent="first"),  # reads nobody: its divergence says nothing about reuse
]
TIMES = [
    Timed(index, "kvcomm", agent, 100, 10, 0.1 * (1 + index) * (1 + place), 1.0 + index, 1000 * (1 + index))
    for index in range(3)
    for place, agent in enumerate(("first", "last"))
]


def test_answers_against_dense() -> None:
    outcome = analyse("kvcomm", OWN, DENSE).outcome
    assert (outcome.lost, outcome.won) == (1, 1)
    assert outcome.flips.value == outcome.changed.value == 0.5
    assert outcome.accuracy.value == 0.5
    assert outcome.otherwise.value == 0
    assert outcome.by_group == {"even": 0.5, "odd": 0.5}
    assert outcome.macro == 0.5
    assert outcome.macro_otherwise == 0.0


def test_where_tokens_came_from() -> None:
    reuse = analyse("kvcomm", OWN, DENSE).reuse
    assert reuse.tokens == {"exact": 32, "aligned": 15, "computed": 33}
    assert reuse.requests == {"moved": 3, "exact prefix": 5, "computed": 0}
    assert reuse.reasons == {"glue": 33}
    assert reuse.rungs == {"token 15 % attention": 3}
    assert reuse.approximated.value == 0.75


def test_how_far_answers_are_off() -> None:
    damage = analyse("kvcomm", OWN, DENSE, divergences=REPLAYED, bound=(0.02, 0.05)).damage
    assert damage.first_change == (1, 2)
    assert damage.same == 0.5
    assert damage.divergences == (0.001, 0.01, 0.5, 0.0)
    assert damage.mean_divergence == pytest.approx(0.511 / 4)
    assert damage.by_position == pytest.approx((2 * 0.511 / 3, 0.0))
    assert damage.key_errors == pytest.approx((0.0, 0.1))
    assert damage.value_errors == pytest.approx((0.0, 0.2))
    assert damage.num_audited == 3
    assert damage.violations is not None
    assert damage.violations.value == pytest.approx(1 / 3)
    assert damage.predictions == ((0.01, 0.001), (0.01, 0.01), (0.01, 0.5))
    assert [(level, share.value) for level, share in damage.reliability] == [(0.5, 1 / 3), (0.9, 2 / 3)]


def test_without_a_bound_nothing_is_audited() -> None:
    damage = analyse("rotate", OWN, DENSE, divergences=REPLAYED).damage
    assert (damage.num_audited, damage.violations, damage.reliability) == (0, None, ())


def test_times_are_medians_over_questions_of_sums_over_agents() -> None:
    times = analyse("kvcomm", OWN, DENSE, times=TIMES, anchor_bytes=7).times
    assert times.num_questions == 3
    assert times.ttft_s == pytest.approx({"first": 0.2, "last": 0.4})
    assert times.total_s == {"first": 2.0, "last": 2.0}
    assert times.team_ttft_s == pytest.approx(0.6)
    assert times.team_s == 4.0
    assert (times.kv_bytes, times.anchor_bytes) == (3000, 7)


def test_the_bound_is_held_against_what_chance_allows() -> None:
    result = analyse("kvcomm", OWN, DENSE, divergences=REPLAYED, bound=(0.02, 0.05))
    figures = {
        figure.id: figure for figure in bound_figures({"dense": analyse("dense", DENSE, DENSE), "kvcomm": result})
    }
    assert figures["violations"].value == pytest.approx(1 / 3)
    assert figures["violations"].goal == f"<= {0.05 + 2 * (0.05 * 0.95 / 3) ** 0.5:.3g}"
    assert violation_limit(0.05, 3) == result.damage.violation_limit
    assert figures["audited"].value == 3
    assert "divergence_dense" not in figures


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (5, 2), (4, 4)])
def test_mcnemar_is_a_coin(lost: int, won: int) -> None:
    count = lost + won
    tail = sum(comb(count, each) for each in range(min(lost, won) + 1)) / 2**count
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail))


def test_pareto() -> None:
    assert pareto([(0.5, 1.0), (0.2, 3.0), (0.6, 2.0), (0.9, 0.5)]) == [(0.2, 3.0), (0.5, 1.0), (0.9, 0.5)]


def test_plots_show_what_there_is() -> None:
    dense = analyse("dense", DENSE, DENSE)
    bare = [dense, analyse("exact", DENSE, DENSE)]
    assert len(all_plots(bare, [])) == 2
    full = analyse("kvcomm", OWN, DENSE, divergences=REPLAYED, bound=(0.02, 0.05), times=TIMES)
    plots = all_plots([dense, full], TIMES)
    assert len(plots) == 8
    for plot in plots:
        assert plot.svg.startswith("<svg")
        assert plot.caption.endswith(".")
        assert "currentColor" in plot.svg
        assert "kvcomm</text>" in plot.svg
    assert all_plots([dense, full], TIMES) == plots


def test_a_run_without_flips_can_be_drawn() -> None:
    assert change_plot([analyse("exact", DENSE, DENSE)]).startswith("<svg")


def test_records_survive_a_file_and_a_cut(tmp_path: Path) -> None:
    file = SampleFile(tmp_path / "a.jsonl")
    kept = [OWN[0], OWN[3]]
    file.add(kept)
    assert file.read() == kept
    file.file.write_text(file.file.read_text()[:-30])
    assert file.read() == kept[:1]
    file.add(kept[1:])
    assert file.read() == kept
    file.file.write_text("{}\n" + file.file.read_text())
    with pytest.raises(InvalidRequest, match=r"a\.jsonl, line 1: not a record"):
        file.read()


def test_divergences_and_times_survive_a_file(tmp_path: Path) -> None:
    divergences, times = DivergenceFile(tmp_path / "d.jsonl"), TimesFile(tmp_path / "t.jsonl")
    assert divergences.read() == times.read() == []
    divergences.add(REPLAYED)
    times.add(TIMES)
    assert divergences.read() == REPLAYED
    assert times.read() == TIMES


def report(folder: Path, value: float, spread: list[float], **settings: object) -> Path:
    folder.mkdir()
    figure = {"id": "flips_kvcomm", "value": value, "unit": "share", "spread": spread}
    settings = {"rows": "abc", **settings}
    values = {"name": "gsm8k", "figures": [figure], "settings": settings, "modes": [{"mode": "kvcomm"}]}
    (folder / "report.json").write_text(json.dumps(values))
    return folder


def keep(folder: Path, samples: dict[int, Sample]) -> None:
    (folder / "samples").mkdir()
    SampleFile(folder / "samples" / "kvcomm.jsonl").add(samples.values())


def test_two_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = report(tmp_path / "a", 0.1, [0.05, 0.15], agents=3)
    other = report(tmp_path / "b", 0.3, [0.2, 0.4], agents=5, rows="xyz")
    assert main([str(one), str(other / "report.json")]) == 0
    out = capsys.readouterr().out
    assert "+0.2" in out
    assert "intervals do not overlap" in out
    assert "not the same questions" in out
    assert "paired" not in out
    assert "agents: 3 in A, 5 in B" in out


def test_two_reports_on_the_same_questions_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = report(tmp_path / "a", 0.1, [0.0, 0.2]), report(tmp_path / "b", 0.1, [0.0, 0.2])
    keep(one, DENSE)
    keep(other, OWN)
    assert main([str(one), str(other)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kvcomm"))
    assert line.split() == ["kvcomm", "4", "1", "1", "1.000", "50.0%"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "gsm8k", "figures": []}'])
def test_what_is_no_report_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = report(tmp_path / "a", 0.1, [0.0, 0.2])
    (tmp_path / "report.json").write_text(text)
    assert main([str(one), str(tmp_path)]) == 1
    assert f"{tmp_path / 'report.json'} is no report" in capsys.readouterr().err
    assert main([str(one), str(tmp_path / "nowhere")]) == 1
    assert "is no report" in capsys.readouterr().err
