"""The sandbox against programs that mean harm: none passes, none reaches what is not its own, nothing of it is left.

Everything is tried in every way of keeping programs apart that works here, and, where it is about who decides, without
any: a failing program does not pass then either, as long as it stays in its own process.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.sandbox import (
    MAX_OUTPUT,
    NONE,
    WAYS,
    Isolation,
    Limits,
    Tests,
    Verdict,
    isolation,
    judge,
    obstacle,
    run_program,
)
from eval.sandbox.system_calls import filter_program

Tests.__test__ = False  # type: ignore[attr-defined]  # a name that pytest takes for a class of tests
SHORT = Limits(seconds=120.0, cpu_s=2, memory_bytes=1 << 28)
"""On a busy machine processor time passes slowly: its limit has to be what ends programs, not the clock."""
HASTY = SHORT._replace(seconds=1.0)
"""For programs that only wait."""
ENDLESS = SHORT._replace(cpu_s=1)
"""For programs that compute until they are stopped."""
DOUBLE = Tests("", "double", "assert double(2) == 4\nassert double(-1) == -2\nassert double('a') == 'aa'\n")
WRONG = "\ndef double(x):\n    return None\n"


@pytest.fixture(params=[*WAYS, NONE], ids=str)
def way(request: pytest.FixtureRequest) -> Isolation:
    """Every way that works here, and none."""
    return usable(request.param)


@pytest.fixture(params=WAYS, ids=str)
def apart(request: pytest.FixtureRequest) -> Isolation:
    """Every way that keeps programs apart."""
    return usable(request.param)


@pytest.fixture(params=["best", "none"])
def one(request: pytest.FixtureRequest) -> Isolation:
    """The best way, and none: for what does not depend on the way."""
    return NONE if request.param == "none" else isolation(unsafe=True)


def usable(found: Isolation) -> Isolation:
    """It, if it works here."""
    if (reason := obstacle(found)) is not None:
        pytest.skip(f"{found}: {reason}")
    return found


def judged(program: str, way: Isolation, tests: Tests = DOUBLE, limits: Limits = SHORT) -> Verdict:
    """The verdict on a program, by default on one that has to double numbers and texts."""
    return judge(program, tests, limits, way)


class TestHonestPrograms:
    """What is right passes."""

    def test_a_right_program_passes(self, way: Isolation) -> None:
        verdict = judged("def double(x):\n    print('seen')\n    return x * 2", way)
        assert verdict == Verdict(True, "passed", "seen\n" * 3, "")

    def test_a_program_is_run_for_its_output(self, way: Isolation) -> None:
        verdict = run_program("import math\nassert math.sqrt(16) == 4\nprint('fine')", SHORT, way)
        assert verdict == Verdict(True, "passed", "fine\n")

    def test_what_solutions_use_is_there(self, way: Isolation) -> None:
        program = """
import collections, copy, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, random
import re, statistics, string, sys, threading, typing

sys.setrecursionlimit(20_000)

@dataclasses.dataclass
class Pair:
    one: int

def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)

assert depth(5000) == 5000
assert Pair(1) == Pair(random.randint(1, 1))
assert hashlib.md5(b"").hexdigest().startswith("d41d")
assert __name__ == "__main__"
done = []
thread = threading.Thread(target=done.append, args=(1,))
thread.start()
thread.join()
assert done
open("own", "w").write("x")
assert open("own").read() == "x"
"""
        assert run_program(program, SHORT, way).reason == "passed"

    def test_results_keep_their_types(self, way: Isolation) -> None:
        program = """
import collections, decimal, fractions
Point = collections.namedtuple("Point", "x y")
def give(name):
    return {
        "tuple": (1, [2.0, (True, None)]), "dict": {(1, 2): {"a"}, 3: frozenset("b"), None: b"c"}, "big": -(7 ** 9999),
        "nan": float("nan"), "infinite": -float("inf"), "zero": -0.0, "complex": 1 - 2j, "text": "\\ud800 \\U0001f600",
        "point": Point(1, 2), "decimal": decimal.Decimal("1.10"), "fraction": fractions.Fraction(1, 3),
        "counter": collections.Counter("aab"), "range": range(1, 9, 2), "keys": {1: 2}.keys(), "bytes": bytearray(b"x"),
        "generator": (each for each in (1, 2)), "map": map(str, range(3)),
    }[name]
