"""Which way of keeping a process apart works here: one in which a program that checks some of it has run."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache

from eval.sandbox.running import Limits, run_program
from eval.sandbox.ways import NONE, Isolation
from kvcomm.errors import InvalidRequest

WAYS = (
    Isolation("bubblewrap", maps_user=False),
    Isolation("bubblewrap"),
    Isolation("namespaces", maps_user=False),
    Isolation("namespaces"),
)
"""The best first."""
_TRIAL = """
import os
assert os.getuid() != 0
assert not os.path.exists("/home") and not os.path.exists("/proc/1")
import json, random, re
open("own", "w").write("x")
try:
    open("/usr/own", "w")
except OSError:
    print("kept apart")
"""


class NoIsolation(InvalidRequest):
    """The system offers no way to keep a program apart."""


@cache
def obstacle(way: Isolation) -> str | None:
    """Why a way does not work here; None: it does."""
    if way == NONE:
        return None
    if sys.platform != "linux":
        return "only Linux has what it takes"
    if not way.maps_user and os.getuid() != 0:
        return "only for root"
    if way.name == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    return _trial(way)


def isolation(*, unsafe: bool = False) -> Isolation:
    """The best way that works here.

    Args:
        unsafe: where none does, go on without.

    Raises:
        NoIsolation: none works; says why, and what would help.
    """
    found = next((way for way in WAYS if obstacle(way) is None), None)
    if found is not None:
        return found
    if unsafe:
        return NONE
    reasons = "; ".join(f"{way}: {obstacle(way)}" for way in WAYS)
    raise NoIsolation(
        f"programs that a model wrote cannot be kept apart from this system ({reasons}). Install bubblewrap, or allow "
        "user namespaces; --unsafe runs them with your rights, files and network"
    )


def _trial(way: Isolation) -> str | None:
    """Why a way does not work here; None: a program has run in it and was kept apart."""
    try:
        found = run_program(_TRIAL, Limits(seconds=60.0, cpu_s=30), way)
    except OSError as error:
        return str(error.strerror)
    return None if found.passed and found.output == "kept apart\n" else found.reason
