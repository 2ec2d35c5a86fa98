"""Writing beside others: one of several who want a name gets it, and what killed writers leave goes, nothing else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvcomm.files.writing import LOCK_FILE, NameTaken, locked, replacing, reserved, sweep, unfinished
from tests.limits import PATIENCE_S, at_once


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "no links here")


@pytest.fixture(params=["links", "no links"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder on a disk that knows hard links, and on one that does not."""
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)
    return tmp_path


def write(file: Path, text: str, *, is_new: bool) -> bool:
    """Whether it got the name."""
    try:
        with replacing(file, is_new=is_new) as temporary:
            temporary.write_text(text)
    except NameTaken:
        return False
    return True


def test_a_new_name_is_one_threads(disk: Path) -> None:
    for attempt in range(20):
        file = disk / f"file{attempt}"
        got = at_once(24, lambda index, file=file: write(file, str(index), is_new=True))  # type: ignore[misc]
        assert got.count(True) == 1
        assert file.read_text() == str(got.index(True))
    assert len(list(disk.iterdir())) == 20


def test_a_name_that_is_replaced_is_everybodys(disk: Path) -> None:
    file = disk / "file"
    assert all(at_once(24, lambda index: write(file, "x" * (index + 1) * 1000, is_new=False)))
    assert len(file.read_text()) % 1000 == 0
    assert list(disk.iterdir()) == [file]


RACER = """
import sys
from pathlib import Path
from kvcomm.files.writing import NameTaken, replacing
names = []
for attempt in range(30):
    file = Path(sys.argv[1]) / f"file{attempt}"
    try:
        with replacing(file, is_new=True) as temporary:
            temporary.write_text(sys.argv[2])
        names.append(file.name)
    except NameTaken:
        pass
print(*names)
"""


def test_a_new_name_is_one_processes(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(index)], stdout=subprocess.PIPE, text=True)
        for index in range(4)
    ]
    try:
        won = [racer.communicate(timeout=PATIENCE_S)[0].split() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert sorted(name for names in won for name in names) == sorted(file.name for file in tmp_path.iterdir())
    assert sum(map(len, won)) == 30
    for index, names in enumerate(won):
        assert all((tmp_path / name).read_text() == str(index) for name in names)


def test_a_failing_block_changes_nothing(disk: Path) -> None:
    file = disk / "file"
    file.write_text("old")
    with pytest.raises(TypeError), replacing(file) as temporary:
        temporary.write_text(1)  # type: ignore[arg-type]
    assert file.read_text() == "old"
    assert not write(file, "new", is_new=True)
    assert (file.read_text(), list(disk.iterdir())) == ("old", [file])


def test_a_claimed_name_is_given_back_if_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", "new", is_new=True)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from pathlib import Path
from kvcomm.files.writing import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_killed_writers_leave_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """Two processes write; one is killed. Both files look alike."""
    (tmp_path / "whole").write_text("whole")
    (tmp_path / ".hidden").write_text("somebody's")
    (tmp_path / ".x.part").write_text("somebody's")
    (tmp_path / ".folder.abcdefgh.part").mkdir()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        for name in ("killed", "living")
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
        before = {file.name for file in tmp_path.iterdir()}
        assert sweep(tmp_path) == 0
        assert unfinished(tmp_path) == {"killed", "living", "folder"}
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait(PATIENCE_S)
        assert sweep(tmp_path, "other") == 0
        assert sweep(tmp_path) == 1
        gone = before - {file.name for file in tmp_path.iterdir()}
        assert gone
        assert all(name.startswith(".killed.") for name in gone)
        assert unfinished(tmp_path) == {"living", "folder"}
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()


def test_a_writer_of_this_process_is_alive_too(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as temporary, reserved(tmp_path / "place"):
        assert sweep(tmp_path) == 0
        assert unfinished(tmp_path) == {"file", "place"}
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_writers_and_sweepers_side_by_side(tmp_path: Path) -> None:
    """Nobody sweeps what is being written, however both meet."""
    over = threading.Event()

    def keep_sweeping() -> None:
        while not over.is_set():
            sweep(tmp_path)

    sweepers = [threading.Thread(target=keep_sweeping) for _ in range(3)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for attempt in range(300):
            assert write(tmp_path / f"file{attempt}", "whole", is_new=attempt % 2 == 0)
    finally:
        over.set()
        for sweeper in sweepers:
            sweeper.join()
    assert len(list(tmp_path.iterdir())) == 300


@pytest.mark.parametrize("is_network", [False, True])
def test_a_folder_is_locked_for_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_network: bool
) -> None:
    """A counter in a file that everybody reads and writes; on a network disk folders cannot be locked."""
    import fcntl

    lock = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        if is_network and os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count(_: int) -> bool:
        for _ in range(20):
            with locked(tmp_path):
                value = int(counter.read_text())
                counter.write_text(str(value + 1))
        return True

    at_once(8, count)
    assert counter.read_text() == "160"
    assert (tmp_path / LOCK_FILE).exists() == is_network


def test_a_disk_without_locks_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, shared=True):
        pass
    with pytest.raises(OSError, match="No locks"), locked(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nowhere", shared=True):
        pass
    assert write(tmp_path / "file", "whole", is_new=True)
