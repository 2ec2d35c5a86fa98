"""Operations that ask the engine: waited for, streamed, left early, awaited on event loops that close under them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import closing
from typing import Any

from eval.engine_faults.faults import FragileLoop
from eval.engine_faults.patience import SLICE_S
from eval.engine_faults.records import Asked, Flight
from eval.engine_faults.values import REFUSED, TAKEN, resolve
from eval.engine_faults.world import Hung, World, named
from kvcomm import RequestHandle, ReusePolicy, Rung, SamplingParams

WAYS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "policy": {"policy": ReusePolicy(max_divergence=5.0, confidence=0.5)},
    "rung": {"rung": Rung("rotate", 0.25)},
}
"""How far a caller lets moved KV be used."""


class Interrupt(KeyboardInterrupt):
    """Ctrl-C in a caller who reads a stream."""


def ask(world: World, settings: Mapping[str, Any]) -> None:
    """Ask and wait."""
    asked, handle = begin(world, settings)
    if handle is not None:
        finish(world, Flight(asked, handle))


def submit(world: World, settings: Mapping[str, Any]) -> None:
    """Ask and see later."""
    asked, handle = begin(world, settings)
    if handle is not None:
        world.fly(Flight(asked, handle))


def stream(world: World, settings: Mapping[str, Any]) -> None:
    """Read chunk by chunk, perhaps not to the end."""
    asked, handle = begin(world, settings)
    if handle is not None:
        read_stream(world, Flight(asked, handle), settings["after"], settings["leaves"])


def await_answer(world: World, settings: Mapping[str, Any]) -> None:
    """Ask on an event loop."""
    asked, handle = begin(world, settings)
    if handle is not None:
        read_async(world, Flight(asked, handle), settings["way"], settings["after"])


def cancel(world: World, settings: Mapping[str, Any]) -> None:
    """Cancel a request in flight, or one that has ended."""
    with world.lock:
        flight = world.flights[settings["which"] % len(world.flights)] if world.flights else None
    if flight is None:
        submit(world, {**settings, "sampling": {"max_new_tokens": 8}})
        return
    flight.asked.was_cancelled = True
    flight.handle.cancel()


def collect(world: World, settings: Mapping[str, Any]) -> None:
    """Look at a request that was made earlier."""
    with world.lock:
        flight = world.flights[settings["which"] % len(world.flights)] if world.flights else None
    if flight is not None:
        world.collect(flight)


def begin(world: World, settings: Mapping[str, Any]) -> tuple[Asked, RequestHandle | None]:
    """Make a request; None if it was refused, which has been judged then."""
    way, tokens, tenant = settings.get("way", "none"), world.tokens_of(settings["prompt"]), settings["tenant"]
    more = WAYS.get(way, {})
    params, values = read_params(settings)
    adapter = world.adapter_of(settings)
    asked = world.asked(tokens, params or SamplingParams(), tenant, adapter, may_move=bool(more))
    asked.is_invalid = params is None or "special" in settings["prompt"]
    more = {**more, **named(adapter), "reads_cache": settings.get("reads_cache", True)}
    try:
        return asked, world.engine.submit(world.prompt_of(settings["prompt"]), tenant=tenant, **more, **values)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return asked, None


def read_params(settings: Mapping[str, Any]) -> tuple[SamplingParams | None, dict[str, Any]]:
    """The sampling settings as an object, None where they must be refused, and as an engine gets them."""
    values = resolve(settings["sampling"])
    must_refuse = any(is_bad(name, value) for name, value in settings["sampling"].items())
    return (None if must_refuse else as_understood(values)), values


def is_bad(name: str, value: Any) -> bool:
    """Whether a drawn setting is one that must be refused."""
    is_special = isinstance(value, dict)
    return is_special and value["special"] in REFUSED[name] and value["special"] not in TAKEN.get(name, ())


def as_understood(values: Mapping[str, Any]) -> SamplingParams:
    """What the values mean, in plain numbers."""
    plain: dict[str, Any] = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    plain["temperature"] = float(plain.get("temperature", 0.0))
    plain["top_k"] = max(0, plain.get("top_k", 0))
    return SamplingParams(**plain)


def finish(world: World, flight: Flight) -> None:
    """Wait for a request and judge it."""
    world.fly(flight)
    world.collect(flight)


def read_stream(world: World, flight: Flight, num_chunks: int, leaves: str) -> None:
    """Read so many chunks and leave, or read all."""
    world.fly(flight)
    if leaves != "reads all":
        flight.asked.was_cancelled = True
        chunks = iter(flight.handle)
        try:
            with closing(chunks):  # type: ignore[type-var]  # a generator
                for _, _chunk in zip(range(num_chunks), chunks, strict=False):
                    pass
                if leaves == "throws":
                    chunks.throw(Interrupt())  # type: ignore[attr-defined]
        except Interrupt:
            pass
        except Exception:  # how the request ended: judged below
            pass
        if num_chunks % 2:
            return  # nobody asks any more, or much later
    world.collect(flight)


def read_async(world: World, flight: Flight, way: str, num_chunks: int) -> None:
    """Read on an event loop: to the end, not to the end, cancelled, or with the loop closed before the end."""
    world.fly(flight)
    handle = flight.handle
    loop = FragileLoop(world.faults)
    flight.asked.was_cancelled = way != "result"
    try:
        if way == "closed loop":
            task = loop.create_task(_read(handle, None))
            loop.call_later(0.002 * num_chunks, loop.stop)
            loop.run_forever()
            del task
        else:
            reading = _read(handle, num_chunks) if way == "stream" else handle.aresult()
            loop.run_until_complete(_patiently(world, reading, 0.002 * num_chunks if way == "cancelled" else None))
    except Exception as error:  # how the request ended is judged below; a loop that was stopped is the fault's doing
        if isinstance(error, Hung):
            world.note_lost(error)
        flight.asked.was_cancelled = True
    finally:
        loop.close()
    world.collect(flight)


async def _patiently(world: World, reading: Coroutine[Any, Any, object], timeout_s: float | None) -> None:
    """Await, cancel after `timeout_s`. Raises Hung when there is no more hope."""
    if timeout_s is not None:
        await asyncio.wait_for(reading, timeout_s)
        return
    task = asyncio.ensure_future(reading)
    waiting = world.patience.slices()
    while not task.done():
        if next(waiting, None) is None:
            task.cancel()
            raise Hung("an awaited request does not end")
        await asyncio.wait({task}, timeout=SLICE_S)
    task.result()


async def _read(handle: RequestHandle, num_chunks: int | None) -> None:
    """Read so many chunks, None: all of them."""
    chunks = aiter(handle)
    number = 0
    async for _ in chunks:
        number += 1
        if number == num_chunks:
            break
    await chunks.aclose()  # type: ignore[attr-defined]  # a generator
