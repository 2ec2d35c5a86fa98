"""A registry of contexts against a naive model: who is there, what it holds, for how long; no page is lost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcomm.engine.context import PREFILL_ONLY
from kvcomm.engine.engine import Engine
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.contexts.conversation import Continued
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.contexts.turns import TenantContext, Turn
from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.contexts import Terms
from kvcomm.server.settings import Limits, ServerSettings
from kvcomm.server.tenants import Tenant
from tests.server.conftest import MODEL, SMALL, require_nothing_left
from tests.tiny import tiny_model

TTL_S = 60.0
TINY = tiny_model()
tokens = st.lists(st.integers(3, 200), min_size=1, max_size=9).map(tuple)
pick = st.integers(-3, 3)  # the newest ones and the oldest


@dataclass
class Known:
    """What the model knows of a context."""

    tokens: tuple[int, ...]
    parent: str | None
    used_s: float
    ttl_s: float = TTL_S
    is_pinned: bool = False
    turn: Turn | None = field(default=None, compare=False)
    new: tuple[int, ...] = ()


class RegistryMachine(RuleBasedStateMachine):
    """Any order of making, forking, extending, giving up, changing, waiting and deleting."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(TINY.model, TINY.tokenizer, config=SMALL)
        self.now_s = 0.0
        self.tenant = Tenant("ann", Limits())
        server = ServerSettings(model=MODEL, context_ttl_s=TTL_S)
        self.registry = ContextRegistry(self.engine, server, self.tenant, lambda: self.now_s)
        self.known: dict[str, Known] = {}

    def chosen(self, index: int) -> tuple[TenantContext, Known]:
        """One of the living contexts."""
        context_id = list(self.known)[index % len(self.known)]
        node = self.registry.find(context_id)
        self.known[context_id].used_s = self.now_s
        return node, self.known[context_id]

    @rule(ids=tokens)
    def make(self, ids: tuple[int, ...]) -> None:
        node = self.registry.adopt(self.engine.context(ids), Terms())
        self.known[node.id] = Known(ids, None, self.now_s)

    @precondition(lambda self: self.known)
    @rule(index=pick)
    def fork(self, index: int) -> None:
        node, known = self.chosen(index)
        child = self.registry.fork(node, Terms())
        whole = known.tokens + (known.new if known.turn is not None else ())
        self.known[child.id] = Known(whole, node.id, self.now_s, known.ttl_s)

    @precondition(lambda self: self.known)
    @rule(index=pick, ids=tokens, keeps=st.booleans())
    def begin(self, index: int, ids: tuple[int, ...], keeps: bool) -> None:
        node, known = self.chosen(index)
        if known.turn is not None:
            with pytest.raises(ApiError, match="fork the context"):
                self.registry.begin_turn(node, keeps=keeps)
            return
        turn = self.registry.begin_turn(node, keeps=keeps)
        turn.put(Continued((Segment(ids),), None))
        turn.start(PREFILL_ONLY, ReusePolicy.exact()).result()
        assert turn.work.tokens == known.tokens + ids
        if keeps:
            known.turn, known.new = turn, ids
        else:
            turn.keep()  # has no effect
            turn.end()

    @precondition(lambda self: any(known.turn for known in self.known.values()))
    @rule(index=pick, succeeds=st.booleans())
    def end(self, index: int, succeeds: bool) -> None:
        busy = [known for known in self.known.values() if known.turn is not None]
        known = busy[index % len(busy)]
        assert known.turn is not None
        if succeeds:
            known.turn.keep()
            known.tokens += known.new
        known.turn.end()
        known.turn, known.used_s = None, self.now_s

    @precondition(lambda self: self.known)
    @rule(index=pick, descendants=st.booleans())
    def delete(self, index: int, descendants: bool) -> None:
        node, _ = self.chosen(index)
        gone = self.registry.branch(node) if descendants else [node]
        self.registry.remove(gone)
        for each in gone:
            each.release()
        assert {each.id for each in gone} == (self.below(node.id) if descendants else {node.id})
        self.forget({each.id for each in gone})

    @precondition(lambda self: self.known)
    @rule(index=pick, ttl_s=st.sampled_from([10.0, 600.0]), is_pinned=st.booleans())
    def change(self, index: int, ttl_s: float, is_pinned: bool) -> None:
        node, known = self.chosen(index)
        node.ttl_s = known.ttl_s = ttl_s
        node.is_pinned = known.is_pinned = is_pinned

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.registry.sweep()
        self.forget(
            {
                context_id
                for context_id, known in self.known.items()
                if not known.is_pinned and known.turn is None and known.used_s + known.ttl_s <= self.now_s
            }
        )

    def below(self, context_id: str) -> set[str]:
        """A context and all that came from it, the slow way."""
        children = [each for each, known in self.known.items() if known.parent == context_id]
        return {context_id}.union(*map(self.below, children))

    def forget(self, gone: set[str]) -> None:
        """Drop contexts from the model; each child goes to the nearest ancestor that is left."""
        before = {context_id: known.parent for context_id, known in self.known.items()}
        for context_id in gone:
            turn = self.known.pop(context_id).turn
            if turn is not None:
                turn.end()
        for known in self.known.values():
            while known.parent in gone:
                known.parent = before[known.parent]

    @invariant()
    def the_same_contexts_with_the_same_tokens(self) -> None:
        nodes = {node.id: node for node in self.registry.nodes}
        assert list(nodes) == list(self.known)
        seen: set[str] = set()
        for context_id, node in nodes.items():
            known = self.known[context_id]
            parent = None if node.parent is None else node.parent.id
            found = replace(known, tokens=node.context.tokens, parent=parent, ttl_s=node.ttl_s)
            assert found == known
            assert (node.turn is not None) == (known.turn is not None)
            assert parent is None or parent in seen
            assert 0 <= node.num_inherited <= node.context.num_tokens
            seen.add(context_id)

    @invariant()
    def no_page_is_lost_and_each_is_counted_once(self) -> None:
        self.engine.check_integrity()
        nodes = self.registry.nodes
        pages = {page for node in nodes for page in node.context.sequence.pages.tolist()}
        assert sum(self.registry.num_bytes().values()) == len(pages) * self.engine.pool.page_bytes
        assert self.tenant.context_tokens == len(pages) * SMALL.page_size
        assert len(self.engine.contexts) == len(nodes) + sum(node.turn is not None for node in nodes)

    def teardown(self) -> None:
        self.registry.remove(nodes := self.registry.nodes)
        for node in nodes:
            node.release()
        self.forget(set(self.known))
        require_nothing_left(self.engine)
        self.engine.close()


RegistryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_registry = RegistryMachine.TestCase
