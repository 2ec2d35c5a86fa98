"""Engines behind Ray Serve: whether prompts stay with their replica, and what is left when a replica is killed.

    python -m eval.on_ray [--python .integrations/ray/bin/python] [--model smollm2-135m] [--replicas N] [--json]

Needs Ray, which `bash scripts/setup-env --integration ray` installs into an environment of its own; `--python` names
its interpreter. Ray is started here, and ended at the end. One engine without Ray answers the same requests first.

`moved_keys`: prompts that some other replica than their first answered, though it lived and was idle. Then clients ask
without a pause while a replica that holds prompts and contexts is killed (SIGKILL). `errors`: requests not answered,
before, while and after; `failover_s`: from the kill to the first answer about what the dead replica held;
`failover_longest_s`: the longest of those requests; `request_s`: the median of all before the kill; `same_tokens`:
share of answers that are the one engine's own, those behind contexts included; `lost_contexts`: that are not there any
more, or hold something else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

from eval.command import note
from eval.figures import Figure, Report, stdout_kept

TIMEOUT_S = 600.0
RULES = "Be brief, be kind, and say when you do not know. "
DOCUMENT = "The quick brown fox jumps over the lazy dog; the dog does not mind. "
MORE = " Remember that all apples are red."
REPLICA = "x-kvcomm-replica"

APP = "kvcomm"
START_S = 900.0
AGENT_PORTS = (
    "--dashboard-agent-grpc-port",
    "--dashboard-agent-listen-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--ray-client-server-port",
)

RAY_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Ray gives its own processes half a minute to start, which a busy machine may not have.
    "RAY_agent_register_timeout_ms": "900000",
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_gcs_server_request_timeout_seconds": "600",
}


class Answer(NamedTuple):
    """One request: what was said, by whom, and how long it took; `text` is None for an error."""

    text: str | None
    replica: str
    seconds: float


@dataclass
class Run:
    """What a run saw.

    Attributes:
        firsts: replica of each prompt, as long as nobody was killed.
        moved: prompts that another one answered then.
        answers: by request, "key 3" or "context 2".
    """

    firsts: dict[int, str] = field(default_factory=dict)
    moved: set[int] = field(default_factory=set)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, name: str, answer: Answer) -> Answer:
        """Keep an answer; returns it."""
        with self.lock:
            self.answers.setdefault(name, []).append(answer)
        return answer

    @property
    def num_errors(self) -> int:
        """Requests that were not answered."""
        return sum(each.text is None for some in self.answers.values() for each in some)

    def num_same(self, wanted: dict[str, str]) -> tuple[int, int]:
        """Answers that are as they should be, and all of them."""
        pairs = [(each.text, wanted[name]) for name, some in self.answers.items() for each in some]
        return sum(text == right for text, right in pairs), len(pairs)


class Client:
    """Asks a server over HTTP; one per thread."""

    def __init__(self, http: Any, model: str, new_tokens: int) -> None:
        """`http` is an httpx client, or one of its kind."""
        self._http = http
        self._model = model
        self._new_tokens = new_tokens

    def chat(self, key: int) -> Answer:
        """One question of agent `key`, greedily."""
        messages = [
            {"role": "system", "content": f"You are agent {key}. {RULES * 4}Document {key}: {DOCUMENT * 6}"},
            {"role": "user", "content": "What does the fox do?"},
        ]
        body = {"model": self._model, "messages": messages, "max_tokens": self._new_tokens, "temperature": 0}
        return self._ask("/v1/chat/completions", body, lambda choice: choice["message"]["content"])

    def behind(self, context_id: str) -> Answer:
        """What is said behind a context, which stays as it is."""
        body = {
            "model": self._model,
            "prompt": " So the answer is",
            "context_id": context_id,
            "max_tokens": self._new_tokens,
            "temperature": 0,
        }
        return self._ask("/v1/completions", body, lambda choice: choice["text"])

    def make_context(self, number: int) -> str:
        """A context that was made and then extended; returns its id."""
        made = self._http.post("/v1/contexts", json={"text": f"Context {number}. {RULES * 3}{DOCUMENT * 4}"})
        made.raise_for_status()
        context_id = str(made.json()["id"])
        self._http.post(f"/v1/contexts/{context_id}/extend", json={"text": MORE}).raise_for_status()
        return context_id

    def replica_of(self, context_id: str) -> str | None:
        """Who has a context; None: nobody."""
        found = self._http.get(f"/v1/contexts/{context_id}")
        return found.headers.get(REPLICA, "") if found.status_code == 200 else None

    def _ask(self, path: str, body: dict[str, Any], read: Any) -> Answer:
        start = time.perf_counter()
        try:
            answer = self._http.post(path, json=body)
            is_right = answer.status_code == 200
            text = read(answer.json()["choices"][0]) if is_right else None
            replica = answer.headers.get(REPLICA, "")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            note(f"request failed: {error!r}")
            text, replica = None, ""
        return Answer(text, replica, time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.python is not None:
        given = list(sys.argv[1:] if arguments is None else arguments)
        return subprocess.run([options.python, "-m", "eval.on_ray", *_without_python(given)], check=False).returncode
    if find_spec("ray") is None:
        print(
            "Ray is not installed here: bash scripts/setup-env --integration ray, then give "
            "--python .integrations/ray/bin/python",
            file=sys.stderr,
        )
        return 2
    if options.quick:
        options.keys, options.contexts, options.rounds = 4, 2, 2
    with stdout_kept():  # Ray says there what befell its processes
        report = measure(options)
    report.emit(as_json=options.json)
    if options.out is not None:
        report.save(options.out)
    return 0


def measure(options: Namespace) -> Report:
    """All figures."""
    os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **RAY_SETTINGS})
    with tempfile.TemporaryDirectory() as folder:
        note("asking one engine without Ray")
        wanted = _wanted(options)
        with _deployed(options, options.tier or Path(folder).as_uri()) as port:
            return _measured(options, port, wanted)


def _measured(options: Namespace, port: int, wanted: dict[str, str]) -> Report:
    seen = Run()
    with _client(options, port) as client:
        note(f"{options.keys} prompts, {options.rounds} times each")
        for _ in range(options.rounds):
            for key in range(options.keys):
                answer = seen.note(f"key {key}", client.chat(key))
                if seen.firsts.setdefault(key, answer.replica) != answer.replica:
                    seen.moved.add(key)
        contexts = [client.make_context(number) for number in range(options.contexts)]
        holders = [client.replica_of(context_id) for context_id in contexts]
        for number, context_id in enumerate(contexts):
            seen.note(f"context {number}", client.behind(context_id))
        before = [each.seconds for some in seen.answers.values() for each in some]
        victim = next(name for name in (*holders, *seen.firsts.values()) if name)
        failover = _kill(options, port, client, seen, victim, contexts, holders)
        lost = sum(client.replica_of(context_id) is None for context_id in contexts)
        for number, context_id in enumerate(contexts):
            seen.note(f"context {number}", client.behind(context_id))
    lost += sum(
        any(each.text not in (None, wanted[f"context {number}"]) for each in seen.answers[f"context {number}"])
        for number in range(options.contexts)
    )
    num_same, num_all = seen.num_same(wanted)
    figures = [
        Figure("moved_keys", len(seen.moved), "prompts", None, "0"),
        Figure("errors", seen.num_errors, "requests", None, "0"),
        Figure("failover_s", failover[0], "s", None, "<= 5"),
        Figure("failover_longest_s", max(failover), "s"),
        Figure("request_s", median(before), "s"),
        Figure("same_tokens", num_same / num_all, "share", None, "1"),
        Figure("lost_contexts", lost, "contexts", None, "0"),
        Figure("replicas_used", len(set(seen.firsts.values())), "replicas"),
        Figure("answers", num_all, "requests"),
    ]
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return Report("on_ray", figures, config, {"failover_s": failover, "request_s": before})


def _kill(
    options: Namespace,
    port: int,
    client: Client,
    seen: Run,
    victim: str,
    contexts: Sequence[str],
    holders: Sequence[str | None],
) -> list[float]:
    """Kill a replica while others ask; seconds of the first answer since then, and of each about what it held."""
    pid = _pids()[victim]
    is_over = threading.Event()

    def ask_on() -> None:
        with _client(options, port) as other:
            while not is_over.is_set():
                for key in range(options.keys):
                    seen.note(f"key {key}", other.chat(key))

    asking = threading.Thread(target=ask_on)
    asking.start()
    note(f"killing replica {victim}")
    os.kill(pid, signal.SIGKILL)
    start = time.perf_counter()
    seconds: list[float] = []
    for number, context_id in enumerate(contexts):
        if holders[number] == victim:
            answer = seen.note(f"context {number}", client.behind(context_id))
            seconds.append(answer.seconds if seconds else time.perf_counter() - start)
    for key, holder in seen.firsts.items():
        if holder == victim:
            answer = seen.note(f"key {key}", client.chat(key))
            seconds.append(answer.seconds if seconds else time.perf_counter() - start)
    is_over.set()
    asking.join()
    return seconds


def _wanted(options: Namespace) -> dict[str, str]:
    """What one engine answers."""
    from starlette.testclient import TestClient

    from kvcomm import Engine
    from kvcomm.server import ServerSettings, make_app

    settings = ServerSettings(model=options.model)
    with Engine.load(settings.model, config=settings.engine) as engine:
        client = Client(TestClient(make_app(engine, settings), base_url="http://localhost"), settings.name, options.new)
        wanted = {f"key {key}": client.chat(key).text for key in range(options.keys)}
        for number in range(options.contexts):
            wanted[f"context {number}"] = client.behind(client.make_context(number)).text
    return {name: text or "" for name, text in wanted.items()}


@contextmanager
def _deployed(options: Namespace, tier: str) -> Iterator[int]:
    """The app on a Ray of its own; gives the port of its HTTP proxy."""
    arguments = {"model": options.model, "replicas": options.replicas, "tier": tier, "log_level": "warning"}
    with deployed(arguments, num_cpus=options.replicas + 2) as port:
        yield port


@contextmanager
def deployed(arguments: Mapping[str, Any], *, num_cpus: int) -> Iterator[int]:
    """The app with these arguments on a Ray of its own, which ends with the block; gives the port of its HTTP proxy."""
    from ray import serve

    from kvcomm.integrations.ray import app

    (port,) = _free_ports(1)
    with _ray_head(num_cpus):
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            note("deploying, which takes a while")
            serve.run(app(arguments), name=APP)
            yield port
        finally:
            serve.shutdown()


@contextmanager
def _ray_head(num_cpus: int) -> Iterator[None]:
    """Ray's own processes, and this one as their client.

    Every port is given: Ray waits only seconds for those that its agents choose, which a busy machine may not have.
    """
    import ray

    note("starting Ray")
    gcs, *agents = _free_ports(1 + len(AGENT_PORTS))
    address = f"127.0.0.1:{gcs}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    command += [f"--port={gcs}", f"--num-cpus={num_cpus}"]
    command += [f"{name}={port}" for name, port in zip(AGENT_PORTS, agents, strict=True)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env={**os.environ, **RAY_SETTINGS}, stdout=log, stderr=log) as head,
    ):
        try:
            _connect(head, address, log)
            yield
        finally:
            ray.shutdown()
            head.terminate()  # which ends the processes that it has started, too


def _connect(head: subprocess.Popen[bytes], address: str, log: IO[str]) -> None:
    """Connect to Ray once it is there. Raises RuntimeError with what it said where it ends instead."""
    import ray

    until = time.monotonic() + START_S
    while head.poll() is None and time.monotonic() < until:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, TimeoutError):
            time.sleep(0.5)
        else:
            return
    log.seek(0)
    raise RuntimeError(f"Ray did not start:\n{log.read()[-2000:]}")


def _free_ports(num_ports: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _pids() -> dict[str, int]:
    from ray import serve

    return dict(serve.get_deployment_handle("engines", APP).broadcast("process").results(timeout_s=TIMEOUT_S))


@contextmanager
def _client(options: Namespace, port: int) -> Iterator[Client]:
    import httpx

    from kvcomm.server import ServerSettings

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as http:
        yield Client(http, ServerSettings(model=options.model).name, options.new)


def _without_python(given: list[str]) -> list[str]:
    """Arguments for the other interpreter."""
    kept = [each for each in given if not each.startswith("--python=")]
    if "--python" in kept:
        at = kept.index("--python")
        del kept[at : at + 2]
    return kept


def _parser() -> ArgumentParser:
    parser = ArgumentParser("python -m eval.on_ray", description="Engines behind Ray Serve, one of which is killed.")
    parser.add_argument("--python", metavar="PATH", help="interpreter of the environment that has Ray")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--keys", type=int, default=8, help="prompts")
    parser.add_argument("--rounds", type=int, default=4, help="times that each is asked before the kill")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--new", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--tier", help="URL that replicas share; a temporary folder by default")
    parser.add_argument("--quick", action="store_true", help="few prompts, to see that it works")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="file for figures, settings and samples")
    return parser


if __name__ == "__main__":
    sys.exit(main())
