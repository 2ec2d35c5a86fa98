"""What one engine has learned about moving text another one takes over from their tier, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvcomm.engine.engine import Engine
from kvcomm.errors import AnchorFileError
from kvcomm.tiers.tier import Tier
from tests.engine.tier_store import FaultyStore
from tests.limits import PATIENCE_S
from tests.reuse.reading import LOOSE, ROLE_A, SMALL_BANKS, ask, earn
from tests.tiny import TinyModel


@contextmanager
def over(tiny: TinyModel, store: FaultyStore) -> Iterator[Engine]:
    tier = Tier(store)
    with Engine(tiny.model, tiny.tokenizer, config=SMALL_BANKS, tier=tier) as engine:
        yield engine
    tier.queue.flush(PATIENCE_S)
    engine.check_integrity()


def num_pairs(engine: Engine) -> int:
    return sum(len(standing.pairs) for standing in engine.reuse.readers())


def test_what_was_learned_is_taken_over(shared_model: TinyModel) -> None:
    """By itself: written at the end, read with the first request that may move text."""
    store = FaultyStore()
    with over(shared_model, store) as first:
        assert not first.reuse.share()
        earn(first, LOOSE, rounds=3)
        known, banks = num_pairs(first), len(list(first.reuse.parts.anchors.banks(first.namespace())))
        assert known
        assert banks
    with over(shared_model, store) as second:
        assert not num_pairs(second)
        ask(second, ROLE_A, 50, LOOSE)
        assert second.tiering.flush(PATIENCE_S)
        assert num_pairs(second) >= known
        assert len(list(second.reuse.parts.anchors.banks(second.namespace()))) == banks
    with over(shared_model, store) as third:
        profile = third.reuse.take()
        assert profile is not None
        assert profile.num_pairs == num_pairs(third)
        assert profile.num_missing == 0
        assert third.reuse.take(tenant="ann") is None


def test_what_is_altered_is_not_taken_over(shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FaultyStore()
    with over(shared_model, store) as first:
        earn(first, LOOSE, rounds=2)
        assert first.reuse.share()
    with over(shared_model, store) as second:
        assert second.tiering.tier is not None
        monkeypatch.setattr(second.tiering.tier, "get_blob", lambda *_, **__: b"no archive")
        with pytest.raises(AnchorFileError):
            second.reuse.take()
        ask(second, ROLE_A, 50, LOOSE)
        assert second.tiering.flush(PATIENCE_S)
        assert not num_pairs(second)
