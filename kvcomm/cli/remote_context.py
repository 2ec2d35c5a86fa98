"""`kvcomm context --server URL`: the same verbs on the contexts of a running server.

A context is called by its name or its id there; names need not be unique on a server, so an ambiguous one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from kvcomm.cli.context_place import Given, Show, Told
from kvcomm.cli.options import read_text
from kvcomm.cli.output import format_bytes, table
from kvcomm.cli.remote import ask_json
from kvcomm.cli.text import counted, printable
from kvcomm.errors import InvalidRequest

PREFILL_TIMEOUT_S = 600.0
NOTHING = "no contexts there"
_OPENAI_NAMES = {"max_new_tokens": "max_tokens"}
"""Settings of sampling that are called otherwise over HTTP."""


class RemoteContexts:
    """A `ContextPlace` of one tenant of a server. Methods raise InvalidRequest and ServerError."""

    def __init__(self, server: str, key: str | None) -> None:
        self._server = server.rstrip("/")
        self._key = key

    def find(self, name: str) -> dict[str, Any]:
        """The context of that name or id."""
        found = [each for each in self._all() if name in (each["id"], each["name"])]
        if not found:
            raise InvalidRequest(
                f"there is no context {name!r} on {self._server}; `kvcomm context ls --server` shows them"
            )
        if len(found) > 1:
            ids = ", ".join(each["id"] for each in found)
            raise InvalidRequest(f"{len(found)} contexts on {self._server} are called {name!r}; give one's id: {ids}")
        return found[0]

    def create(self, name: str, given: Given, parent: str | None) -> Told:
        """See `ContextPlace`; each text is tokenized on its own."""
        texts = _texts_of(given)
        if parent is not None:
            made = self._extended(self._forked(parent, name), texts)
        else:
            first, *others = texts
            made = self._extended(self._ask("POST", "/v1/contexts", {"name": name, "text": first}), others)
        return _told_one("created", made)

    def fork(self, name: str, new: str) -> Told:
        """See `ContextPlace`."""
        return _told_one("forked", self._forked(name, new))

    def extend(self, name: str, given: Given, save_as: str | None) -> Told:
        """See `ContextPlace`."""
        texts = _texts_of(given)
        context = self.find(name) if save_as is None else self._forked(name, save_as)
        return _told_one("extended", self._extended(context, texts))

    def generate(
        self, name: str, sampling: Mapping[str, Any], stop: Sequence[str], save_as: str | None, show: Show
    ) -> Told:
        """See `ContextPlace`; the answer comes at its end."""
        context = self.find(name) if save_as is None else self._forked(name, save_as)
        body = {
            "model": self._ask("GET", "/v1/models")["data"][0]["id"],
            "prompt": "",
            "context_id": context["id"],
            "store": save_as is not None,
            "stop": list(stop) or None,
            **{_OPENAI_NAMES.get(setting, setting): value for setting, value in sampling.items()},
        }
        value = dict(self._ask("POST", "/v1/completions", body))
        choice, usage = value["choices"][0], value["usage"]
        num_tokens = counted(usage["completion_tokens"], "token")
        line = f"{num_tokens} behind {usage['prompt_tokens']}, {choice['finish_reason']}"
        return Told(value, (Text(choice["text"]), Text(line, style="dim")))

    def all(self) -> Told:
        """See `ContextPlace`."""
        values = self._all()
        return Told({"contexts": values}, (_table(values) if values else Text(NOTHING),))

    def relatives(self, name: str | None) -> Told:
        """See `ContextPlace`."""
        values = self._all()
        if name is not None:
            branch = self._ask("GET", f"/v1/contexts/{self.find(name)['id']}")
            wanted = {branch["id"], *branch["ancestors"], *(each["id"] for each in branch["descendants"])}
            values = [each for each in values if each["id"] in wanted]
        return Told({"contexts": values}, (_tree(values) if values else Text(NOTHING),))

    def remove(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Delete contexts; what came from them stays. Returns their names and the bytes each held by itself."""
        found = [self.find(name) for name in names]  # all names are known before the first is removed
        for context in found:
            self._ask("DELETE", f"/v1/contexts/{context['id']}")
        return [(name, context["bytes"]) for name, context in zip(names, found, strict=True)]

    def _all(self) -> list[dict[str, Any]]:
        """Every context, parents before children."""
        return list(self._ask("GET", "/v1/contexts")["data"])

    def _forked(self, name: str, new: str) -> dict[str, Any]:
        return dict(self._ask("POST", f"/v1/contexts/{self.find(name)['id']}/fork", {"name": new}))

    def _extended(self, context: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        for text in texts:
            context = self._ask("POST", f"/v1/contexts/{context['id']}/extend", {"text": text})
        return dict(context)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return ask_json(method, self._server + path, body, key=self._key, timeout_s=PREFILL_TIMEOUT_S)


def _texts_of(given: Given) -> list[str]:
    """A file's text, then the text itself.

    Raises:
        InvalidRequest: stored segments, which a server does not see; nothing at all; a file that cannot be read.
    """
    if given.segments:
        raise InvalidRequest("--segment names a segment of this machine's folder; with --server give --text or --file")
    texts = [
        *([read_text(given.file)] if given.file is not None else []),
        *([given.text] if given.text is not None else []),
    ]
    if not texts:
        raise InvalidRequest("nothing to compute: give --text or --file")
    return texts


def _told_one(verb: str, value: dict[str, Any]) -> Told:
    name, num_tokens = printable(value["name"] or value["id"]), counted(value["tokens"], "token")
    return Told(
        value, (Text(f"{verb} {name}: {num_tokens}, {format_bytes(value['bytes'])} of its own, {value['id']}"),)
    )


def _table(values: Sequence[dict[str, Any]]) -> Table:
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
    return table(columns, rows, numeric={"tokens", "size"})


def _tree(values: Sequence[dict[str, Any]]) -> Tree:
    """A forest; parents come before children in `values`."""
    root = Tree(Text("contexts", style="dim"))
    places = {None: root}
    for each in values:
        label = f"{printable(each['name'] or each['id'])}  +{counted(each['own_tokens'], 'token')}, "
        label += f"{format_bytes(each['bytes'])} {_state(each)}"
        places[each["id"]] = places.get(each["parent"], root).add(Text(label.rstrip()))
    return root


def _state(value: dict[str, Any]) -> str:
    return "busy" if value["busy"] else "pinned" if value["pinned"] else ""
