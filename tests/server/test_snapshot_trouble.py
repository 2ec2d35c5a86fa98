"""Disks that fail and folders with strange things in them: a 503 with the system's reason, told to the operator too."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import safetensors.torch
from safetensors import SafetensorError
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.errors import AnchorFileError, InvalidRequest
from kvcomm.memory import snapshots
from tests.files.special import SPECIAL, make_special
from tests.limits import PATIENCE_S
from tests.server.conftest import MakeClient
from tests.server.test_contexts import URL, error_of, made, ok
from tests.server.test_snapshots import save


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def saving(make_client: MakeClient, root: Path) -> TestClient:
    return make_client(snapshots=root)


def disk_full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_full_in_safetensors(*_: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def broken(*_: object, **__: object) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextmanager
def told(caplog: pytest.LogCaptureFixture, reason: str) -> Iterator[None]:
    """The operator's log says it meanwhile."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kvcomm.server"):
        yield
    assert reason in caplog.text
    assert not [record for record in caplog.records if record.message == "unexpected error"]


@pytest.mark.parametrize(
    ("target", "name", "failure"),
    [
        (safetensors.torch, "save_file", disk_full_in_safetensors),
        (os, "fsync", disk_full),
        (os, "link", None),
        (Path, "mkdir", disk_full),
    ],
)
def test_a_full_disk_is_said(
    saving: TestClient,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    target: object,
    name: str,
    failure: Callable[..., Any] | None,
) -> None:
    context = made(saving, text="The quick brown fox")["id"]
    with monkeypatch.context() as patch, told(caplog, "No space left on device"):
        if failure is None:  # neither a link nor a name without one
            patch.setattr(os, "link", disk_full)
            patch.setattr("kvcomm.files.writing._claim", disk_full)
        else:
            patch.setattr(target, name, failure)
        answer = save(saving, context)
    assert error_of(answer) == (503, "snapshot_failed")
    message = answer.json()["error"]["message"]
    assert "'one'" in message
    assert "No space left on device" in message
    assert str(root) not in message
    assert ok(saving.get("/v1/snapshots"))["data"] == []
    assert save(saving, context).status_code == 201


def test_listing_and_deleting_on_a_broken_disk(
    saving: TestClient, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ok(save(saving, made(saving, text="The quick brown fox")["id"]))
    for target, call in (
        ("scandir", lambda: saving.get("/v1/snapshots")),
        ("unlink", lambda: saving.delete("/v1/snapshots/one")),
        ("open", lambda: saving.post("/v1/snapshots/one/restore", json={})),
    ):
        with monkeypatch.context() as patch, told(caplog, "Input/output error"):
            patch.setattr(os, target, broken)
            answer = call()
        assert error_of(answer) == (503, "snapshot_failed")
        assert "Input/output error" in answer.json()["error"]["message"]
        assert str(root) not in answer.text
    assert ok(saving.delete("/v1/snapshots/one"))["name"] == "one"


def test_anchors_on_a_full_disk(
    make_client: MakeClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client()

    def fail(*_: object, **__: object) -> None:
        raise AnchorFileError("/somewhere/x cannot be written: No space left on device") from OSError(28, "No space")

    with monkeypatch.context() as patch, told(caplog, "No space left on device"):
        patch.setattr(engine.reuse, "save", fail)
        answer = client.get("/v1/anchors")
    assert error_of(answer) == (503, "anchors_failed")
    assert "/somewhere" not in answer.text
    archive = client.get("/v1/anchors").content
    with monkeypatch.context() as patch, told(caplog, "No space left on device"):
        patch.setattr(anyio, "open_file", disk_full)
        answer = client.put("/admin/tenants/default/anchors", content=archive)
    assert error_of(answer) == (503, "anchors_failed")


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_listed_as_refused_and_hinders_nothing(saving: TestClient, root: Path, kind: str) -> None:
    """A FIFO used to hang the listing for ever."""
    context = made(saving, text="The quick brown fox")["id"]
    ok(save(saving, context))
    with make_special(root / "default" / "odd.safetensors", kind):
        listed = {each["name"]: each["refusal"] for each in ok(saving.get("/v1/snapshots"))["data"]}
        assert listed["one"] is None
        assert "not a regular file" in listed["odd"]
        assert error_of(saving.post("/v1/snapshots/odd/restore", json={})) == (503, "snapshot_failed")
        assert error_of(save(saving, context, name="odd")) == (409, "snapshot_exists")


KILLED = """
import os, signal, sys
from pathlib import Path
from kvcomm.files.writing import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_servers_left_is_swept_at_start(make_client: MakeClient, root: Path) -> None:
    for tenant in ("ann", "bob"):
        subprocess.run([sys.executable, "-c", KILLED, str(root / tenant / "one.safetensors")], timeout=PATIENCE_S)
    (root / "ann" / "whole.safetensors").write_text("whole")
    assert len(list(root.glob("*/.*.part"))) == 2
    make_client(snapshots=root)
    assert [file.name for file in root.glob("*/*")] == ["whole.safetensors"]


def test_a_folder_that_cannot_be_read_is_an_error_at_once(
    make_client: MakeClient, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(InvalidRequest, match="Input/output error"):
        make_client(snapshots=root)


def test_the_server_answers_while_a_snapshot_is_read_and_written(
    engine: Engine, make_client: MakeClient, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer holds up nobody else: contexts are made, forked, counted and deleted meanwhile."""
    with make_client(snapshots=root) as client:
        context = made(client, text="The quick brown fox")["id"]
        ok(save(client, context))
        for place, call in (
            ("payload_digest", lambda: client.post("/v1/snapshots/one/restore", json={})),
            ("payload_digest", lambda: save(client, context, name="two")),
        ):
            reached, go_on = threading.Event(), threading.Event()
            original = snapshots.payload_digest

            def stalled(*tensors: Any, original: Any = original, reached: Any = reached, go_on: Any = go_on) -> str:
                reached.set()
                assert go_on.wait(PATIENCE_S)
                return str(original(*tensors))

            answers: list[Any] = []
            with monkeypatch.context() as patch:
                patch.setattr(snapshots, place, stalled)
                thread = threading.Thread(target=lambda call=call, answers=answers: answers.append(call()))  # type: ignore[misc]
                thread.start()
                try:
                    assert reached.wait(PATIENCE_S)
                    assert engine.lock.acquire(timeout=PATIENCE_S)
                    engine.lock.release()
                    other = made(client, text="jumps over the lazy dog")["id"]
                    ok(client.post(f"{URL}/{other}/fork", json={}))
                    ok(client.get(URL))
                    ok(client.delete(f"{URL}/{other}?descendants=true"))
                    ok(client.get("/v1/stats"))
                    engine.check_integrity()
                finally:
                    go_on.set()
                    thread.join(PATIENCE_S)
            assert answers[0].status_code == 201, answers[0].text