def endless():
    number = 0
    while True:
        yield number
        number += 1
"""
        code = """
import math
from decimal import Decimal
from fractions import Fraction
found = give("tuple")
assert type(found) is tuple and found == (1, [2.0, (True, None)]) and found[1][1][0] is True
assert type(found[1]) is list and type(found[1][0]) is float and type(found[0]) is int
assert give("dict") == {(1, 2): {"a"}, 3: frozenset("b"), None: b"c"}
assert give("big") == -(7 ** 9999)
assert math.isnan(give("nan")) and give("infinite") == -math.inf and math.copysign(1, give("zero")) == -1
assert give("complex") == 1 - 2j and give("text") == "\\ud800 \\U0001f600"
assert give("point") == (1, 2) and give("decimal") == Decimal("1.1") and give("fraction") == Fraction(1, 3)
assert give("counter") == {"a": 2, "b": 1} and give("range") == range(1, 9, 2) and give("keys") == {1}
assert give("bytes") == b"x" and give(name="generator") != [1, 2] and list(give("generator")) == [1, 2]
assert " ".join(give("map")) == "0 1 2"
try:
    give("nothing")
except KeyError as error:
    assert error.args == ("nothing",)
else:
    assert False
print("all")
"""
        verdict = judged(program, way, Tests("", "give", code))
        assert (verdict.reason, verdict.said) == ("passed", "all\n")

    def test_iterators_are_asked_item_by_item(self, one: Isolation) -> None:
        program = "import itertools\ndef count(n):\n    return map(str, itertools.count(n))"
        code = "from itertools import islice\nassert list(islice(count(3), 3)) == ['3', '4', '5']"
        assert judged(program, one, Tests("", "count", code)).reason == "passed"

    def test_arguments_that_are_changed_are_seen_to_be(self, one: Isolation) -> None:
        program = "def sort(rows, key):\n    rows.sort()\n    key['n'] = len(rows)\n    return rows"
        code = "rows, key = [3, 1], {}\nfound = sort(rows, key=key)\n"
        code += "assert rows == [1, 3] and found is rows and key == {'n': 2}"
        assert judged(program, one, Tests("", "sort", code)).reason == "passed"

    def test_tests_may_use_what_the_task_defines_and_nothing_of_the_program(self, one: Isolation) -> None:
        program = "def helper(x):\n    return 0\ndef other():\n    return 1\ndef double(x):\n    return x * 2"
        beginning = "import math\ndef helper(x):\n    return math.floor(x)\ndef double(x):\n    pass\n"
        assert judged(program, one, Tests(beginning, "double", "assert double(helper(2.5)) == 4")).passed
        verdict = judged(program, one, Tests(beginning, "double", "other()"))
        assert verdict.reason == "NameError: name 'other' is not defined"

    def test_a_task_whose_tests_pass_functions_is_refused_by_name(self, one: Isolation) -> None:
        code = "try:\n    double(len)\nexcept Exception:\n    pass"
        verdict = judged("def double(x):\n    return x", one, Tests("", "double", code))
        assert not verdict.passed
        assert "a value of the type builtin_function_or_method cannot be passed" in verdict.reason


# Programs whose function is wrong; the reason is what shows that the program got as far as it should.
FAILING = {
    "nothing": ("", "NameError: name 'double' is not defined"),
    "gives nothing": (WRONG, "AssertionError"),
    "gives the argument": ("def double(x):\n    return x", "AssertionError"),
    "gives an ellipsis": ("def double(x):\n    return ...", "of the type ellipsis cannot be passed"),
    "raises": ("def double(x):\n    raise ValueError('no')", "ValueError: no"),
    "raises its own": ("class E(Exception):\n    pass\ndef double(x):\n    raise E('no')", "Exception: no"),
    "raises what cannot be passed": ("def double(x):\n    raise ValueError(print)", "ValueError: <built-in"),
    "no program": ("def f(:", "SyntaxError: invalid syntax"),
    "fails at once": ("1 / 0", "ZeroDivisionError: division by zero"),
    "asks": ("input()", "EOFError"),
    "exits": ("def double(x):\n    import sys\n    sys.exit(0)", "SystemExit: 0"),
    "exits at once": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "leaves": ("def double(x):\n    import os\n    os._exit(0)", "ended before its tests: exit status 0"),
    "leaves at once": ("import os\nos._exit(0)", "ended before its tests: exit status 0"),
    "leaves after the last call": (
        "n = 0\ndef double(x):\n    global n\n    n += 1\n    if n == 3:\n        import threading, os, time\n"
        "        threading.Thread(target=lambda: (time.sleep(0.5), os._exit(0))).start()\n        time.sleep(60)\n"
        "    return x * 2",
        "ended before its tests: exit status 0",
    ),
    "interrupts": ("def double(x):\n    raise KeyboardInterrupt", "KeyboardInterrupt"),
    "ends generators": ("def double(x):\n    raise GeneratorExit", "GeneratorExit"),
    "says it passed": ("print('passed')\nraise SystemExit", "SystemExit"),
    "gives an object": (
        "class L:\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return L()",
        "type L",
    ),
    "gives a lying number": (
        "class L(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\n"
        "    def __index__(self):\n        return 4\n    __int__ = __index__\ndef double(x):\n    return L(5)",
        "AssertionError",
    ),
    "gives a lying text": (
        "class L(str):\n    def __eq__(self, other):\n        return True\n    __hash__ = str.__hash__\n"
        "    def __str__(self):\n        return 'aa'\ndef double(x):\n    return L('no') if x == 'a' else x * 2",
        "AssertionError",
    ),
    "gives a lying list": (
        "class L(list):\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return L()",
        "AssertionError",
    ),
    "gives a lying class": (
        "class M(type):\n    def __instancecheck__(cls, x):\n        return True\n"
        "    def __eq__(cls, x):\n        return True\n"
        "    __hash__ = type.__hash__\n    def mro(cls):\n        return [cls, object]\nclass L(metaclass=M):\n"
        "    __class__ = int\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return L()",
        "KeyError: <class '__main__.L'>",
    ),
    "redefines the check": ("def check(f):\n    pass" + WRONG, "AssertionError"),
    "patches built-ins": (
        "import builtins\nbuiltins.AssertionError = type('A', (), {})\nbuiltins.isinstance = lambda *_: True\n"
        "builtins.abs = builtins.len = lambda *_: 0\nbuiltins.__build_class__ = None\n__builtins__ = {}" + WRONG,
        "ended before its tests: exit status 1",
    ),
    "patches types": (
        "import gc\nfor type_ in (int, str, type(None)):\n    held = gc.get_referents(type_.__dict__)[0]\n"
        "    held['__eq__'] = lambda *_: True" + WRONG,
        "AssertionError",
    ),
    "patches by address": (
        "import ctypes\nfor place in range(0, 4096, 8):\n"
        "    ctypes.c_void_p.from_address(id(int) + place).value = 1" + WRONG,
        "ended before its tests: exit status 139",
    ),
    "patches modules": (
        "import sys\nfor module in list(sys.modules.values()):\n    for key in list(vars(module)):\n"
        "        if key in ('WireError', 'Closed', '_require', 'passed', 'ended'):\n"
        "            setattr(module, key, None)" + WRONG,
        "TypeError: 'NoneType' object is not callable",
    ),
    "hooks errors": (
        "import sys, os, threading\nsys.excepthook = threading.excepthook = lambda *_: os._exit(0)\n"
        "sys.unraisablehook = sys.excepthook" + WRONG,
        "AssertionError",
    ),
    "hooks the end": ("import atexit, os\natexit.register(os._exit, 0)" + WRONG, "AssertionError"),
    "traces": (
        "import sys\ndef trace(frame, event, arg):\n    for name in ('reason', 'error', 'breach', 'answer'):\n"
        "        frame.f_locals[name] = None\n    return trace\nsys.settrace(trace)\nsys.setprofile(trace)" + WRONG,
        "ended before its tests: exit status 1",
    ),
    "walks frames": (
        "import sys, threading\ndef every():\n    frames = list(sys._current_frames().values()) + [sys._getframe()]\n"
        "    while frames:\n        frame = frames.pop()\n        yield frame\n        if frame.f_back:\n"
        "            frames.append(frame.f_back)\ndef double(x):\n    for frame in every():\n"
        "        for held in (frame.f_globals, frame.f_locals):\n            for name in list(held):\n"
        "                if name in ('tests', 'reason', 'ended', 'passed', 'check', 'candidate', 'token'):\n"
        "                    held[name] = lambda *_: None\n    return None",
        "AssertionError",
    ),
    "walks all objects": (
        "import gc, types\nfor held in gc.get_objects():\n    if isinstance(held, dict) and 'passed' in held:\n"
        "        held['passed'] = True\n    if isinstance(held, types.FunctionType) and held.__name__ == '_judge':\n"
        "        held.__code__ = (lambda *_: None).__code__" + WRONG,
        "AssertionError",
    ),
    "stays behind in a thread": (
        "import threading, time\ndef late():\n    global double\n    time.sleep(1)\n    double = None\n"
        "threading.Thread(target=late).start()" + WRONG,
        "AssertionError",
    ),
    "audits": ("import sys\nsys.addaudithook(lambda *_: None)" + WRONG, "AssertionError"),
    "answers wrongly without the harness": (
        "import sys, os, json\nwire, service = sys.modules['wire'], sys._getframe(2).f_locals['self']\n"
        "mark = sys._getframe(1).f_locals['message']['mark']\nwhile True:\n"
        "    wire.send(service._answers, {'mark': mark, 'nodes': [], 'value': 4})\n"
        "    mark = wire.receive(service._calls)['mark']",
        "AssertionError",
    ),
}
FORGE = """
import json, os
def forge(**answer):
    content = json.dumps(answer).encode()
    for fd in range(3, 64):
        try:
            os.write(fd, len(content).to_bytes(4, "big") + content)
        except OSError:
            pass
