"""What is seen of a run, from made-up events."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvcomm.agents.results import AgentFinished, AgentResult, AgentStarted, AgentText, GroupEvent
from kvcomm.cli.progress import Lines, OneText, Panels, ProgressView, Silent
from kvcomm.engine.results import Usage


def finished(agent: str, text: str, round: int = 1) -> AgentFinished:
    usage = Usage(10, 4, 0, 6, 3, queue_s=0.0, ttft_s=0.5, total_s=1.0)
    result = AgentResult(agent, round, text, (), (), usage, "length", 0.0, 1.0)
    return AgentFinished(agent, round, result)


def text(agent: str, piece: str, round: int = 1) -> AgentText:
    return AgentText(agent, round, piece, (1,))


def show(view: ProgressView, *events: GroupEvent) -> None:
    with view:
        for event in events:
            view.show(event)


def test_lines_of_agents_that_answer_side_by_side() -> None:
    stream = io.StringIO()
    events = [
        AgentStarted("a", 1, 10),
        AgentStarted("bcd", 1, 10),
        text("a", "one "),
        text("bcd", "x\ny\nz"),
        text("a", "two\x1b\n \n\nthree"),
        finished("bcd", "x\ny\nz"),
        text("a", "\n"),
        finished("a", "one two\x1b\nthree\n"),
    ]
    show(Lines(stream, ["a", "bcd"]), *events)
    assert stream.getvalue().splitlines() == [
        "bcd | x",
        "bcd | y",
        "a   | one two\ufffd",
        "bcd | z",
        "a   | three",
    ]


def test_lines_keep_rounds_apart() -> None:
    stream = io.StringIO()
    show(Lines(stream, ["a"]), text("a", "one"), text("a", "two", 2), finished("a", "one"), finished("a", "two", 2))
    assert stream.getvalue() == "a | one\na | two\n"


def test_one_text_is_bare() -> None:
    stream = io.StringIO()
    show(OneText(stream), AgentStarted("a", 1, 10), text("a", "one\n"), text("a", "two"), finished("a", "one\ntwo"))
    assert stream.getvalue() == "one\ntwo\n"


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    show(Silent(), text("a", "one"))
    assert capsys.readouterr() == ("", "")


def test_panels() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None, legacy_windows=False)
    view = Panels(console, num_rounds=2)
    with view:
        view.show(AgentStarted("a", 1, 10))
        view.show(text("a", "[b]" + "word " * 60))
        growing = io.StringIO()
        Console(file=growing, width=40).print(view._render())
        view.show(finished("a", "x"))
        assert list(view._render().renderables) == []
    lines = growing.getvalue().splitlines()
    assert lines[0].startswith("╭─ a, round 1 ─")
    assert len(lines) == 6  # two borders and the last four lines
    assert "word" in lines[-2]
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "[b]word word" in shown  # the whole answer, square brackets and all
    assert "10 prompt tokens, 4 from the cache" in shown
    assert "\x1b[?25h" in shown  # the cursor is back


def test_panels_give_the_terminal_back_after_an_interrupt() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    try:
        with Panels(console, num_rounds=1) as view:
            view.show(AgentStarted("a", 1, 10))
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?25h" in console.file.getvalue()
