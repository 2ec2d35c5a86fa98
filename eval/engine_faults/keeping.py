"""Operations on what an engine keeps: pins, quotas, clearing, segments, explanations, learning, looking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.engine_faults.asking import WAYS
from eval.engine_faults.operations import NAMED
from eval.engine_faults.records import Pin
from eval.engine_faults.world import World, named
from kvcomm import SamplingParams

PREFILL = SamplingParams(max_new_tokens=0)


def pin(world: World, settings: Mapping[str, Any]) -> None:
    """Keep what is cached of a prompt."""
    tokens, tenant = world.tokens_of(settings["prompt"]), settings["tenant"]
    with world.lock:
        world.has_pinned = True
    asked = world.asked(tokens, PREFILL, tenant)
    try:
        num_tokens = world.engine.cache.pin(list(tokens), tenant=tenant)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return
    with world.lock:
        world.pins.append(Pin(tokens, tenant, world.subject.weights, num_tokens))


def unpin(world: World, settings: Mapping[str, Any]) -> None:
    """Undo a pin. Pins of one tenant lie on each other's paths, so none of the others is known to hold any more."""
    with world.lock:
        chosen = world.pins[settings["which"] % len(world.pins)] if world.pins else None
        tenant = settings["tenant"] if chosen is None else chosen.tenant
        tokens = world.tokens_of(settings["prompt"]) if chosen is None else chosen.tokens
        world.pins = [each for each in world.pins if each.tenant != tenant]
    asked = world.asked(tokens, PREFILL, tenant)
    try:
        world.engine.cache.unpin(list(tokens), tenant=tenant)
    except Exception as error:
        world.oracle.judge_error(asked, error)


def quota(world: World, settings: Mapping[str, Any]) -> None:
    """Limit a tenant, or lift its limits."""
    tenant = settings["tenant"]
    with world.lock:
        world.tenants_with_quota.add(tenant)
    world.engine.cache.set_quota(
        cached_tokens=settings["cached_tokens"], held_tokens=settings["held_tokens"], tenant=tenant
    )


def clear(world: World, settings: Mapping[str, Any]) -> None:
    """Drop what is cached, of one tenant or of all; pins with it."""
    tenant = settings["tenant"]
    with world.lock:
        world.pins = [each for each in world.pins if tenant is not None and each.tenant != tenant]
        world.engine.cache.clear(tenant=tenant)


def explain(world: World, settings: Mapping[str, Any]) -> None:
    """Ask for a plan: it covers the prompt."""
    tokens, tenant = world.tokens_of(settings["prompt"]), settings["tenant"]
    adapter = world.adapter_of(settings)
    more = {**(WAYS["policy"] if settings["which"] % 3 == 0 else {}), **named(adapter)}
    asked = world.asked(tokens, PREFILL, tenant, adapter)
    try:
        explained = world.engine.explain(world.prompt_of(settings["prompt"]), tenant=tenant, **more)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return
    spans = explained.plan.spans
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != len(tokens):
        world.findings.wrong("a plan does not cover its prompt", f"{asked}: {explained}")


def segments(world: World, settings: Mapping[str, Any]) -> None:
    """Make a segment anew: it has the tokens that it had before."""
    name, text = NAMED[settings["which"] % len(NAMED)]
    asked = world.asked((), PREFILL, settings["tenant"])
    try:
        made = world.engine.segment(text, name=name)
        if made != world.segment(text, name):
            world.findings.wrong("a segment has other tokens", f"{made}")
    except Exception as error:
        world.oracle.judge_error(asked, error)


def learn(world: World, settings: Mapping[str, Any]) -> None:
    """Let the engine learn from a prompt when it is idle."""
    tenant = settings["tenant"]
    adapter = world.adapter_of(settings)
    asked = world.asked(world.tokens_of(settings["prompt"]), PREFILL, tenant, adapter)
    try:
        job = world.engine.reuse.learn(world.prompt_of(settings["prompt"]), tenant=tenant, **named(adapter))
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return
    with world.lock:
        world.jobs.append(job)


def look(world: World, settings: Mapping[str, Any]) -> None:
    """Look at what there is."""
    tokens, tenant = world.tokens_of(settings["prompt"]), settings["tenant"]
    asked = world.asked(tokens, PREFILL, tenant)
    try:
        num_cached = world.engine.cache.num_cached(list(tokens), tenant=tenant)
        stats = world.engine.cache.stats()
        repr(world.engine)
        texts = [each.text for each in world.engine.contexts]
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return
    if not (0 <= num_cached <= len(tokens) and 0 <= stats.num_free <= stats.num_pages == world.num_pages):
        world.findings.wrong("sizes that cannot be", f"{num_cached} of {len(tokens)}, {stats}")
    world.findings.count("texts read", len(texts))
