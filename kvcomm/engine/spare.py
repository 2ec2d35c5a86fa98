"""What answers in progress leave of a step, measured while the engine works.

Rows beside answers cost time that the answers feel. A share of their time may go there, and no more: while something
waits to be computed beside them, every pass over answers alone earns some, and every pass with rows beside them is held
against the pace of such passes and pays what it took longer. So answers keep their pace whatever the machine, the model
and the number of rows make of it, and where nothing is earned nothing is spent. What answers took while nothing waited
earns nothing: those that are followed would pay for it. Reading along hides work and saves none; where a row takes
longer beside answers than alone (on a CPU in float32 it takes 1.4 times as long) it makes the work more, so under load
it is left.
"""

from __future__ import annotations

import math

SMOOTHING = 0.2
"""Weight of the newest measurement."""

MIN_PROMPT_ROWS = 32
"""Of a pass that tells what a row of a prompt takes."""

MAX_ROWS = 96
"""Beside answers in one pass: what has been earned over a long time is not spent in one stall."""

MANY_ANSWERS = 4
"""In progress at once: the machine is under load."""

MAX_DEARER = 1.1
"""Times as long as in a pass of its own that a row beside answers may take under load."""

MIN_CHUNK = 16
"""Rows of one prompt that are worth a pass with more than the answers' rows."""


class Spare:
    """Time and rows beside answers in progress. Used by the engine's thread only.

    Attributes:
        share: of the time of answers in progress; 0: nothing is done beside them.
        saved_s: earned and not spent.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.saved_s = 0.0
        self._row_s: float | None = None  # of a prompt, in a pass of its own
        self._dearer = 1.0  # times as long as that a row takes beside answers
        self._paces: dict[int, float] = {}  # seconds of a pass by the number of answers' rows, without others

    def passed(
        self, num_answer_rows: int, num_prompt_rows: int, num_beside: int, seconds: float, *, is_wanted: bool
    ) -> None:
        """A pass has taken so long.

        Args:
            num_beside: rows of open prompts and of healing.
            is_wanted: whether more rows would have been computed beside the answers, had there been time.
        """
        if not num_answer_rows:
            num_rows = num_prompt_rows + num_beside
            if num_rows >= MIN_PROMPT_ROWS:
                self._row_s = _smoothed(self._row_s, seconds / num_rows)
        elif not num_beside and not num_prompt_rows:
            self._paces[num_answer_rows] = _smoothed(self._paces.get(num_answer_rows), seconds)
            if is_wanted:
                self._earn(seconds)
            else:
                self.saved_s = min(0.0, self.saved_s)
        elif num_beside and not num_prompt_rows and (pace_s := self._pace_s(num_answer_rows)) is not None:
            extra_s = max(0.0, seconds - pace_s)
            self._earn(pace_s)
            self.saved_s -= extra_s
            if self._row_s:
                self._dearer = _smoothed(self._dearer, extra_s / (num_beside * self._row_s))
            else:
                self._row_s = extra_s / num_beside

    def num_rows(self, num_answer_rows: int, num_answers: int = 1) -> int:
        """Rows that may be computed beside answers in the next pass.

        Args:
            num_answer_rows: theirs, guesses among them.
            num_answers: in progress.
        """
        if not self.share or self._pace_s(num_answer_rows) is None:
            return 0
        if num_answers >= MANY_ANSWERS and self._dearer > MAX_DEARER:
            return 0  # under load what counts is the work, and here it would become more
        if self._row_s is None:  # the smallest chunk will tell
            return MIN_CHUNK if self.saved_s > 0 else 0
        row_s = self._row_s * max(self._dearer, 0.1)
        if self.saved_s >= MAX_ROWS * row_s:  # also where rows seem to take no time at all
            return MAX_ROWS
        return max(0, int(self.saved_s / row_s)) if row_s > 0 else 0

    def _earn(self, seconds: float) -> None:
        """No more than the largest chunk takes: what could not be spent is gone."""
        most_s = math.inf if self._row_s is None else MAX_ROWS * self._row_s * max(self._dearer, 1.0)
        self.saved_s = min(most_s, self.saved_s + self.share * seconds)

    def _pace_s(self, num_answer_rows: int) -> float | None:
        """Seconds of a pass over answers alone; of the most alike one where this many rows were not seen yet."""
        if not self._paces:
            return None
        nearest = min(self._paces, key=lambda known: abs(known - num_answer_rows))
        return self._paces[nearest]


def _smoothed(former: float | None, newest: float) -> float:
    return newest if former is None else former + SMOOTHING * (newest - former)
