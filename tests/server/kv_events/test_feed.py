"""What is published about an engine at work: exact prefixes of the tenants that may be announced, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from eval.kv_events import Case, Mirror, second_names, whole_blocks
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest, WeightsChanged
from kvcomm.server.kv_events.blocks import Owner
from kvcomm.server.kv_events.feed import KVEventFeed, make_feed, open_publisher, owners_of
from kvcomm.server.kv_events.publisher import END
from kvcomm.server.kv_events.settings import KVEventSettings, parse_tenants
from kvcomm.server.tenants import namespace
from tests.limits import wait_for
from tests.lora import save_lora
from tests.reuse.conftest import learning, shared_model
from tests.reuse.reading import LOOSE, ROLE_A, ROLE_B, ask, earn, prompt, tokens_of
from tests.tiny import tiny_model

__all__ = ["learning", "shared_model"]

TEXT = "the quick brown fox jumps over the lazy dog and the lazy dog sleeps on"


class Recorder:
    """In the place of the sockets: what would have been sent."""

    def __init__(self) -> None:
        self.batches: list[bytes] = []
        self.can_be_asked = False

    def publish(self, batch: bytes) -> None:
        self.batches.append(batch)

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events so far."""
        return [event for batch in self.batches for event in msgspec.msgpack.decode(batch)[1]]

    @property
    def mirror(self) -> set[int]:
        """What somebody who has read it all believes."""
        mirror = Mirror()
        for batch in self.batches:
            mirror.read(batch)
        return mirror.names


def feed_of(engine: Engine, recorder: Recorder, *, has_keys: bool = False, **settings: Any) -> KVEventFeed:
    """A feed whose steps the test takes, begun."""
    wanted = KVEventSettings(url="tcp://*:1", block_size=3, **settings)
    feed = make_feed(engine, recorder, wanted, has_keys=has_keys)  # type: ignore[arg-type]
    feed._begin()
    return feed


def blocks_of(engine: Engine, owners: dict[str, Owner], block_size: int) -> set[int]:
    with engine.lock:
        return whole_blocks(engine.tree.walk, owners, block_size)


def test_what_is_cached_is_announced_and_taken_back(engine: Engine) -> None:
    recorder = Recorder()
    engine.generate(TEXT, max_new_tokens=2)
    feed = feed_of(engine, recorder)
    assert recorder.events[0] == {"type": "AllBlocksCleared"}
    owners = {engine.namespace(): Owner()}
    assert recorder.mirror == blocks_of(engine, owners, 3)
    assert len(recorder.mirror) > 5
    engine.generate(f"{TEXT} once more", max_new_tokens=2)
    feed.step()
    assert recorder.mirror == blocks_of(engine, owners, 3)
    num_batches = len(recorder.batches)
    feed.step()
    assert len(recorder.batches) == num_batches
    engine.cache.clear()
    feed.step()
    assert recorder.mirror == set()


