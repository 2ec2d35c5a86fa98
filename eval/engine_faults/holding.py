"""Operations on contexts: made, extended, forked while busy, answered, saved, restored, released and forgotten.

After each of them a context must hold exactly the tokens it should: its own and what was added, or its own alone when
the operation failed. That its KV is right as well shows in the next answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from eval.engine_faults.asking import WAYS, read_async, read_params, read_stream
from eval.engine_faults.records import Asked, Flight, Held, Saved
from eval.engine_faults.values import resolve
from eval.engine_faults.world import PROBE, World, named
from kvcomm import Context, SamplingParams
from kvcomm.errors import SnapshotError
from kvcomm.lab.moving import Fidelity

PREFILL = SamplingParams(max_new_tokens=0)
KV_TOLERANCE = 1e-3


def context(world: World, settings: Mapping[str, Any]) -> None:
    """Make one."""
    held = _make(world, settings)
    if held is not None:
        world.keep(held)


def extend(world: World, settings: Mapping[str, Any]) -> None:
    """Compute further text behind one."""
    with world.taken(settings["which"]) as held:
        if held is None:
            context(world, settings)
            return
        asked, before = asked_of(world, held, settings["prompt"], PREFILL)
        try:
            held.context.extend(world.prompt_of(settings["prompt"]))
        except Exception as error:
            world.oracle.judge_error(asked, error)
            settled(world, held, before, asked)
            return
        if asked.context_was_busy:
            asked.tokens = (*_base(world, held), *world.tokens_of(settings["prompt"]))
        world.expect_tokens(held, asked.tokens, asked)


def fork(world: World, settings: Mapping[str, Any]) -> None:
    """Fork one, whatever is done with it meanwhile."""
    parent = world.borrowed(settings["which"])
    if parent is None:
        context(world, settings)
        return
    child = _fork(world, parent)
    if child is not None:
        world.keep(child)


def answer(world: World, settings: Mapping[str, Any]) -> None:
    """Answer behind one: waited for, streamed, or on an event loop."""
    with world.taken(settings["which"]) as held:
        if held is None:
            context(world, {**settings, "prompt": settings["prompt"] or {"ids": list(PROBE)}, "tenant": "a"})
            return
        flight = _begin(world, held, settings)
        if flight is None:
            return
        match settings["way"]:
            case "result":
                world.collect(flight)
            case "stream":
                read_stream(world, flight, settings["after"] * 2, settings["leaves"])
                world.collect(flight)
            case _:
                way = "stream" if settings["leaves"] == "leaves" else "result"
                read_async(world, flight, way, settings["after"] + 1)


def submit_answer(world: World, settings: Mapping[str, Any]) -> None:
    """Answer behind one and see later: it is busy until then."""
    with world.taken(settings["which"]) as held:
        if held is None:
            context(world, {**settings, "prompt": settings["prompt"] or {"ids": list(PROBE)}, "tenant": "a"})
            return
        _begin(world, held, settings)


def answer_of_fork(world: World, settings: Mapping[str, Any]) -> None:
    """Fork one and let parent and child write on at the same time, in the page they share."""
    with world.taken(settings["which"]) as held:
        if held is None:
            context(world, settings)
            return
        child = _fork(world, held)
        if child is None:
            return
        flights = [_begin(world, each, {**settings, "prompt": None}) for each in (held, child)]
        for flight in flights:
            if flight is not None:
                world.collect(flight)
        world.keep(child)


def refused(world: World, settings: Mapping[str, Any]) -> bool:
    """Bad values are refused by a context as well, and it stays as it is; False where there is none."""
    with world.taken(settings["which"]) as held:
        if held is None or held.flight is not None or held.weights != world.weights_of(held.adapter):
            return False
        asked, before = asked_of(world, held, None, PREFILL)
        asked.is_invalid = True
        try:
            handle = held.context.submit(**resolve(settings["sampling"]))
        except Exception as error:
            world.oracle.judge_error(asked, error)
        else:
            flight = Flight(asked, handle, held, before)
            world.fly(flight)
            world.collect(flight)
        world.expect_tokens(held, before, asked)
        return True


def release(world: World, settings: Mapping[str, Any]) -> None:
    """Release one, busy or not."""
    with world.taken(settings["which"]) as held:
        if held is None:
            context(world, settings)
            return
        world.release(held)


def forget(world: World, settings: Mapping[str, Any]) -> None:
    """Lose one without a word."""
    world.forget(settings["which"])


def save(world: World, settings: Mapping[str, Any]) -> None:
    """Write a snapshot."""
    with world.taken(settings["which"]) as held:
        if held is None:
            context(world, settings)
            return
        asked, before = asked_of(world, held, None, PREFILL)
        file = world.folder / f"{settings['which'] % 5}.safetensors"
        try:
            held.context.save(file)
        except Exception as error:
            if not (isinstance(error, SnapshotError) and world.oracle.fired_since(asked, "snapshot.write")):
                world.oracle.judge_error(asked, error)
            settled(world, held, before, asked)
            return
        with world.lock:
            world.snapshots = [saved for saved in world.snapshots if saved.file != file]
            world.snapshots.append(Saved(file, held.context.tokens, held.tenant, held.weights, held.adapter))


def restore(world: World, settings: Mapping[str, Any]) -> None:
    """Read a snapshot that was written; its KV is what it was."""
    saved = _saved(world, settings["which"])
    if saved is None:
        save(world, settings)
        return
    asked = world.asked(saved.tokens, PREFILL, saved.tenant, saved.adapter)
    asked.held_other_weights = saved.weights != asked.weights
    try:
        restored = world.engine.restore(saved.file, tenant=saved.tenant, **named(saved.adapter))
    except Exception as error:
        is_foreign = asked.held_other_weights or not _is_newest(world, saved)
        if not (isinstance(error, SnapshotError) and (is_foreign or _has_read_fault(world, asked))):
            world.oracle.judge_error(asked, error)
        return
    held = Held(restored, saved.tenant, saved.weights, saved.adapter)
    if _is_newest(world, saved):
        world.expect_tokens(held, saved.tokens, asked)
    world.keep(held)


def restore_damaged(world: World, settings: Mapping[str, Any]) -> None:
    """A snapshot with one byte changed, or its end missing, is refused by name."""
    saved = _saved(world, settings["which"])
    if saved is None:
        save(world, settings)
        return
    content = bytearray(saved.file.read_bytes())
    if settings["which"] % 2:
        content[-1 - settings["which"] % 64] ^= 0x10
    else:
        del content[-1 - settings["which"] % 64 :]
    damaged = world.folder / f"damaged-{settings['which']}.safetensors"
    damaged.write_bytes(bytes(content))
    try:
        restored = world.engine.restore(damaged, tenant=saved.tenant)
    except SnapshotError:
        world.findings.count("damage refused")
    except Exception as error:
        if not world.oracle.excuses(error):
            world.findings.wrong(f"a damaged snapshot raises {type(error).__name__}", repr(error))
    else:
        restored.release()
        world.findings.wrong("a damaged snapshot was taken", f"{saved}, {settings}")


def to_cache(world: World, settings: Mapping[str, Any]) -> None:
    """Copy one's KV for transformers; it is what a stock forward gives."""
    with world.taken(settings["which"]) as held:
        if held is None:
            context(world, settings)
            return
        asked, before = asked_of(world, held, None, PREFILL)
        try:
            cache = held.context.to_hf_cache()
        except Exception as error:
            world.oracle.judge_error(asked, error)
            settled(world, held, before, asked)
            return
        tokens = _base(world, held) if asked.context_was_busy else before
        num_tokens = cache.get_seq_length()
        if held.context.fidelity is not Fidelity.EXACT or not num_tokens or asked.held_other_weights:
            return
        cold = world.reference.cache(held.weights, tokens)
        for given, wanted in zip(cache.layers, cold.layers, strict=True):
            for kind in ("keys", "values"):
                other = getattr(wanted, kind)[:, :, :num_tokens]
                if not torch.allclose(getattr(given, kind), other, rtol=0, atol=KV_TOLERANCE):
                    world.findings.wrong("KV differs from a stock forward's", f"{kind} of {asked}")
                    return
        return


