"""What an operator sets: `kv_connector_extra_config` of vLLM's `--kv-transfer-config`. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kvcomm.errors import InvalidRequest
from kvcomm.tiers.keys import read_secret

DEFAULT_POOL_TOKENS = 16384


class ConnectorSettings(BaseModel):
    """Settings of kvcomm inside vLLM.

    Attributes:
        move: whether segments are moved at all; False: only exact KV is loaded and stored, and no second pool is kept.
        pool_tokens: token slots of kvcomm's own pool, where sources of moved text and prompts in preparation lie.
        step_tokens: tokens that kvcomm computes at most between two steps of vLLM.
        learning_share: of the time, for learning while vLLM is busy.
        prior: a file of pairs measured on this model; "shipped": those that come with kvcomm for it, if there are any;
            None: none.
        tier: URL of a shared tier, see `kvcomm.tiers`; None: nothing is shared.
        tier_secret_file: holds the secret under which tenants' KV is named there.
        tier_bytes: that the tier may hold; None: as it is.
        read_s: seconds that a request waits at most for the tier.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    move: bool = True
    pool_tokens: Annotated[int, Field(ge=256)] = DEFAULT_POOL_TOKENS
    step_tokens: Annotated[int, Field(ge=16)] = 512
    learning_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    prior: str | None = "shipped"
    tier: str | None = None
    tier_secret_file: Path | None = None
    tier_bytes: Annotated[int, Field(ge=1)] | None = None
    read_s: Annotated[float, Field(gt=0)] = 5.0

    @model_validator(mode="after")
    def _check(self) -> ConnectorSettings:
        if self.tier is None and (self.tier_secret_file or self.tier_bytes):
            raise PydanticCustomError("needs", "tier_secret_file and tier_bytes need a tier")
        return self

    @property
    def secret(self) -> bytes | None:
        """What the secret's file holds.

        Raises:
            TierError: it cannot be read, or is too short.
        """
        return None if self.tier_secret_file is None else read_secret(self.tier_secret_file)


def read_settings(given: Mapping[str, Any]) -> ConnectorSettings:
    """Settings from a mapping.

    Raises:
        InvalidRequest: an unknown setting, or one out of its range; names it.
    """
    try:
        return ConnectorSettings.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("kv_connector_extra_config", *first["loc"])))
        raise InvalidRequest(f"{place}: {first['msg']}, got {str(first['input'])[:100]!r}") from error
