"""The tree of stored contexts: what their paths have in common, step by step.

One tree per namespace. A node is a step of a path, or the part of one that several contexts share; children of a
node begin with different tokens. Works on headers alone: no model, no KV.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text
from rich.tree import Tree

from kvcomm.cli.output import format_bytes
from kvcomm.cli.store import ContextEntry
from kvcomm.cli.text import age_of, counted, printable
from kvcomm.memory.snapshots import SnapshotHeader

UNNAMED = "text"
"""Shown for a step without a name."""

TokenIds = tuple[int, ...]


@dataclass
class StepNode:
    """A step, or part of a step.

    Attributes:
        name: of the step; None if it has none.
        token_ids: of this part.
        continues: the step began in the parent, which other contexts share.
        contexts: those that end here.
    """

    name: str | None
    token_ids: TokenIds
    continues: bool = False
    contexts: list[ContextEntry] = field(default_factory=list)
    children: list[StepNode] = field(default_factory=list)


def steps_of(header: SnapshotHeader) -> list[StepNode]:
    """The steps of a context's path, empty ones left out."""
    steps, start = [], 0
    for record in header.path:
        end = start + record.num_tokens
        if end > start:
            steps.append(StepNode(record.name, header.token_ids[start:end]))
        start = end
    return steps


def build_trees(entries: Iterable[ContextEntry]) -> dict[str, StepNode]:
    """One root per namespace; refused entries are left out."""
    roots: dict[str, StepNode] = {}
    for entry in entries:
        if entry.header is not None:
            root = roots.setdefault(entry.header.namespace, StepNode(None, ()))
            _insert(root, steps_of(entry.header), entry)
    return roots


def relatives(entries: Iterable[ContextEntry], header: SnapshotHeader) -> Iterator[ContextEntry]:
    """The contexts that a context continues, itself, and those that continue it."""
    for entry in entries:
        other = entry.header
        if other is None or other.namespace != header.namespace:
            continue
        num_shared = min(len(other.token_ids), len(header.token_ids))
        if other.token_ids[:num_shared] == header.token_ids[:num_shared]:
            yield entry


def tree_values(root: StepNode) -> list[dict[str, Any]]:
    """The children of a node as JSON values."""
    return [
        {
            "name": node.name,
            "num_tokens": len(node.token_ids),
            "continues": node.continues,
            "contexts": [entry.name for entry in node.contexts],
            "children": tree_values(node),
        }
        for node in root.children
    ]


def render_tree(root: StepNode) -> Tree:
    """A namespace's tree for people."""
    header = _first(root)
    view = Tree(Text(f"{header.architecture}, {short_dtype(header)}, {header.namespace[:12]}", style="dim"))
    _render(root, view)
    return view


def short_dtype(header: SnapshotHeader) -> str:
    """The dtype without torch's prefix."""
    return printable(header.dtype.removeprefix("torch."))


def _insert(node: StepNode, steps: list[StepNode], entry: ContextEntry) -> None:
    while steps:
        step, *steps = steps
        child = next((child for child in node.children if child.token_ids[0] == step.token_ids[0]), None)
        if child is None:
            node.children.append(step)
            node = step
            continue
        num_common = _num_common(child.token_ids, step.token_ids)
        if num_common < len(child.token_ids):
            _split(child, num_common)
        if num_common < len(step.token_ids):
            steps = [StepNode(step.name, step.token_ids[num_common:], continues=True), *steps]
        node = child
    node.contexts.append(entry)


def _split(node: StepNode, num_tokens: int) -> None:
    """Leave the first tokens in `node` and move the rest, with all that ends or hangs there, to a child."""
    rest = StepNode(node.name, node.token_ids[num_tokens:], True, node.contexts, node.children)
    node.token_ids, node.contexts, node.children = node.token_ids[:num_tokens], [], [rest]


def _num_common(first: TokenIds, second: TokenIds) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _first(root: StepNode) -> SnapshotHeader:
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if node.contexts and node.contexts[0].header is not None:
            return node.contexts[0].header
        nodes += node.children
    raise AssertionError("a tree without a context")


def _render(node: StepNode, view: Tree) -> None:
    for entry in node.contexts:
        view.add(_context_line(entry))
    for child in node.children:
        name = printable(child.name or UNNAMED)
        label = Text(f"{'… ' if child.continues else ''}{name} ")
        label.append(counted(len(child.token_ids), "token"), style="cyan")
        _render(child, view.add(label))


def _context_line(entry: ContextEntry) -> Text:
    assert entry.header is not None
    age = age_of(entry.header.created)
    facts = [
        counted(len(entry.header.token_ids), "token") + " in all",
        entry.header.fidelity,
        format_bytes(entry.num_bytes),
    ]
    return Text.assemble((f"● {entry.name}", "bold"), "  " + ", ".join([*facts, *([f"{age} old"] if age else [])]))