"""
# What is written into the pipes by force; in the end the program answers rightly, so that only the breach can fail it.
FORGING = {
    "ahead of time": f"{FORGE}forge(mark='', nodes=[], value=4)\ndef double(x):\n    return x * 2",
    "ahead of time, without a mark": f"{FORGE}forge(nodes=[], value=4)\ndef double(x):\n    return x * 2",
    "while it is called": f"{FORGE}def double(x):\n    forge(mark='0' * 32, nodes=[], value=4)\n    return x * 2",
    "a verdict": f"{FORGE}def double(x):\n    forge(reason=None, has_ended=False)\n    return x * 2",
    "after its last answer": FORGE
    + "import sys, threading, time\n"
    + "n = 0\ndef double(x):\n    global n\n    n += 1\n    return x * 2\n"
    + "old = sys.modules['wire'].send\ndef send(fd, message):\n    old(fd, message)\n    if n == 3:\n"
    + "        old(fd, message)\nsys.modules['wire'].send = send",
    "no message": "import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'\\xff' * 1000)\n"
    "    except OSError:\n        pass\ndef double(x):\n    return x * 2",
    "closes everything": "import os\nos.closerange(0, 64)\ndef double(x):\n    return x * 2",
}


@pytest.mark.parametrize("name", FAILING)
def test_a_wrong_program_does_not_pass(name: str, one: Isolation) -> None:
    program, reason = FAILING[name]
    verdict = judged(program, one)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize("name", FORGING)
def test_a_program_that_writes_answers_of_its_own_does_not_pass(name: str, one: Isolation) -> None:
    verdict = judged(FORGING[name], one)
    assert not verdict.passed
    assert any(text in verdict.reason for text in ("answered what no function can", "ended before its tests")), verdict


def test_an_answer_that_fits_by_chance_is_of_no_use_a_second_time(one: Isolation) -> None:
    """A program that answers the first call by hand, twice, has answered the second one too early."""
    program = """
