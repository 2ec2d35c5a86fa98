"""The key file and the ring: what is written, who is recognised, and what happens while the server runs."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcomm.errors import InvalidRequest, KeyFileError
from kvcomm.server.keys import KeyFile, KeyRing, Role, add_key, digest, remove_key
from kvcomm.server.settings import Limits
from tests.files.special import SPECIAL, make_special
from tests.limits import PATIENCE_S


def test_a_key_round_trip(key_file: Path) -> None:
    limits = Limits(requests_per_minute=30, held_tokens=1000)
    key = add_key(key_file, "ann", tenant="team", limits=limits)
    ring = KeyRing(key_file)

    found = ring.find(key)
    assert found is not None
    assert (found.name, found.tenant, found.role) == ("ann", "team", Role.TENANT)
    assert ring.limits_of("team") == limits
    assert ring.find(key + "x") is None
    assert ring.find("") is None
    assert ring.find("\udcff\u20ac") is None


def test_the_file_holds_no_key_and_is_private(key_file: Path) -> None:
    key = add_key(key_file, "ann")
    text = key_file.read_text()
    assert key not in text
    assert digest(key) in text
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert json.loads(text)["version"] == 1


def test_keys_differ() -> None:
    assert digest("a") != digest("b")
    assert len(digest("a")) == 64


def test_names_are_unique_and_plain(key_file: Path) -> None:
    add_key(key_file, "ann")
    with pytest.raises(InvalidRequest, match="has a key named 'ann' already"):
        add_key(key_file, "ann")
    for name in ("", "a b", "../x", "a\n", '["a", "b"]', "x" * 65):
        with pytest.raises(InvalidRequest, match="is not a name"):
            add_key(key_file, name)
    add_key(key_file, "x" * 64)
    with pytest.raises(InvalidRequest, match="belongs to no tenant"):
        add_key(key_file, "root", role=Role.ADMIN, tenant="ann")
    assert [record.name for record in KeyFile.read(key_file).keys] == ["ann", "x" * 64]


def test_removing(key_file: Path) -> None:
    key = add_key(key_file, "ann")
    add_key(key_file, "bob")
    assert remove_key(key_file, "ann").sha256 == digest(key)
    assert KeyRing(key_file).find(key) is None
    with pytest.raises(InvalidRequest, match="no key named 'ann'; there are: bob"):
        remove_key(key_file, "ann")


def test_a_running_ring_follows_the_file(key_file: Path) -> None:
    now = [0.0]
    key = add_key(key_file, "ann")
    ring = KeyRing(key_file, clock=lambda: now[0])
    late = add_key(key_file, "bob")
    assert ring.find(late) is None  # it looks once a second
    now[0] = 2.0
    assert ring.find(late) is not None
    remove_key(key_file, "ann")
    now[0] = 4.0
    assert ring.find(key) is None


def test_a_file_that_breaks_meanwhile_changes_nothing(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    key = add_key(key_file, "ann")
    ring = KeyRing(key_file, clock=lambda: now[0])
    key_file.write_text("{")
    for second in (2.0, 4.0, 6.0):
        now[0] = second
        assert ring.find(key) is not None
    assert caplog.text.count("keys stay as they were") == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2}', '{"keys": [{"name": "a"}]}', '{"keys": [], "x": 1}', "\udcff"]
)
def test_other_files_are_refused_by_name(key_file: Path, text: str) -> None:
    key_file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(KeyFileError, match=r"keys\.json is not a key file"):
        KeyRing(key_file)


def test_a_file_that_is_not_there(key_file: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read: No such file"):
        KeyRing(key_file)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot be written"):
        add_key(tmp_path / "file" / "keys.json", "ann")


def test_every_hash_is_compared(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key found early must not be told from one found late by its time."""
    keys = [add_key(key_file, name) for name in ("a", "b", "c")]
    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return left == right

    monkeypatch.setattr("kvcomm.server.keys.hmac.compare_digest", compare)
    ring = KeyRing(key_file)
    for key in (*keys, "wrong"):
        compared.clear()
        ring.find(key)
        assert compared == [digest(each).encode() for each in keys]


ADDER = """
import sys
from pathlib import Path
from kvcomm.server.keys import add_key, remove_key
for i in range(10):
    add_key(Path(sys.argv[1]), f"{sys.argv[2]}-{i}")
remove_key(Path(sys.argv[1]), f"{sys.argv[2]}-0")
"""


def test_changes_from_several_processes_lose_nothing(key_file: Path) -> None:
    adders = [subprocess.Popen([sys.executable, "-c", ADDER, str(key_file), str(each)]) for each in range(3)]
    try:
        assert [adder.wait(PATIENCE_S) for adder in adders] == [0, 0, 0]
    finally:
        for adder in adders:
            adder.kill()
            adder.wait()
    names = {record.name for record in KeyFile.read(key_file).keys}
    assert names == {f"{each}-{i}" for each in range(3) for i in range(1, 10)}


def test_changes_from_several_threads_lose_nothing(key_file: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda index: add_key(key_file, f"key{index}"), range(16)))
    assert len(KeyFile.read(key_file).keys) == 16


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_at_once(key_file: Path, kind: str) -> None:
    """A FIFO as the key file hung for ever: at the start, and in a running server at the next request."""
    with make_special(key_file, kind):
        for call in (lambda: KeyRing(key_file), lambda: add_key(key_file, "ann"), lambda: remove_key(key_file, "ann")):
            with pytest.raises(KeyFileError, match="not a regular file"):
                call()


def test_a_running_ring_does_not_wait_for_a_fifo(key_file: Path) -> None:
    now = [0.0]
    key = add_key(key_file, "ann")
    ring = KeyRing(key_file, clock=lambda: now[0])
    key_file.unlink()
    with make_special(key_file, "fifo"):
        now[0] = 2.0
        assert ring.find(key) is not None


def test_a_file_that_cannot_be_read_is_not_an_empty_one(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a change would drop all the keys that are there."""
    add_key(key_file, "ann")
    before = key_file.read_text()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("kvcomm.server.keys.read_bytes", refuse)
        with pytest.raises(KeyFileError, match="Permission denied"):
            add_key(key_file, "bob")
    assert key_file.read_text() == before
