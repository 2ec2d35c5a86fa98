"""The README's `curl` examples, as they stand there, one after the other against one server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcomm.engine.engine import Engine
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S
from tests.server.live import serving

README = Path(__file__).parents[2] / "README.md"
NAMES = "http://127.0.0.1:8000", "smollm2-135m"
"""The server and the model that the README speaks of."""


def commands() -> list[str]:
    """Every command of a shell block that calls curl, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("curl ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_example_is_answered(engine: Engine) -> None:
    assert commands()
    address, model = NAMES
    with serving(engine, ServerSettings(model=model, port=0)) as live:
        for command in commands():
            assert address in command
            ran = subprocess.run(
                ["bash", "-c", command.replace(address, live.url).replace("curl ", "curl --fail-with-body ", 1)],
                capture_output=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
            assert json.loads(ran.stdout), command
