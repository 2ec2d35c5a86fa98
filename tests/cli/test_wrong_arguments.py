"""What a command refuses, it refuses at once: torch, which takes seconds to import, is not imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from kvcomm.cli.app import app

REPOSITORY = Path(__file__).resolve().parents[2]

PROBE = """
import contextlib, io, json, sys
from kvcomm.cli.app import run
HEAVY = ("torch", "transformers", "numba")
told = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    told.append([code, err.getvalue(), [name for name in HEAVY if name in sys.modules]])
print(json.dumps(told))
"""
"""Runs command lines in a process that has imported nothing yet."""

NOTHING = "nowhere/at-all.file"
PARENTS = {
    "run": ["--prompt", "Hi."],
    "doctor": [],
    "top": [],
    "serve": [],
    "tune": ["--data", NOTHING, "--workload", "gsm8k", "--out", "p.toml"],
    "context create": ["c", "--text", "Hi."],
    "context fork": ["c", "d"],
    "context extend": ["c", "--text", "Hi."],
    "context generate": ["c"],
    "context ls": [],
    "context show": ["c"],
    "context rm": ["c"],
    "segment add": ["s", "--text", "Hi."],
    "segment ls": [],
    "segment show": ["s"],
    "segment rm": ["s"],
    "snapshot ls": ["f"],
    "snapshot save": ["c", "f"],
    "snapshot restore": ["f", "c"],
    "snapshot rm": ["f"],
    "anchors ls": ["d"],
    "anchors show": ["d", "3fa9"],
    "anchors prune": ["d", "--edge", "3fa9"],
    "anchors export": ["d", "f"],
    "anchors import": ["f", "d"],
    "anchors fetch": ["d"],
    "anchors send": ["d"],
    "tier ls": ["d"],
    "tier stat": ["d"],
    "tier verify": ["d"],
    "tier prune": ["d", "--bad"],
    "model ls": [],
    "model fetch": ["smollm2-135m"],
    "model rm": ["smollm2-135m"],
    "bench prefix": [],
    "bench decode": [],
    "bench fork": [],
    "bench restore": [],
    "bench reuse": [],
    "bench serve": [],
    "serve keys add": ["ann", "--keys", "k.json"],
    "serve keys ls": ["--keys", "k.json"],
    "serve keys rm": ["ann", "--keys", "k.json"],
    "serve tenants ls": [],
    "serve tenants show": ["ann"],
    "serve tenants rm": ["ann"],
}
"""Every command, with arguments that it would take."""

LOADING = [
    "run",
    "context create",
    "context extend",
    "context generate",
    "segment add",
    "snapshot restore",
    "bench prefix",
    "bench decode",
    "bench fork",
    "bench restore",
    "bench reuse",
    "bench serve",
    "tune",
    "serve",
]
"""Those that take --model."""

WRONG = {
    "numbers": [
        "run --prompt Hi. --max-new-tokens none",
        "run --prompt Hi. --temperature -1",
        "run --prompt Hi. --seed -1",
        "run gsm8k --rounds 0",
        "bench prefix --prefix-tokens 0",
        "bench decode --streams 1,none",
        "bench fork --repeats 0",
        "bench reuse --confidence 2",
        "bench reuse --runs 0",
        "bench serve --num-prompts 0",
        "tune --data pyproject.toml --workload gsm8k --out p.toml --budget soon",
        "tune --data pyproject.toml --workload gsm8k --out p.toml --confidence 2",
        "top --interval never",
        "serve --port 99999",
        "serve --port many",
        "serve --pool-tokens -5",
        "serve --max-requests 0",
        "serve --body-timeout 0",
        "serve --kv-events tcp://*:5557 --kv-events-block-size 0",
        "serve keys add ann --keys k.json --max-requests 0",
        "tier prune folder --keep-bytes -1",
    ],
    "names": [
        "doctor no-such-model",
        "doctor smollm2-135m --weights int7",
        "run --prompt Hi. --weights int7",
        "bench decode --weights int7",
        "serve --weights int7",
        "run no-such-team",
        "run --prompt Hi. --adapter tone",
        "bench reuse --team no-such-team",
        "bench serve --dataset-name none",
        "tune --data pyproject.toml --workload no-such-team --out p.toml",
        "tune --data pyproject.toml --workload gsm8k --out p.toml --basis none",
        "model fetch no-such-model",
        "model rm no-such-model",
        "serve --dtype float63",
        "run --prompt Hi. --dtype float63",
        "bench decode --dtype float63",
        "serve --log-level loud",
        "serve --tool-parser none",
        "serve --allowed-host http://here/",
        "serve keys add ann --keys k.json --role king",
        "context generate no-such-context",
        "context show no-such-context",
        "context create a/b --text Hi.",
        "segment show no-such-segment",
        "segment add a/b --text Hi.",
        "context create c --segment no-such-segment",
        "tier ls ftp://there",
        "serve --tier ftp://there",
    ],
    "files": [
        f"run {NOTHING[:-5]}.toml --input question=x",
        f"run --prompt Hi. --adapter tone={NOTHING}",
        f"run gsm8k --input question=x --profile {NOTHING}",
        f"context create c --file {NOTHING}",
        f"segment add s --file {NOTHING}",
        f"snapshot ls {NOTHING}",
        f"snapshot restore {NOTHING} c",
        f"snapshot rm {NOTHING}",
        f"anchors ls {NOTHING}",
        f"anchors show {NOTHING} 3fa9",
        f"anchors prune {NOTHING} --edge 3fa9",
        f"anchors export {NOTHING} f.tar",
        f"anchors import {NOTHING} d",
        f"anchors send {NOTHING}",
        f"bench reuse --load {NOTHING}",
        f"bench reuse --data {NOTHING}",
        f"bench serve --dataset-name mooncake --dataset-path {NOTHING}",
        f"tune --data {NOTHING} --workload gsm8k --out p.toml",
        f"tune --data pyproject.toml --check {NOTHING}",
        f"serve --config {NOTHING}",
        f"serve --keys {NOTHING}",
        f"serve --prior {NOTHING}",
        "serve --prior pyproject.toml",
        f"serve --adapter tone={NOTHING}",
        f"serve --tier folder --tier-secret-file {NOTHING}",
        f"serve keys ls --keys {NOTHING}",
    ],
    "contradictions": [
        "doctor --weights int8",
        "run --prompt Hi. --weights int8 --adapter tone=anchors",
        "serve --weights int8 --adapter tone=anchors",
        "run",
        "run gsm8k --prompt Hi.",
        "run gsm8k --raw --input question=x",
        "run gsm8k",
        "run --prompt Hi. --input question=x",
        "run --prompt Hi. --rounds 2",
        "context create c",
        "segment add s",
        "segment add s --text Hi. --file pyproject.toml",
        "anchors prune anchors",
        "anchors import pyproject.toml anchors",
        "anchors fetch anchors",
        "tier prune folder",
        "bench serve --dataset-name mooncake",
        "bench serve --dataset-path pyproject.toml",
        "tune --data pyproject.toml",
        "tune --data pyproject.toml --out p.toml",
        "tune --data pyproject.toml --workload gsm8k --out p.toml --check p.toml",
        "serve --host 0.0.0.0",
        "serve --cors-origin *",
        "serve --tier-bytes 5",
        "serve keys rm ann --keys k.json --snapshots",
    ],
}


def refused(lines: list[list[str]], folder: Path) -> None:
    """Every line is refused with a word on stderr, none of the heavy packages imported."""
    environment = {**os.environ, "KVCOMM_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=REPOSITORY,
        env=environment,
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for line, (code, said, heavy) in zip(lines, told, strict=True):
        assert code in (1, 2), (line, said)
        assert said.startswith("error: "), (line, said)
        assert heavy == [], (line, said)


def test_unknown_options(tmp_path: Path) -> None:
    refused([[*name.split(), *rest, "--nonsense"] for name, rest in PARENTS.items()], tmp_path)


def test_unknown_models(tmp_path: Path) -> None:
    lines = [
        [*name.split(), *PARENTS[name], "--model", model] for name in LOADING for model in ("none", "pyproject.toml")
    ]
    refused(lines, tmp_path)


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_wrong(kind: str, tmp_path: Path) -> None:
    refused([line.split() for line in WRONG[kind]], tmp_path)


def test_every_command_is_asked() -> None:
    """What `PARENTS` names is all that there is."""

    def names(group: typer.Typer, before: tuple[str, ...] = ()) -> Iterator[str]:
        for command in group.registered_commands:
            yield " ".join((*before, command.name or command.callback.__name__))
        for inner in group.registered_groups:
            yield from names(inner.typer_instance, (*before, inner.name))

    assert {*names(app), "serve"} == set(PARENTS)
