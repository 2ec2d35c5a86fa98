"""A server in a process of its own, on a free port of this machine: `kvcomm serve`, as anybody would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from kvcomm.errors import ServerError


class ServerProcess:
    """Runs from construction to the end of the `with` block, or until it is ended or killed.

    Attributes:
        url: where it listens.
        pid: of the process.
    """

    def __init__(self, *flags: str, variables: Mapping[str, str] | None = None) -> None:
        """Start a server and wait until it listens.

        Args:
            flags: of `kvcomm serve`; without `--port` it takes a free one.
            variables: settings by their environment variables.

        Raises:
            ServerError: it has ended instead.
        """
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        command = [sys.executable, "-m", "kvcomm", "serve", "--json", *_with_port(flags)]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **(variables or {})}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            self.url = self._address()
        except BaseException:
            self.kill()
            raise
        self.pid = self._process.pid

    def _address(self) -> str:
        """From what the server prints once it listens."""
        assert self._process.stdout is not None
        printed = ""
        for line in self._process.stdout:
            printed += line
            if line.startswith("}"):
                return str(json.loads(printed)["address"])
        self._process.wait()
        raise ServerError(f"the server ended with code {self._process.returncode}: {self.log()[-2000:].strip()}")

    def log(self) -> str:
        """What it has written to stderr so far."""
        return self._log.read_text(encoding="utf-8")

    def end(self) -> int:
        """Ask it to drain and end, and wait; its exit code."""
        self._process.terminate()
        return self._wait()

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()
        self._wait()

    def _wait(self) -> int:
        code = self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self.end()
        self._folder.cleanup()


def _with_port(flags: Sequence[str]) -> list[str]:
    return list(flags) if "--port" in flags else [*flags, "--port", "0"]
