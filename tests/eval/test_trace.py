"""The trace evaluation on a trace small enough to replay by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.optimum import most_hits, next_uses, trie_paths
from eval.trace import main, measure, replay
from kvcomm.lab.cache import ORDERS
from kvcomm.lab.load.trace_file import Trace, TraceRequest
from tests.lab.load.test_trace_file import AGENTIC, write

# 9 blocks, 4 distinct. Unbounded, requests 2, 3 and 5 find 1, 2 and 2 of them.
LINES = [{"timestamp": t, "hash_ids": ids} for t, ids in enumerate([[0, 1], [0, 2], [0, 1], [3], [0, 1]])]


def run(tmp_path: Path, lines: list[dict[str, object]], *arguments: str) -> int:
    file = write(tmp_path / "tiny.jsonl.gz", lines)
    return main(["--trace", str(file), "--out", str(tmp_path / "out" / "run.json"), *arguments])


def test_figures_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, LINES, "--json", "--capacities", "25,50,75") == 0
    printed = json.loads(capsys.readouterr().out)
    values = {figure["id"]: figure["value"] for figure in printed["figures"]}
    hits = {name: round(value * 9 / 100, 6) for name, value in values.items() if not name.startswith(("ns", "gap"))}
    assert hits == {
        "hit_rate": 5,
        "lru_25": 2,  # one page: only block 0 is ever kept, and block 3 drives it out
        "return_25": 2,  # the whole trace lasts milliseconds: nobody has come back, so the least recently used goes
        "belady_25": 3,
        "lru_50": 3,  # two pages: blocks 1 and 2 drive each other out, block 3 drives out block 1
        "return_50": 3,
        "belady_50": 5,
        "lru_75": 5,  # three pages: block 3 drives out block 2, which nobody wants again
        "return_75": 5,
        "belady_75": 5,
    }
    assert [values[f"gap_closed_{percent}"] for percent in (25, 50, 75)] == [0.0, 0.0, 1.0]
    assert values["ns_per_token"] > 0
    assert all(set(figure) == {"id", "value", "unit", "spread"} for figure in printed["figures"])
    config = printed["config"]
    assert (config["trace"], config["limit"], config["page_size"], config["block_size"]) == (
        "tiny.jsonl.gz",
        None,
        16,
        512,
    )
    assert (config["num_requests"], config["num_blocks"], config["num_distinct_blocks"]) == (5, 9, 4)
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert saved["figures"] == printed["figures"]
    assert len(saved["samples"]["ns_per_token"]) == 5


def test_sessions_share_nothing_but_subagents_share_their_sessions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, AGENTIC, "--json", "--capacities", "100") == 0
    printed = json.loads(capsys.readouterr().out)
    values = {figure["id"]: figure["value"] for figure in printed["figures"]}
    assert values["hit_rate"] == pytest.approx(100 * 3 / 12)
    assert values["lru_100"] == pytest.approx(100 * 3 / 12)


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, LINES, "--limit", "3") == 0
    captured = capsys.readouterr()
    assert "hit_rate" in captured.out
    assert "<= 12" in captured.out
    assert "3 requests, 6 blocks, 3 of them distinct" in captured.err


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--capacities", "10,101"], ["--capacities", "x"]])
def test_bad_options_are_refused(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, LINES, *arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", str(tmp_path / "nowhere.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


prompts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=12)


def make_trace(prompts_: list[list[int]]) -> Trace:
    requests = [TraceRequest(0, float(at), np.array(blocks, dtype=np.int32)) for at, blocks in enumerate(prompts_)]
    return Trace("mooncake", 8, 1, tuple(requests), "")


@given(prompts, st.integers(1, 8), st.sampled_from(sorted(ORDERS)))
@settings(deadline=None, max_examples=60)
def test_the_tree_agrees_with_bookkeeping_and_never_beats_the_optimum(
    prompts_: list[list[int]], capacity: int, eviction: str
) -> None:
    trace = make_trace(prompts_)
    seen: set[tuple[int, ...]] = set()
    expected = 0
    for prompt in prompts_:
        prefixes = [tuple(prompt[: n + 1]) for n in range(len(prompt))]
        expected += sum(prefix in seen for prefix in prefixes)
        seen |= set(prefixes)
    for page_size in (3, 8):
        assert replay(trace, page_size=page_size, num_pages=500).hit_blocks == expected
    bounded = replay(trace, page_size=8, num_pages=capacity, eviction=eviction)
    paths, num_nodes = trie_paths(trace.requests)
    assert bounded.hit_blocks <= most_hits(next_uses(paths, num_nodes), capacity)
    assert bounded.num_pages <= capacity


def test_all_pages_of_an_unbounded_replay_fit() -> None:
    report = measure(make_trace([[0, 1, 2], [0, 1, 3], [0, 4], [0]]), [50])
    assert [figure.id for figure in report.figures][:3] == ["hit_rate", "ns_per_token", "ns_per_token_page_8"]


def test_the_gap_that_is_closed_by_hand() -> None:
    """One who comes back between others that never do; two blocks fit."""
    turns = [[0], [0], [0], *([[0], [9 + n], [19 + n]][at] for n in range(9) for at in range(3))]
    requests = [TraceRequest(0, 10.0 * at, np.array(blocks, dtype=np.int32)) for at, blocks in enumerate(turns)]
    report = measure(Trace("mooncake", 8, 1, tuple(requests), ""), [10])
    values = {figure.id: figure.value for figure in report.figures}
    assert values["lru_10"] < values["return_10"] == values["belady_10"]
    assert values["gap_closed_10"] == 1.0
