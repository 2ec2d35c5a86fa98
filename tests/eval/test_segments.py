"""`python -m eval.segments` on a tiny model: which figures there are, and that a wrong hit would be seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import segments

WORDS = {"A": "helpful agent", "D": "question", "E": "answer"}


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """A folder like that of the real prompts and schemas."""
    folder = tmp_path / "agents"
    (folder / "prompts").mkdir(parents=True)
    for name, file in (
        ("A", "openhands_codeact_system_prompt.j2"),
        ("D", "taubench_retail_policy.md"),
        ("E", "openhands_swe_task.j2"),
    ):
        (folder / "prompts" / file).write_text(WORDS[name] * 2)
    (folder / "bfcl_tool_schemas.json").write_text(json.dumps({"gorilla_file_system": [{"name": "cat"}]}))
    (folder / "github_mcp_tools.json").write_text(json.dumps([{"name": "clone"}]))
    return folder


def run(tiny_folder: Path, agents: Path) -> dict[str, float]:
    """Figures by id."""
    out = agents / "run.json"
    arguments = ["--model", str(tiny_folder), "--agents", str(agents), "--out", str(out), "--max-tokens=6"]
    assert segments.main([*arguments, "--max-chars=60"]) == 0
    saved = json.loads(out.read_text())
    sizes = saved["config"]["segment_tokens"]
    figures = {figure["id"]: figure["value"] for figure in saved["figures"]}
    assert figures["agent_2_cached_prefix_tokens"] == sizes["A"]
    assert figures["agent_3_cached_prefix_tokens"] == sizes["A"] + sizes["B"]
    assert sizes["A"] <= figures["tools_agent_2_cached_prefix_tokens"] < figures["tools_agent_3_cached_prefix_tokens"]
    assert figures["second_turn_cached_segment_tokens"] == sizes["A"] + sizes["B"] + sizes["D"]
    return figures


@pytest.mark.usefixtures("capsys")
def test_what_is_shared_is_hit_and_nothing_else(tiny_folder: Path, agents: Path) -> None:
    assert run(tiny_folder, agents)["segment_hits_wrong"] == 0


@pytest.mark.usefixtures("capsys")
def test_a_wrong_answer_is_seen(tiny_folder: Path, agents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = segments.Client.ask

    def lying(client: segments.Client, *arguments: object, **fields: object) -> segments.Answer:
        answer = ask(client, *arguments, **fields)  # type: ignore[arg-type]
        return answer if fields else answer._replace(text="something else")

    monkeypatch.setattr(segments.Client, "ask", lying)
    assert run(tiny_folder, agents)["segment_hits_wrong"] >= 3