def from_cache(world: World, settings: Mapping[str, Any]) -> None:
    """A context from a stock forward's cache."""
    tokens, tenant = world.tokens_of(settings["prompt"]), settings["tenant"]
    adapter = world.adapter_of(settings)
    asked = world.asked(tokens, PREFILL, tenant, adapter)
    try:
        cache = world.reference.cache(asked.weights, tokens)
        made = world.engine.context_from_hf_cache(cache, list(tokens), tenant=tenant, **named(adapter))
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return
    held = Held(made, tenant, asked.weights, adapter)
    world.expect_tokens(held, tokens, asked)
    world.keep(held)


def repair(world: World, settings: Mapping[str, Any]) -> None:
    """Ask for exact KV in place of approximate; later operations find what became of it."""
    with world.taken(settings["which"]) as held:
        if held is None:
            context(world, settings)
            return
        asked, _ = asked_of(world, held, None, PREFILL)
        try:
            job = held.context.repair()
        except Exception as error:
            world.oracle.judge_error(asked, error)
            return
        with world.lock:
            world.jobs.append(job)


def _make(world: World, settings: Mapping[str, Any]) -> Held | None:
    tokens, tenant = world.tokens_of(settings["prompt"]), settings.get("tenant", "a")
    more = WAYS["policy"] if settings.get("way") == "policy" else {}
    adapter = world.adapter_of(settings)
    asked = world.asked(tokens, PREFILL, tenant, adapter, may_move=bool(more))
    try:
        made = world.engine.context(world.prompt_of(settings["prompt"]), tenant=tenant, **named(adapter), **more)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return None
    held = Held(made, tenant, asked.weights, adapter)
    world.expect_tokens(held, tokens, asked)
    return held


