"""`python -m eval.picture`: what is drawn is what the file says, and what is no result is named in one line."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest

from eval.picture import CLASSES, main

SVG = "{http://www.w3.org/2000/svg}"
AGENTS = ("solver", "analyst", "referee")
SECONDS = {"no cache": (2.0, 4.0, 8.0), "exact prefixes": (1.0, 3.0, 5.0), "moved KV": (0.5, 0.5, 1.25)}


def demo_result() -> dict[str, Any]:
    """Two questions; the second one takes twice as long, and a way that is not drawn is there, too."""
    rows = [
        {"question": question, "way": way, "agent": agent, "ttft_s": question * seconds}
        for question in (1, 2)
        for way, each in {**SECONDS, "read along": (9.0, 9.0, 9.0)}.items()
        for agent, seconds in zip(AGENTS, each, strict=True)
    ]
    bound = {"max_divergence": 0.05, "confidence": 0.9}
    config = {"model": "tiny", "dtype": "float32", "device": "cpu", "num_questions": 2, "bound": bound}
    return {"rows": rows, "config": config, "figures": []}


def report(*modes: str) -> dict[str, Any]:
    """A task evaluation's report; mode number N takes 1 / N of the first one's time."""
    found = [
        {
            "mode": mode,
            "times": {
                "num_questions": 1,
                "ttft_s": {agent: 6.0 * (index + 1) / place for index, agent in enumerate(AGENTS)},
            },
        }
        for place, mode in enumerate(modes, start=1)
    ]
    model = {"name": "tiny", "dtype": "torch.bfloat16", "device": "cuda:0"}
    return {
        "name": "gsm8k",
        "modes": found,
        "settings": {"max_divergence": 0.02, "confidence": 0.95},
        "facts": {"model": model},
    }


def drawn(value: Any, folder: Path) -> ElementTree.Element:
    source, out = folder / "result.json", folder / "new" / "picture.svg"
    source.write_text(json.dumps(value))
    assert main(["--from", str(source), "--out", str(out)]) == 0
    assert out.stat().st_size < 20_000
    return ElementTree.parse(out).getroot()


def bars(svg: ElementTree.Element, way: int) -> list[ElementTree.Element]:
    """Of one way, agent by agent; without the squares of the legend and of the sums."""
    return svg.findall(f"{SVG}rect[@class='{CLASSES[way]}']")[1:-1]


def texts(svg: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in svg.iter(f"{SVG}text")]


def test_bars_and_words_are_the_files(tmp_path: Path) -> None:
    svg = drawn(demo_result(), tmp_path)
    means = {way: [fmean((each, 2 * each)) for each in seconds] for way, seconds in SECONDS.items()}
    widths = [[float(bar.attrib["width"]) for bar in bars(svg, way)] for way in range(3)]
    scale = widths[0][0] / means["no cache"][0]
    assert widths == [[pytest.approx(scale * each, abs=0.02) for each in seconds] for seconds in means.values()]
    told = texts(svg)
    for index in range(3):
        dense, exact, moved = (seconds[index] for seconds in means.values())
        assert f"{dense:.2f} s" in told
        assert f"{exact:.2f} s, {dense / exact:.1f} times as fast" in told
        assert f"{moved:.2f} s, {dense / moved:.1f} times as fast" in told
    assert [agent for agent in AGENTS if agent in told] == list(AGENTS)
    sums = told[told.index("together") + 1 :]
    assert sums[:3] == ["21.00 s", "13.50 s, 1.6 times as fast", "3.38 s, 6.2 times as fast"]
    assert "tiny, float32, on cpu. Means over 2 questions." in told
    assert any("within 0.05 nats of the exact one in 90% of cases" in each for each in told)


def test_who_cannot_see_it_is_told_all_of_it(tmp_path: Path) -> None:
    svg = drawn(demo_result(), tmp_path)
    parts = {each.attrib["id"]: each.text or "" for each in svg if "id" in each.attrib}
    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-labelledby"].split() == list(parts) == ["title", "desc"]
    assert parts["title"] == "Time to the first token of 3 agents"
    for agent, dense, exact, moved in zip(AGENTS, *SECONDS.values(), strict=True):
        said = f"{agent}: no cache {1.5 * dense:.2f} s; exact prefix {1.5 * exact:.2f} s, {dense / exact:.1f} times"
        assert said in parts["desc"]
        assert f"moved text {1.5 * moved:.2f} s, {dense / moved:.1f} times as fast." in parts["desc"]
    together = "no cache 21.00 s; exact prefix 13.50 s, 1.6 times as fast; moved text 3.38 s, 6.2 times as fast."
    assert f"Together: {together}" in parts["desc"]


def test_nothing_leaves_the_picture_or_covers_something_else(tmp_path: Path) -> None:
    """Where exact prefixes gain nothing, the longest bar has the longest words behind it."""
    value = demo_result()
    for row in value["rows"]:
        row["ttft_s"] = 123.0
    svg = drawn(value, tmp_path)
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    letter = {"title": 10.0, "": 7.8, "quiet": 6.7}  # pixels of DejaVu Sans, which is wide
    for each in svg.iter(f"{SVG}text"):
        length = len(each.text or "") * letter[each.attrib.get("class", "")]
        assert float(each.attrib["x"]) + length <= width
        assert float(each.attrib["y"]) < height
    names = max(len(agent) for agent in AGENTS) * 9.4 + 24
    assert all(float(bar.attrib["x"]) >= names for way in range(3) for bar in bars(svg, way))
    tops = sorted(float(bar.attrib["y"]) for way in range(3) for bar in bars(svg, way))
    assert all(below - above >= 14 for above, below in pairwise(tops))


@pytest.mark.parametrize(
    ("modes", "first"),
    [(("stock", "exact", "kvcomm", "dense"), "transformers alone"), (("dense", "exact", "kvcomm"), "no cache")],
)
def test_a_task_evaluation(modes: tuple[str, ...], first: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text(json.dumps(report(*modes)))
    out = tmp_path / "picture.svg"
    assert main(["--from", str(tmp_path / "run"), "--out", str(out)]) == 0
    told = texts(ElementTree.parse(out).getroot())
    assert f"{first}: the whole prompt is computed" in told
    assert [each for each in ("6.00 s", "12.00 s", "18.00 s") if each in told] == ["6.00 s", "12.00 s", "18.00 s"]
    assert {"6.00 s, 3.0 times as fast", "9.00 s, 2.0 times as fast"} <= set(told)
    assert "tiny, bfloat16, on cuda:0. Medians over 1 question." in told


def test_times_below_a_second_have_more_digits(tmp_path: Path) -> None:
    value = demo_result()
    for row in value["rows"]:
        row["ttft_s"] /= 1000
    assert "0.003 s" in texts(drawn(value, tmp_path))


def test_names_are_text(tmp_path: Path) -> None:
    value = demo_result()
    for row in value["rows"]:
        row["agent"] = {"solver": "<script>&\x00", "analyst": "a" * 99}.get(row["agent"], row["agent"])
    svg = drawn(value, tmp_path)
    assert svg.find(f".//{SVG}script") is None
    assert "<script>&\ufffd" in texts(svg)
    assert f"{'a' * 19}…" in texts(svg)


def without(value: dict[str, Any], agent: str, way: str) -> dict[str, Any]:
    rows = [row for row in value["rows"] if (row["agent"], row["way"]) != (agent, way)]
    return {**value, "rows": rows}


def with_time(seconds: Any) -> dict[str, Any]:
    value = copy.deepcopy(demo_result())
    value["rows"][0]["ttft_s"] = seconds
    return value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no result of `scripts/demo --json` or of a task evaluation"),
        ("[]", "is no result of"),
        ("7", "is no result of"),
        ('{"rows": 1}', "is no result of"),
        (json.dumps({"figures": []}), "is no result of"),
        (json.dumps({**demo_result(), "config": {}}), "is no result of"),
        (json.dumps({**demo_result(), "rows": []}), "holds no agent's first token"),
        (json.dumps(without(demo_result(), "referee", "moved KV")), "has no time of agent 'referee' in the way 'moved"),
        (json.dumps(with_time("fast")), "holds 'fast' where the seconds"),
        (json.dumps(with_time(0)), "holds 0 where the seconds"),
        (json.dumps(with_time(float("inf"))), "holds inf where the seconds"),
        (json.dumps(report("dense", "kvcomm")), "has no times of mode exact; run with --modes stock,exact,kvcomm"),
    ],
)
def test_what_is_no_result_is_named_in_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "result.json", tmp_path / "picture.svg"
    source.write_text(content)
    assert main(["--from", str(source), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source} ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'} cannot be read: No such file or directory\n"
