"""How many guesses at the next tokens of answers are worth their rows, measured while the engine works.

A row more makes a pass longer: hardly on a GPU, by a tenth and more on a CPU. A guess is right the more often the more
tokens before it are repeated, and where one is right the next one mostly is. Both are counted, and a guess is tried
where a pass with it is expected to give more tokens a second than one without it. What is drawn does not depend on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from kvcomm.engine.fading_line import FADING, FadingLine
from kvcomm.engine.guesses import CERTAIN, MAX_MATCH

ROW_COST = 0.12
"""Of a pass over one row, that a row more takes, before anything was measured."""

MAX_ROW_COST = 0.5
"""What passes on a busy machine seem to say beyond this is not believed: nothing would be tried any more."""

MAX_ROWS = 32
"""Of a pass that tells what a row more takes."""

PRIOR_TRIES = 8.0
"""Tries that the chances known beforehand count for."""


class GuessGain:
    """What guesses of one engine have gained so far. Used by its thread only."""

    def __init__(self) -> None:
        # By repeated tokens: tries and right ones, of first guesses and of those behind a right one. What is known
        # beforehand are counts of SmolLM2's answers in teams.
        self._first = {matched: [PRIOR_TRIES, PRIOR_TRIES * _first_chance(matched)] for matched in _MATCHES}
        self._next = {matched: [PRIOR_TRIES, PRIOR_TRIES * _next_chance(matched)] for matched in _MATCHES}
        self._pass_s = FadingLine()  # seconds of a pass by its rows

    @property
    def row_cost(self) -> float:
        """Share of a pass over one row that a row more takes."""
        line = self._pass_s.fit(min_variance=0.1)
        if line is None:
            return ROW_COST
        one_row_s = line.offset + line.slope
        return min(max(line.slope / one_row_s, 0.0), MAX_ROW_COST) if one_row_s > 0 else MAX_ROW_COST

    def passed(self, num_rows: int, seconds: float) -> None:
        """A pass over so many rows of answers, and no others, has taken so long."""
        if num_rows <= MAX_ROWS:
            self._pass_s.add(num_rows, seconds)

    def tried(self, num_matched: int, num_tried: int, num_right: int) -> None:
        """Guesses behind so many repeated tokens were tried, and so many leading ones were right."""
        for index in range(min(num_tried, num_right + 1)):
            counts = (self._next if index else self._first)[num_matched]
            counts[0] = FADING * counts[0] + 1
            counts[1] = FADING * counts[1] + (index < num_right)

    def shares(self, found: Sequence[tuple[int, int]], num_rows: int) -> list[int]:
        """How many guesses each answer has in the next pass.

        Args:
            found: for each answer the repeated tokens, and the guesses behind them that may be tried.
            num_rows: of all guesses at most.
        """
        shares, cost = [0] * len(found), self.row_cost
        rows, tokens = float(len(found)), float(len(found))
        best = [(-self._first_of(matched), index) for index, (matched, num) in enumerate(found) if matched and num]
        heapq.heapify(best)
        while best and sum(shares) < num_rows:
            negative, index = heapq.heappop(best)
            if -negative * (1 + cost * (rows - 1)) <= cost * tokens:
                break  # and so with all that is less likely
            matched, num = found[index]
            shares[index] += 1
            rows, tokens = rows + 1, tokens - negative
            if shares[index] < num:
                heapq.heappush(best, (negative * self._next_of(matched), index))
        return shares

    def _first_of(self, matched: int) -> float:
        return _chance(self._first, matched)

    def _next_of(self, matched: int) -> float:
        return _chance(self._next, matched)


def _chance(counts: Mapping[int, list[float]], matched: int) -> float:
    if matched == CERTAIN:
        return 1.0
    tries, right = counts[matched]
    return right / tries


_MATCHES = range(1, MAX_MATCH + 1)


def _first_chance(matched: int) -> float:
    return 0.35 if matched < 4 else 0.75


def _next_chance(matched: int) -> float:
    return 0.6 if matched < MAX_MATCH else 0.9
