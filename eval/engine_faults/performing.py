"""Performs operations by name: alone, or several at once in threads. Nothing they raise leaves them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from eval.engine_faults import asking, following, holding, keeping
from eval.engine_faults.operations import Operation
from eval.engine_faults.world import Hung, World

Act = Callable[[World, Mapping[str, Any]], None]


def perform(world: World, operation: Operation) -> None:
    """Perform one operation; one that never ends costs the world its engine."""
    if not world.is_lost and not world.patience.call(lambda: perform_here(world, operation)):
        world.note_lost(Hung(f"{operation.name} does not end"))


def perform_here(world: World, operation: Operation) -> None:
    """Perform one operation. An exception that gets here comes from a call that must not fail, and is a finding."""
    try:
        ACTS[operation.name](world, operation.settings)
    except Exception as error:
        if not world.oracle.excuses(error):
            world.findings.wrong(f"{operation.name} raises {type(error).__name__}", f"{error!r} in {operation}")


def _refused(world: World, settings: Mapping[str, Any]) -> None:
    is_for_context = "special" not in settings["prompt"] and settings["which"] % 3 == 0
    if not (is_for_context and holding.refused(world, settings)):
        asking.ask(world, settings)


def _fault(world: World, settings: Mapping[str, Any]) -> None:
    world.faults.arm(settings["point"], settings["passes"], settings["kind"])


def _threads(world: World, settings: Mapping[str, Any]) -> None:
    """Several callers at once, each with a few operations one after the other."""
    together = [[Operation.from_json(each) for each in operations] for operations in settings["together"]]

    def run(operations: list[Operation]) -> None:
        for operation in operations:
            perform_here(world, operation)

    threads = [threading.Thread(target=run, args=(operations,), daemon=True) for operations in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _adapter(world: World, settings: Mapping[str, Any]) -> None:
    """Switch adapters when nothing runs."""
    world.check()
    adapters = world.subject.adapters
    world.weights_have_changed = True
    world.subject.activate(adapters[settings["adapter"] % len(adapters)])


def _edit(world: World, settings: Mapping[str, Any]) -> None:
    """Change a weight in place, or back, when nothing runs."""
    world.check()
    world.weights_have_changed = True
    world.subject.edit()


ACTS: Mapping[str, Act] = {
    "ask": asking.ask,
    "ask_drawn": asking.ask,
    "ask_text": asking.ask,
    "ask_logprobs": asking.ask,
    "ask_moved": asking.ask,
    "ask_unusual": asking.ask,
    "ask_refused": _refused,
    "ask_huge": asking.ask,
    "submit": asking.submit,
    "stream": asking.stream,
    "async": asking.await_answer,
    "cancel": asking.cancel,
    "collect": asking.collect,
    "context": holding.context,
    "extend": holding.extend,
    "fork": holding.fork,
    "answer": holding.answer,
    "answer_of_fork": holding.answer_of_fork,
    "submit_answer": holding.submit_answer,
    "answer_behind": following.answer_behind,
    "release": holding.release,
    "forget": holding.forget,
    "save": holding.save,
    "restore": holding.restore,
    "restore_damaged": holding.restore_damaged,
    "to_cache": holding.to_cache,
    "from_cache": holding.from_cache,
    "repair": holding.repair,
    "pin": keeping.pin,
    "unpin": keeping.unpin,
    "quota": keeping.quota,
    "clear": keeping.clear,
    "explain": keeping.explain,
    "segments": keeping.segments,
    "learn": keeping.learn,
    "look": keeping.look,
    "fault": _fault,
    "threads": _threads,
    "adapter": _adapter,
    "edit": _edit,
    "open": following.open_prompt,
    "append": following.append,
    "follow": following.follow,
    "close_open": following.close_open,
    "cancel_open": following.cancel_open,
    "team": following.team,
    "close": lambda world, settings: world.close(),
    "check": lambda world, settings: world.drain() if settings["which"] % 4 == 0 else world.check(),
}
