"""The contexts of a folder, as snapshots; an engine is loaded for the verbs that compute."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvcomm.cli import context_tree
from kvcomm.cli.context_place import Given, Show, Told
from kvcomm.cli.entries import entries_table, entry_values
from kvcomm.cli.options import load_engine
from kvcomm.cli.output import format_bytes
from kvcomm.cli.sources import ContextSources
from kvcomm.cli.store import ContextEntry, Store, way_out
from kvcomm.cli.text import counted, usage_line, usage_values

if TYPE_CHECKING:
    from kvcomm.engine.context import Context
    from kvcomm.engine.engine import Engine

REMOVAL = "kvcomm context rm NAME"


class LocalContexts:
    """A `ContextPlace` of snapshot files."""

    def __init__(self, folder: Path | None, model: str, *, force: bool) -> None:
        """Make one.

        Args:
            folder: None: the user's own.
            model: that computes.
            force: replace what has a name already.
        """
        self._store = Store(folder)
        self._model = model
        self._force = force

    def create(self, name: str, given: Given, parent: str | None) -> Told:
        """See `ContextPlace`."""
        target = self._store.new_context(name, force=self._force)
        sources = self._sources(given)
        entry = self._store.usable_context(parent) if parent else None
        with load_engine(self._model) as engine:
            began_s = time.monotonic()
            segments = sources.read(engine)
            with _restore(engine, entry) if entry else engine.context(segments) as context:
                if entry:
                    context.extend(segments)
                elapsed_s = time.monotonic() - began_s
                with self._store.taking(name):
                    value = _save(context, name, target, replace=self._force, elapsed_s=elapsed_s)
        return Told(value, (Text(_saved_line("created", value)),))

    def fork(self, name: str, new: str) -> Told:
        """See `ContextPlace`; no bytes are copied where the disk knows hard links."""
        copied_bytes = self._store.fork_context(name, new, force=self._force)
        file = self._store.context(new).file
        value = {"name": new, "forked_from": name, "copied_bytes": copied_bytes, "file": str(file)}
        return Told(value, (f"forked {name} as {new}, {format_bytes(copied_bytes)} copied",))

    def extend(self, name: str, given: Given, save_as: str | None) -> Told:
        """See `ContextPlace`."""
        new, is_replaced = save_as or name, self._force or not save_as
        entry = self._store.usable_context(name)
        target = self._store.new_context(new, force=is_replaced)
        sources = self._sources(given)
        with load_engine(self._model) as engine, _restore(engine, entry) as context:
            began_s = time.monotonic()
            context.extend(sources.read(engine))
            elapsed_s = time.monotonic() - began_s
            with self._store.taking(new):
                value = _save(context, new, target, replace=is_replaced, elapsed_s=elapsed_s)
        return Told(value, (Text(_saved_line("extended", value)),))

    def generate(
        self, name: str, sampling: Mapping[str, Any], stop: Sequence[str], save_as: str | None, show: Show
    ) -> Told:
        """See `ContextPlace`."""
        from kvcomm.engine.sampling import SamplingParams

        entry = self._store.usable_context(name)
        target = self._store.new_context(save_as, force=self._force) if save_as else None
        params = SamplingParams(**sampling, stop=tuple(stop))
        with load_engine(self._model) as engine, _restore(engine, entry) as context:
            handle = context.submit(params)
            for chunk in handle:
                show(chunk.text)
            completion = handle.result()
            with self._store.taking(save_as or ""):
                saved = _save(context, save_as, target, replace=self._force) if save_as and target else None
        value: dict[str, Any] = {"name": name, "text": completion.text, "token_ids": list(completion.token_ids)}
        value |= {"finish_reason": completion.finish_reason, "usage": usage_values(completion.usage), "saved": saved}
        aside = usage_line(completion.usage) + (f"; {_saved_line('kept as', saved)}" if saved else "")
        return Told(value, ("",), aside)

    def all(self) -> Told:
        """See `ContextPlace`."""
        entries = self._store.contexts()
        value = {"folder": str(self._store.folder), "contexts": [entry_values(entry) for entry in entries]}
        return Told(value, (entries_table("name", entries, removal=REMOVAL) if entries else self._nothing(),))

    def relatives(self, name: str | None) -> Told:
        """See `ContextPlace`; all of them also tells which files are refused."""
        entries = self._store.contexts()
        refused = [] if name else [entry for entry in entries if entry.header is None]
        if name:
            header = self._store.usable_context(name).header
            assert header is not None
            entries = list(context_tree.relatives(entries, header))
        roots = context_tree.build_trees(entries)
        value = {
            "folder": str(self._store.folder),
            "trees": [{"namespace": key, "children": context_tree.tree_values(root)} for key, root in roots.items()],
            "refused": [entry_values(entry) for entry in refused],
        }
        views: list[Any] = [context_tree.render_tree(root) for root in roots.values()]
        if refused:
            views.append(entries_table("name", refused, title="Refused", removal=REMOVAL))
        return Told(value, tuple(views or [self._nothing()]))

    def remove(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """See `ContextPlace`; whatever state the files are in."""
        for name in names:
            self._store.context(name)  # all names are known before the first is removed
        return [(name, self._store.remove_context(name)) for name in names]

    def _sources(self, given: Given) -> ContextSources:
        return ContextSources(self._store, given.segments or [], given.file, given.text)

    def _nothing(self) -> Text:
        return Text(f"no contexts in {self._store.folder}")


def _restore(engine: Engine, entry: ContextEntry) -> Context:
    with way_out(entry.name):
        return engine.restore(entry.file)


def _save(context: Context, name: str, file: Path, *, replace: bool, elapsed_s: float | None = None) -> dict[str, Any]:
    context.name = name
    context.save(file, replace=replace)
    return {
        "name": name,
        "file": str(file),
        "num_tokens": context.num_tokens,
        "num_steps": len(context.segments),
        "num_bytes": file.stat().st_size,
        **({} if elapsed_s is None else {"elapsed_s": elapsed_s}),
    }


def _saved_line(verb: str, value: dict[str, Any]) -> str:
    elapsed = f" in {value['elapsed_s']:.2f} s" if "elapsed_s" in value else ""
    return (
        f"{verb} {value['name']}: {counted(value['num_tokens'], 'token')}, {counted(value['num_steps'], 'step')}, "
        f"{format_bytes(value['num_bytes'])}{elapsed}"
    )
