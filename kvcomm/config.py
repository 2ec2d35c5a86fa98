"""How an engine is set up: one frozen dataclass, defaults written once, derived values as properties."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from kvcomm.errors import InvalidRequest
from kvcomm.values import items, real_number, text, truth_value, whole_number

DEFAULT_POOL_BYTES = 2 * 2**30

POSITIVE = (
    "page_size",
    "pool_bytes",
    "max_batch_tokens",
    "prefill_chunk",
    "max_running",
    "anchor_bytes",
    "neighbors",
    "sketch_groups",
    "sketch_layers",
)
"""Settings that are at least 1."""


EVICTION_POLICIES = ("lru", "return")
"""Names of what decides which cached prefix goes first; the first one is the default."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine.

    Attributes:
        page_size: tokens per page, the unit of sharing.
        pool_tokens: token slots of the pool; None: as many as `pool_bytes` holds.
        pool_bytes: bytes of KV when `pool_tokens` is None. Untouched pages cost no memory on CPU.
        max_batch_tokens: tokens computed in one step at most; a longer prompt is prefilled in chunks.
        prefill_chunk: prompt tokens in a step in which other requests decode, so that their streams go on.
        max_running: requests that are computed at the same time at most.
        draft_rows: a step that decodes fewer answers than this may be filled up with guesses at their next tokens, as
            many as are expected to pay on this machine; they change no answer. 0: no guesses.
        attention: "auto", "torch", "triton" or "flashinfer".
        cache_ttl_s: seconds after which an unused cached prefix is dropped; None: only when pages are needed.
        eviction: which cached prefixes go when pages are needed: "lru", the least recently used; or "return", those
            that are likely to be asked for again the latest, by their own past visits: better where the pool is small
            beside what is asked for again, on two traces a little worse where it is not.
        anchor_bytes: of offsets that one edge keeps at most.
        learning_share: of the time, that is spent on learning while requests come without a pause; 0: none.
        follow_share: of the time of answers in progress, that reading along and healing beside them may cost; 0: what
            is read along is read when nobody decodes, and healed at the deadline.
        idle_after_s: seconds without any request before idle work goes on: the next agent of a team asks at once.
        neighbors: anchor tokens by which each moved token is corrected.
        alpha: factors on the correction: one for all layers, or one per group of layers that looks for neighbors.
        sketch_groups: groups of consecutive layers that look for their own neighbors.
        sketch_layers: layers per group by whose KV neighbors are found.
        cache: False switches prefix reuse off (contexts and forks still share).
    """

    page_size: int = 16
    pool_tokens: int | None = None
    pool_bytes: int = DEFAULT_POOL_BYTES
    max_batch_tokens: int = 2048
    prefill_chunk: int = 256
    max_running: int = 64
    draft_rows: int = 8
    attention: str = "auto"
    cache_ttl_s: float | None = None
    eviction: str = EVICTION_POLICIES[0]
    anchor_bytes: int = 16 * 2**20
    learning_share: float = 0.1
    follow_share: float = 0.09
    idle_after_s: float = 0.05
    neighbors: int = 8
    alpha: tuple[float, ...] = (1.0,)
    sketch_groups: int = 3
    sketch_layers: int = 5
    cache: bool = True

    def __post_init__(self) -> None:
        self._bring()
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.pool_tokens is not None and self.pool_tokens < self.page_size:
            raise InvalidRequest(f"pool_tokens={self.pool_tokens} is less than one page of {self.page_size}")
        if self.cache_ttl_s is not None and not self.cache_ttl_s > 0:
            raise InvalidRequest(f"cache_ttl_s must be positive, not {self.cache_ttl_s}")
        if self.eviction not in EVICTION_POLICIES:
            raise InvalidRequest(f"eviction must be one of {', '.join(EVICTION_POLICIES)}, not {self.eviction!r}")
        if not self.alpha or not all(math.isfinite(each) and each >= 0 for each in self.alpha):
            raise InvalidRequest(f"alpha must be finite factors >= 0, one or one per group, not {self.alpha!r}")
        if self.draft_rows < 0:
            raise InvalidRequest(f"draft_rows must be at least 0, not {self.draft_rows}")
        if not 0 <= self.learning_share < 1:
            raise InvalidRequest(f"learning_share must be a share of the time in [0, 1), not {self.learning_share}")
        if not 0 <= self.follow_share < 1:
            raise InvalidRequest(f"follow_share must be a share of the time in [0, 1), not {self.follow_share}")
        if not self.idle_after_s >= 0:
            raise InvalidRequest(f"idle_after_s must be at least 0, not {self.idle_after_s}")

    def _bring(self) -> None:
        """Every value as one of Python's own types; refuses those of another type."""
        for name in (*POSITIVE, "draft_rows"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.pool_tokens is not None:
            object.__setattr__(self, "pool_tokens", whole_number("pool_tokens", self.pool_tokens))
        if self.cache_ttl_s is not None:
            object.__setattr__(self, "cache_ttl_s", real_number("cache_ttl_s", self.cache_ttl_s))
        for name in ("idle_after_s", "learning_share", "follow_share"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        for name in ("attention", "eviction"):
            object.__setattr__(self, name, text(name, getattr(self, name)))
        factors = items("alpha", self.alpha, "finite factors, one or one per group")
        object.__setattr__(self, "alpha", tuple(real_number("each of alpha", factor) for factor in factors))
        object.__setattr__(self, "cache", truth_value("cache", self.cache))

    def num_pages(self, kv_bytes_per_token: int) -> int:
        """Pages of the pool for a model of this KV size."""
        num_tokens = self.pool_tokens or self.pool_bytes // kv_bytes_per_token
        return max(1, num_tokens // self.page_size)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> EngineConfig:
        """From a parsed file or flags; unknown keys fail. `alpha` may be a single number.

        Raises:
            InvalidRequest: an unknown key, with the known ones, or a value of the wrong type or outside its range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise InvalidRequest(f"unknown engine settings {unknown}; known: {sorted(known)}")
        alpha = values.get("alpha", ())
        wanted = values | ({"alpha": (alpha,)} if isinstance(alpha, int | float) else {})
        return cls(**wanted)
