"""The ways in which a team's requests are served, all by the same engine and kernels."""

from __future__ import annotations

from typing import NamedTuple

from eval.baselines.methods import METHODS
from kvcomm import ReusePolicy
from kvcomm.engine.variant import Variant
from kvcomm.errors import InvalidRequest

DENSE, EXACT, KVCOMM = "dense", "exact", "kvcomm"
MODES = (DENSE, EXACT, KVCOMM, *METHODS)


class Mode(NamedTuple):
    """One way.

    Attributes:
        policy: what the caller accepts.
        variant: reuse in this way with no bound; None: as the policy allows.
        is_cached: whether anything is reused.
    """

    name: str
    policy: ReusePolicy
    variant: Variant | None = None
    is_cached: bool = True

    @property
    def moves(self) -> bool:
        """Whether text is moved between contexts."""
        return self.variant is not None or not self.policy.is_exact


def make_modes(names: str, policy: ReusePolicy) -> list[Mode]:
    """The modes of a comma-separated list; dense, to which all others are compared, always comes first.

    Raises:
        InvalidRequest: an unknown one; lists the known ones.
    """
    wanted = list(dict.fromkeys([DENSE, *(name.strip() for name in names.split(",") if name.strip())]))
    if unknown := [name for name in wanted if name not in MODES]:
        raise InvalidRequest(f"unknown mode {unknown[0]!r}; there are {', '.join(MODES)}")
    exact = ReusePolicy.exact()
    own = {DENSE: Mode(DENSE, exact, is_cached=False), EXACT: Mode(EXACT, exact), KVCOMM: Mode(KVCOMM, policy)}
    return [own.get(name) or Mode(name, exact, METHODS[name]) for name in wanted]
