"""What keeps programs apart here, and why the rest does not.

python -m eval.sandbox [--json]
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from eval.sandbox import WAYS, obstacle
from eval.sandbox.system_calls import filter_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Print it; the exit code says whether anything works."""
    parser = ArgumentParser(prog="python -m eval.sandbox", description="What keeps programs apart here.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    obstacles = {str(way): obstacle(way) for way in WAYS}
    works = next((name for name, found in obstacles.items() if found is None), None)
    if options.json:
        print(json.dumps({"isolation": works, "obstacles": obstacles, "system_call_filter": bool(filter_program())}))
        return works is None
    for name, found in obstacles.items():
        state = "used" if name == works else "works" if found is None else f"does not work: {found}"
        print(f"{name:<33} {state}")
    print(f"{'system call filter':<33} {'yes' if filter_program() else 'none for this machine'}")
    if works is None:
        print("Nothing works here: evaluations that run programs refuse to start without --unsafe.")
    return works is None


if __name__ == "__main__":
    sys.exit(main())
