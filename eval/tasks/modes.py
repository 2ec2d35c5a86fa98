"""The ways in which a team's requests are served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from kvcomm import ReusePolicy, Rung
from kvcomm.errors import InvalidRequest
from kvcomm.lab.bounds import Bound
from kvcomm.lab.methods import METHODS

DENSE, EXACT, ALONG, KVCOMM, HEAL = "dense", "exact", "along", "kvcomm", "heal"
STOCK, STOCK_PREFIX = "stock", "stock_prefix"
MODES = (DENSE, EXACT, ALONG, KVCOMM, HEAL, *METHODS, STOCK, STOCK_PREFIX)


class Mode(NamedTuple):
    """One way.

    Attributes:
        policy: what the caller accepts.
        rung: reuse at exactly this rung, with no bound; None: as the policy allows.
    """

    name: str
    policy: ReusePolicy
    rung: Rung | None = None

    @property
    def is_stock(self) -> bool:
        """Whether transformers serves it, without the engine."""
        return self.name in (STOCK, STOCK_PREFIX)

    @property
    def reads_cache(self) -> bool:
        """Whether its requests use anything that the engine knows."""
        return self.name != DENSE

    @property
    def reads_along(self) -> bool:
        """Whether prompts are read before they are complete."""
        return self.name == ALONG

    @property
    def heals(self) -> bool:
        """Whether moved KV is replaced by exact KV while the answer is decoded."""
        return self.policy.heal

    @property
    def moves(self) -> bool:
        """Whether text is moved between contexts."""
        return self.rung is not None or not self.policy.is_exact

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """At which its requests may be served; none: nothing is moved."""
        if self.rung is not None:
            return (self.rung,)
        return () if self.policy.is_exact else self.policy.rungs

    @property
    def estimators(self) -> frozenset[str]:
        """How moved KV is corrected; none: nothing is moved."""
        return frozenset(rung.estimator for rung in self.rungs)

    @property
    def bound(self) -> Bound | None:
        """The (epsilon, delta) that is kept; None: none."""
        return self.policy.bound

    def describe(self) -> dict[str, Any]:
        """For reports."""
        if self.rung is not None:
            return {"served by": "engine", **vars(self.rung)}
        if not self.policy.is_exact:
            return {"served by": "engine", **vars(self.policy), "rungs": list(map(str, self.policy.rungs))}
        described = {
            DENSE: {"served by": "engine", "cached": "nothing"},
            EXACT: {"served by": "engine", "cached": "exact prefixes"},
            ALONG: {"served by": "engine", "cached": "exact prefixes, and what was read along"},
            STOCK: {"served by": "transformers", "cached": "nothing"},
            STOCK_PREFIX: {"served by": "transformers", "cached": "text before the first slot"},
        }
        return described[self.name]


def make_modes(names: str, policy: ReusePolicy) -> list[Mode]:
    """The modes of a comma-separated list; dense, to which all others are compared, always comes first.

    Raises:
        InvalidRequest: an unknown one; lists the known ones. One that heals beside others that move text: what it
            leaves is exact, and they would take it from there.
    """
    wanted = list(dict.fromkeys([DENSE, *(name.strip() for name in names.split(",") if name.strip())]))
    if unknown := [name for name in wanted if name not in MODES]:
        raise InvalidRequest(f"unknown mode {unknown[0]!r}; there are {', '.join(MODES)}")
    exact = ReusePolicy.exact()
    own = {KVCOMM: Mode(KVCOMM, policy), HEAL: Mode(HEAL, replace(policy, heal=True))}
    modes = [own.get(name) or Mode(name, exact, METHODS.get(name)) for name in wanted]
    moving = [mode.name for mode in modes if mode.moves]
    if HEAL in moving and len(moving) > 1:
        others = ",".join(name for name in wanted if name != HEAL)
        raise InvalidRequest(
            f"{HEAL} leaves exact KV where {moving[0] if moving[0] != HEAL else moving[1]} moves it; run --modes "
            f"{others} and then --modes {HEAL} with the same --out, which adds it"
        )
    return modes
