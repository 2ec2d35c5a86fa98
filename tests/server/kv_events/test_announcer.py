"""Announcements: whole blocks only, whatever the tree does; a mirror that reads the bytes equals the tree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from eval.kv_events import Mirror, whole_blocks
from kvcomm.memory.events import EventKind, EventLog
from kvcomm.memory.tree import RadixTree
from kvcomm.server.kv_events.announcer import AllCleared, Announcer, BlocksRemoved, BlocksStored, KVEvent
from kvcomm.server.kv_events.blocks import Owner, as_int, block_hash, root_hash
from kvcomm.server.kv_events.wire import Encoder, Form
from tests.memory.kv_model import MarkedPool, MarkedSequence, Path
from tests.memory.test_tree_machine import NAMESPACES, TreeMachine

NS = "namespace"
PLAIN = {NS: Owner()}


class Bench:
    """A tree with small pages, and an announcer of blocks of three tokens."""

    def __init__(self) -> None:
        self.marked = MarkedPool(64, 4)
        self.tree = RadixTree(self.marked.pool)
        self.announcer = Announcer(block_size=3)
        self.tree.take_events()

    def serve(self, path: Path, namespace: str = NS) -> None:
        sequence = MarkedSequence(self.marked, namespace, path)
        self.tree.insert(namespace, path, sequence.pages)
        sequence.release()

    def said(self, owners: dict[str, Owner] | None = None) -> list[KVEvent]:
        return self.announcer.announce(self.tree.take_events(), PLAIN if owners is None else owners)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def names(path: Path, owner: Owner = Owner()) -> list[int]:  # noqa: B008  # a named tuple never changes
    """The blocks of three tokens of a path."""
    found: list[int] = []
    name = root_hash()
    for index in range(len(path) // 3):
        name = block_hash(name, path[3 * index : 3 * index + 3], owner.keys(index))
        found.append(as_int(name))
    return found


def test_only_whole_blocks_are_announced(bench: Bench) -> None:
    bench.serve((1, 2))
    assert bench.said() == []
    bench.serve((1, 2, 3, 4, 5, 6, 7))
    assert bench.said() == [BlocksStored(names((1, 2, 3, 4, 5, 6)), None, [1, 2, 3, 4, 5, 6], 0, Owner())]
    bench.serve((1, 2, 3, 4, 5, 6, 7, 8, 9))
    last = names((1, 2, 3, 4, 5, 6, 7, 8, 9))
    assert bench.said() == [BlocksStored(last[2:], last[1], [7, 8, 9], 2, Owner())]


def test_a_split_inside_a_block_says_nothing_about_what_stays(bench: Bench) -> None:
    bench.serve((1, 2, 3, 4, 5, 6))
    bench.said()
    bench.serve((1, 2, 3, 4, 9, 9))
    other = names((1, 2, 3, 4, 9, 9))
    assert bench.said() == [BlocksStored(other[1:], other[0], [4, 9, 9], 1, Owner())]
    assert bench.announcer.num_blocks == 3


def test_a_block_goes_with_its_last_token(bench: Bench) -> None:
    path = tuple(range(12))
    bench.serve(path)
    bench.said()
    bench.tree.evict(1)  # tokens 8 to 11, a page: the block of 6 to 8 loses its last one
    assert bench.said() == [BlocksRemoved(names(path)[2:])]
    bench.tree.evict(1)
    assert bench.said() == [BlocksRemoved(names(path)[1:2])]
    bench.tree.reset()
    assert bench.said() == [BlocksRemoved(names(path)[:1])]
    assert bench.announcer.num_blocks == 0


def test_namespaces_without_an_owner_are_nobodys_business(bench: Bench) -> None:
    bench.serve((1, 2, 3))
    bench.serve((1, 2, 3), "other")
    assert len(bench.said()) == 1
    bench.tree.reset("other")
    assert bench.said() == []


def test_beginning_again_says_the_difference_only(bench: Bench) -> None:
    bench.serve((1, 2, 3))
    bench.serve((4, 5, 6))
    bench.said()
    bench.tree.reset()
    bench.serve((4, 5, 6))
    bench.serve((7, 8, 9))
    bench.tree.take_events()  # lost
    said = bench.announcer.begin_again(bench.tree.all_stored(), PLAIN)
    new = BlocksStored(names((7, 8, 9)), None, [7, 8, 9], 0, Owner())
    assert said == [BlocksRemoved(names((1, 2, 3))), new]
    assert bench.announcer.begin_again(bench.tree.all_stored(), PLAIN) == []
    salted = {NS: Owner(salt="team")}
    gone, *stored = bench.announcer.begin_again(bench.tree.all_stored(), salted)
    assert isinstance(gone, BlocksRemoved)
    assert set(gone.block_hashes) == {*names((4, 5, 6)), *names((7, 8, 9))}
    assert {each.block_hashes[0] for each in stored if isinstance(each, BlocksStored)} == {
        *names((4, 5, 6), salted[NS]),
        *names((7, 8, 9), salted[NS]),
    }


class MirrorMachine(TreeMachine):
    """Whatever happens to a tree, and whenever its events are taken, a reader of the bytes knows what is in it."""

    @initialize(
        block_size=st.integers(1, 5),
        form=st.sampled_from(["map", "array"]),
        max_events=st.sampled_from([1, 4, 1000]),
        seed=st.sampled_from(["vllm-none-hash"]),
    )
    def begin(self, block_size: int, form: Form, max_events: int, seed: str) -> None:
        self.block_size = block_size
        self.max_events = max_events
        self.encoder = Encoder(form, block_size=block_size, medium="CPU")
        self.announcer = Announcer(block_size, seed)
        self.mirror = Mirror()
        self.owners: dict[str, Owner] = {"left": Owner(), "right": Owner(salt="team", adapter="tone")}
        self.is_new = True

    @rule(owners=st.sets(st.sampled_from(NAMESPACES)))
    def change_owners(self, owners: set[str]) -> None:
        self.owners = {name: Owner(salt=name if name == "left" else "") for name in owners}
        self.is_new = True

    @rule()
    def listen(self) -> None:
        events = self.tree.take_events()
        if self.is_new or any(event.kind is EventKind.LOST for event in events):
            said = self.announcer.begin_again(self.tree.all_stored(), self.owners)
        else:
            said = self.announcer.announce(events, self.owners)
        self.is_new = False
        self.mirror.read(self.encoder.batch(said, 0.0))
        assert self.mirror.names == whole_blocks(self.tree.walk, self.owners, self.block_size)
        assert self.announcer.num_blocks == len(self.mirror.names)

    @invariant()
    def the_log_is_short(self) -> None:
        """The machine's tree is made by the machine; here its log forgets sooner."""
        if hasattr(self, "tree") and hasattr(self, "max_events"):
            self.tree._log._max_events = self.max_events

    def teardown(self) -> None:
        if hasattr(self, "mirror") and hasattr(self, "tree"):
            self.listen()
        super().teardown()


TestMirrorMachine = MirrorMachine.TestCase
TestMirrorMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_a_reader_forgets_what_is_cleared() -> None:
    mirror = Mirror()
    mirror.names = {1, 2}
    mirror.read(Encoder("array", block_size=3, medium="CPU").batch([AllCleared()], 0.0))
    assert mirror.names == set()


def test_a_log_without_a_reader_keeps_nothing() -> None:
    """Whoever serves without KV events pays nothing for them."""
    bench: Any = Bench()
    bench.tree._log = EventLog()
    bench.serve((1, 2, 3))
    assert not bench.tree.has_events
