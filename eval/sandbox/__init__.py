"""Running programs that a model wrote, and judging them where they cannot reach.

Programs and their tests run in two processes. The tests decide; what the program's function gives comes to them as
plain values over a pipe, so that no object of the program's, no patched built-in and no trick with frames, hooks or
threads is ever in the process that decides. `judge` does this; `run_program` runs a program for its output.

What is promised, where `isolation()` gives "bubblewrap" or "namespaces": a program sees Python and the system's
libraries, read-only, an empty folder in memory and no more: no file of the user's, no environment, no other process, no
network. It has no rights, cannot start processes, cannot get more than its limits of memory, processor time, open
files, file size and output, and is gone with its folder when the call returns, or a moment later. A program whose
function does not give what its tests want does not pass.

What is not: anything about a kernel with faults that let a program out; that a program learns nothing from how long
things take; that a program which passes is what somebody meant, for all it shows is the right answers to the questions
of its tests; on machines without a system call filter (`python -m eval.sandbox` says so), that there are no processes
besides, up to a small number. With isolation "none", which nobody gets without asking for it (`--unsafe`), nothing is
promised but the limits of time and memory of each process: programs have the user's files, network and rights.
"""

from eval.sandbox.choosing import WAYS, NoIsolation, isolation, obstacle
from eval.sandbox.running import MAX_OUTPUT, Limits, Tests, Verdict, judge, run_program
from eval.sandbox.ways import NONE, Isolation

__all__ = [
    "MAX_OUTPUT",
    "NONE",
    "WAYS",
    "Isolation",
    "Limits",
    "NoIsolation",
    "Tests",
    "Verdict",
    "isolation",
    "judge",
    "obstacle",
    "run_program",
]
