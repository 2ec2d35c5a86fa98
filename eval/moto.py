"""An S3 server for evaluations and tests: moto's, which keeps everything in memory and takes any credentials.

It lives in an environment of its own, as it wants other versions than kvcomm; `KVCOMM_MOTO_SERVER` says where, or the
path has it. Its requests count as this machine's work, so `cpu_s` tells what it has used.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import NamedTuple

VARIABLE = "KVCOMM_MOTO_SERVER"
BUCKET = "agents"
START_S = 600.0


class S3Server(NamedTuple):
    """A running server.

    Attributes:
        url: of a tier in an empty bucket there.
    """

    url: str
    pid: int

    def cpu_s(self) -> float:
        """Seconds of the processor so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def moto_program() -> str | None:
    """Where the server is, if it is anywhere."""
    return os.environ.get(VARIABLE) or shutil.which("moto_server")


@contextmanager
def s3_running() -> Iterator[S3Server]:
    """A server with an empty bucket, for a `with` statement.

    Raises:
        FileNotFoundError: there is none to be started.
        OSError: it does not start.
    """
    program, port = moto_program(), free_port()
    if program is None:
        raise FileNotFoundError(f"there is no moto_server; set {VARIABLE} to one (pip install 'moto[server]')")
    with Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=DEVNULL, stderr=DEVNULL) as server:
        try:
            _wait_for(server, port)
            endpoint = f"http://127.0.0.1:{port}"
            request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
            with urllib.request.urlopen(request, timeout=START_S):
                pass
            keys = "access_key_id=key&secret_access_key=secret"
            yield S3Server(f"s3://{BUCKET}/some/prefix?endpoint={endpoint}&region=us-east-1&{keys}", server.pid)
        finally:
            server.kill()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(server: Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_S
    while not is_open(port):
        if server.poll() is not None or time.monotonic() > until:
            raise OSError("the S3 server does not start")
        time.sleep(0.05)
