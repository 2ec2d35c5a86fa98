"""Where exceptions are thrown into an engine, and the proof that they were.

A point is a place that code of a choice, of the model or of the memory passes through. What users hand in fails by
itself: the tokenizer (`FragileTokenizer`), the model (hooks on its modules), the event loop (`FragileLoop`). Calls
inside the engine are wrapped by name while `Faults.installed` lasts. A wrapped call that fails does so before it has
changed anything. An armed point fires once; every exception is an object of its own, so that its way to callers can be
followed.

Left out, because nothing promises to survive them: exceptions that are no `Exception` (an exit of the interpreter, or
Ctrl-C in the engine's own thread, end a process), and failures of giving back (release, settle, closing), which have no
cause outside the engine.
"""

from __future__ import annotations

import asyncio
import errno
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from transformers import (
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcomm import Engine
from kvcomm.errors import PoolExhausted
from kvcomm.lab.faults import attention_watched, places_watched


class InjectedFault(Exception):
    """Raised by nothing but this program."""


class Point(NamedTuple):
    """A place where exceptions can be thrown.

    Attributes:
        kinds: of exceptions that make sense here; see `make_error`.
        in_reach: operations that pass through here.
        every: passes between which a fault comes at most.
        hits_one: whether one fault fails one request at most, as a choice's code does; a pass fails all in it.
        share: how often it is drawn, beside the others. Rarely passed points come more often.
    """

    kinds: tuple[str, ...]
    in_reach: tuple[str, ...]
    every: int = 1
    hits_one: bool = True
    share: int = 1


OWN_CODE = ("InjectedFault", "RuntimeError", "ValueError", "TypeError", "KeyError", "IndexError", "MemoryError")
ALSO_ASSERTIONS = (*OWN_CODE, "AssertionError", "UnicodeDecodeError", "OverflowError")
ASKING = ("ask", "submit", "stream", "answer", "team")
DRAWN = ("ask_drawn",)

POINTS: dict[str, Point] = {
    "sampler.make": Point(OWN_CODE, ASKING),
    "sampler.sample": Point(OWN_CODE, ASKING, 8),
    "logits_processor": Point(OWN_CODE, DRAWN, 4),
    "logprobs": Point(OWN_CODE, ("ask_logprobs",), 4),
    "detokenizer.push": Point(OWN_CODE, ASKING, 8),
    "detokenizer.finish": Point(OWN_CODE, ASKING, 2),
    "tokenizer.encode": Point(ALSO_ASSERTIONS, ("ask_text",)),
    "tokenizer.decode": Point(ALSO_ASSERTIONS, ASKING, 8),
    "handle.publish": Point(OWN_CODE, ASKING, 8),
    "loop.wake": Point(("closed loop",), ("async",), 4),
    "request.completion": Point(OWN_CODE, ASKING, 2),
    "context.complete": Point(OWN_CODE, ("extend", "answer")),
    "tree.match": Point(OWN_CODE, ASKING, 2),
    "tree.insert": Point(OWN_CODE, ASKING, 2),
    "reuse.plan": Point(OWN_CODE, ("ask_moved",)),
    "reuse.assemble": Point(OWN_CODE, ("ask_moved",), share=5),
    "reuse.look": Point(OWN_CODE, ("ask_moved",), share=3),
    "reuse.advance": Point(OWN_CODE, ("ask_moved",), share=3),
    "reuse.publish": Point(OWN_CODE, ("ask_moved",), 2),
    "learner.after": Point(OWN_CODE, ASKING),
    "model.forward": Point(ALSO_ASSERTIONS, ASKING, 6, hits_one=False),
    "model.layer": Point(ALSO_ASSERTIONS, ASKING, 12, hits_one=False),
    "model.logits": Point(("nan", "inf"), ASKING, 6, hits_one=False),
    "attention.prepare": Point(OWN_CODE, ASKING, 6, hits_one=False),
    "attention.layer": Point(OWN_CODE, ASKING, 12, hits_one=False),
    "pool.allocate": Point(("PoolExhausted", "MemoryError"), ASKING, 2),
    "pool.copy_page": Point(("PoolExhausted", "MemoryError", "RuntimeError"), ("answer_of_fork",)),
    "snapshot.write": Point(("disk full",), ("save",)),
    "snapshot.read": Point(("unreadable",), ("restore",)),
}

PROCESSORS = (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def make_error(kind: str) -> Exception:
    """A fresh exception."""
    text = "thrown in by the evaluation"
    special: dict[str, Callable[[], Exception]] = {
        "InjectedFault": lambda: InjectedFault(text),
        "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, text),
        "PoolExhausted": lambda: PoolExhausted(text),
        "closed loop": lambda: RuntimeError("Event loop is closed"),
        "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
        "unreadable": lambda: OSError(errno.EIO, "Input/output error"),
    }
    if kind in special:
        return special[kind]()
    builtin = getattr(sys.modules["builtins"], kind)
    assert issubclass(builtin, Exception), kind
    return builtin(text)


class _Armed(NamedTuple):
    passes_left: int
    kind: str


class Faults:
    """Points that are armed, and what became of them. Thread-safe.

    Attributes:
        reached, fired: by point: how often code came by, and how often it met a fault.
    """

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        self.fired: Counter[str] = Counter()
        self.errors: list[Exception] = []
        self._points_of: dict[int, str] = {}
        self._armed: dict[str, _Armed] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Faults:
        return self  # a copied tokenizer fails where its original does

    def arm(self, point: str, passes: int, kind: str) -> None:
        """Let a point fail after it has been passed `passes` times."""
        assert kind in POINTS[point].kinds, (point, kind)
        with self._lock:
            self._armed[point] = _Armed(passes, kind)

    def disarm(self) -> None:
        """Nothing fails any more."""
        with self._lock:
            self._armed.clear()

    def forget(self) -> None:
        """Nothing fails any more, and whatever was thrown has been dealt with; the counts stay."""
        with self._lock:
            self._armed.clear()
            self._points_of.clear()
            self.errors.clear()

    def strikes(self, point: str) -> str | None:
        """Code has come to a point: the kind of fault it meets, if it does."""
        with self._lock:
            self.reached[point] += 1
            armed = self._armed.get(point)
            if armed is None:
                return None
            if armed.passes_left > 0:
                self._armed[point] = armed._replace(passes_left=armed.passes_left - 1)
                return None
            del self._armed[point]
            self.fired[point] += 1
            return armed.kind

    def reach(self, point: str) -> None:
        """Code has come to a point; raises if it is to fail here."""
        kind = self.strikes(point)
        if kind is not None:
            raise self.remembered(point, make_error(kind))

    def remembered(self, point: str, error: Exception) -> Exception:
        """Note an exception that is about to be raised."""
        with self._lock:
            self.errors.append(error)
            self._points_of[id(error)] = point
        return error

    def behind(self, error: BaseException) -> Exception | None:
        """The fault that caused an error, or None."""
        known = (each for each in chained(error) if isinstance(each, Exception) and id(each) in self._points_of)
        return next(known, None)

    def point_of(self, error: Exception) -> str:
        """Where a fault was thrown."""
        return self._points_of[id(error)]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the calls inside the engine."""
        with ExitStack() as stack:
            stack.enter_context(places_watched(self.reach))
            for processor in PROCESSORS:
                call = self._wrap("logits_processor", processor.__call__)
                stack.enter_context(mock.patch.object(processor, "__call__", call))
            yield

    def watch_model(self, model: nn.Module) -> None:
        """Hook the modules of a model; they are hooked for good."""
        model.register_forward_pre_hook(lambda module, inputs: self.reach("model.forward"))
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_pre_hook(lambda module, inputs: self.reach("model.layer"))
            if name == "lm_head":
                module.register_forward_hook(self._spoil)

    def watch_attention(self, engine: Engine) -> None:
        """Let an engine's attention back end fail, before a pass and in one of its layers."""
        attention_watched(engine, self.reach)

    def _wrap(self, point: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            self.reach(point)
            return function(*arguments, **keywords)

        return wrapped

    def _spoil(self, module: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor | None:
        kind = self.strikes("model.logits") if logits.shape[-2] else None  # passes in the middle of a prompt want none
        if kind is None:
            return None
        spoiled = logits.clone()
        spoiled[..., -1, self.fired["model.logits"] % logits.shape[-1]] = float(kind)
        return spoiled


def chained(error: BaseException) -> Iterator[BaseException]:
    """An error and all that stand behind it."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        each = queue.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            queue += [each.__cause__, each.__context__]


class FragileTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that fails where it is told to. `faults` is set behind its making."""

    faults: Faults | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """As the base class."""
        if self.faults is not None:
            self.faults.reach("tokenizer.encode")
        return super().__call__(*arguments, **keywords)

    def encode(self, *arguments: Any, **keywords: Any) -> Any:
        """As the base class."""
        if self.faults is not None:
            self.faults.reach("tokenizer.encode")
        return super().encode(*arguments, **keywords)

    def decode(self, *arguments: Any, **keywords: Any) -> Any:
        """As the base class."""
        if self.faults is not None:
            self.faults.reach("tokenizer.decode")
        return super().decode(*arguments, **keywords)


class FragileLoop(asyncio.SelectorEventLoop):
    """An event loop that may be closed at the moment in which somebody wakes it from another thread."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults = faults
        self.set_exception_handler(lambda loop, context: None)  # tasks that were left behind

    def call_soon_threadsafe(self, *arguments: Any, **keywords: Any) -> Any:
        """As the base class; where it fails the loop stops, as one that is being closed has."""
        try:
            self._faults.reach("loop.wake")
        except RuntimeError:
            super().call_soon_threadsafe(self.stop)
            raise
        return super().call_soon_threadsafe(*arguments, **keywords)
