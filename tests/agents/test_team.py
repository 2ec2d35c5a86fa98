"""Teams from TOML files: what is read, and that every mistake names file, table and key."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

from kvcomm.agents import Agent, KVCommAgentGroup, load_team, packaged_teams
from kvcomm.agents.group import GroupSettings
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, TemplateError
from tests.agents.fakes import FakeEngine, byte_tokenizer

FULL = """
name = "reviewers"
description = "Two agents."
[defaults]
rounds = 2
read_along = false
sampling = { max_new_tokens = 12, stop = ["###"] }
[inputs]
style = "short"
[[agents]]
name = "solver"
prompt = "{question} ({style})"
[[agents]]
name = "critic"
system = "You check."
prompt = "{solver}"
sampling = { temperature = 1, seed = 3, stop_token_ids = [1, 2] }
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "team.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_reads_everything(tmp_path: Path) -> None:
    team = load_team(write(tmp_path, FULL))
    assert (team.name, team.description, team.rounds, dict(team.inputs)) == (
        "reviewers",
        "Two agents.",
        2,
        {"style": "short"},
    )
    default = SamplingParams(max_new_tokens=12, stop=("###",))
    own = SamplingParams(max_new_tokens=12, stop=("###",), temperature=1, seed=3, stop_token_ids=(1, 2))
    assert team.agents == (
        Agent("solver", prompt="{question} ({style})", sampling=default),
        Agent("critic", system="You check.", prompt="{solver}", sampling=own),
    )
    assert team.required_inputs == ("question",)
    assert not team.read_along
    assert pickle.loads(pickle.dumps(team)) == team


@pytest.mark.parametrize(
    ("given", "wanted"), [({}, False), ({"read_along": True}, True), ({"read_along": False}, False)]
)
def test_a_group_may_say_otherwise_whether_agents_read_along(
    tmp_path: Path, given: dict[str, bool], wanted: bool
) -> None:
    engine = FakeEngine(tokenizer=byte_tokenizer())
    team = load_team(write(tmp_path, FULL))
    team.group(engine, **given).run(question="why?", **team.inputs)  # type: ignore[arg-type]
    assert bool(engine.open_prompts) == wanted


def test_the_smallest_team(tmp_path: Path) -> None:
    team = load_team(str(write(tmp_path, '[[agents]]\nname = "a"')))
    assert (team.name, team.rounds, team.read_along, team.agents) == ("team", 1, True, (Agent("a"),))


