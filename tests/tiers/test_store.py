"""Every store keeps the same promises; the folder, and Redis and S3 where a server is at hand."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.moto import moto_program, s3_running
from kvcomm.errors import MissingExtra, ObjectMissing, StoreFailed, TierError
from kvcomm.tiers import folder as folder_module
from kvcomm.tiers.folder import FolderStore
from kvcomm.tiers.opening import open_store
from kvcomm.tiers.redis_store import CHUNK_BYTES, RedisStore
from kvcomm.tiers.store import ObjectStore, safe_key, shown_url
from tests.limits import at_once
from tests.tiers.stores import DictStore, redis_running, redis_server


@pytest.fixture(scope="module", params=["dict", "folder", "unmapped", "redis", "s3"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An empty store of each kind; tests use names of their own."""
    folder = tmp_path_factory.mktemp("store")
    if request.param == "dict":
        yield DictStore()
    elif request.param == "folder":
        yield open_store(str(folder))
    elif request.param == "unmapped":
        yield FolderStore(folder, is_mapped=False)
    elif request.param == "redis":
        if (program := redis_server()) is None:
            pytest.skip("there is no redis-server here; set KVCOMM_REDIS_SERVER to one")
        with redis_running(program, folder) as url:
            yield open_store(url)
    else:
        if moto_program() is None:
            pytest.skip("there is no moto_server here; set KVCOMM_MOTO_SERVER to one")
        with s3_running() as server:
            yield open_store(server.url)


def test_what_is_put_is_there_once(store: ObjectStore) -> None:
    big = os.urandom(2 * CHUNK_BYTES + 17)
    assert store.put_once("once/a.b-c_d=1", [big[:1000], memoryview(big)[1000:]])
    assert not store.put_once("once/a.b-c_d=1", [b"something else"])
    content = store.get("once/a.b-c_d=1")
    assert bytes(content) == big
    content[:3] = b"abc"  # the caller's own
    assert bytes(store.get("once/a.b-c_d=1")) == big
    (found,) = store.list("once")
    assert (found.key, found.num_bytes) == ("once/a.b-c_d=1", len(big))
    assert found.used_s >= found.modified_s > 1.6e9


@pytest.mark.parametrize(("start", "length"), [(0, 5), (3, 4), (CHUNK_BYTES - 2, 9), (2 * CHUNK_BYTES + 10, 100)])
def test_ranges(store: ObjectStore, start: int, length: int) -> None:
    content = bytes(range(256)) * (CHUNK_BYTES // 128) + b"the last few bytes"
    store.put_once("ranges", [content])
    assert bytes(store.get_range("ranges", start, length)) == content[start : start + length]


def test_an_empty_object(store: ObjectStore) -> None:
    assert store.put_once("empty", [])
    assert bytes(store.get("empty")) == b""


def test_what_is_not_there(store: ObjectStore) -> None:
    store.put_once("there", [b"x"])
    store.delete("there")
    store.delete("there")
    for key in ("there", "there/below", "never/was"):
        with pytest.raises(ObjectMissing):
            store.get(key)
        with pytest.raises(ObjectMissing):
            store.get_range(key, 0, 1)
    assert list(store.list("never")) == []


def test_listing_goes_by_parts_of_names(store: ObjectStore) -> None:
    for key in ("list/ab/1", "list/ab/c/2", "list/abc/3"):
        store.put_once(key, [b"x"])
    assert sorted(each.key for each in store.list("list/ab")) == ["list/ab/1", "list/ab/c/2"]
    assert sorted(each.key for each in store.list("list/ab/")) == ["list/ab/1", "list/ab/c/2"]
    assert len([each for each in store.list() if each.key.startswith("list/")]) == 3


def test_one_of_many_writers_wins(store: ObjectStore) -> None:
    won = at_once(6, lambda index: store.put_once("race", [bytes([index]) * 100_000]))
    assert sum(won) == 1
    assert bytes(store.get("race")) == bytes([won.index(True)]) * 100_000


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "a/../b", ".a", "a/.b", "a b", "a\0", "ü", "a#1", "x" * 600]
)
def test_names_that_are_none(store: ObjectStore, key: str) -> None:
    for ask in (lambda: store.get(key), lambda: store.put_once(key, [b"x"]), lambda: store.delete(key)):
        with pytest.raises(TierError, match="no name of an object"):
            ask()


def test_a_reader_reads_on_while_an_object_is_removed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_once("a", [b"1234" * 5000])
    content = store.get("a")
    store.delete("a")
    assert store.put_once("a", [b"other"])
    assert bytes(content) == b"1234" * 5000


def test_modes_follow_the_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    store = open_store(str(tmp_path))
    store.put_once("a/b", [b"x"])
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o440
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o770


