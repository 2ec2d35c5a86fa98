"""How much time may be spent on learning while requests come without a pause."""

from __future__ import annotations

LOAN_S = 60.0
"""Seconds of work beforehand, of which the share may be spent at once: what is learned first pays longest."""
KNOWN_LOAN_S = 15.0
"""The same where a prior lets text move before anything is learned."""
OVERDUE_S = 1.0
"""Seconds of learning that may pile up before first tokens wait for it."""


class Budget:
    """A share of the time that an engine works. Used by its thread only.

    Attributes:
        served_s: worked on requests.
        spent_s: of learning beside requests.
    """

    def __init__(self, share: float, loan_s: float = LOAN_S) -> None:
        """Make one.

        Args:
            share: of all time that is worked, in [0, 1); 0: nothing is learned while requests come.
            loan_s: seconds that count as worked from the beginning.
        """
        self.share = share
        self.loan_s = loan_s
        self.served_s = 0.0
        self.spent_s = 0.0

    def allows_more(self, somebody_waits: bool) -> bool:
        """Whether there is time left.

        Args:
            somebody_waits: for a first token. Then only what could not be spent for long is spent now.
        """
        left_s = self.share * (self.served_s + self.spent_s + self.loan_s) - self.spent_s
        return self.share > 0 and left_s > (self.loan_s * self.share + OVERDUE_S if somebody_waits else 0)

    def learned(self, seconds: float) -> None:
        """Time was taken from them."""
        self.spent_s += seconds