def test_approximate_kv_is_never_announced(learning: Engine) -> None:
    earn(learning, LOOSE)
    recorder = Recorder()
    feed = feed_of(learning, recorder)
    before = recorder.mirror
    ask(learning, ROLE_A, 99, LOOSE)
    feed.step()
    exact = recorder.mirror
    assert exact > before
    served = ask(learning, ROLE_B, 99, LOOSE)
    assert served.usage.aligned_tokens
    feed.step()
    assert recorder.mirror == blocks_of(learning, {learning.namespace(): Owner()}, 3)
    read = tokens_of(prompt(ROLE_B, 99))
    behind = second_names(Case(read, Owner(), 3))[len(ROLE_B) // 3 :]  # the moved text, and all that has read it
    assert len(behind) > 30
    assert recorder.mirror.isdisjoint(behind)


def test_tenants_and_salts(engine: Engine) -> None:
    """With keys only named tenants, each under its salt; what a request has salted itself is nobody's business."""
    recorder = Recorder()
    feed = feed_of(engine, recorder, has_keys=True, tenants={"ann": "sesame", "bob": ""})
    for tenant in ("default", "ann", "bob", "eve", namespace("ann", "mine"), namespace("bob", "mine")):
        engine.generate(f"{tenant} {TEXT}", max_new_tokens=2, tenant=tenant)
    feed.step()
    owners = {engine.namespace("ann"): Owner(salt="sesame"), engine.namespace("bob"): Owner()}
    assert recorder.mirror == blocks_of(engine, owners, 3)
    first = [event for event in recorder.events if event.get("parent_block_hash", 0) is None]
    assert sorted(event["extra_keys"][0] or [] for event in first) == [[], ["sesame"]]


def test_without_keys_there_is_one_tenant(engine: Engine) -> None:
    recorder = Recorder()
    feed = feed_of(engine, recorder)
    engine.generate(TEXT, max_new_tokens=2)
    engine.generate(f"secret {TEXT}", max_new_tokens=2, tenant=namespace("default", "salt"))
    feed.step()
    assert recorder.mirror == blocks_of(engine, {engine.namespace(): Owner()}, 3)


def test_other_weights_are_another_cache(engine: Engine) -> None:
    """What was cached with the former ones will not be found again, so it is taken back."""
    recorder = Recorder()
    feed = feed_of(engine, recorder)
    engine.generate(TEXT, max_new_tokens=2)
    feed.step()
    former = recorder.mirror
    engine.weights_changed()
    engine.generate(f"another {TEXT}", max_new_tokens=2)
    feed.step()
    assert recorder.mirror == blocks_of(engine, {engine.namespace(): Owner()}, 3)
    assert not former & recorder.mirror


def test_lost_events_are_made_good(engine: Engine) -> None:
    recorder = Recorder()
    feed = feed_of(engine, recorder)
    engine.tree._log._max_events = 1
    for index in range(4):
        engine.generate(f"{index} {TEXT}", max_new_tokens=2)
    with engine.lock:
        engine.tree.evict(2)
    feed.step()
    assert recorder.mirror == blocks_of(engine, {engine.namespace(): Owner()}, 3)


def test_nothing_is_announced_where_nothing_can_be_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def namespace(tenant: str, *, adapter: str | None = None) -> str:
        raise WeightsChanged("gone")

    monkeypatch.setattr(engine, "namespace", namespace)
    assert owners_of(engine, {"default": ""}, {}) == {}


def test_from_a_running_thread_over_sockets(engine: Engine) -> None:
    here = "tcp://127.0.0.1:*"
    settings = KVEventSettings(url=here, replay=here, topic="kv@pod@tiny", block_size=3)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    mirror = Mirror()
    with context, context.socket(zmq.SUB) as socket, context.socket(zmq.DEALER) as asking:
        socket.linger = asking.linger = 0
        with open_publisher(settings, "tiny") as publisher:
            socket.connect(publisher.address)
            socket.subscribe(b"kv@")
            asking.connect(str(publisher.replay_address))
            with make_feed(engine, publisher, settings, has_keys=False):
                engine.generate(TEXT, max_new_tokens=2)
                wanted = blocks_of(engine, {engine.namespace(): Owner()}, 3)

                def has_it_all() -> bool:
                    """Ask again from the beginning, as who comes late does."""
                    asking.send_multipart([b"", bytes(8)])
                    mirror.names.clear()
                    while (frames := asking.recv_multipart())[2] != END:
                        mirror.read(frames[3])
                    return mirror.names == wanted

                wait_for(has_it_all)
                while socket.poll(0):
                    assert socket.recv_multipart()[0] == b"kv@pod@tiny"
    assert mirror.names == wanted


def test_the_default_topic_names_machine_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "pod-7")
    with open_publisher(KVEventSettings(url="tcp://127.0.0.1:*"), "tiny") as publisher:
        assert publisher._topic == b"kv@pod-7@tiny"


def test_named_tenants() -> None:
    assert parse_tenants(["ann", "bob=sesame", "all="]) == {"ann": "ann", "bob": "sesame", "all": ""}
    for texts in (["=salt"], [""], ["ann", "ann=other"]):
        with pytest.raises(InvalidRequest, match="--kv-events-tenant"):
            parse_tenants(texts)


def test_adapters_have_names_of_their_own(tmp_path: Path) -> None:
    folder, tiny = save_lora(tmp_path, seed=1), tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        engine.adapters.load("tone", folder)
        owners = owners_of(engine, {"default": ""}, {"tone": folder})
        assert owners == {
            engine.namespace(): Owner(),
            engine.namespace(adapter="tone"): Owner("", "tone", str(folder)),
        }