import sys
wire = sys.modules["wire"]
def double(x):
    frame = sys._getframe(1)
    while "message" not in frame.f_locals:
        frame = frame.f_back
    answer = {"mark": frame.f_locals["message"]["mark"], "nodes": [], "value": x * 2}
    wire.send(frame.f_locals["self"]._answers, answer)
    return x * 2
"""
    verdict = judged(program, one)
    assert "it carries another mark" in verdict.reason
    assert not verdict.passed


# name: a program that tries something, and what its last line may be; `{victim}` is a file, `{port}` a server's port,
# `{pid}` the process of the tests. Each fails because the system refuses, not because a hook is watching.
REFUSED = {
    "starts programs": ("import subprocess\nsubprocess.run(['/bin/true'])", "PermissionError"),
    "forks": ("import os\nos.fork()", "PermissionError"),
    "starts processes": (
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "PermissionError|No such file|Function not implemented|OSError",
    ),
    "spawns": ("import os\nos.posix_spawn('/bin/true', ['true'], {{}})", "PermissionError"),
    "kills the tests": ("import os\nos.kill({pid}, 9)", "ProcessLookupError|PermissionError"),
    "looks for the tests": ("import os\nos.kill({pid}, 0)", "ProcessLookupError"),
    "kills its parent": (
        "import os\nos.kill(1, 9)\nimport time\ntime.sleep(0.2)\nraise OSError('alive')",
        "alive|PermissionError",
    ),
    "limits its parent": (
        "import os, resource\nresource.prlimit({pid}, resource.RLIMIT_CPU, (0, 0))",
        "ProcessLookupError|PermissionError",
    ),
    "lifts its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "not allowed to raise maximum limit|PermissionError",
    ),
    "reads foreign files": ("open({victim!r}).read()", "FileNotFoundError"),
    "reads accounts": ("open('/etc/passwd').read()", "FileNotFoundError"),
    "looks around": (
        "import os\nassert not os.path.exists('/home') and not os.path.exists('/tmp')\nraise OSError('alone')",
        "alone",
    ),
    "writes foreign files": ("open({victim!r}, 'w').write('dead')", "FileNotFoundError"),
    "removes": ("import os\nos.remove({victim!r})", "FileNotFoundError"),
    "changes Python": ("import os\nopen(os.__file__, 'a')", "Read-only file system|PermissionError"),
    "changes the sandbox": (
        "import sys\nopen(sys.modules['wire'].__file__, 'a')",
        "Read-only file system|PermissionError",
    ),
    "makes folders": ("import os\nos.mkdir('/own')", "Read-only file system|PermissionError"),
    "opens devices": ("open('/dev/vda', 'rb')", "FileNotFoundError"),
    "makes devices": ("import os, stat\nos.mknod('own', stat.S_IFBLK | 0o666, os.makedev(254, 0))", "PermissionError"),
    "reads memory of processes": ("open('/proc/1/mem', 'rb')", "FileNotFoundError"),
    "writes its own memory": ("open('/proc/self/mem', 'wb')", "FileNotFoundError"),
    "sees processes": ("import os\nos.listdir('/proc')", "FileNotFoundError"),
    "connects": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", "PermissionError"),
    "asks for names": (
        "import socket\nsocket.getaddrinfo('localhost', 80)\nsocket.socket()",
        "PermissionError|gaierror",
    ),
    "talks to the host": ("import socket\nsocket.socket(40, socket.SOCK_STREAM)", "PermissionError"),
    "talks locally": ("import socket\nsocket.socket(socket.AF_UNIX)", "PermissionError"),
    "becomes root": ("import os\nos.setuid(0)", "PermissionError|Invalid argument"),
    "becomes another": ("import os\nos.execv('/bin/true', ['true'])", "exit status 0|exit status"),
    "traces by C": ("{libc}assert libc.ptrace(16, 1, 0, 0) == 0, denied()", "denied 1"),
    "writes memory by C": ("{libc}assert libc.process_vm_writev(1, 0, 0, 0, 0, 0) == 0, denied()", "denied 1"),
    "mounts": ("{libc}assert libc.mount(b'none', b'/', b'tmpfs', 0, None) == 0, denied()", "denied 1"),
    "makes namespaces": ("{libc}assert libc.unshare(0x10000000) == 0, denied()", "denied 1"),
    "reads keyrings": ("{libc}assert libc.syscall(KEYCTL, 0, -3, 1) != -1, denied()", "denied 1"),
    "clones": ("{libc}assert libc.syscall(CLONE, 17, 0, 0, 0, 0) != -1, denied()", "denied 1"),
    "takes shared memory": ("{libc}assert libc.shmget(0, 1 << 20, 0o1600) != -1, denied()", "denied 1"),
    "takes memory": ("x = bytearray(1 << 30)", "MemoryError"),
    "computes for ever": ("while True:\n    pass", "used up its 1 s of processor time"),
    "computes for ever, deaf": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass",
        "exit status 137",
    ),
    "fills a file": (
        "f = open('f', 'wb')\nfor _ in range(64):\n    f.write(b'x' * (1 << 20))",
        "File too large|exit status 153",
    ),
    "fills the folder": (
        "held = bytes(1 << 20)\nfor n in range(50):\n    open(f'f{{n}}', 'wb').write(held)",
        "No space left on device",
    ),
    "opens many files": ("held = [open('/dev/null') for _ in range(1000)]", "Too many open files"),
    "starts many threads": (
        "import threading, time\nthreading.stack_size(65536)\n"
        "held = [threading.Thread(target=time.sleep, args=(600,), daemon=True) for _ in range(5000)]\n"
        "for each in held:\n    each.start()",
        "can't start new thread",
    ),
    "overflows the stack": ("import ctypes\nctypes.string_at(0)", "exit status 139"),
}
BY_FILTER = {
    *("starts programs", "forks", "starts processes", "spawns", "connects", "asks for names", "talks to the host"),
    *("talks locally", "traces by C", "writes memory by C", "mounts", "makes namespaces", "reads keyrings", "clones"),
    "takes shared memory",
}
LIBC = """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
KEYCTL, CLONE = {"x86_64": (250, 56), "aarch64": (219, 220)}[platform.machine()]
def denied():
    return f"denied {ctypes.get_errno()}"
