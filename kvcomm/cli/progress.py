"""What agents say, as they say it: panels on a terminal, whole lines with the agent's name elsewhere.

A view takes the events of a run in order and owns nothing else. Text is made printable before it is shown.
"""

from __future__ import annotations

from typing import Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from kvcomm.agents.results import AgentFinished, AgentStarted, AgentText, GroupEvent
from kvcomm.cli.text import printable

NUM_TAIL_LINES = 4
"""Lines of an answer that a panel shows while it grows."""


class ProgressView(Protocol):
    """Shows a run; used in a `with` statement, so that a terminal is put in order however the run ends."""

    def show(self, event: GroupEvent) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class _View:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to put in order."""


class Silent(_View):
    """Shows nothing."""

    def show(self, event: GroupEvent) -> None:
        """Ignore the event."""


class OneText(_View):
    """The bare text of a single agent, piece by piece, with a line break at its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, event: GroupEvent) -> None:
        """Write the text of an event."""
        if isinstance(event, AgentText):
            self._stream.write(printable(event.text))
        elif isinstance(event, AgentFinished):
            self._stream.write("\n")
        self._stream.flush()


class Lines(_View):
    """`agent | line` for every finished line with text, so that agents that answer side by side stay readable."""

    def __init__(self, stream: TextIO, names: list[str]) -> None:
        self._stream = stream
        self._width = max(map(len, names))
        self._open: dict[tuple[str, int], str] = {}

    def show(self, event: GroupEvent) -> None:
        """Write the lines that an event finishes."""
        if not isinstance(event, (AgentText, AgentFinished)):
            return
        key = (event.agent, event.round)
        text = self._open.pop(key, "")
        if isinstance(event, AgentText):
            *lines, self._open[key] = (text + printable(event.text)).split("\n")
        else:
            lines = [text]
        for line in filter(str.strip, lines):
            self._stream.write(f"{event.agent:<{self._width}} | {line}\n")
        self._stream.flush()


class Panels(_View):
    """A panel for every agent at work, with the end of its text; finished answers stay above as whole panels."""

    def __init__(self, console: Console, *, num_rounds: int) -> None:
        self._console = console
        self._num_rounds = num_rounds
        self._texts: dict[tuple[str, int], str] = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the unfinished panels away and give the terminal back."""
        self._live.stop()

    def show(self, event: GroupEvent) -> None:
        """Bring the panels up to date."""
        if isinstance(event, AgentStarted):
            self._texts[event.agent, event.round] = ""
        elif isinstance(event, AgentText):
            self._texts[event.agent, event.round] += printable(event.text)
        elif isinstance(event, AgentFinished):
            text = self._texts.pop((event.agent, event.round), "")
            usage = event.result.usage
            tokens = f"{usage.prompt_tokens} prompt tokens, {usage.exact_tokens} from the cache"
            note = f"{tokens}, first token after {usage.ttft_s:.2f} s"
            self._console.print(self._panel(event.agent, event.round, text.strip(), note=note))

    def _render(self) -> Group:
        # The live display draws from its own thread.
        return Group(*(self._panel(*key, self._tail(text)) for key, text in list(self._texts.items())))

    def _tail(self, text: str) -> str:
        """The last few lines as wide as a panel."""
        width = max(1, self._console.width - 4)
        rows = [line[at : at + width] for line in text.split("\n") for at in range(0, max(1, len(line)), width)]
        return "\n".join(rows[-NUM_TAIL_LINES:])

    def _panel(self, agent: str, round: int, text: str, *, note: str = "") -> Panel:
        title = f"{agent}, round {round}" if self._num_rounds > 1 else agent
        return Panel(Text(text), title=Text(title, style="bold"), title_align="left", subtitle=Text(note, style="dim"))
