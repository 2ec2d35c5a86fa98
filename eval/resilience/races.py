"""Saves that race for one name, and for the last places that a tenant has, on a server of their own."""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from eval.resilience.questions import PATIENCE_S, Asking, Question, call
from kvcomm.errors import ServerError
from kvcomm.lab.load.process import ServerProcess

NUM_RACERS = 24
NUM_RACES = 5
NUM_PLACES = NUM_RACES + 3
"""Snapshots that the tenant may have: three are left after the races for one name."""

PLACES = {"KVCOMM_SERVE_MAX_SNAPSHOTS": str(NUM_PLACES)}

WON, TAKEN, FULL = 201, 409, 429


class FoundInRaces(NamedTuple):
    """What came of it; see `Found`. Lost counts refusals of another kind too, and places more or less than there are.

    Attributes:
        racing_winners: of a race for one name; where races differ, of the one that is farthest from 1.
    """

    lost_answers: int
    wrong_answers: int
    leaked_pages: int
    asked: int
    racing_winners: int


def racing_saves(model: str, questions: Sequence[Question]) -> FoundInRaces:
    """So many saves of one context under one name, all at once; then under as many names as there are savers."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess("--model", model, "--snapshots", folder, variables=PLACES) as server,
    ):
        asking = Asking(server.url, model)
        context = _context(server.url, questions[0])
        with asking.meanwhile(questions):
            races = [_race(server.url, context, [f"race-{index}"] * NUM_RACERS) for index in range(NUM_RACES)]
            names = [f"place-{index}" for index in range(NUM_RACERS)]
            places = _race(server.url, context, names)
        code, listed = call(server.url, "GET", "/v1/snapshots")
        call(server.url, "DELETE", f"/v1/contexts/{context}")
        num_kept = len(json.loads(listed)["data"]) if code == 200 else 0
        others = sum(race.total() - race[WON] - race[TAKEN] for race in races)
        missed = abs(num_kept - NUM_PLACES) + abs(places[WON] - (NUM_PLACES - NUM_RACES)) + places.total()
        missed -= places[WON] + places[FULL]
        found = asking.found(refusals_missed=others + missed)
    winners = max((race[WON] for race in races), key=lambda count: abs(count - 1))
    return FoundInRaces(found.lost_answers, found.wrong_answers, found.leaked_pages, found.asked, winners)


def _context(url: str, question: Question) -> str:
    code, body = call(url, "POST", "/v1/contexts", json.dumps({"messages": list(question.chat)}).encode())
    if code != WON:
        raise ServerError(f"the context to be saved could not be made: {code} {body[:200]!r}")
    return str(json.loads(body)["id"])


def _race(url: str, context: str, names: Sequence[str]) -> Counter[int]:
    """How often saving under these names at once had which status."""
    barrier = threading.Barrier(len(names))

    def save(name: str) -> int:
        barrier.wait(PATIENCE_S)
        return call(url, "POST", f"/v1/contexts/{context}/snapshot", json.dumps({"name": name}).encode())[0]

    with ThreadPoolExecutor(len(names)) as threads:
        return Counter(threads.map(save, names))