"""


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server on this machine that answers everybody here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", REFUSED)
def test_the_system_refuses_what_is_not_the_programs_own(
    name: str, apart: Isolation, tmp_path: Path, port: int
) -> None:
    program, reasons = REFUSED[name]
    if name == "starts many threads" and apart.maps_user and os.getuid() == 0:
        pytest.skip("root's own processes are not counted")
    if name in BY_FILTER and not filter_program():
        pytest.skip("no system call filter for this machine")
    victim = tmp_path / "victim"
    victim.write_text("alive")
    filled = program.format(victim=str(victim), port=port, pid=os.getpid(), libc=LIBC)
    verdict = run_program(filled, ENDLESS if "for ever" in name else SHORT, apart)
    assert not verdict.passed
    assert any(reason in verdict.reason for reason in reasons.split("|")), verdict
    assert victim.read_text() == "alive"


def test_a_program_that_only_waits_is_late(way: Isolation) -> None:
    assert run_program("import time\ntime.sleep(1000)", HASTY, way).reason == "timeout"
    late = judged("import time\ndef double(x):\n    time.sleep(1000)", way, limits=HASTY)
    assert (late.passed, late.reason) == (False, "timeout")


def test_a_function_that_never_returns_uses_up_its_time(way: Isolation) -> None:
    verdict = judged("def double(x):\n    while True:\n        pass", way, limits=ENDLESS)
    assert not verdict.passed
    assert verdict.reason == "the program ended before its tests: used up its 1 s of processor time"


def test_tests_that_never_end_are_limited_too(one: Isolation) -> None:
    verdict = judged("def double(x):\n    return x", one, Tests("", "double", "while True:\n    double(1)"), ENDLESS)
    assert not verdict.passed


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("'x' * (1 << 25)", "a message of"),
        ("['x' * (1 << 20) for _ in range(17)]", "a message of|MemoryError"),
        ("[{} for _ in range(1 << 20)]", "a message of|MemoryError|AssertionError"),
        ("1 << 30_000_000", "AssertionError"),
        ("range(10 ** 30)", "AssertionError"),
    ],
)
def test_a_huge_result_fails_the_program_alone(result: str, reason: str, one: Isolation) -> None:
    limits = SHORT._replace(cpu_s=60)
    verdict = judged(f"def double(x):\n    return {result}", one, limits=limits)
    assert not verdict.passed
    assert any(text in verdict.reason for text in reason.split("|")), verdict


def test_a_deep_result_fails_the_program_alone(one: Isolation) -> None:
    program = (
        "def double(x):\n    held = {}\n    for _ in range(100_000):\n        held = {open: held}\n    return held"
    )
    assert not judged(program.replace("{open: held}", "[held]"), one).passed
    assert not judged(program.replace("{open: held}", "(held,)"), one).passed
    assert not judged(program, one).passed


def test_a_breach_cannot_be_caught_by_the_tests(one: Isolation) -> None:
    """Tests that want an error take none that comes from the program's end."""
    code = "for n in range(3):\n    try:\n        double(n)\n    except BaseException:\n        pass"
    assert judged("def double(x):\n    raise ValueError(x)", one, Tests("", "double", code)).passed
    for way_out in ("import os\n    os._exit(0)", "raise SystemExit", "return print", "import sys\n    sys.exit(0)"):
        assert not judged(f"def double(x):\n    {way_out}", one, Tests("", "double", code)).passed


