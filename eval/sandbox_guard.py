"""Runs one program inside the sandbox: a script of its own, started by `eval.sandbox`, that imports nothing of kvcomm.

Reads {"program", "limits", "token", "report"} as JSON from stdin, gives up what the program must not have, runs it, and
writes the token to the file descriptor `report` only if the program came to its end: leaving early is not passing.
"""

import json
import os
import resource
import signal
import sys
import sysconfig
import threading
import types

DENIED = frozenset(
    (
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
)
DENIED_BEGINNINGS = ("socket.", "ctypes.", "shutil.", "sqlite3.", "ftplib.", "http.client", "urllib.", "gc.get_")
DENIED_IMPORTS = frozenset(
    ("ctypes", "_ctypes", "_dbm", "_gdbm", "_multiprocessing", "_posixsubprocess", "_socket", "_sqlite3", "resource")
)
UNWATCHED = ("mkfifo", "mknod", "pidfd_open", "pidfd_send_signal")
"""What reaches files and processes and tells no hook."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
READABLE = ("/dev/null", "/dev/urandom", "/usr/share/zoneinfo")
MAX_FILES = 16


def main() -> None:
    """Run the program of stdin."""
    given = json.load(sys.stdin)
    sys.stdin.close()
    token, report = given["token"].encode(), os.fdopen(given["report"], "wb", buffering=0)
    code = compile(given.pop("program"), "<program>", "exec")
    _limit(given["limits"])
    _guard(os.getcwd())
    if _run(code):
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
    """Refuse, for good, what a solution of a programming task has no use for.

    Files are written in `folder` only, and read there and in Python's own library.
    """
    for module in (os, signal, sys.modules["posix"], sys.modules["_signal"]):
        for name in UNWATCHED:
            if hasattr(module, name):
                delattr(module, name)
    inside = os.path.realpath(folder) + os.sep
    library = tuple(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
    readable = (inside, *library, *READABLE)
    # Names of the module could be changed by the program; what the hook holds cannot.
    denied, beginnings, imports, writing, real, decode = (
        DENIED,
        DENIED_BEGINNINGS,
        DENIED_IMPORTS,
        WRITING,
        os.path.realpath,
        os.fsdecode,
    )
    left = MAX_FILES

    def hook(event: str, arguments: tuple) -> None:  # type: ignore[type-arg]
        nonlocal left
        if event in denied or event.startswith(beginnings):
            raise PermissionError(f"{event} is not allowed here")
        if event == "import" and arguments[0] in imports:
            raise PermissionError(f"importing {arguments[0]} is not allowed here")
        if event not in ("open", "os.mkdir"):
            return
        path = arguments[0]
        if isinstance(path, int):
            raise PermissionError("descriptors are not opened here")
        path = real(decode(path))
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & writing):
            if not path.startswith(readable):
                raise PermissionError("only files of the current folder and Python's own may be read")
            return
        left -= 1
        if left < 0 or not path.startswith(inside):
            raise PermissionError("a few files may be written in the current folder, nothing else")

    sys.addaudithook(hook)


def _run(code: types.CodeType) -> bool:
    """Run a program as the main module; whether it came to its end.

    On a thread of its own: no frame of ours, and so no token, stands below those of the program.
    """
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    ended: list[bool] = []

    def run() -> None:
        exec(code, module.__dict__)
        sys.stdout.flush()

    def work() -> None:
        try:
            run()
        except BaseException as error:
            if not isinstance(error, SystemExit):
                sys.excepthook(type(error), error, error.__traceback__)
        else:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return bool(ended)


if __name__ == "__main__":
    main()
