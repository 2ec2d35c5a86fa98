"""What answers in progress leave of a step, measured while the engine works.

Rows beside answers cost time that the answers feel. A share of their time may go there, and no more: while something
waits to be computed beside them, every pass over answers alone earns some, and every pass with rows beside them is held
against the pace of such passes and pays what it took longer. So answers keep their pace whatever the machine, the model
and the number of rows make of it, and where nothing is earned nothing is spent.

Guesses that are right end an answer in a fraction of its time, and whoever follows it has as much to read. So where
they make answers more than `FAST` times as fast, the share is of the time that these would have taken at that pace.

Other rows make a pass longer by something that does not depend on their number, too: on a CPU in float32 each of 16
takes 1.7 times as long as each of 96. So what has fallen behind waits until enough is earned for many rows at once.

What answers took while nothing waited earns nothing: those that are followed would pay for it. Reading along hides work
and saves none; where a row takes longer beside answers than alone it makes the work more, so under load it is left.
"""

from __future__ import annotations

import math

from kvcomm.engine.fading_line import FadingLine, StraightLine

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

USUAL_CHUNK = 48
"""Rows that are worth waiting for where passes beside answers were all of one size."""

MAX_WASTE = 0.3
"""Of what rows beside answers take in a chunk that is large enough: what does not depend on their number."""

MIN_VARIANCE = 16.0
"""Of the numbers of rows that tell what one takes."""

FAST = 1.25
"""Times as fast as without guesses that answers may be before their readers have a share of what guesses save."""

ROUNDING = 1e-6
"""Of a row: what has been saved for the largest chunk is enough for it."""


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
        self._extra_s = FadingLine()  # that rows beside answers take, by their number
        self._paces: dict[int, float] = {}  # seconds of a pass by the number of answers' rows, without others

    def passed(
        self,
        num_answer_rows: int,
        num_prompt_rows: int,
        num_beside: int,
        seconds: float,
        *,
        is_wanted: bool,
        num_answers: int = 1,
        tokens_a_pass: float = 1.0,
    ) -> None:
        """A pass has taken so long.

        Args:
            num_beside: rows of open prompts and of healing.
            is_wanted: whether more rows would have been computed beside the answers, had there been time.
            num_answers: in progress, with one row each and those of their guesses.
            tokens_a_pass: that right guesses have given so far, of the answer to which they gave least.
        """
        # Only where passes without guesses were seen: those with them are slower, and would earn too much.
        unguessed_s = tokens_a_pass * self._paces.get(num_answers, 0.0)
        if not num_answer_rows:
            num_rows = num_prompt_rows + num_beside
            if num_rows >= MIN_PROMPT_ROWS:
                self._row_s = _smoothed(self._row_s, seconds / num_rows)
        elif not num_beside and not num_prompt_rows:
            self._paces[num_answer_rows] = _smoothed(self._paces.get(num_answer_rows), seconds)
            if is_wanted:
                self._earn(max(seconds, unguessed_s / FAST))
            else:
                self.saved_s = min(0.0, self.saved_s)
        elif num_beside and not num_prompt_rows and (pace_s := self._pace_s(num_answer_rows)) is not None:
            extra_s = max(0.0, seconds - pace_s)
            self._earn(max(pace_s, unguessed_s / FAST))
            self.saved_s -= extra_s
            self._extra_s.add(num_beside, extra_s)
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
        cost = self._cost
        if cost is None:  # the smallest chunk will tell
            return MIN_CHUNK if self.saved_s > 0 else 0
        left_s = self.saved_s - cost.offset
        if left_s < 0:
            return 0
        # Rows may also seem to take no time at all.
        return MAX_ROWS if left_s >= MAX_ROWS * cost.slope else int(left_s / cost.slope + ROUNDING)

    @property
    def chunk(self) -> int:
        """Rows that are worth waiting for: with more of them at once, one would hardly be cheaper."""
        line = self._line
        if line is None:
            return MIN_CHUNK if self._row_s is None else USUAL_CHUNK
        return min(MAX_ROWS, max(MIN_CHUNK, math.ceil(line.offset / (MAX_WASTE * line.slope))))

    @property
    def _cost(self) -> StraightLine | None:
        """Seconds that rows beside answers take, by their number; None: nothing tells yet."""
        line = self._line
        if line is None and self._row_s is not None:
            line = StraightLine(0.0, self._row_s * max(self._dearer, 0.1))
        return line

    @property
    def _line(self) -> StraightLine | None:
        """The same as far as passes of several sizes tell."""
        line = self._extra_s.fit(MIN_VARIANCE)
        return StraightLine(max(0.0, line.offset), line.slope) if line is not None and line.slope > 0 else None

    def _earn(self, seconds: float) -> None:
        """No more than the largest chunk takes: what could not be spent is gone."""
        cost = self._cost
        most_s = math.inf if cost is None else cost.offset + MAX_ROWS * cost.slope
        self.saved_s = min(most_s, self.saved_s + self.share * seconds)

    def _pace_s(self, num_answer_rows: int) -> float | None:
        """Seconds of a pass over answers alone; of the most alike one where this many rows were not seen yet."""
        if not self._paces:
            return None
        nearest = min(self._paces, key=lambda known: abs(known - num_answer_rows))
        return self._paces[nearest]


def _smoothed(former: float | None, newest: float) -> float:
    return newest if former is None else former + SMOOTHING * (newest - former)
