"""What may be said by name of an engine, and of a request, wherever one is made."""

from __future__ import annotations

from typing import TypedDict

from kvcomm.align.ladder import Rung
from kvcomm.config import EngineConfig
from kvcomm.engine.assembly import WhichPrior
from kvcomm.engine.sampling import SamplingSettings
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.tiers.tier import Tier


class EngineSettings(TypedDict, total=False):
    """What an engine is like, whatever its model; see `Engine`."""

    config: EngineConfig | None
    policy: ReusePolicy | None
    prior: WhichPrior
    tier: Tier | str | None


class RequestSettings(SamplingSettings, total=False):
    """How an answer is drawn, who computes it, for whom, and how far reuse may go; see `Engine.submit`."""

    adapter: str | None
    tenant: str
    policy: ReusePolicy | None
    rung: Rung | None
    reads_cache: bool