def test_a_new_folder_is_its_owners(tmp_path: Path) -> None:
    open_store(str(tmp_path / "new"))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_use_is_noted_and_written_stays(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_once("a", [b"x"])
    os.utime(tmp_path / "a", (1e9, 1e9))
    assert [(each.modified_s, each.used_s) for each in store.list()] == [(1e9, 1e9)]
    store.get("a")
    (found,) = store.list()
    assert found.modified_s == 1e9
    assert found.used_s > 1.6e9


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module.os, "fchmod", full)
    with pytest.raises(StoreFailed, match="No space left on device"):
        store.put_once("a/b", [b"x"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_once("a", [b"x"])
    tmp_path.chmod(0o500)
    try:
        assert bytes(store.get("a")) == b"x"
        with pytest.raises(StoreFailed, match="Permission denied"):
            store.put_once("b", [b"x"])
    finally:
        tmp_path.chmod(0o700)


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_once("a/b", [b"x"])
    (tmp_path / "a/.c.abcdefgh.part").touch()
    (tmp_path / "a/.c.abcdefgh.d").mkdir()
    (tmp_path / "a/.c.abcdefgh.d/c").write_bytes(b"half")
    left, recent = tmp_path / "a" / f"{'0' * 32}#1", tmp_path / "a" / f"{'1' * 32}#1"
    left.touch()
    recent.touch()
    os.utime(left, (1e9, 1e9))
    assert [each.key for each in store.list()] == ["a/b"]
    assert store.sweep() == 2
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b", recent.name}
    assert store.sweep() == 0


def test_a_living_writer_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    is_writing, may_end = threading.Event(), threading.Event()
    chmod = os.fchmod

    def waiting(*arguments: int) -> None:
        is_writing.set()
        may_end.wait(3600)
        chmod(*arguments)

    monkeypatch.setattr(folder_module.os, "fchmod", waiting)
    writer = threading.Thread(target=store.put_once, args=("a", [b"x"]))
    writer.start()
    is_writing.wait(3600)
    assert store.sweep() == 0
    may_end.set()
    writer.join()
    assert bytes(store.get("a")) == b"x"


def test_links_and_foreign_files_are_not_objects(tmp_path: Path) -> None:
    root = tmp_path / "root"
    store = open_store(str(root))
    (tmp_path / "outside").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root)
    (root / "with space").write_bytes(b"x")
    os.mkfifo(root / "fifo")
    assert list(store.list()) == []
    with pytest.raises(StoreFailed, match="FIFO"):
        store.get("fifo")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "not by ''"),
        ("  ", "not by"),
        ("a\0b", "not by"),
        ("ftp://host/x", "ftp:// is not known"),
        ("file://host/x", "of the host host"),
        ("file://", "names no folder"),
        ("/no/such/parent", "there is no /no/such"),
        ("redis://127.0.0.1:1/0", "cannot be used as a tier"),
        ("redis://127.0.0.1:notaport", "cannot be used as a tier|cannot be opened|the URL"),
        ("s3://", "names no bucket"),
        ("s3://agents?nonsense=1", "nonsense"),
    ],
)
def test_urls_that_cannot_be_used(url: str, reason: str) -> None:
    with pytest.raises(TierError, match=reason) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for url in (str(tmp_path / "file"), f"file://{tmp_path}/file"):
        for is_made in (True, False):
            with pytest.raises(TierError, match="is no folder"):
                open_store(url, is_made=is_made)


def test_a_folder_is_made_only_if_that_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="No such file"):
        open_store(str(tmp_path / "x"), is_made=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("url", "extra"), [("s3://agents", "tiers"), ("redis://localhost", "redis")])
def test_a_missing_package_is_named(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("obstore", "obstore.store", "obstore.exceptions", "redis", "hiredis"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"kvcomm\[{extra}\]"):
        open_store(url)


def test_messages_hold_no_secret() -> None:
    assert shown_url("redis://user:password@host:1/0?x=y") == "redis://host:1/0"
    assert shown_url("s3://bucket/a?secret_access_key=s") == "s3://bucket/a"
    assert safe_key("a/b") == "a/b"


def test_redis_forgets_what_it_has_evicted_a_part_of(store: ObjectStore) -> None:
    if not isinstance(store, RedisStore):
        pytest.skip("of Redis only")
    store.put_once("evicted", [bytes(3 * CHUNK_BYTES)])
    client = store._client
    name = client.get("kvcomm:o:evicted").split()[0].decode()
    client.delete(f"kvcomm:c:{name}:1")
    with pytest.raises(ObjectMissing):
        store.get_range("evicted", CHUNK_BYTES, 10)
    with pytest.raises(ObjectMissing):
        store.get("evicted")
    assert client.keys(f"kvcomm:c:{name}:*") == []
    assert store.put_once("evicted", [b"again"])


def test_redis_gives_chunks_without_a_record_an_end(store: ObjectStore) -> None:
    if not isinstance(store, RedisStore):
        pytest.skip("of Redis only")
    store._send(["kvcomm:c:killed:0"], memoryview(b"x"))  # a writer killed before the record is there
    assert 0 < store._client.ttl("kvcomm:c:killed:0") <= 600
    store.put_once("lasting", [b"x"])
    name = store._client.get("kvcomm:o:lasting").split()[0].decode()
    assert store._client.ttl(f"kvcomm:c:{name}:0") == -1