def test_settings_of_a_group_are_what_it_takes() -> None:
    taken = {
        name
        for name, each in inspect.signature(KVCommAgentGroup).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert {*GroupSettings.__annotations__} == taken - {"read_along"}  # which a team says by itself


def test_a_team_makes_a_group_that_runs(tmp_path: Path) -> None:
    team = load_team(write(tmp_path, FULL))
    engine = FakeEngine(lambda text: text.upper(), tokenizer=byte_tokenizer(None))
    group = team.group(engine, tenant="acme")  # type: ignore[arg-type]
    result = group.run(rounds=team.rounds, **{**team.inputs, "question": "why?"})
    assert result["critic"].text == "YOU CHECK.\n\nWHY? (SHORT)"
    assert len(result.rounds) == 2
    assert set(engine.tenants) == {"acme"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the top level: 'agents' is missing or empty"),
        ("agents = []", "the top level: 'agents' is missing or empty"),
        ("agents = 3", "the top level: agents must be an array, got 3"),
        ("agents = [3]", r"\[\[agents\]\] number 1: must be a table, got int"),
        (
            "colour = 1",
            "the top level: unknown key 'colour'; known here: name, description, defaults, inputs, agents",
        ),
        ("name = 1", "the top level: name must be text, got 1"),
        ("[defaults]\nround = 1", r"\[defaults\]: unknown key 'round'; known here: rounds, read_along, sampling"),
        ("[defaults]\nrounds = true", r"\[defaults\]: rounds must be a whole number, got True"),
        ("[defaults]\nrounds = 0", r"\[defaults\]: rounds must be at least 1, got 0"),
        ("[defaults]\nsampling = 1", r"\[defaults\]: sampling must be a table, got 1"),
        (
            "[defaults.sampling]\ntemp = 1",
            r"\[defaults\], sampling: unknown key 'temp'; known here: max_new_tokens",
        ),
        (
            "[defaults.sampling]\ntemperature = 'x'",
            r"\[defaults\], sampling: temperature must be a number, got 'x'",
        ),
        (
            "[defaults.sampling]\ntop_k = 1.5",
            r"\[defaults\], sampling: top_k must be a whole number, got 1.5",
        ),
        ("[defaults.sampling]\nseed = 'x'", r"\[defaults\], sampling: seed must be a whole number, got 'x'"),
        (
            "[defaults.sampling]\nstop = 'x'",
            r"\[defaults\], sampling: stop must be an array, each item text, got 'x'",
        ),
        (
            "[defaults.sampling]\nstop = [1]",
            r"\[defaults\], sampling: stop must be an array, each item text, got \[1\]",
        ),
        (
            "[defaults.sampling]\nignore_eos = 1",
            r"\[defaults\], sampling: ignore_eos must be true or false, got 1",
        ),
        ("[defaults.sampling]\ntop_p = 2.0", r"\[defaults\], sampling: top_p must be in \(0, 1\], not 2.0"),
        ("[inputs]\nhint = 'x'", r"\[inputs\]: unknown key 'hint'; known here: question"),
        ("[inputs]\nquestion = 1", r"\[inputs\]: question must be text, got 1"),
    ],
)
def test_mistakes_outside_agents(tmp_path: Path, text: str, message: str) -> None:
    if "agents" not in text and text:
        text += '\n[[agents]]\nname = "a"'
    with pytest.raises(InvalidRequest, match=rf"team.toml, {message}"):
        load_team(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt = 'x'", "'name' is missing or empty"),
        ("name = ''", "'name' is missing or empty"),
        ("name = 1", "name must be text, got 1"),
        ("name = 'a'\nrole = 'x'", "unknown key 'role'; known here: name, system, prompt, sampling"),
        ("name = 'a'\nsystem = ['x']", "system must be text"),
        ("name = 'a'\nsampling = {min_p = 2}", r"\('a'\), sampling: min_p must be in \[0, 1\], not 2"),
        ("name = 'a'\nsampling = {tempo = 2}", r"\('a'\), sampling: unknown key 'tempo'"),
        ("name = 'a'\nprompt = '{'", r"\('a'\): agent 'a', prompt, line 1: unbalanced '{'"),
        ("name = 'a b'", r"\('a b'\): bad agent name 'a b'"),
        ("name = 'a'\nsampling = {n = 2}", r"\('a'\): agent 'a': sampling has n=2"),
    ],
)
def test_mistakes_in_an_agent(tmp_path: Path, text: str, message: str) -> None:
    first = "[[agents]]\nname = 'first'\n"
    with pytest.raises(InvalidRequest, match=rf"team.toml, \[\[agents\]\] number 2.*{message}"):
        load_team(write(tmp_path, f"{first}[[agents]]\n{text}"))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (("{b}", "{a}"), "team.toml: agent .* wait for each other"),
        (("{c@previous}", "x"), r"team.toml: agent 'a', placeholder \{c@previous\}: 'c' is not an agent"),
    ],
)
def test_agents_that_do_not_fit_together(tmp_path: Path, prompts: tuple[str, str], message: str) -> None:
    tables = [f"[[agents]]\nname = '{name}'\nprompt = '{text}'\n" for name, text in zip("ab", prompts, strict=True)]
    with pytest.raises(TemplateError, match=message):
        load_team(write(tmp_path, "".join(tables)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no team 'nobody': neither a packaged team .*gsm8k"):
        load_team("nobody")
    with pytest.raises(InvalidRequest, match="not a TOML file"):
        load_team(write(tmp_path, "name = "))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match=r"binary.toml: not a TOML file"):
        load_team(binary)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_team(tmp_path)


def test_every_packaged_team_loads() -> None:
    assert "gsm8k" in packaged_teams()
    for name in packaged_teams():
        assert load_team(name).name == name


def test_who_reads_whom_in_gsm8k() -> None:
    team = load_team("gsm8k")
    reads = {agent.name: {slot.name for slot in agent.slots} for agent in team.agents}
    alone = {"question"}
    assert reads == {
        "solver": alone,
        "analyst": alone,
        "programmer": alone,
        "inspector": {"question", "solver", "analyst", "programmer"},
        "referee": {"question", "solver", "analyst", "programmer", "inspector"},
    }
    assert team.required_inputs == ("question",)
    assert all(len(agent.system) > 500 for agent in team.agents)
