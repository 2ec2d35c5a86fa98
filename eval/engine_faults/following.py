"""Operations on open prompts: opened, filled, following answers and each other, closed, given up, forgotten.

A follower is judged as any other request once it has ended: its prompt is what was put into it, the ids of the answers
that it followed among that. That such an answer failed, was cancelled or took too long is a reason for SourceFailed and
for nothing else; that a source is another tenant's, or the prompt would wait for itself, one for InvalidRequest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.engine_faults import holding
from eval.engine_faults.asking import read_params
from eval.engine_faults.records import KEEPS, Flight, Followed, Held, Opened
from eval.engine_faults.world import World, named
from kvcomm import SamplingParams
from kvcomm.errors import InvalidRequest, SourceFailed

PREFILL = SamplingParams(max_new_tokens=0)
HURRIED_S = 0.002
"""A deadline that answers do not always keep."""


def open_prompt(world: World, settings: Mapping[str, Any]) -> None:
    """Open one, with some text."""
    opened = _open(world, settings)
    if opened is not None:
        world.keep_open(opened)


def append(world: World, settings: Mapping[str, Any]) -> None:
    """Put text behind one."""
    with world.opened_taken(settings["which"]) as opened:
        if opened is None:
            open_prompt(world, settings)
        else:
            _append(world, opened, settings["prompt"])


def follow(world: World, settings: Mapping[str, Any]) -> None:
    """Let one follow a request in flight, or another one, or itself."""
    with world.opened_taken(settings["which"]) as opened:
        if opened is None:
            open_prompt(world, settings)
            return
        others = [*world.sources(), opened]
        _follow(world, opened, others[settings["other"] % len(others)], settings["keep"])


def close_open(world: World, settings: Mapping[str, Any]) -> None:
    """Ask for one's answer, and see later; what is closed takes no more text."""
    with world.opened_taken(settings["which"]) as opened:
        if opened is None:
            open_prompt(world, settings)
            return
        if _close(world, opened, settings) and settings["other"] % 2:
            _require_refused(world, opened)


def cancel_open(world: World, settings: Mapping[str, Any]) -> None:
    """Give one up: in words, or by forgetting it."""
    with world.opened_taken(settings["which"]) as opened:
        if opened is None:
            return
        opened.asked.was_cancelled = True
        if settings["other"] % 2 and opened.handle is None:
            world.drop_open(opened)
        else:
            opened.prompt.cancel()


def team(world: World, settings: Mapping[str, Any]) -> None:
    """A request, several that follow it, and one that follows all of those; some of them may be given up."""
    tenant = settings["tenant"]
    params, values = read_params(settings)
    assert params is not None, settings
    adapter = world.adapter_of(settings)
    asked = world.asked(world.tokens_of(settings["prompt"]), params, tenant, adapter)
    try:
        handle = world.engine.submit(world.prompt_of(settings["prompt"]), tenant=tenant, **named(adapter), **values)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return
    producer = Flight(asked, handle)
    world.fly(producer)
    readers = [_reader(world, settings, index, producer) for index in range(len(settings["behind"]))]
    _meet(world, settings, producer, [each for each in readers if each is not None])


def answer_behind(world: World, settings: Mapping[str, Any]) -> None:
    """Let a context answer to what a request says while it says it."""
    with world.taken(settings["which"]) as held:
        if held is None or held.flight is not None:
            holding.submit_answer(world, settings)
            return
        producer = _producer(world, held, settings)
        if producer is not None:
            _answer_behind(world, held, producer, settings)


def _producer(world: World, held: Held, settings: Mapping[str, Any]) -> Flight | None:
    """A request of the context's tenant."""
    params, values = read_params(settings)
    assert params is not None, settings
    asked = world.asked(world.tokens_of(settings["prompt"]), params, held.tenant)
    try:
        handle = world.engine.submit(world.prompt_of(settings["prompt"]), tenant=held.tenant, **values)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return None
    producer = Flight(asked, handle)
    world.fly(producer)
    return producer


def _answer_behind(world: World, held: Held, producer: Flight, settings: Mapping[str, Any]) -> None:
    params, values = read_params(settings)
    assert params is not None, settings
    asked, before = holding.asked_of(world, held, None, params)
    followed = Followed(producer, "all")
    try:
        prompt = held.context.follow(producer.handle)
    except Exception as error:
        if not (isinstance(error, SourceFailed) and followed.token_ids is None):
            world.oracle.judge_error(asked, error)
        holding.settled(world, held, before, asked)
        return
    opened = Opened(prompt, asked, [before, followed])
    asked.opened, asked.num_followed = opened, followed.max_tokens
    try:
        handle = prompt.close(**values)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        prompt.cancel()
        holding.settled(world, held, before, asked)
        return
    opened.handle = handle
    world.collect(producer)
    flight = Flight(asked, handle, held, before)
    world.fly(flight)
    world.collect(flight)


