"""The exact twin of a sequence: what it shares, when it may take over, and what becomes of the pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from kvcomm.engine.engine import Engine
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import LayerShape, PagePool
from kvcomm.memory.sequences import KVSequence
from kvcomm.reuse.healing import Healing
from kvcomm.reuse.replay import Case
from tests.limits import PATIENCE_S
from tests.reuse.reading import LOOSE, ROLE_A, ROLE_B, ask, earn, prompt
from tests.stored import stored_by

PAGE = 4


@pytest.fixture
def memory() -> Memory:
    """Ten pages of four tokens of one number each."""
    pool = PagePool([LayerShape(1, 1, 1)], num_pages=10, page_size=PAGE)
    return Memory(pool, ttl_s=None, rendition_bytes=10**6)


def approximate(memory: Memory, num_tokens: int, start: int, num_reserved: int = 0) -> KVSequence:
    """A sequence whose KV is approximate from `start` on, with pages reserved for more tokens."""
    sequence = KVSequence(memory.pool, range(num_tokens))
    sequence.make_writable(0, num_tokens + num_reserved)
    sequence.count(num_tokens)
    sequence.mark_approximate(start)
    return sequence


def compute(healing: Healing, num_tokens: int) -> None:
    """As if a pass had been."""
    assert healing.stretch(num_tokens) == (healing.twin.num_computed, num_tokens)
    healing.twin.count(num_tokens)


def test_a_twin_shares_what_is_exact_and_owns_the_rest(memory: Memory) -> None:
    own = approximate(memory, 14, start=9, num_reserved=6)
    assert own.num_pages == 5
    healing = Healing(memory, "n", own)
    healing.begin(16)
    assert healing.twin.num_computed == 9
    assert healing.twin.pages[:2].tolist() == own.pages[:2].tolist()
    assert not set(healing.twin.pages[2:].tolist()) & set(own.pages.tolist())  # the third page was shared in part
    assert memory.pool.num_free == 10 - 5 - 2
    assert not healing.has_caught_up
    compute(healing, 14)
    assert healing.has_caught_up
    reserved = own.pages[4:].tolist()
    healing.put_in_place()
    assert (own.num_computed, own.num_exact, own.approximate_from) == (14, 14, None)
    assert own.pages[4:].tolist() == reserved  # of the longest answer, for which room was promised
    assert healing.twin.num_pages == 0
    memory.check_integrity([own.pages])
    own.release()
    assert memory.pool.num_free == 10


def test_what_the_tree_has_is_not_computed_again(memory: Memory) -> None:
    own = approximate(memory, 12, start=2)
    other = KVSequence(memory.pool, range(8))
    other.make_writable(0, 8)
    memory.tree.insert("n", other.token_ids, other.pages)
    healing = Healing(memory, "n", own)
    healing.begin(12)
    assert healing.twin.num_computed == 8
    healing.release()
    healing.release()
    memory.check_integrity([own.pages, other.pages])


def test_reserved_pages_become_the_twins(memory: Memory) -> None:
    own = approximate(memory, 12, start=5)
    healing = Healing(memory, "n", own)
    healing.reserve(3)
    assert memory.pool.num_free == 10 - 3 - 3
    healing.begin(14)
    assert memory.pool.num_free == 10 - 3 - 3
    healing.release()
    assert memory.pool.num_free == 10 - 3


def test_a_twin_grows_with_its_sequence_and_no_further(memory: Memory) -> None:
    own = approximate(memory, 6, start=0)
    healing = Healing(memory, "n", own)
    healing.begin(6)
    compute(healing, 6)
    own.append([100, 101])
    own.make_writable(6, 8)
    own.count(8)
    assert not healing.has_caught_up
    assert healing.grow(8)
    assert healing.twin.token_ids.tolist() == own.token_ids.tolist()
    compute(healing, 8)
    assert healing.has_caught_up
    healing.release()


@pytest.mark.parametrize("others", [[], [200], [200, 201], [200, 201, 202]])
def test_a_sequence_that_went_on_otherwise_keeps_its_kv(memory: Memory, others: list[int]) -> None:
    """It was rolled back, and other tokens, or none, stand where the twin has some."""
    own = approximate(memory, 8, start=3)
    healing = Healing(memory, "n", own)
    healing.begin(8)
    compute(healing, 8)
    own.truncate(6)
    own.append(others)
    own.make_writable(6, own.num_tokens)
    own.count(own.num_tokens)
    assert not healing.has_caught_up
    assert not healing.grow(own.num_computed)
    healing.release()
    memory.check_integrity([own.pages])


def test_an_audit_judges_what_was_served(learning: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the exact KV that has taken its place by then; and it need not compute what is exact already."""
    earn(learning, LOOSE)
    found: list[tuple[Fidelity, float]] = []
    served = learning.reuse.parts.replayer.served

    def watched(case: Case, exact: Tensor) -> float:
        divergence = served(case, exact)
        found.append((case.sequence.fidelity, divergence))
        return divergence

    monkeypatch.setattr(learning.reuse.parts.replayer, "served", watched)
    for policy in (LOOSE, replace(LOOSE, heal=True, heal_within=2)):
        learning.cache.clear()
        ask(learning, ROLE_A, 99, LOOSE)
        usage = ask(learning, ROLE_B, 99, replace(policy, audit=1.0)).usage
        assert usage.aligned_tokens == 90
        assert learning.wait_idle(PATIENCE_S)
    (unhealed, healed) = found
    assert (unhealed[0], healed[0]) == (Fidelity.APPROXIMATE, Fidelity.APPROXIMATE)
    assert healed[1] > 1e-3
    learning.check_integrity()


def test_a_repaired_context_leaves_exact_text_for_others(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)
    with learning.context(prompt(ROLE_B, 99), policy=LOOSE) as context:
        own = context.sequence.identity

        def fidelities() -> set[Fidelity]:
            return {each.fidelity for each in stored_by(learning) if each.context is own}

        assert fidelities() == {Fidelity.APPROXIMATE}
        assert context.repair().result(PATIENCE_S)
        assert fidelities() == {Fidelity.EXACT}