def test_the_tests_are_nowhere_in_the_programs_process(one: Isolation) -> None:
    """Neither what is asked next, nor what is wanted."""
    code = "secret = 'a secret of the tests'\nassert double(1) == 2, secret\nassert double(2) == 6210535"
    program = """
import gc, sys
def double(x):
    seen = [repr(frame.f_locals) + repr(frame.f_globals) for frame in sys._current_frames().values()]
    seen += [repr(each) for each in gc.get_objects() if isinstance(each, (str, list, dict, tuple))]
    print(any("terces a"[::-1] in each or "5350126"[::-1] in each for each in seen))
    return 2
"""
    verdict = judged(program, one, Tests("", "double", code), SHORT._replace(cpu_s=60))
    assert verdict.reason == "AssertionError"
    assert verdict.output == "False\nFalse\n"


def test_what_a_program_says_of_its_end(one: Isolation) -> None:
    assert run_program("import sys\nsys.exit(0)", SHORT, one).reason == "exit status 0"
    assert run_program("import os\nos._exit(3)", SHORT, one).reason == "exit status 3"
    assert run_program("print('passed')\nraise SystemExit", SHORT, one).passed is False
    assert run_program("assert 1 == 2, 'wrong'", SHORT, one).reason == "AssertionError: wrong"
    assert run_program("def f(:", SHORT, one).reason == "SyntaxError: invalid syntax"


