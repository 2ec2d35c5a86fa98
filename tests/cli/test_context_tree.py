"""The tree of contexts against the paths it was built from."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvcomm.cli.context_tree import StepNode, build_trees, relatives, render_tree, tree_values
from kvcomm.cli.store import ContextEntry
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.snapshots import SegmentRecord, SnapshotHeader

Steps = list[tuple[str | None, tuple[int, ...]]]


def entry(name: str, steps: Steps, *, namespace: str = "n") -> ContextEntry:
    token_ids = tuple(token for _, ids in steps for token in ids)
    header = SnapshotHeader(
        namespace=namespace,
        architecture="Tiny",
        dtype="torch.float32",
        name=None,
        token_ids=token_ids,
        num_computed=len(token_ids),
        path=tuple(SegmentRecord(num_tokens=len(ids), name=step) for step, ids in steps),
        fidelity=Fidelity.EXACT,
        created="2026-01-02T03:04:05+00:00",
        payload_blake3="",
    )
    return ContextEntry(name, Path(f"{name}.safetensors"), 1234, 1, header, None)


def paths(node: StepNode, before: tuple[int, ...] = ()) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every context with the tokens on the way to it."""
    for found in node.contexts:
        yield found.name, before
    assert len({child.token_ids[0] for child in node.children}) == len(node.children)
    for child in node.children:
        yield from paths(child, before + child.token_ids)


steps_strategy = st.lists(
    st.tuples(st.sampled_from([None, "doc"]), st.lists(st.integers(0, 2), max_size=4).map(tuple)), max_size=4
)


@given(st.lists(steps_strategy, min_size=1, max_size=8))
def test_every_context_hangs_at_its_own_tokens(all_steps: list[Steps]) -> None:
    entries = [entry(str(at), steps) for at, steps in enumerate(all_steps)]
    (root,) = build_trees(entries).values()
    expected = {found.name: found.header.token_ids for found in entries if found.header}
    assert dict(paths(root)) == expected
    assert len(list(paths(root))) == len(entries)


@given(st.lists(steps_strategy, min_size=1, max_size=8))
def test_steps_keep_their_ends(all_steps: list[Steps]) -> None:
    """No node spans the end of a step of any context that passes it, so token counts per step stay visible."""
    (root,) = build_trees([entry(str(at), steps) for at, steps in enumerate(all_steps[:1])]).values()
    lengths = [len(ids) for _, ids in all_steps[0] if ids]
    node, found = root, []
    while node.children:
        (node,) = node.children
        found.append(len(node.token_ids))
    assert found == lengths


def test_shared_part_of_a_step_stands_once() -> None:
    fox = entry("fox", [("tools", (1, 2)), (None, (3, 4, 5))])
    dog = entry("dog", [("tools", (1, 2)), (None, (3, 4, 6, 7))])
    part = entry("part", [(None, (1,))])
    (root,) = build_trees([fox, dog, part]).values()
    assert tree_values(root) == [
        {
            "name": "tools",
            "num_tokens": 1,
            "continues": False,
            "contexts": ["part"],
            "children": [
                {
                    "name": "tools",
                    "num_tokens": 1,
                    "continues": True,
                    "contexts": [],
                    "children": [
                        {
                            "name": None,
                            "num_tokens": 2,
                            "continues": False,
                            "contexts": [],
                            "children": [
                                {"name": None, "num_tokens": 1, "continues": True, "contexts": ["fox"], "children": []},
                                {"name": None, "num_tokens": 2, "continues": True, "contexts": ["dog"], "children": []},
                            ],
                        }
                    ],
                }
            ],
        }
    ]


def test_namespaces_stay_apart_and_refused_files_out() -> None:
    refused = ContextEntry("bad", Path("bad"), 1, 1, None, "is foreign")
    trees = build_trees([entry("a", [(None, (1,))]), entry("b", [(None, (1,))], namespace="m"), refused])
    assert {key: dict(paths(root)) for key, root in trees.items()} == {"n": {"a": (1,)}, "m": {"b": (1,)}}


def test_relatives_are_what_a_context_continues_and_what_continues_it() -> None:
    chain = [entry(str(end), [(None, tuple(range(end)))]) for end in (1, 3, 5)]
    others = [entry("x", [(None, (0, 9))]), entry("y", [(None, (0,))], namespace="m")]
    header = chain[1].header
    assert header is not None
    assert [found.name for found in relatives([*others, *chain], header)] == ["1", "3", "5"]


def test_for_people() -> None:
    steps: Steps = [("to\x1b[31mols", (1, 2)), (None, (3,))]
    (root,) = build_trees([entry("left", steps), entry("base", steps[:1])]).values()
    console = Console(file=io.StringIO(), width=100)
    console.print(render_tree(root))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[0] == "Tiny, float32, n"
    assert lines[1] == "└── to\ufffd[31mols 2 tokens"
    assert lines[2].startswith("    ├── ● base  2 tokens in all, exact, 1.2 kB, ")
    assert lines[3] == "    └── text 1 token"
    assert lines[4].startswith("        └── ● left  3 tokens in all, exact, 1.2 kB, ")


def test_number_of_tokens_in_all_is_the_sum_on_the_way() -> None:
    ends = list(accumulate((2, 3, 4)))
    steps: Steps = [(None, tuple(range(start, end))) for start, end in pairwise([0, *ends])]
    (root,) = build_trees([entry("a", steps)]).values()
    assert len(dict(paths(root))["a"]) == sum((2, 3, 4))
