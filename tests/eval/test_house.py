"""`eval.house`: what is called on the way of a request is found, and nothing else; lengths are those of the source."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import kvcomm
from eval import house
from kvcomm.values import text, whole_number

UNASKED = {
    *(f"engine/{name}.py" for name in ("adapters", "answers", "healing_work", "holdings", "offers", "read_along")),
    *(f"engine/{name}.py" for name in ("byte_runs", "grammar_state", "guesses", "spare", "tiering")),
    *(f"memory/{name}.py" for name in ("ages", "eviction", "leaves", "renditions", "rhythm")),
    *(f"model/{name}.py" for name in ("adapters", "choice", "namespace")),
    *(f"model/attention/{name}.py" for name in ("merging", "short_runs", "single_rows")),
    *(f"reuse/{name}.py" for name in ("attempt", "budget", "idle_work", "learner", "planner", "policy")),
}
"""What a prompt computed alone, under the exact policy and with nothing else asked for, does not run through."""


def test_a_request_is_followed_to_its_logits(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "house.json"
    assert house.main(["--model", str(tiny_folder), "--out", str(out), "--json"]) == 0
    run = json.loads(out.read_text())
    figures = {figure["id"]: figure["value"] for figure in run["figures"]}
    files, classes = run["config"]["exact_files"], run["config"]["exact_classes"]
    assert figures["exact_files"] == len(files)
    assert figures["exact_classes"] == len(classes)
    assert {"engine/engine.py", "engine/scheduler.py", "memory/tree.py", "model/runner.py"} <= {*files}
    assert {"engine/engine.py:Engine", "engine/scheduler.py:Scheduler", "model/runner.py:ModelRunner"} <= {*classes}
    assert not [file for file in files if file.startswith(("align/ops", "server/", "cli/", "tiers/"))]
    assert not UNASKED & {*files}
    assert figures["approximate_files"] > figures["exact_files"]
    assert figures["approximate_functions"] > figures["exact_functions"] > figures["exact_files"]


def test_lengths_are_those_of_the_source() -> None:
    figures = {figure.id: figure.value for figure in house._lengths()}
    root = Path(kvcomm.__file__).parent
    sources = {file: file.read_text().count("\n") for file in root.rglob("*.py")}
    assert figures["files"] == len(sources)
    assert figures["max_file_lines"] == max(sources.values())
    assert figures["lines"] == sum(num for file, num in sources.items() if root / "integrations" not in file.parents)
    assert figures["public_names"] == len(kvcomm.__all__)


@pytest.mark.parametrize("in_thread", [False, True])
def test_only_what_is_called_while_followed_counts(in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(act: Callable[[], object]) -> None:
        if not in_thread:
            act()
            return
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()

    monkeypatch.setattr(house, "LOGITS", "whole_number")
    with house.Tracer() as tracer:
        text("before", "x")
        followed = tracer.follow(lambda: ended(lambda: (whole_number("a number", 3), text("behind the logits", "x"))))
        text("after", "x")
    assert [code.co_qualname for code in followed.codes] == ["whole_number"]
    assert followed.files == ["values.py"]
    assert followed.classes == []
