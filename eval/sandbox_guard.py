"""Runs one program inside the sandbox: a script of its own, started by `eval.sandbox`, that imports nothing of kvcomm.

Reads {"program", "limits", "token", "report"} as JSON from stdin, gives up what the program must not have, runs it, and
writes the token to the file descriptor `report` only if the program came to its end: leaving early is not passing.
"""

import json
import os
import resource
import sys

DENIED = (
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.exec",
    "os.system",
    "os.kill",
    "os.killpg",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.remove",
    "os.rmdir",
    "os.rename",
    "os.truncate",
    "os.chroot",
    "subprocess.Popen",
    "pty.spawn",
    "resource.setrlimit",
    "resource.prlimit",
    "signal.pthread_kill",
    "sys._current_frames",
)
DENIED_BEGINNINGS = ("socket.", "ctypes.", "shutil.", "ftplib.", "http.client", "urllib.", "winreg.", "gc.get_")
DENIED_IMPORTS = ("ctypes", "_ctypes", "_posixsubprocess", "_socket", "_multiprocessing", "resource")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the program of stdin."""
    given = json.load(sys.stdin)
    sys.stdin.close()
    token, report = given["token"].encode(), os.fdopen(given["report"], "wb", buffering=0)
    program = given.pop("program")
    _limit(given["limits"])
    _guard(os.getcwd())
    code = compile(program, "<program>", "exec")
    exec(code, {"__name__": "__main__"})
    sys.stdout.flush()
    report.write(token)


def _limit(limits: dict[str, int]) -> None:
    wanted = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _guard(folder: str) -> None:
    """Refuse, for good, what a solution of a programming task has no use for; files are written in `folder` only."""
    inside = os.path.realpath(folder) + os.sep
    written = 0

    def hook(event: str, arguments: tuple) -> None:  # type: ignore[type-arg]
        nonlocal written
        if event in DENIED or event.startswith(DENIED_BEGINNINGS):
            raise PermissionError(f"{event} is not allowed here")
        if event == "import" and arguments[0] in DENIED_IMPORTS:
            raise PermissionError(f"importing {arguments[0]} is not allowed here")
        if event in ("open", "os.mkdir"):
            path = arguments[0]
            is_writing = event == "os.mkdir" or (isinstance(arguments[2], int) and arguments[2] & WRITING)
            if not is_writing:
                return
            if isinstance(path, int):
                raise PermissionError("descriptors are not opened here")
            written += 1
            if written > 16 or not os.path.realpath(os.fsdecode(path)).startswith(inside):
                raise PermissionError("a few files may be written in the current folder, nothing else")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