def _fork(world: World, parent: Held) -> Held | None:
    asked, _ = asked_of(world, parent, None, PREFILL)
    asked.context_was_released = True  # by somebody else, at any moment
    try:
        child = parent.context.fork()
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return None
    return Held(child, parent.tenant, parent.weights, parent.adapter)


def _begin(world: World, held: Held, settings: Mapping[str, Any]) -> Flight | None:
    """Let a context answer; None if that was refused, which has been judged then."""
    prompt = settings["prompt"]
    params, values = read_params(settings)
    assert params is not None, settings
    asked, before = asked_of(world, held, prompt, params)
    try:
        given = None if prompt is None else world.prompt_of(prompt)
        handle = held.context.submit(prompt=given, **values)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        settled(world, held, before, asked)
        return None
    if asked.context_was_busy:
        before = _base(world, held)
        asked.tokens = (*before, *(() if prompt is None else world.tokens_of(prompt)))
    flight = Flight(asked, handle, held, before)
    world.fly(flight)
    return flight


def asked_of(
    world: World, held: Held, prompt: Mapping[str, Any] | None, params: SamplingParams
) -> tuple[Asked, tuple[int, ...]]:
    """What is asked of a context, and its tokens before (unless a request is running on it)."""
    before = held.context.tokens
    tokens = (*before, *(() if prompt is None else world.tokens_of(prompt)))
    asked = world.asked(tokens, params, held.tenant, held.adapter, may_move=_may_move(held.context))
    asked.context_was_busy = held.flight is not None
    asked.held_other_weights = held.weights != asked.weights
    return asked, before


def _may_move(context: Context) -> bool:
    return context.policy is not None or context.fidelity is not Fidelity.EXACT


def _base(world: World, held: Held) -> tuple[int, ...]:
    """What a context held when its last request, which must have ended, had ended."""
    flight = held.flight
    assert flight is not None
    tokens = world.collect(flight, is_context_as_left=False)
    assert tokens is not None
    return tokens


def settled(world: World, held: Held, before: tuple[int, ...], asked: Asked) -> None:
    """An operation on a context failed: it is as it was."""
    if not asked.context_was_busy:
        world.expect_tokens(held, before, asked)


def _saved(world: World, which: int) -> Saved | None:
    with world.lock:
        return world.snapshots[which % len(world.snapshots)] if world.snapshots else None


def _is_newest(world: World, saved: Saved) -> bool:
    """Whether nobody has written another one in its place."""
    with world.lock:
        return saved in world.snapshots


def _has_read_fault(world: World, asked: Asked) -> bool:
    return world.oracle.fired_since(asked, "snapshot.read")
