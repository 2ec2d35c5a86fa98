"""The system calls that a sandboxed process does not get: a seccomp filter, as the kernel wants it.

It closes what namespaces leave open: other processes (so that the limits of one process are those of the whole
program; threads are allowed), sockets (those of a virtual machine's host pass by every network namespace), the user's
kernel keyrings, tracing, shared memory that no limit counts, and the parts of the kernel in which its own faults are
found most often. Refused calls fail with EPERM. Machines whose call numbers are not written down here get no filter.
"""

from __future__ import annotations

import errno
import platform
import struct
from typing import NamedTuple

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERROR, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_CLONE_THREAD = 0x0001_0000
_CLONE3 = 435
_FOREIGN_NUMBERING = 0x4000_0000
"""Where the numbers of x86's x32 calls begin: the same calls once more."""

# io_uring, the calls that make mounts, pidfd_getfd; the same numbers everywhere.
_REFUSED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442)


class _Machine(NamedTuple):
    audit_code: int
    clone: int
    refused: dict[str, int]


_MACHINES = {
    "x86_64": _Machine(
        0xC000_003E,
        56,
        {
            "fork": 57,
            "vfork": 58,
            "socket": 41,
            "shmget": 29,
            "ptrace": 101,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "kcmp": 312,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "bpf": 321,
            "perf_event_open": 298,
            "userfaultfd": 323,
            "unshare": 272,
            "setns": 308,
            "mount": 165,
            "umount2": 166,
            "pivot_root": 155,
            "chroot": 161,
            "name_to_handle_at": 303,
            "open_by_handle_at": 304,
            "kexec_load": 246,
            "kexec_file_load": 320,
            "init_module": 175,
            "finit_module": 313,
            "delete_module": 176,
            "reboot": 169,
            "swapon": 167,
            "swapoff": 168,
            "acct": 163,
            "quotactl": 179,
            "personality": 135,
            "syslog": 103,
            "vmsplice": 278,
            "modify_ldt": 154,
            "iopl": 172,
            "ioperm": 173,
        },
    ),
    "aarch64": _Machine(
        0xC000_00B7,
        220,
        {
            "socket": 198,
            "shmget": 194,
            "ptrace": 117,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "kcmp": 272,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "bpf": 280,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "unshare": 97,
            "setns": 268,
            "mount": 40,
            "umount2": 39,
            "pivot_root": 41,
            "chroot": 51,
            "name_to_handle_at": 264,
            "open_by_handle_at": 265,
            "kexec_load": 104,
            "kexec_file_load": 294,
            "init_module": 105,
            "finit_module": 273,
            "delete_module": 106,
            "reboot": 142,
            "swapon": 224,
            "swapoff": 225,
            "acct": 89,
            "quotactl": 60,
            "personality": 92,
            "syslog": 116,
            "vmsplice": 75,
        },
    ),
}


def filter_program(machine: str | None = None) -> bytes:
    """The filter for a machine, by default this one: an array of `struct sock_filter`; empty: there is none for it."""
    known = _MACHINES.get(machine or platform.machine())
    if known is None:
        return b""
    refuse, missing = _ERROR | errno.EPERM, _ERROR | errno.ENOSYS
    steps = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_IF_EQUAL, 1, 0, known.audit_code),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, 0, 1, _FOREIGN_NUMBERING),
        (_RETURN, 0, 0, missing),
        # The flags of clone3 cannot be seen from here. Told that it is missing, the C library takes clone.
        (_IF_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, missing),
    ]
    for number in (*known.refused.values(), *_REFUSED_EVERYWHERE):
        steps += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse)]
    steps += [
        (_IF_EQUAL, 1, 0, known.clone),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_IF_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
