"""`kvcomm context --server URL`: the same verbs on the contexts of a running server.

A context is called by its name or its id there; names need not be unique on a server, so an ambiguous one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from kvcomm.cli.options import read_text
from kvcomm.cli.output import emit, format_bytes, table
from kvcomm.cli.remote import ask_json
from kvcomm.cli.text import counted, printable
from kvcomm.errors import InvalidRequest

PREFILL_TIMEOUT_S = 600.0
_OPENAI_NAMES = {"max_new_tokens": "max_tokens"}
"""Settings of sampling that are called otherwise over HTTP."""


class RemoteContexts:
    """The contexts of one tenant of a server, as it describes them. Methods raise InvalidRequest and ServerError."""

    def __init__(self, server: str, key: str | None) -> None:
        self._server = server.rstrip("/")
        self._key = key

    def all(self) -> list[dict[str, Any]]:
        """Every context, parents before children."""
        return list(self._ask("GET", "/v1/contexts")["data"])

    def find(self, name: str) -> dict[str, Any]:
        """The context of that name or id."""
        found = [each for each in self.all() if name in (each["id"], each["name"])]
        if not found:
            raise InvalidRequest(
                f"there is no context {name!r} on {self._server}; `kvcomm context ls --server` shows them"
            )
        if len(found) > 1:
            ids = ", ".join(each["id"] for each in found)
            raise InvalidRequest(f"{len(found)} contexts on {self._server} are called {name!r}; give one's id: {ids}")
        return found[0]

    def create(self, name: str, texts: Sequence[str], parent: str | None) -> dict[str, Any]:
        """A context of texts, each tokenized on its own, behind a parent if there is one."""
        if parent is not None:
            return self.extend(self.fork(parent, name)["id"], texts)
        first, *others = texts
        made = self._ask("POST", "/v1/contexts", {"name": name, "text": first})
        return self.extend(made["id"], others) if others else dict(made)

    def fork(self, name: str, new: str) -> dict[str, Any]:
        """A second context with the same past."""
        return dict(self._ask("POST", f"/v1/contexts/{self.find(name)['id']}/fork", {"name": new}))

    def extend(self, name: str, texts: Sequence[str], save_as: str | None = None) -> dict[str, Any]:
        """Texts behind a context, or behind a fork of it."""
        context = self.find(name) if save_as is None else self.fork(name, save_as)
        for text in texts:
            context = self._ask("POST", f"/v1/contexts/{context['id']}/extend", {"text": text})
        return context

    def generate(
        self, name: str, sampling: Mapping[str, Any], stop: Sequence[str] | None, save_as: str | None
    ) -> dict[str, Any]:
        """The server's answer behind a context; with `save_as` a fork of it keeps the answer."""
        context = self.find(name) if save_as is None else self.fork(name, save_as)
        body = {
            "model": self._ask("GET", "/v1/models")["data"][0]["id"],
            "prompt": "",
            "context_id": context["id"],
            "store": save_as is not None,
            "stop": list(stop) if stop else None,
            **{_OPENAI_NAMES.get(setting, setting): value for setting, value in sampling.items()},
        }
        return dict(self._ask("POST", "/v1/completions", body))

    def relatives(self, name: str | None) -> list[dict[str, Any]]:
        """All contexts, or one with what it came from and what came from it; parents before children."""
        if name is None:
            return self.all()
        branch = self._ask("GET", f"/v1/contexts/{self.find(name)['id']}")
        wanted = {branch["id"], *branch["ancestors"], *(each["id"] for each in branch["descendants"])}
        return [each for each in self.all() if each["id"] in wanted]

    def remove(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Delete contexts; what came from them stays. Returns their names and the bytes each held by itself."""
        found = [self.find(name) for name in names]  # all names are known before the first is removed
        for context in found:
            self._ask("DELETE", f"/v1/contexts/{context['id']}")
        return [(name, context["bytes"]) for name, context in zip(names, found, strict=True)]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return ask_json(method, self._server + path, body, key=self._key, timeout_s=PREFILL_TIMEOUT_S)


def texts_of(text: str | None, file: Path | None, segments: Sequence[str] | None) -> list[str]:
    """What a command puts into a context on a server: a file's text, then the text itself.

    Raises:
        InvalidRequest: stored segments, which a server does not see; nothing at all; a file that cannot be read.
    """
    if segments:
        raise InvalidRequest("--segment names a segment of this machine's folder; with --server give --text or --file")
    given = [*([read_text(file)] if file is not None else []), *([text] if text is not None else [])]
    if not given:
        raise InvalidRequest("nothing to compute: give --text or --file")
    return given


def emit_context(verb: str, value: dict[str, Any], *, as_json: bool) -> None:
    """Print one context."""
    name = printable(value["name"] or value["id"])
    line = (
        f"{verb} {name}: {counted(value['tokens'], 'token')}, {format_bytes(value['bytes'])} of its own, {value['id']}"
    )
    emit(value, Text(line), as_json=as_json)


def emit_answer(value: dict[str, Any], *, as_json: bool) -> None:
    """Print an answer."""
    choice, usage = value["choices"][0], value["usage"]
    line = f"{counted(usage['completion_tokens'], 'token')} behind {usage['prompt_tokens']}, {choice['finish_reason']}"
    emit(value, Text(choice["text"]), Text(line, style="dim"), as_json=as_json)


def emit_contexts(values: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print contexts as a table."""
    columns = ["name", "id", "tokens", "size", "fidelity", "state", "expires in"]
    rows = [
        [
            printable(each["name"] or ""),
            each["id"],
            each["tokens"],
            format_bytes(each["bytes"]),
            each["fidelity"],
            _state(each),
            None if each["expires_in_s"] is None else f"{each['expires_in_s']:.0f} s",
        ]
        for each in values
    ]
    view = table(columns, rows, numeric={"tokens", "size"}) if rows else Text("no contexts there")
    emit({"contexts": list(values)}, view, as_json=as_json)


def emit_tree(values: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print contexts as a forest; parents come before children in `values`."""
    root = Tree(Text("contexts", style="dim"))
    places = {None: root}
    for each in values:
        label = f"{printable(each['name'] or each['id'])}  +{counted(each['own_tokens'], 'token')}, "
        label += f"{format_bytes(each['bytes'])} {_state(each)}"
        places[each["id"]] = places.get(each["parent"], root).add(Text(label.rstrip()))
    emit({"contexts": list(values)}, root if values else Text("no contexts there"), as_json=as_json)


def _state(value: dict[str, Any]) -> str:
    return "busy" if value["busy"] else "pinned" if value["pinned"] else ""
