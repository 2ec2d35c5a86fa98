"""Files are read and written without the engine's lock: what happens in between neither spoils nor leaks anything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvcomm.align import bank_file
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import EngineClosed, PoolExhausted, QuotaExceeded, SnapshotExists
from kvcomm.memory import snapshots
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import SMALL, greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.tiny import TinyModel

LEARNING = ReusePolicy(max_divergence=50.0, confidence=0.5, audit=0.0)


@contextmanager
def stalled(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, work: Callable[[], Any]
) -> Iterator[tuple[threading.Event, list[Any]]]:
    """`work` in a thread, held up where it calls a function, until the event is set; then what came of it."""
    reached, go_on, found = threading.Event(), threading.Event(), list[Any]()
    original = getattr(module, name)

    def held_up(*arguments: Any) -> Any:
        reached.set()
        assert go_on.wait(PATIENCE_S)
        return original(*arguments)

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, held_up)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert reached.wait(PATIENCE_S)
            yield go_on, found
        finally:
            go_on.set()
            thread.join(PATIENCE_S)


@pytest.fixture
def file(engine: Engine, tmp_path: Path) -> Path:
    with engine.context(some_tokens(50)) as context:
        return context.save(tmp_path / "a.safetensors")


def require_free_lock(engine: Engine) -> None:
    """From a thread that does not hold it: this one, which holds nothing."""
    assert engine.lock.acquire(timeout=PATIENCE_S), "somebody holds the engine's lock"
    engine.lock.release()


def test_a_snapshot_is_read_without_the_lock(engine: Engine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stalled(monkeypatch, snapshots, "payload_digest", lambda: engine.restore(file)) as (go_on, found):
        require_free_lock(engine)
        assert list(engine.generate(some_tokens(9), max_new_tokens=3, ignore_eos=True).token_ids) == greedy(
            engine.model, some_tokens(9), 3
        )
        engine.check_integrity()
        go_on.set()
    (restored,) = found
    assert list(restored.generate(max_new_tokens=4, ignore_eos=True).token_ids) == greedy(
        engine.model, some_tokens(50), 4
    )


def test_a_snapshot_is_written_without_the_lock_and_holds_what_was(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context goes on meanwhile, in the very page that is being read; the file holds the state of its beginning."""
    context = engine.context(some_tokens(50))
    file = tmp_path / "b.safetensors"
    with stalled(monkeypatch, snapshots, "payload_digest", lambda: context.save(file)) as (go_on, found):
        require_free_lock(engine)
        answer = context.generate(max_new_tokens=7, ignore_eos=True)
        engine.check_integrity()
        context.release()
        engine.cache.clear()
        engine.context(some_tokens(300, 5)).release()  # others use the pages that come free
        go_on.set()
    assert found == [file]
    restored = engine.restore(file)
    assert restored.tokens == tuple(some_tokens(50))
    assert list(restored.generate(max_new_tokens=7, ignore_eos=True).token_ids) == list(answer.token_ids)
    engine.check_integrity()


def test_an_engine_that_is_closed_meanwhile(
    shared_model: TinyModel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(shared_model.model, shared_model.tokenizer, config=SMALL)
    with stalled(monkeypatch, snapshots, "payload_digest", lambda: engine.restore(file)) as (go_on, found):
        engine.close()
        go_on.set()
    assert isinstance(found[0], EngineClosed)
    with pytest.raises(EngineClosed):
        engine.restore(file)
    assert engine.contexts == ()
    assert engine.cache.stats().num_free == engine.pool.num_pages


def test_pages_that_run_out_meanwhile(engine: Engine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.cache.clear()
    with stalled(monkeypatch, snapshots, "payload_digest", lambda: engine.restore(file)) as (go_on, found):
        held = [engine.context(some_tokens(490, seed)) for seed in (1, 2)]
        go_on.set()
    assert isinstance(found[0], PoolExhausted)
    engine.check_integrity()
    for context in held:
        context.release()
    engine.restore(file).release()


def test_a_quota_that_is_used_up_meanwhile(engine: Engine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.cache.set_quota(held_tokens=60)
    with stalled(monkeypatch, snapshots, "payload_digest", lambda: engine.restore(file)) as (go_on, found):
        context = engine.context(some_tokens(20, 3))
        go_on.set()
    context.release()
    assert isinstance(found[0], QuotaExceeded)
    engine.restore(file).release()
    engine.cache.set_quota()


def test_what_fails_while_pages_are_filled_gives_them_back(
    engine: Engine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.cache.stats().num_free
    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "slots", _fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.restore(file)
    assert engine.cache.stats().num_free == before
    engine.check_integrity()


def _fail(*_: object) -> None:
    raise RuntimeError("out of memory")


def test_pages_that_are_being_filled_are_accounted_for(
    engine: Engine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stalled(monkeypatch, PagePool, "slots", lambda: engine.restore(file)) as (go_on, found):
        require_free_lock(engine)
        engine.check_integrity()
        assert engine.contexts == ()
        assert engine.cache.stats().num_in_contexts == 13
        go_on.set()
    found[0].release()


def test_one_of_many_threads_saves_a_new_name(engine: Engine, tmp_path: Path) -> None:
    """Every save would have gone over the one before."""
    barrier = threading.Barrier(24)

    def save(_: int) -> bool:
        barrier.wait(PATIENCE_S)
        try:
            context.save(tmp_path / "a", replace=False)
        except SnapshotExists:
            return False
        return True

    with engine.context(some_tokens(20)) as context, ThreadPoolExecutor(24) as threads:
        assert list(threads.map(save, range(24))).count(True) == 1
        context.save(tmp_path / "a")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def taught(engine: Engine) -> Engine:
    """An engine whose bank knows how one question moves from one role to another."""
    for role in (21, 34):
        prompt = [Segment(tuple(some_tokens(role, role))), Segment(tuple(some_tokens(60)), "q"), Segment((11, 12))]
        engine.generate(prompt, SamplingParams(max_new_tokens=4), policy=LEARNING)
    assert engine.wait_idle(PATIENCE_S)
    return engine


def test_anchors_are_written_and_read_without_the_lock(
    taught: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "anchors"
    for work in (lambda: taught.reuse.save(folder), lambda: taught.reuse.load(folder)):
        with stalled(monkeypatch, bank_file, "tensors_digest", work) as (go_on, found):
            require_free_lock(taught)
            taught.generate(some_tokens(9), max_new_tokens=1)
            go_on.set()
        assert found[0].num_tokens > 0, found
        assert found[0].num_missing == 0


def test_many_save_anchors_into_one_folder(taught: Engine, tmp_path: Path) -> None:
    """What is there then is what one of them had: pairs whose banks are another's would be left out."""
    folder = tmp_path / "anchors"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: taught.reuse.save(folder), range(8)))
        profiles = list(threads.map(lambda _: taught.reuse.load(folder), range(4)))
    assert {profile.num_missing for profile in profiles} == {0}
    assert all(profile.num_tokens for profile in profiles)