def _reader(world: World, settings: Mapping[str, Any], index: int, producer: Flight) -> Opened | None:
    """One that has a role, follows the producer and has a question behind that, asked for at once."""
    opened = _open(world, {**settings, "prompt": settings["roles"][index]})
    if opened is None or not _follow(world, opened, producer, settings["keep"]):
        return None
    if not _append(world, opened, settings["behind"][index]):
        return None
    return opened if _close(world, opened, settings) else None


def _meet(world: World, settings: Mapping[str, Any], producer: Flight, readers: list[Opened]) -> None:
    """One that reads what they all say; then whoever is to leave does."""
    last = _open(world, settings)
    if last is not None and all(_follow(world, last, reader, "all") for reader in readers):
        _close(world, last, settings)
    leaves = settings["leaves"]
    if leaves == "producer":
        producer.asked.was_cancelled = True
        producer.handle.cancel()
    for opened in readers[:1] if leaves == "reader" else ():
        opened.asked.was_cancelled = True
        opened.prompt.cancel()


def _open(world: World, settings: Mapping[str, Any]) -> Opened | None:
    tenant, adapter = settings["tenant"], world.adapter_of(settings)
    asked = world.asked((), PREFILL, tenant, adapter)
    asked.is_hurried = bool(settings.get("is_hurried"))
    more = {"deadline_s": HURRIED_S} if asked.is_hurried else {}
    try:
        prompt = world.engine.open_prompt(tenant=tenant, **named(adapter), **more)
    except Exception as error:
        world.oracle.judge_error(asked, error)
        return None
    opened = Opened(prompt, asked)
    asked.opened = opened
    return opened if _append(world, opened, settings["prompt"]) else None


def _append(world: World, opened: Opened, spec: Mapping[str, Any]) -> bool:
    tokens = world.tokens_of(spec)
    opened.asked.tokens = (*opened.asked.tokens, *tokens)
    try:
        opened.prompt.append(world.prompt_of(spec))
    except Exception as error:
        _failed(world, opened, error)
        return False
    opened.parts.append(tokens)
    return True


def _follow(world: World, opened: Opened, source: Flight | Opened, keep: str) -> bool:
    is_refused = source.asked.tenant != opened.asked.tenant or (isinstance(source, Opened) and source.waits_for(opened))
    followed = Followed(source, keep)
    opened.parts.append(followed)
    opened.asked.num_followed += followed.max_tokens
    try:
        wanted = source.prompt if isinstance(source, Opened) else source.handle
        opened.prompt.follow(wanted, name=f"answer {len(opened.parts)}", keep=KEEPS[keep])
    except InvalidRequest as error:
        if not is_refused:
            _failed(world, opened, error)
            return False
        world.findings.count("sources refused")
        opened.parts.pop()
        opened.asked.num_followed -= followed.max_tokens
        return True  # and it is as it was
    except Exception as error:
        _failed(world, opened, error)
        return False
    if is_refused:
        world.findings.wrong("a source was taken that must be refused", f"{opened.asked} behind {source.asked}")
    return True


def _close(world: World, opened: Opened, settings: Mapping[str, Any]) -> bool:
    params, values = read_params(settings)
    assert params is not None, settings
    opened.asked.params = params
    try:
        handle = opened.prompt.close(**values)
    except Exception as error:
        _failed(world, opened, error)
        return False
    opened.handle = handle
    world.fly(Flight(opened.asked, handle))
    world.drop_open(opened)
    return True


def _require_refused(world: World, opened: Opened) -> None:
    """A closed prompt takes nothing."""
    try:
        opened.prompt.append([5, 6])
    except InvalidRequest:
        world.findings.count("closed prompts refused")
    except Exception as error:
        if not world.oracle.excuses(error):
            world.oracle.judge_error(opened.asked, error)
    else:
        world.findings.wrong("a closed prompt took more text", f"{opened.asked}")


def _failed(world: World, opened: Opened, error: Exception) -> None:
    """A call on an open prompt has failed: why is judged, and the prompt is given up."""
    world.oracle.judge_error(opened.asked, error)
    world.drop_open(opened)
    opened.asked.was_cancelled = True
    opened.prompt.cancel()
