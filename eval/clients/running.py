"""Clients: which are installed where, and what their hellos find.

A client runs in the first of the given interpreters that has it: not all of them agree with each other about versions,
and none of them has to agree with kvcomm.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kvcomm.errors import InvalidRequest

HELLOS = Path(__file__).with_name("hellos")
LIMIT_S = 900.0
"""For one client, its slow import included."""

CLIENTS: Mapping[str, tuple[str, ...]] = {
    "openai": ("openai",),
    "anthropic": ("anthropic",),
    "langgraph": ("langgraph", "langchain", "langchain-openai"),
    "openai-agents": ("openai-agents",),
    "pydantic-ai": ("pydantic-ai-slim", "openai"),
    "instructor": ("instructor", "openai"),
    "llama-index": ("llama-index-core", "llama-index-llms-openai-like"),
    "crewai": ("crewai",),
    "smolagents": ("smolagents", "openai"),
    "lm-eval": ("lm-eval", "aiohttp", "tenacity", "transformers"),
}
"""The distributions that each needs, its own first."""

_LIST = """
import json, sys
from importlib.metadata import distributions
json.dump({each.name.lower().replace("_", "-"): each.version for each in distributions()}, sys.stdout)
"""


class Check(NamedTuple):
    """One check: its name, what was wrong (None: nothing), and what it returned."""

    name: str
    error: str | None
    found: Any = None


@dataclass(frozen=True)
class Hello:
    """What one client found; `versions` of what it needs."""

    client: str
    versions: Mapping[str, str]
    checks: Sequence[Check] = field(default_factory=list)

    def works(self, kind: str) -> bool:
        """Whether all its checks of a kind, "tool" or "structured", passed; False where it has none."""
        errors = [check.error for check in self.checks if check.name.startswith(kind)]
        return bool(errors) and not any(errors)

    def to_json(self) -> dict[str, Any]:
        """Versions, and errors by check."""
        return {"versions": dict(self.versions), "errors": {check.name: check.error for check in self.checks}}


@dataclass(frozen=True)
class Interpreter:
    """A Python with some of the clients."""

    path: Path

    @cached_property
    def versions(self) -> Mapping[str, str]:
        """Of all its distributions.

        Raises:
            InvalidRequest: it does not run.
        """
        try:
            run = subprocess.run([self.path, "-c", _LIST], capture_output=True, text=True, check=True, timeout=LIMIT_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise InvalidRequest(f"--python {self.path} does not run: {error}") from error
        found: dict[str, str] = json.loads(run.stdout)
        return found

    def has(self, client: str) -> bool:
        """Whether the client and what it needs are installed."""
        return all(name in self.versions for name in CLIENTS[client])

    def hello(self, client: str, address: str, model: str, tokenizer: Path) -> Hello:
        """Run a client's checks against a server; `tokenizer`: a folder."""
        script = HELLOS / f"with_{client.replace('-', '_')}.py"
        command = [self.path, script, address, model, tokenizer]
        versions = {name: self.versions[name] for name in CLIENTS[client]}
        environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "unused"}
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return Hello(client, versions, [_failed(f"no answer within {LIMIT_S:.0f} s")])
        checks = [
            Check(each["check"], each["error"], each["found"]) for each in map(json.loads, run.stdout.splitlines())
        ]
        if run.returncode != 0:
            checks.append(_failed(run.stderr.strip().rpartition("\n")[2] or f"ended with {run.returncode}"))
        return Hello(client, versions, checks)


def _failed(why: str) -> Check:
    """What is wrong with all of a script is wrong with its tools."""
    return Check("tool", why)


def place_of(client: str, interpreters: Sequence[Interpreter]) -> Interpreter | None:
    """The first interpreter that has a client; None: it is not installed."""
    return next((each for each in interpreters if each.has(client)), None)
