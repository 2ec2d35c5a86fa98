"""The ways in which a team's requests are served."""

from __future__ import annotations

from typing import Any, NamedTuple

from eval.baselines.methods import METHODS
from kvcomm import ReusePolicy
from kvcomm.align.bound import Bound
from kvcomm.errors import InvalidRequest
from kvcomm.lab.variant import Variant

DENSE, EXACT, KVCOMM = "dense", "exact", "kvcomm"
STOCK, STOCK_PREFIX = "stock", "stock_prefix"
MODES = (DENSE, EXACT, KVCOMM, *METHODS, STOCK, STOCK_PREFIX)


class Mode(NamedTuple):
    """One way.

    Attributes:
        policy: what the caller accepts.
        variant: reuse in this way with no bound; None: as the policy allows.
    """

    name: str
    policy: ReusePolicy
    variant: Variant | None = None

    @property
    def is_stock(self) -> bool:
        """Whether transformers serves it, without the engine."""
        return self.name in (STOCK, STOCK_PREFIX)

    @property
    def reads_cache(self) -> bool:
        """Whether its requests use anything that the engine knows."""
        return self.name != DENSE

    @property
    def moves(self) -> bool:
        """Whether text is moved between contexts."""
        return self.variant is not None or not self.policy.is_exact

    @property
    def estimator(self) -> str | None:
        """How moved KV is corrected; None: nothing is moved."""
        if self.variant is not None:
            return self.variant.estimator
        return None if self.policy.is_exact else self.policy.estimator

    @property
    def bound(self) -> Bound | None:
        """The (epsilon, delta) that is kept; None: none."""
        return self.policy.bound

    def describe(self) -> dict[str, Any]:
        """For reports."""
        if self.variant is not None:
            return {"served by": "engine", **vars(self.variant)}
        if not self.policy.is_exact:
            return {"served by": "engine", **vars(self.policy)}
        described = {
            DENSE: {"served by": "engine", "cached": "nothing"},
            EXACT: {"served by": "engine", "cached": "exact prefixes"},
            STOCK: {"served by": "transformers", "cached": "nothing"},
            STOCK_PREFIX: {"served by": "transformers", "cached": "text before the first slot"},
        }
        return described[self.name]


def make_modes(names: str, policy: ReusePolicy) -> list[Mode]:
    """The modes of a comma-separated list; dense, to which all others are compared, always comes first.

    Raises:
        InvalidRequest: an unknown one; lists the known ones.
    """
    wanted = list(dict.fromkeys([DENSE, *(name.strip() for name in names.split(",") if name.strip())]))
    if unknown := [name for name in wanted if name not in MODES]:
        raise InvalidRequest(f"unknown mode {unknown[0]!r}; there are {', '.join(MODES)}")
    exact = ReusePolicy.exact()
    own = {KVCOMM: Mode(KVCOMM, policy)}
    return [own.get(name) or Mode(name, exact, METHODS.get(name)) for name in wanted]
