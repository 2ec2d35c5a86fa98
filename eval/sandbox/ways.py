"""How a process is kept apart from everything else.

A way is a command line that is put before the process's own. What a process sees is the same in all of them: the
system's programs and libraries, the Python that runs this, the folder `inside` beside this file, four harmless
devices, all read-only, and one empty folder in memory; no other process, no network, no environment. What it may ask
of the kernel is the rest (`system_calls`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from eval.sandbox.system_calls import filter_program

INSIDE = Path(__file__).with_name("inside")
FOLDER, FOLDER_BYTES = "/kvcomm-sandbox/work", 32 << 20
"""Where files may be written inside, and how much altogether."""
_INSIDE_SEEN = "/kvcomm-sandbox/inside"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store", "/gnu/store")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_CAPABILITIES_KEPT = ("CAP_SETUID", "CAP_SETGID")
"""Of a process that starts as root: it becomes another user before it runs anything that is not ours."""


@dataclass(frozen=True)
class Isolation:
    """A way.

    Attributes:
        name: "bubblewrap"; "namespaces": our own; "none": limits of memory, time and files only.
        maps_user: it makes a user namespace, as plain users have to. Otherwise root is needed, and the process becomes
            a user that nobody else is.
    """

    name: str
    maps_user: bool = True

    def __str__(self) -> str:
        if self.name == "none":
            return "none"
        return f"{self.name}, {'in a user namespace' if self.maps_user else 'as another user'}"

    @property
    def uid(self) -> int | None:
        """The user that a process has to become by itself; None: it stays who it is."""
        return None if self.maps_user or self.name == "none" else 1_000_000_000 + secrets.randbelow(1_000_000_000)

    def command(self, function: str, folder: str, filter_fd: int) -> list[str]:
        """The command line of a process.

        Args:
            function: what it runs, as `module.function` of the folder `inside`.
            folder: an empty one of its own, outside.
            filter_fd: where the system call filter can be read.
        """
        if self.name == "bubblewrap":
            return [*self._bubblewrap(filter_fd), *_python(function, _INSIDE_SEEN)]
        if self.name == "namespaces":
            given = {
                "root": folder,
                "shown": [*_shown(), *((device, device) for device in _DEVICES)],
                "links": _links(),
                "folder": FOLDER,
                "folder_bytes": FOLDER_BYTES,
                "maps_user": self.maps_user,
                "filter": filter_program().hex(),
                "command": _python(function, _INSIDE_SEEN),
            }
            return [_interpreter(), "-I", "-S", "-B", str(INSIDE / "launch.py"), json.dumps(given)]
        return _python(function, str(INSIDE))

    def _bubblewrap(self, filter_fd: int) -> list[str]:
        command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--clearenv"]
        command += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
        if self.maps_user:
            command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
        else:
            command += ["--cap-drop", "ALL", *(each for name in _CAPABILITIES_KEPT for each in ("--cap-add", name))]
        for source, place in _shown():
            # Without this bubblewrap lets nobody else into the folders that it has to make on the way.
            for parent in reversed(PurePosixPath(place).parents[:-1]):
                command += ["--perms", "755", "--dir", str(parent)]
            command += ["--ro-bind", source, place]
        for target, place in _links():
            command += ["--symlink", target, place]
        command += ["--perms", "755", "--dir", "/dev"]
        for device in _DEVICES:
            command += ["--dev-bind", device, device]
        command += ["--size", str(FOLDER_BYTES), "--perms", "1777", "--tmpfs", FOLDER]
        command += ["--remount-ro", "/", "--chdir", FOLDER]
        return [*command, *(["--seccomp", str(filter_fd)] if filter_program() else []), "--"]


NONE = Isolation("none")


def _python(function: str, inside: str) -> list[str]:
    module, name = function.split(".")
    code = f"import sys; sys.path.insert(0, {inside!r}); import {module} as m; sys.path.pop(0); m.{name}()"
    return [_interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", code]


@cache
def _interpreter() -> str:
    """Python itself, not that of a virtual environment: only its own library is shown."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def _shown() -> tuple[tuple[str, str], ...]:
    """Files and folders of the system and of Python, and where they are seen: as a rule where they are."""
    found = [path for path in _SYSTEM if os.path.exists(path) and not os.path.islink(path)]
    library = sysconfig.get_config_var("LIBDIR") or ""
    compiled = sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})
    ours = [_interpreter(), sysconfig.get_path("stdlib"), compiled]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        ours += [str(path) for path in Path(library).glob("libpython3*.so*")]
    for path in map(os.path.realpath, ours):
        if not any(path == shown or path.startswith(shown + os.sep) for shown in found):
            found.append(path)
    return *((path, path) for path in found), (str(INSIDE), _INSIDE_SEEN)


@cache
def _links() -> tuple[tuple[str, str], ...]:
    return tuple((os.readlink(path), path) for path in _SYSTEM if os.path.islink(path))
