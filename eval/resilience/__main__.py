"""Whether a server loses or changes answers, or pages, when things go wrong; every server is a process of its own.

    python -m eval.resilience [--model smollm2-135m] [--scenarios kill,full_pool] [--quick] [--json]

- kill: SIGKILL under load, and a server in its place; whoever got no whole answer asks again.
- disconnect: streams that their clients leave in the middle, some before the first token.
- full_pool: many more tokens wanted than the pool has, and a prompt that it can never hold.
- large_body: bodies of 10 MB, declared, chunked and broken off.
- racing_saves: 24 saves of one snapshot name at once, of which one is to win, and as many for the last places.
- slow_loris: connections that send headers, or bodies, a byte at a time.
- bodies: bodies of 4 MB that cost as much as bodies can; how long `/health` takes meanwhile, and how much memory goes.
- crowd: a tenant that holds 256 half-sent requests, then sends 2 times 128 prompts, and another one that asks.
- hoarding: a tenant keeps all it can beside few tokens, pins contexts, and loses its key.

In each of them but the last two clients go on asking. An answer is *wrong* if it differs from what transformers' own
greedy `generate` says, *lost* if there is none after the retries that a client would make, a page *leaked* if it is not
free once nothing is in flight and caches are cleared. What the server should refuse, or cut off, counts as lost when it
does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from eval.command import add_model, add_outputs, finish, note
from eval.figures import Figure, Report
from eval.resilience.bodies import bodies
from eval.resilience.crowd import crowd
from eval.resilience.hoarding import hoarding
from eval.resilience.questions import Found, Question, make_questions
from eval.resilience.races import FoundInRaces, racing_saves
from eval.resilience.scenarios import disconnect, full_pool, kill, large_body, slow_loris

SCENARIOS = (
    "kill",
    "disconnect",
    "full_pool",
    "large_body",
    "slow_loris",
    "racing_saves",
    "hoarding",
    "bodies",
    "crowd",
)
QUICK_DISCONNECTS = 60

AnyFound = Found | FoundInRaces
Scenario = Callable[[str, Sequence[Question]], AnyFound]
Measure = Callable[[str, Sequence[Question]], list[Figure]]

MEASURES: dict[str, Measure] = {"bodies": bodies, "crowd": crowd}
"""Scenarios that are not about answers, with figures of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.resilience", description=__doc__.partition("\n")[0])
    add_model(parser)
    parser.add_argument("--scenarios", type=_names, default=SCENARIOS, metavar="NAME,NAME", help="[all]")
    parser.add_argument("--disconnects", type=int, default=1000, metavar="N", help="streams left [%(default)s]")
    parser.add_argument("--questions", type=int, default=12, metavar="N", help="different ones [%(default)s]")
    parser.add_argument("--prefix-len", type=int, default=96, metavar="N", help="words they share [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of questions and of when clients leave [%(default)s]")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_DISCONNECTS} streams left")
    add_outputs(parser, "resilience")
    options = parser.parse_args(arguments)
    return finish(lambda: _measure(options), options)


def _measure(options: argparse.Namespace) -> Report:
    num_disconnects = QUICK_DISCONNECTS if options.quick else options.disconnects
    known: dict[str, Scenario] = {
        "kill": kill,
        "disconnect": lambda model, questions: disconnect(model, questions, num_disconnects, options.seed),
        "full_pool": full_pool,
        "large_body": large_body,
        "slow_loris": slow_loris,
        "hoarding": hoarding,
        "racing_saves": racing_saves,
    }
    note("answers of transformers alone")
    questions = make_questions(options.model, options.questions, options.prefix_len, options.seed)
    found: dict[str, AnyFound] = {}
    measured: list[Figure] = []
    for name in options.scenarios:
        note(name)
        if name in MEASURES:
            measured += MEASURES[name](options.model, questions)
        else:
            found[name] = known[name](options.model, questions)
    return Report(
        "resilience", figures(found) + measured, {**vars(options), "out": None, "disconnects": num_disconnects}
    )


def figures(found: dict[str, AnyFound]) -> list[Figure]:
    """Sums over all scenarios, then each one's own."""
    goals = {"lost_answers": "0", "wrong_answers": "0", "leaked_pages": "0", "asked": ""}
    units = {"leaked_pages": "pages"}
    each = {name: found[name]._asdict() for name in found}
    total = [
        Figure(id, sum(values[id] for values in each.values()), units.get(id, "answers"), None, goal)
        for id, goal in goals.items()
    ]
    own = [
        Figure(f"{name}_{id}", values[id], units.get(id, "answers"), None, goal)
        for name, values in each.items()
        for id, goal in goals.items()
    ]
    if "disconnect" in each:
        own.append(Figure("disconnect_left_in_stream", each["disconnect"]["left_in_stream"], "streams"))
    if "racing_saves" in each:
        own.append(Figure("racing_winners", each["racing_saves"]["racing_winners"], "saves", goal="1"))
    return total + own


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(SCENARIOS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(SCENARIOS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
