"""The dependency graph: what is refused, and what waits for what."""

from __future__ import annotations

import pytest

from kvcomm.agents.agent import Agent
from kvcomm.agents.graph import AgentGraph, Task
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import TemplateError


def graph(**prompts: str) -> AgentGraph:
    return AgentGraph(tuple(Agent(name, prompt=prompt) for name, prompt in prompts.items()))


DEBATE = {
    "solver": "{question} {critic@previous}",
    "critic": "{question} {solver}",
    "judge": "{critic}{solver}",
}


def test_names_inputs_and_final() -> None:
    debate = graph(**DEBATE)
    assert debate.names == ("solver", "critic", "judge")
    assert debate.inputs == ("question",)
    assert debate.final == ("judge",)


def test_reading_a_previous_answer_does_not_make_its_author_less_final() -> None:
    assert graph(a="{b@previous}", b="{q}").final == ("a", "b")


def test_system_text_is_a_template_too() -> None:
    agents = (Agent("a", prompt="x"), Agent("b", system="You saw {a}.", prompt="{q}"))
    assert AgentGraph(agents).needs(Task("b", 1)) == {Task("a", 1)}


def test_needs_of_rounds() -> None:
    debate = graph(**DEBATE)
    assert debate.needs(Task("solver", 1)) == set()
    assert debate.needs(Task("critic", 1)) == {Task("solver", 1)}
    assert debate.needs(Task("solver", 2)) == {Task("critic", 1), Task("solver", 1)}
    assert debate.needs(Task("judge", 2)) == {Task("critic", 2), Task("solver", 2), Task("judge", 1)}


def test_two_agents_of_one_name() -> None:
    with pytest.raises(TemplateError, match="agent 'a' is in the group already"):
        AgentGraph((Agent("a"), Agent("a")))


def test_cycle_is_reported_with_its_path() -> None:
    with pytest.raises(TemplateError, match=r"a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c") as caught:
        graph(a="{c}", b="{a}", c="{b}", d="{a}")
    assert "@previous}" in str(caught.value)
    assert "agent 'd'" not in str(caught.value)


def test_cycle_names_an_agent_with_the_placeholder_it_really_has() -> None:
    with pytest.raises(TemplateError, match=r"agent 'b', placeholder \{a\}.*a -> b -> a|agent 'a', placeholder \{b\}"):
        graph(a="{b}", b="{a}")


def test_an_agent_that_reads_itself() -> None:
    with pytest.raises(TemplateError, match=r"agent 'a', placeholder \{a\}: .*a -> a"):
        graph(a="{a}")
    assert graph(a="{a@previous}").needs(Task("a", 1)) == set()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"agent 'solver', placeholder \{question\}: neither an agent nor an input .*inputs: none"),
        ({"questoin": "x"}, r"placeholder \{question\}.*did you mean 'questoin'"),
        (
            {"question": "x", "hint": "y"},
            "input 'hint' is read by no agent; the placeholders ask for: question",
        ),
        ({"question": "x", "critic": "y"}, "input 'critic' has the name of an agent"),
        ({"question": 3}, r"input 'question' must be text \(str\) or a list of passages, got int"),
    ],
)
def test_inputs_that_do_not_fit(inputs: dict[str, object], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        graph(**DEBATE).check_inputs(inputs)


def test_previous_answer_of_an_input() -> None:
    with pytest.raises(
        TemplateError, match=r"agent 'a', placeholder \{question@previous\}: 'question' is not an agent"
    ):
        graph(a="{question} {question@previous}").check_inputs({"question": "x"})


def test_the_name_of_a_parameter_of_run() -> None:
    with pytest.raises(TemplateError, match=r"agent 'a', placeholder \{rounds\}: 'rounds' is a parameter of run"):
        graph(a="{rounds}").check_inputs({})


def test_no_agents() -> None:
    with pytest.raises(TemplateError, match="no agents"):
        AgentGraph(()).check_inputs({})


@pytest.mark.parametrize("name", ["", "1a", "a b", "a.b", "é", "{a}"])
def test_bad_agent_names(name: str) -> None:
    with pytest.raises(TemplateError, match="bad agent name"):
        Agent(name)


def test_an_agent_gives_one_answer() -> None:
    with pytest.raises(TemplateError, match="agent 'a': sampling has n=2"):
        Agent("a", sampling=SamplingParams(n=2))


def test_a_template_mistake_is_reported_when_the_agent_is_made() -> None:
    with pytest.raises(TemplateError, match="agent 'critic', system, line 1: empty placeholder"):
        Agent("critic", system="{}")
