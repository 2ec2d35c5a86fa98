"""`kvcomm segment ... --server URL`: the named segments of a running server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from rich.text import Text

from kvcomm.cli.output import emit, table
from kvcomm.cli.remote import ask_json, get_json
from kvcomm.cli.text import age_of, counted, printable

SHOWN = ("name", "version", "tokens", "kind", "ttl", "hash")


def add(server: str, key: str | None, name: str, content: str, *, as_json: bool) -> None:
    """Make a text the next version of a name; raises as `ask_json`, like all here."""
    put = ask_json("PUT", _url(server, name), {"content": content}, key=key)
    line = f"added {name}, version {put['version']}: {counted(put['tokens'], 'token')}, {put['hash'][:12]}"
    emit(put, printable(line), as_json=as_json)


def show_all(server: str, key: str | None, *, as_json: bool) -> None:
    """Show the latest version of every name."""
    value = get_json(_url(server), key)
    rows = [(each["name"], each["version"], each["tokens"], each["hash"][:12], _age(each)) for each in value["data"]]
    view = table(["name", "version", "tokens", "hash", "age"], rows, numeric={"version", "tokens"})
    emit(value, view if rows else Text(f"no segments at {server}"), as_json=as_json)


def show(server: str, key: str | None, name: str, *, as_json: bool) -> None:
    """Show the latest version of a name, and its text."""
    value = get_json(_url(server, name), key)
    rows = [(fact, value[fact]) for fact in SHOWN]
    emit(value, table(None, rows), as_json=as_json)
    if not as_json:
        sys.stdout.write(f"\n{printable(value['content'])}\n")


def remove(server: str, key: str | None, names: Sequence[str], *, as_json: bool) -> None:
    """Remove names with all their versions; none of them if one is unknown."""
    for name in names:
        get_json(f"{_url(server, name)}/versions", key)
    removed = [ask_json("DELETE", _url(server, name), key=key) for name in names]
    lines = [f"removed {each['name']}: {counted(each['versions'], 'version')}" for each in removed]
    emit({"removed": removed}, printable("\n".join(lines)), as_json=as_json)


def _url(server: str, name: str | None = None) -> str:
    base = f"{server.rstrip('/')}/v1/segments"
    return base if name is None else f"{base}/{quote(name, safe='')}"


def _age(record: dict[str, Any]) -> str | None:
    return age_of(datetime.fromtimestamp(record["created"], UTC).isoformat())
