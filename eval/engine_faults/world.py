"""The engine under test and all that its callers hold: contexts, requests in flight, pins, quotas.

A caller takes a context out of the list while it works with it and puts it back, so that what a context must hold is
always known; forks are made of contexts that others work with, too. An engine that is lost or closed is replaced, with
everything that was held on it. Sizes are counted here a second time, from the settings alone.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eval.engine_faults.faults import Faults, FragileTokenizer, chained
from eval.engine_faults.findings import Findings, Harm
from eval.engine_faults.oracle import Oracle
from eval.engine_faults.patience import Patience
from eval.engine_faults.records import Asked, Flight, Held, Opened, Pin, Saved
from eval.engine_faults.reference import Reference
from eval.engine_faults.subject import Subject, Weights
from eval.engine_faults.values import SPECIAL
from kvcomm import Completion, Engine, EngineConfig, RequestHandle, SamplingParams, Segment

PROBE = tuple(range(40, 52))
MAX_CONTEXTS = 5
MAX_OPEN = 4


class Hung(Exception):
    """An engine gives no answer."""


class World:
    """One engine after the other on one subject.

    Attributes:
        weights_have_changed: adapters were switched or a weight was edited since the beginning.
        pins: that must hold; `has_pinned`: whether there may be others.
        jobs: idle work that somebody waits for.
        snapshots: that were written.
        is_closed: this engine was closed by its owner.
        tenants_with_quota: whose contexts and requests have been limited.
        folder: for snapshots.
    """

    def __init__(
        self, subject: Subject, settings: Mapping[str, Any], faults: Faults, findings: Findings, folder: Path
    ) -> None:
        self.subject = subject
        self.weights_have_changed = False
        self.faults = faults
        self.findings = findings
        self.config = EngineConfig(**settings)
        self.reference = Reference(subject, frozenset({subject.tokenizer.eos_token_id}))
        self.oracle = Oracle(self, self.reference, faults, findings)
        self.lock = threading.RLock()
        self.patience = Patience()
        self.folder = folder
        self._tokenizer = FragileTokenizer(**_parts_of(subject))
        self._begin()

    def _begin(self) -> None:
        self.engine = Engine(self.subject.model, self._tokenizer, config=self.config)
        self._tokenizer.faults = self.faults
        self.faults.watch_attention(self.engine)
        self.patience.renew()
        self.is_closed = False
        self._lost: BaseException | None = None
        self._held: list[Held] = []
        self.flights: list[Flight] = []
        self._opened: list[Opened] = []
        self.pins: list[Pin] = []
        self.has_pinned = False
        self.jobs: list[Future[Any]] = []
        self.snapshots: list[Saved] = []
        self.tenants_with_quota: set[str] = set()
        self.tenants: set[str] = set()
        self._last_held_s = -1.0
        self._has_forgotten = False
        self._num_taken = 0

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return (self.config.pool_tokens or 0) // self.config.page_size

    @property
    def is_lost(self) -> bool:
        """Whether the engine is of no use any more though nobody closed it."""
        return self._lost is not None

    # What callers ask, counted again.

    def adapter_of(self, settings: Mapping[str, Any]) -> str | None:
        """The adapter that an operation names, None if it names none."""
        which = settings.get("adapter")
        adapters = self.subject.adapters
        return None if which is None else adapters[which % len(adapters)]

    def weights_of(self, adapter: str | None) -> Weights:
        """The weights in force for whoever names this adapter, or none."""
        return self.subject.weights if adapter is None else self.subject.weights._replace(adapter=adapter)

    def asked(
        self, tokens: tuple[int, ...], params: SamplingParams, tenant: str, adapter: str | None = None, **more: Any
    ) -> Asked:
        """A request that is about to be made."""
        with self.lock:
            is_first = tenant not in self.tenants
            self.tenants.add(tenant)
        weights = self.weights_of(adapter)
        return Asked(tokens, params, weights, tenant, self.faults.fired.copy(), is_first=is_first, **more)

    def num_pages_at_most(self, asked: Asked) -> int:
        """Pages that a request needs if its choices shared nothing, one for a page that a context is writing in."""
        longest = len(asked.tokens) + asked.num_followed + int(asked.params.max_new_tokens)
        return int(asked.params.n) * -(-longest // self.config.page_size) + 1

    def num_pages_at_least(self, asked: Asked) -> int:
        """Pages that a request may need at the same time if its choices share what can be shared."""
        prompt, new = len(asked.tokens), int(asked.params.max_new_tokens)
        shared = prompt // self.config.page_size
        if not new:
            return -(-prompt // self.config.page_size)
        return shared + int(asked.params.n) * (-(-(prompt + new) // self.config.page_size) - shared)

    def was_held_since(self, moment: float) -> bool:
        """Whether contexts, pins or idle work that somebody waits for held pages since a moment."""
        with self.lock:
            return self._is_holding() or self._last_held_s >= moment

    def note_held(self) -> None:
        """Something is given back, or a call holds pages for itself."""
        with self.lock:
            self._last_held_s = time.monotonic()

    def prompt_of(self, spec: Mapping[str, Any]) -> Any:
        """What an engine is given as a prompt."""
        if "special" in spec:
            return SPECIAL[spec["special"]]
        if "segments" in spec:
            return [self.segment(text, name) for name, text in spec["segments"]]
        return spec["text"] if "text" in spec else list(spec["ids"])

    def segment(self, text: str, name: str | None) -> Segment:
        """A text tokenized on its own, by stock means."""
        return Segment(tuple(self.subject.tokenizer.encode(text, add_special_tokens=False)), name)

    def tokens_of(self, spec: Mapping[str, Any]) -> tuple[int, ...]:
        """The tokens of a prompt, by stock means."""
        if "special" in spec:
            return ()
        if "segments" in spec:
            return tuple(token for name, text in spec["segments"] for token in self.segment(text, name).token_ids)
        return self.segment(spec["text"], None).token_ids if "text" in spec else tuple(spec["ids"])

    # What callers hold.

    @contextmanager
    def taken(self, which: int) -> Iterator[Held | None]:
        """A context that nobody else works with meanwhile, None where there is none. Put back if it still lives."""
        with self.lock:
            held = self._held.pop(which % len(self._held)) if self._held else None
            self._num_taken += 1
        try:
            yield held
        finally:
            with self.lock:
                self._num_taken -= 1
                self._last_held_s = time.monotonic()
                if held is not None and not held.context.released:
                    self._held.append(held)

    def borrowed(self, which: int) -> Held | None:
        """A context that others may be working with."""
        with self.lock:
            return self._held[which % len(self._held)] if self._held else None

    def keep(self, held: Held) -> None:
        """One more context; the oldest one goes when there are too many."""
        with self.lock:
            self._held.append(held)
            oldest = self._held.pop(0) if len(self._held) > MAX_CONTEXTS else None
        if oldest is not None:
            self.release(oldest)

    def release(self, held: Held) -> None:
        """Release a context, busy or not."""
        flight = held.flight
        if flight is not None:
            flight.asked.was_cancelled = True
        held.context.release()
        self.note_held()
        if flight is not None:
            self.collect(flight)

    def forget(self, which: int) -> None:
        """Drop the last reference to a context without a word."""
        with self.lock:
            if self._held:
                self._has_forgotten = True
                held = self._held.pop(which % len(self._held))
                self.flights = [flight for flight in self.flights if flight is not held.flight]

    @contextmanager
    def opened_taken(self, which: int) -> Iterator[Opened | None]:
        """An open prompt that nobody else works with meanwhile, None where there is none. Put back if it is open."""
        with self.lock:
            opened = self._opened.pop(which % len(self._opened)) if self._opened else None
        try:
            yield opened
        finally:
            if opened is not None and opened.handle is None and not opened.asked.was_cancelled:
                self.keep_open(opened)

    def keep_open(self, opened: Opened) -> None:
        """One more open prompt; the oldest one is given up when there are too many."""
        with self.lock:
            self._opened.append(opened)
            oldest = self._opened.pop(0) if len(self._opened) > MAX_OPEN else None
        if oldest is not None:
            self.give_up(oldest)

    def drop_open(self, opened: Opened) -> None:
        """Nobody asks about an open prompt any more."""
        with self.lock:
            self._opened = [each for each in self._opened if each is not opened]

    def give_up(self, opened: Opened) -> None:
        """Cancel an open prompt."""
        opened.asked.was_cancelled = True
        opened.prompt.cancel()

    def give_up_all(self) -> None:
        """Cancel all open prompts."""
        with self.lock:
            given_up, self._opened = self._opened, []
        for opened in given_up:
            self.give_up(opened)

    def sources(self) -> list[Flight | Opened]:
        """What an open prompt may follow: requests in flight, and other open prompts."""
        with self.lock:
            return [*self.flights, *self._opened]

    def fly(self, flight: Flight) -> None:
        """Ask about a request later. Safe to call again."""
        with self.lock:
            if flight not in self.flights:
                self.flights.append(flight)
            if flight.on is not None:
                flight.on.flight = flight

    def collect(self, flight: Flight, *, is_context_as_left: bool = True) -> tuple[int, ...] | None:
        """Wait for a request and judge how it ended.

        Args:
            is_context_as_left: nothing has been done with its context since.

        Returns:
            The tokens that its context, if any, must have held then; None if all this was done before.
        """
        with self.lock:
            if flight not in self.flights:
                return None
            self.flights.remove(flight)
        if flight.on is not None:
            flight.on.flight = None
        completion = None
        try:
            completion = self.result(flight.handle)
        except Hung as error:
            self.note_lost(error)
        except Exception as error:
            self.oracle.judge_error(flight.asked, error)
        else:
            self.oracle.judge_answer(flight.asked, completion, flight.handle)
        if flight.on is None:
            return ()
        is_kept = completion is not None and int(flight.asked.params.n) == 1
        now = (*flight.asked.tokens, *completion.token_ids) if is_kept and completion else flight.before
        if is_context_as_left:
            self.expect_tokens(flight.on, now, flight.asked)
        return now

    def result(self, handle: RequestHandle) -> Completion:
        """As the handle's.

        Raises:
            Hung: the request does not end.
        """
        if not self.patience.wait(handle.wait):
            raise Hung("a request does not end")
        return handle.result()

    def collect_all(self) -> None:
        """Wait for every request."""
        while self.flights:
            self.collect(self.flights[0])

    def expect_tokens(self, held: Held, tokens: tuple[int, ...], asked: Asked) -> None:
        """A context must hold exactly these."""
        if not held.context.released and held.context.tokens != tokens and not self.is_lost:
            found = f"{list(held.context.tokens)} instead of {list(tokens)}, after {asked}"
            self.findings.wrong("a context holds other tokens", found)

    # Quiet points.

    def check(self) -> None:
        """Nothing runs: pages have owners, the engine answers, and rightly."""
        self.give_up_all()
        self.collect_all()
        self.faults.disarm()
        if not self.is_lost and not self.is_closed:
            self._require_idle()
        if not self.is_lost and not self.is_closed:
            try:
                self.engine.check_integrity()
            except AssertionError as error:
                self.findings.add(Harm.LEAKED, "the books do not balance", str(error))
                self._lost = self._lost or error  # counted once, and nothing is asked of it any more
                self.replace()
                return
        if not self.is_lost and not self.is_closed:
            self._judge_pins()
            self._probe()
        if self.is_lost:
            self.replace()

    def drain(self) -> None:
        """Give everything back: every page must be free. The engine is replaced if it is not."""
        self.check()
        num_missing = self._num_missing()
        if num_missing:
            self.findings.add(Harm.LEAKED, "pages leaked", f"{num_missing} of {self.num_pages} pages", num_missing)
            self.replace()

    def close(self) -> None:
        """Its owner closes the engine, whatever runs; what was held is given back all the same."""
        self.is_closed = True
        self.engine.close()
        self.give_up_all()
        self.collect_all()
        num_missing = self._num_missing()
        if num_missing:
            what = "pages leaked by a closed engine"
            self.findings.add(Harm.LEAKED, what, f"{num_missing} of {self.num_pages} pages", num_missing)
        self._begin()

    def replace(self) -> None:
        """Go on with another engine; nothing is expected of the old one."""
        with suppress(Exception):
            self.patience.call(self.engine.close)
        self.give_up_all()
        self.collect_all()
        self._begin()

    def end(self) -> None:
        """Give everything back and close."""
        self.drain()
        self.engine.close()

    def note_lost(self, error: BaseException) -> None:
        """An engine is found closed though nobody closed it, or does not answer."""
        with self.lock:
            if self._lost is None and not self.is_closed:
                self._lost = error
                cause = error.__cause__ or error
                what = "hangs" if isinstance(error, Hung) else f"closed by {type(cause).__name__}"
                self.findings.add(Harm.LOST, f"an engine {what}", f"{error!r}; {_point(self.faults, error)}")

    def _num_missing(self) -> int:
        """Pages that are not free when nobody holds anything. Everything is given back first."""
        while self._held:  # leaving no name for the last one: its last error may know contexts that were forgotten
            self.release(self._held.pop())
        strip_tracebacks(self.faults)
        gc.collect()
        self._has_forgotten = False  # the collector has been there: a forgotten context holds nothing any more
        self._require_idle()
        self.pins.clear()
        self.engine.cache.clear()
        self.has_pinned = False
        stats = self.engine.cache.stats()
        return stats.num_pages - stats.num_free

    def _require_idle(self) -> None:
        if not self.is_closed and not self.patience.wait(self.engine.wait_idle):
            self.note_lost(Hung("the engine does not come to rest"))

    def _judge_pins(self) -> None:
        for pin in self.pins:
            if pin.weights == self.subject.weights:
                num_cached = self.engine.cache.num_cached(list(pin.tokens), tenant=pin.tenant)
                if num_cached < pin.num_tokens:
                    self.findings.wrong("pinned tokens are gone", f"{num_cached} of {pin}")

    def _probe(self) -> None:
        params = SamplingParams(max_new_tokens=3, ignore_eos=True)
        asked = self.asked(PROBE, params, "a")
        try:
            completion = self.result(self.engine.submit(list(PROBE), params, tenant="a"))
        except Hung as error:
            self.note_lost(error)
        except Exception as error:
            self.oracle.judge_error(asked, error)
        else:
            self.oracle.judge_answer(asked, completion)

    def _is_holding(self) -> bool:
        self.jobs = [job for job in self.jobs if not job.done()]
        return bool(self._held or self.has_pinned or self._num_taken or self.jobs or self._has_forgotten)


def named(adapter: str | None) -> dict[str, str]:
    """The adapter as a keyword, if there is one."""
    return {} if adapter is None else {"adapter": adapter}


def strip_tracebacks(faults: Faults) -> None:
    """Frames of exceptions hold what their callers held: a context in one would never be forgotten."""
    for fault in faults.errors:
        for error in chained(fault):
            error.__traceback__ = None


def _parts_of(subject: Subject) -> dict[str, Any]:
    tokenizer = subject.tokenizer
    names = ("unk_token", "bos_token", "eos_token", "pad_token")
    return {"tokenizer_object": tokenizer.backend_tokenizer, **{name: getattr(tokenizer, name) for name in names}}


def _point(faults: Faults, error: BaseException) -> str:
    fault = faults.behind(error)
    return "no fault behind it" if fault is None else f"behind it a fault at {faults.point_of(fault)}"
