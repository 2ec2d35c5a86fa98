"""Who reads whom in every topology, and that every task runs in every one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import gsm8k, humaneval, mmlu
from eval.tasks.topology import TOPOLOGIES, wire
from kvcomm.agents import load_team
from kvcomm.agents.graph import AgentGraph
from kvcomm.agents.team import Team
from kvcomm.errors import InvalidRequest


def reads(team: Team) -> dict[str, set[str]]:
    inputs = set(team.required_inputs)
    return {agent.name: {slot.name for slot in agent.slots} - inputs for agent in team.agents}


def test_who_reads_whom() -> None:
    team = load_team("gsm8k")
    assert reads(wire(team, 3, "full")) == {"solver": set(), "analyst": {"solver"}, "referee": {"solver", "analyst"}}
    assert reads(wire(team, 4, "chain")) == {
        "solver": set(),
        "analyst": {"solver"},
        "programmer": {"analyst"},
        "referee": {"programmer"},
    }
    assert reads(wire(team, 3, "star")) == {"solver": set(), "analyst": set(), "referee": {"solver", "analyst"}}
    assert reads(wire(team, 3, "debate")) == {
        "solver": set(),
        "analyst": set(),
        "solver_again": {"analyst"},
        "analyst_again": {"solver"},
        "referee": {"solver_again", "analyst_again"},
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "humaneval"])
def test_every_team_can_be_wired_in_every_way(name: str, topology: str) -> None:
    team = load_team(name)
    for num_agents in range(2, 6):
        wired = wire(team, num_agents, topology)
        assert set(wired.required_inputs) == set(team.required_inputs)
        assert wired.agents[-1].name == "referee"
        assert AgentGraph(wired.agents).agents == wired.agents
        for agent in wired.agents:
            assert agent.prompt.startswith(team.agents[0].prompt.strip())
            assert agent.system == next(each.system for each in team.agents if agent.name.startswith(each.name))


TASKS = {"gsm8k": gsm8k.main, "mmlu": mmlu.main, "humaneval": humaneval.main}
ROLES = {"gsm8k": "programmer", "mmlu": "reader", "humaneval": "coder"}
NUM_ROWS = 7


def small_team(task: str) -> str:
    """Five agents, the second one with a tool if the task has any, short enough for a tiny model."""
    names = ["first", ROLES[task], "third", "fourth", "referee"]
    agents = "".join(f'[[agents]]\nname = "{name}"\nsystem = "{name}"\nprompt = "Q {{question}} ?"\n' for name in names)
    return f'name = "small"\n[defaults]\nsampling = {{ max_new_tokens = 6, ignore_eos = true }}\n{agents}'


def write_rows(task: str, folder: Path) -> None:
    text = "def f(x):\n" if task == "humaneval" else ""
    rows = [
        {
            "question": f"{chr(65 + n)}{n}",
            "answer": n % 4 if task == "mmlu" else f"#### {n}",
            "subject": "law",
            "choices": ["w", "x", "y", "z"],
            "prompt": f'{text}    """{chr(65 + n)}"""\n',
            "entry_point": "f",
            "test": "def check(f): pass\n",
        }
        for n in range(NUM_ROWS)
    ]
    for name in {"gsm8k": ("train", "test"), "mmlu": ("dev", "test"), "humaneval": ("humaneval",)}[task]:
        (folder / f"{name}_public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_agents", [2, 5])
def test_every_task_runs_in_every_topology(
    task: str, topology: str, num_agents: int, tiny_folder: Path, tmp_path: Path
) -> None:
    write_rows(task, tmp_path)
    (tmp_path / "team.toml").write_text(small_team(task))
    arguments = [f"--model={tiny_folder}", f"--team={tmp_path / 'team.toml'}", f"--data={tmp_path}"]
    arguments += [f"--out={tmp_path / 'out'}", "--limit=1", "--anchors=1", "--calibration=1", "--samples=0"]
    arguments += [
        f"--agents={num_agents}",
        f"--topology={topology}",
        "--modes=exact,rotate",
        "--timed=0",
        "--divergence=1",
    ]
    if task == "mmlu":
        arguments.append("--shots=0")
    assert TASKS[task](arguments) == 0
    modes = {each["mode"]: each for each in json.loads((tmp_path / "out" / "report.json").read_text())["modes"]}
    num_answers = 2 * (num_agents - 1) + 1 if topology == "debate" else num_agents
    assert sum(modes["rotate"]["reuse"]["requests"].values()) == num_answers
    # A single worker has nobody to debate with: it is asked the same once more, and finds its prompt cached.
    repeats = int(topology == "debate" and num_agents == 2)
    assert modes["rotate"]["reuse"]["requests"]["moved"] == num_answers - 1 - repeats
    assert modes["exact"]["damage"]["same"] == 1.0


def test_what_cannot_be_wired() -> None:
    with pytest.raises(InvalidRequest, match="unknown topology 'ring'; there are full, chain, debate, star"):
        wire(load_team("gsm8k"), 3, "ring")
    with pytest.raises(InvalidRequest, match="has 5 agents"):
        wire(load_team("gsm8k"), 6, "full")
