"""`kvcomm top`: a running server as it is now, for one tenant; once for a pipe, again and again on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvcomm.cli.output import JsonFlag, emit
from kvcomm.cli.remote import DEFAULT_SERVER, KeyFlag, ServerFlag, get_json
from kvcomm.errors import ServerError

if TYPE_CHECKING:
    from kvcomm.server.schemas.stats import Stats

EPILOG = "Examples: kvcomm top; kvcomm top --server http://localhost:8000 --interval 1; kvcomm top --once --json"


def top(
    server: ServerFlag = DEFAULT_SERVER,
    key: KeyFlag = None,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, metavar="SECONDS", help="Time between two looks at the server.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end, as when the output is no terminal.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Watch a running server: where tokens come from, times, bounds, what is dropped; Ctrl-C ends it.

    Shows the numbers of the tenant whose key is given, like the page at /ui.
    """
    if once or as_json or not sys.stdout.isatty():
        from kvcomm.cli.top_view import view

        stats = _look(server, key)
        emit(stats.model_dump(), view(stats), as_json=as_json)
    else:
        _watch(server, key, interval)


def _watch(server: str, key: str | None, interval_s: float) -> None:
    """Draw until interrupted; a server that does not answer for a while is no reason to end."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from kvcomm.cli.top_view import view

    before = stats = _look(server, key)
    with Live(view(stats), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            trouble = None
            try:
                before, stats = stats, _look(server, key)
            except ServerError as error:
                trouble = Text(f"{error}; trying again", style="red")
            shown = view(stats, before=before)
            live.update(shown if trouble is None else Group(trouble, shown), refresh=True)


def _look(server: str, key: str | None) -> Stats:
    from pydantic import ValidationError

    from kvcomm.server.schemas.stats import Stats

    url = f"{server.rstrip('/')}/v1/stats"
    try:
        return Stats.model_validate(get_json(url, key))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ServerError(f"{url} answered what this version does not understand: {where}: {first['msg']}") from error
