"""The limits that a process of the sandbox puts on itself before it runs anything that is not ours.

Imports nothing of kvcomm, like everything in this folder: it runs on the bare Python inside the sandbox.
"""

import json
import os
import resource
import sys

NOBODY = 65534
MAX_OPEN_FILES = 64
MAX_TASKS = 64


def given():
    """What the sandbox was started with, from stdin; stdin is empty afterwards."""
    with os.fdopen(os.dup(0), "rb") as file:
        found = json.loads(file.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return found


def confine(limits, uid):
    """Give up what is not needed, for good.

    Args:
        limits: memory_bytes, cpu_s and file_bytes.
        uid: the user to become, for a process that was started as root; None: stay who we are.
    """
    if uid is not None:
        _become(uid)
    # The processor limit first sends a signal that is seen in the exit status, and a second later ends the process.
    _limit(resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1)
    _limit(resource.RLIMIT_AS, limits["memory_bytes"])
    _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _limit(resource.RLIMIT_NPROC, MAX_TASKS)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind, soft, hard=None):
    now = resource.getrlimit(kind)[1]
    soft, hard = (value if now == resource.RLIM_INFINITY else min(value, now) for value in (soft, hard or soft))
    resource.setrlimit(kind, (soft, hard))


def _become(uid):
    os.setgroups([])
    try:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:  # a container that has no such user
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def last_line(error):
    """An error in one line, as at the end of a traceback."""
    name = type(error).__name__
    try:
        text = str(error.msg if isinstance(error, SyntaxError) else error)
    except Exception:  # of what is in it, such as a number with more digits than Python shows
        text = ""
    return f"{name}: {text}".splitlines()[0][:200] if text else name


def leave_path(folder):
    """Take the folder of these modules out of the path again."""
    sys.path[:] = [each for each in sys.path if each != folder]
