"""Puts a command into namespaces of its own, for systems without bubblewrap: a script, run by the bare Python.

    python launch.py SPECIFICATION

SPECIFICATION is JSON: "root", an empty folder to build the new file system on; "shown", pairs of what is shown and
where; "links", pairs of a symbolic link's target and place; "folder" and "folder_bytes", where files may be written;
"maps_user", whether a user namespace is made (else this is root and stays it, without what root may do); "filter",
the system call filter in hexadecimal; "command". The exit status is the command's, 128 and the signal if one ended
it.
"""

import ctypes
import json
import os
import platform
import signal
import sys

NEW_NAMESPACES = 0x0002_0000 | 0x0400_0000 | 0x0800_0000 | 0x2000_0000 | 0x4000_0000
"""Mounts, host name, inter-process communication, process ids, network."""
NEW_USER, NEW_CGROUP = 0x1000_0000, 0x0200_0000
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SET_DEATH_SIGNAL, SET_SECCOMP, DROP_CAPABILITY, SET_NO_NEW_PRIVILEGES = 1, 22, 24, 38
SETGID, SETUID = 6, 7
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def main():
    """Run the command of the specification."""
    given = json.loads(sys.argv[1])
    libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    uid, gid = os.getuid(), os.getgid()
    call("unshare", NEW_NAMESPACES | (NEW_USER if given["maps_user"] else 0))
    if given["maps_user"]:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    libc.unshare(NEW_CGROUP)  # older kernels have none
    sys.exit(ended_as(fork(lambda: first_process(given))))


def first_process(given):
    """Process 1 of the new namespaces: all others end with it."""
    libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    new_file_system(given)
    child = fork(lambda: become(given))
    while True:
        found, status = os.wait()
        if found == child:
            return os.waitstatus_to_exitcode(status)


def new_file_system(given):
    """Only what is shown, read-only, and one folder in memory."""
    root = given["root"]
    call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
    call("mount", b"tmpfs", root.encode(), b"tmpfs", NO_SUID | NO_DEVICES, b"mode=755,size=1m")
    for source, place in given["shown"]:
        show(source, root + place)
    for target, place in given["links"]:
        os.symlink(target, root + place)
    folder = root + given["folder"]
    os.makedirs(folder)
    options = f"mode=1777,size={given['folder_bytes']}".encode()
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", NO_SUID | NO_DEVICES, options)
    old = f"{root}/old"
    os.mkdir(old)
    call("syscall", PIVOT_ROOT[platform.machine()], root.encode(), old.encode())
    os.chdir("/")
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    call("mount", None, b"/", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES, None)
    os.chdir(given["folder"])


def show(source, place):
    """A file or a folder with all that is mounted in it; read-only, but for devices."""
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "w"):
            pass
    call("mount", source.encode(), place.encode(), None, BIND | RECURSIVE, None)
    if not source.startswith("/dev/"):
        attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
        call("syscall", MOUNT_SETATTR, AT_FDCWD, place.encode(), AT_RECURSIVE, ctypes.byref(attributes), 32)


def become(given):
    """Give everything up and turn into the command."""
    os.setsid()
    kept = () if given["maps_user"] else (SETUID, SETGID)  # with these two it becomes another user by itself
    for capability in range(64):
        if capability not in kept:
            libc.prctl(DROP_CAPABILITY, capability, 0, 0, 0)
    call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    content = bytes.fromhex(given["filter"])
    if content:
        call("prctl", SET_SECCOMP, 2, ctypes.byref(Filter(len(content) // 8, content)), 0, 0)
    os.execve(given["command"][0], given["command"], {})


class Filter(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def call(name, *arguments):
    """A function of the C library that gives -1 for an error."""
    arguments = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    if getattr(libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def write(file, text):
    """Into a file of the kernel."""
    with open(file, "w") as opened:
        opened.write(text)


def fork(work):
    """Do some work in a process of its own, which ends with what the work gives."""
    child = os.fork()
    if child:
        return child
    try:
        status = work()
    except BaseException as error:
        sys.stderr.write(f"{error}\n")
        status = 1
    os._exit(status if status >= 0 else 128 - status)


def ended_as(child):
    """How a process ended, as an exit status."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    main()
