"""Saves that race: a new name is one's, and there are never more snapshots than a tenant may have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server.contexts.snapshots import SnapshotFolder
from kvcomm.server.errors import ApiError
from tests.engine.conftest import some_tokens
from tests.limits import PATIENCE_S, at_once
from tests.server.conftest import MakeClient
from tests.server.test_contexts import URL, made

NUM_RACERS = 24


def codes(folder: SnapshotFolder, engine: Engine, names: Callable[[int], str], *, replace: bool = False) -> list[str]:
    """What came of saving a context under names, all at once."""

    def save(index: int) -> str:
        try:
            folder.save(context, names(index), replace=replace)
        except ApiError as error:
            return error.code
        return "saved"

    with engine.context(some_tokens(20)) as context:
        return at_once(NUM_RACERS, save)


def test_one_of_many_threads_gets_a_new_name(engine: Engine, tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, "ann", max_snapshots=64)
    for attempt in range(5):
        found = codes(folder, engine, lambda _, attempt=attempt: f"s{attempt}")  # type: ignore[misc]
        assert sorted(found) == ["saved"] + ["snapshot_exists"] * (NUM_RACERS - 1)
    assert len(list((tmp_path / "ann").iterdir())) == 5


def test_a_limit_holds_whoever_races_for_the_last_places(engine: Engine, tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, "ann", max_snapshots=4)
    found = codes(folder, engine, lambda index: f"s{index}")
    assert sorted(found) == ["quota_exceeded"] * (NUM_RACERS - 4) + ["saved"] * 4
    assert len(folder.snapshots()) == 4
    assert codes(folder, engine, lambda _: folder.snapshots()[0].name, replace=True) == ["saved"] * NUM_RACERS


def test_a_failed_save_gives_its_place_back(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SnapshotFolder(tmp_path, "ann", max_snapshots=1)
    with monkeypatch.context() as patch, engine.context(some_tokens(20)) as context:
        patch.setattr(safetensors.torch, "save_file", _fail)
        with pytest.raises(ApiError):
            folder.save(context, "one", replace=False)
        assert list((tmp_path / "ann").iterdir()) == []
    assert "saved" in codes(folder, engine, lambda index: f"s{index}")


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_over_the_wire(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client(snapshots=tmp_path / "snapshots", max_snapshots=3)
    with client:  # one loop for all requests
        context = made(client, text="The quick brown fox")["id"]

        def save(name: str) -> int:
            return client.post(f"{URL}/{context}/snapshot", json={"name": name}).status_code

        assert sorted(at_once(NUM_RACERS, lambda _: save("one"))) == [201] + [409] * (NUM_RACERS - 1)
        assert sorted(at_once(NUM_RACERS, lambda index: save(f"s{index}"))) == [201] * 2 + [429] * (NUM_RACERS - 2)
        assert _num_listed(client) == 3


def _num_listed(client: TestClient) -> int:
    return len(client.get("/v1/snapshots").json()["data"])


RACER = """
import sys
from pathlib import Path
from kvcomm import Engine, EngineConfig
from kvcomm.server.contexts.snapshots import SnapshotFolder
from kvcomm.server.errors import ApiError
from tests.tiny import tiny_model
tiny = tiny_model()
own = SnapshotFolder(Path(sys.argv[1]), "ann", max_snapshots=30)
with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=256)) as engine:
    with engine.context(list(range(20, 40))) as context:
        print("ready", flush=True)
        sys.stdin.readline()
        won = []
        for name in [f"same{i}" for i in range(20)] + [f"own{sys.argv[2]}-{i}" for i in range(20)]:
            try:
                own.save(context, name, replace=False)
                won.append(name)
            except ApiError as error:
                assert error.code in ("snapshot_exists", "quota_exceeded"), error
print(*won, flush=True)
"""


def test_between_processes(tmp_path: Path) -> None:
    """Servers that share a folder: 20 names that both want, then 20 of each one's own where 10 places are left."""
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    root = Path(__file__).parents[2]
    racers = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        for i in range(2)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        won = [racer.communicate(timeout=PATIENCE_S)[0].split() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert sorted(name for each in won for name in each if name.startswith("same")) == sorted(
        f"same{i}" for i in range(20)
    )
    assert sum(map(len, won)) == 30
    assert len(list((tmp_path / "ann").iterdir())) == 30