def test_megabytes_of_output_are_cut(one: Isolation) -> None:
    verdict = run_program("for _ in range(20_000): print('x' * 1000)\nprint('end')", Limits(seconds=120, cpu_s=60), one)
    assert verdict.passed
    assert len(verdict.output) == MAX_OUTPUT
    assert verdict.output.endswith("end\n")


def test_output_without_end_does_not_keep_the_run(way: Isolation) -> None:
    for verdict in (
        run_program("while True: print('x' * 1000)", HASTY._replace(cpu_s=60), way),
        judged("def double(x):\n    while True: print('x' * 1000)", way, limits=HASTY._replace(cpu_s=60)),
    ):
        assert not verdict.passed
        assert len(verdict.output) <= MAX_OUTPUT


def test_files_are_gone_afterwards(way: Isolation) -> None:
    verdict = run_program("import os\nopen('a', 'w').write('x')\nprint(os.getcwd())", SHORT, way)
    assert verdict.passed
    assert not Path(verdict.output.strip()).exists()
    assert not (Path.cwd() / "a").exists()


def test_nothing_of_the_environment_is_seen(way: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    verdict = run_program("import os\nprint(sorted(os.environ))", SHORT, way)
    assert verdict.passed
    assert "SECRET" not in verdict.output
    assert "PATH" not in verdict.output


def test_no_descriptor_of_ours_is_open_inside(way: Isolation, tmp_path: Path) -> None:
    """Not even one that programs started from here would inherit."""
    program = "import os\nopen_ones = []\nfor fd in range(64):\n    try:\n        os.fstat(fd)\n"
    program += "        open_ones.append(fd)\n    except OSError:\n        pass\nprint(len(open_ones))"
    before = int(run_program(program, SHORT, way).output)
    with open(tmp_path / "ours", "w") as file:
        os.set_inheritable(file.fileno(), True)
        assert int(run_program(program, SHORT, way).output) == before
    assert before <= 6


@pytest.mark.parametrize("ends", ["late", "itself"])
def test_nothing_is_left_running(ends: str, way: Isolation) -> None:
    """Of a program that is late, and of one that ends while a thread of its sleeps."""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    program = (
        f"import threading, time, sys\nname = {mark!r}\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
    )
    program += "time.sleep(600)" if ends == "late" else "import os\nos._exit(0)"
    before = descendants()
    run_program(program, HASTY, way)
    judged(program + WRONG, way, limits=HASTY)
    assert are_gone(before)


def test_whoever_starts_it_may_be_killed(apart: Isolation, tmp_path: Path) -> None:
    """Programs do not outlive the evaluation that runs them."""
    code = (
        "import sys\nfrom eval.sandbox import *\n"
        f"way = next(each for each in WAYS if str(each) == {str(apart)!r})\n"
        "print('ready', flush=True)\nrun_program('import time; time.sleep(600)', Limits(seconds=600), way)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["TMPDIR"] = str(tmp_path)  # its folder outlives it
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        assert any(len(family_of(owner.pid)) >= 3 or time.sleep(0.05) for _ in range(2400))
        family = family_of(owner.pid)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
    assert any(not any(is_running(each) for each in family) or time.sleep(0.05) for _ in range(2400))


def family_of(pid: int) -> set[int]:
    """A process and all that came from it."""
    found = {pid}
    while True:
        more = {child for child, parent in parents().items() if parent in found} - found
        if not more:
            return found
        found |= more


def parents() -> dict[int, int]:
    """Of every process that runs."""
    found = {}
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = each.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(each.parent.name)] = int(parent)
    return found


def is_running(pid: int) -> bool:
    """Whether it is there, and more than a remembered exit status."""
    return pid in parents()


def descendants() -> set[int]:
    """What came from this process and runs."""
    return family_of(os.getpid())


def are_gone(before: set[int]) -> bool:
    """Whether everything that was not there before ends; killed processes are seen for a moment still."""
    return any(descendants() <= before or time.sleep(0.05) for _ in range(2400))


DATA = Path(os.environ.get("KVCOMM_HUMANEVAL", ""))


@pytest.mark.skipif(not DATA.is_file(), reason="KVCOMM_HUMANEVAL names no file of HumanEval's tasks")
def test_every_canonical_solution_passes_and_no_other() -> None:
    from eval.tasks.humaneval import HumanEval

    task = HumanEval(Limits(seconds=120.0))
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        assert task.score(row["canonical_solution"], {}, row).found == "passed", row["task_id"]
        for body in ("return None", "import os\n    os._exit(0)", "raise SystemExit(0)", "return type('L', (), {})()"):
            assert not task.score(f"    {body}", {}, row).is_right, (row["task_id"], body)
