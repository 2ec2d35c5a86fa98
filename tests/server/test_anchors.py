"""What was learned about a tenant's text goes out as an archive and comes back only through the operator."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from kvcomm.align.archive import import_archive
from kvcomm.cli.anchor_folder import AnchorFolder
from kvcomm.cli.app import run
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.keys import KeyRing, Role, add_key
from kvcomm.server.settings import ServerSettings
from tests.engine.conftest import some_tokens
from tests.limits import PATIENCE_S
from tests.server.conftest import MODEL, MakeClient
from tests.server.live import serving

LEARNING = ReusePolicy(max_divergence=50.0, confidence=0.5, audit=0.0)
URL = "/admin/tenants/ann/anchors"


@pytest.fixture
def archive(engine: Engine, make_client: MakeClient, tmp_path: Path) -> bytes:
    """What ann's two roles have taught about one question, as ann gets it; ann's key and the operator's beside it."""
    for role in (21, 34):
        prompt = [Segment(tuple(some_tokens(role, role))), Segment(tuple(some_tokens(60)), "q"), Segment((11, 12))]
        engine.generate(prompt, SamplingParams(max_new_tokens=4), tenant="ann", policy=LEARNING)
    assert engine.wait_idle(PATIENCE_S)
    with make_client(keys=_ring(tmp_path)) as client:
        answer = client.get("/v1/anchors", headers=_auth(tmp_path, "ann"))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-tar"
    return answer.content


def test_a_tenant_gets_its_own(archive: bytes, make_client: MakeClient, tmp_path: Path) -> None:
    assert _banks(archive, tmp_path / "ann")
    with make_client(keys=_ring(tmp_path)) as client:
        other = client.get("/v1/anchors", headers=_auth(tmp_path, "bob"))
    assert not _banks(other.content, tmp_path / "bob")


def test_the_operator_puts_it_back(archive: bytes, engine: Engine, make_client: MakeClient, tmp_path: Path) -> None:
    with make_client(keys=_ring(tmp_path)) as client:
        refused = client.put(URL, content=archive, headers=_auth(tmp_path, "ann"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "wrong_key")
        taken = client.put(URL, content=archive, headers=_auth(tmp_path, "operator"))
        assert taken.status_code == 200, taken.text
        assert taken.json()["num_banks"] == len(_banks(archive, tmp_path / "x"))
        again = client.get("/v1/anchors", headers=_auth(tmp_path, "ann"))
    assert _banks(again.content, tmp_path / "again") == _banks(archive, tmp_path / "ann")


def test_what_is_no_archive_or_anothers_is_refused_without_a_path(
    archive: bytes, make_client: MakeClient, tmp_path: Path
) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as whole:
        content = whole.next().offset_data + 3000  # within the first bank
    altered = archive[:content] + bytes([archive[content] ^ 1]) + archive[content + 1 :]
    with make_client(keys=_ring(tmp_path)) as client:
        for body, url in ((archive[:2000], URL), (b"", URL), (altered, URL), (archive, URL.replace("ann", "bob"))):
            answer = client.put(url, content=body, headers=_auth(tmp_path, "operator"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_anchors")
            assert "/tmp" not in answer.json()["error"]["message"]


def test_archives_have_a_limit_of_their_own(archive: bytes, make_client: MakeClient, tmp_path: Path) -> None:
    for limit, status in ((len(archive), 200), (len(archive) - 1, 413)):
        with make_client(keys=_ring(tmp_path), max_body_bytes=1000, max_archive_bytes=limit) as client:
            assert client.put(URL, content=archive, headers=_auth(tmp_path, "operator")).status_code == status


def test_the_command_line_fetches_and_sends(
    archive: bytes, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ring, folder = _ring(tmp_path), tmp_path / "fetched"
    keys = {name: (tmp_path / name / "key").read_text() for name in ("ann", "operator")}
    with serving(engine, ServerSettings(model=MODEL, port=0), keys=ring) as live:
        at = ["--server", live.url, "--json"]
        assert run(["anchors", "fetch", str(folder), "--key", keys["ann"], *at]) == 0
        assert json.loads(capsys.readouterr().out)["num_banks"] == len(_banks(archive, tmp_path / "ann"))
        assert run(["anchors", "fetch", str(folder), "--key", keys["ann"], *at]) == 2
        assert "exists" in capsys.readouterr().err
        send = ["anchors", "send", str(folder), "--tenant", "ann", *at]
        assert run([*send, "--key", keys["operator"]]) == 0
        assert json.loads(capsys.readouterr().out)["num_banks"] == len(_banks(archive, tmp_path / "ann"))
        assert run([*send, "--key", keys["ann"]]) == 1
        assert "answered 403" in capsys.readouterr().err


def _ring(folder: Path) -> KeyRing:
    file = folder / "keys.json"
    if not file.exists():
        for name, role in (("ann", Role.TENANT), ("bob", Role.TENANT), ("operator", Role.ADMIN)):
            (folder / name).mkdir()
            (folder / name / "key").write_text(add_key(file, name, role=role))
    return KeyRing(file)


def _auth(folder: Path, name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {(folder / name / 'key').read_text()}"}


def _banks(archive: bytes, folder: Path) -> list[tuple[str, int]]:
    """(edge, bytes) of every bank in an archive."""
    file = folder.with_suffix(".tar")
    file.write_bytes(archive)
    unpacked = folder.with_suffix(".unpacked")
    if not unpacked.exists():
        import_archive(file, unpacked)
    return [(entry.edge, entry.num_bytes) for entry in AnchorFolder(unpacked).entries]
