"""Arguments of the Ray Serve app: what `serve run kvcomm.integrations.ray:app NAME=VALUE ...` and a `config.yaml` say.

Arguments of the app itself are fields here; all others are settings of the server by their own names, such as
`tier=file:///srv/kv`, `keys=keys.json` or `engine.pool_tokens=65536`. A name that nobody knows is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvcomm.errors import InvalidRequest
from kvcomm.server.settings import ServerSettings, load_settings

LISTENING = ("host", "port")
"""Settings of `kvcomm serve` that are Ray Serve's own here."""

PositiveCount = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AppSettings(BaseModel):
    """How the app is deployed.

    Attributes:
        replicas: engines; with `max_replicas` the number at the start, and the least.
        max_replicas: engines at most; Ray adds and removes some as requests come.
        target_requests: in flight per replica, at which Ray neither adds nor removes one.
        upscale_delay_s, downscale_delay_s: for which more or fewer must be wanted first.
        requests_per_replica: in flight at once; over it, requests wait in the ingress.
        ingresses: processes that take HTTP requests.
        cpus, gpus: that Ray keeps for a replica.
        threads: of torch in a replica; None: as many as its CPUs.
        config: the server's TOML file.
        health_period_s, health_timeout_s: how often a replica is asked whether it lives, and for how long.
        stats_period_s: how often replicas tell routers what they hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: PositiveCount = 1
    max_replicas: PositiveCount | None = None
    target_requests: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    upscale_delay_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    downscale_delay_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600.0
    requests_per_replica: PositiveCount = 64
    ingresses: PositiveCount = 1
    cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    threads: PositiveCount | None = None
    config: Path | None = None
    health_period_s: Seconds = 2.0
    health_timeout_s: Seconds = 10.0
    stats_period_s: Seconds = 1.0

    @model_validator(mode="after")
    def _require_order(self) -> AppSettings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, less than replicas, {self.replicas}")
        return self

    @property
    def num_threads(self) -> int:
        """Threads of torch in a replica."""
        return self.threads or max(1, int(self.cpus))

    def autoscaling(self) -> dict[str, Any] | None:
        """For Ray's `autoscaling_config`; None: the number stays."""
        if self.max_replicas is None:
            return None
        return {
            "min_replicas": self.replicas,
            "initial_replicas": self.replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_requests,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
        }


def read_arguments(given: Mapping[str, Any]) -> tuple[AppSettings, ServerSettings]:
    """The settings of the app and those of the server in each replica.

    Args:
        given: names to values; texts from the command line, anything from YAML.

    Raises:
        InvalidRequest: an unknown name or a bad value, by name; a file that cannot be read.
    """
    for name in LISTENING:
        if name in given:
            raise InvalidRequest(f"{name} is Ray Serve's: `serve start --http-{name} ...`, or http_options in the YAML")
    own = {name: value for name, value in given.items() if name in AppSettings.model_fields}
    servers = {name: value for name, value in given.items() if name not in own}
    settings = _validated(own)
    try:
        server = load_settings(_nested(servers), {}, settings.config)
    except InvalidRequest as error:
        raise _known_here(error, servers) from error
    server.require_safe_origins(has_keys=server.keys is not None)
    if server.tier_secret_file is not None and server.tier is None:
        raise InvalidRequest("tier_secret_file is of no use without tier")
    return settings, server


def _validated(values: Mapping[str, Any]) -> AppSettings:
    try:
        return AppSettings.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        where = f"argument {name}={first['input']}: " if name else ""
        raise InvalidRequest(f"{where}{first['msg'].removeprefix('Value error, ')}") from error


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`engine.pool_tokens=N` is a key of a table."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        at = nested
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise InvalidRequest(f"argument {name}: {part} is no table, and has a value of its own")
        is_table = isinstance(value, Mapping)
        at[last] = {**at.get(last, {}), **value} if is_table else value
    return nested


def _known_here(error: InvalidRequest, given: Mapping[str, Any]) -> InvalidRequest:
    """Where a name is unknown, all names that would not be."""
    unknown = [name for name in given if name.split(".")[0] not in ServerSettings.model_fields]
    if not unknown:
        return InvalidRequest(str(error).replace("in the command line", "among the app's arguments"))
    known = ", ".join(sorted({*AppSettings.model_fields, *ServerSettings.model_fields}))
    return InvalidRequest(f"unknown argument {unknown[0]!r}; known: {known}")
