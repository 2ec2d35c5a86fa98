"""Evaluations: `python -m eval.NAME`. Each prints its figures, as one JSON object with `--json`.

They use the public API of kvcomm only. Unlike the package, an evaluation owns its process, so the one setting that must
stand before torch is imported is made here.
"""

from __future__ import annotations

import os

# Two torch threads that spin while they wait take the cores from whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
