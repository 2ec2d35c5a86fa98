"""`python -m kvcomm`: the `kvcomm` command of this Python, also where its script is not on the path."""

from __future__ import annotations

from kvcomm.cli.app import main

if __name__ == "__main__":
    main()
