"""Settings of a server: one frozen object, read from flags, environment and a TOML file.

Flags win over environment variables (`KVCOMM_SERVE_PORT`, and `KVCOMM_SERVE_ENGINE__PAGE_SIZE` for what the file has
in its table `[engine]`), those over the file, the file over the defaults. A key that nobody knows is an error wherever
it stands. Settings hold no secrets: keys live in a file of their own, as hashes.
"""

from __future__ import annotations

import ipaddress
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from kvcomm.config import EngineConfig
from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import BadContent, parse_toml, read_toml
from kvcomm.model.names import AUTO, DTYPE_NAMES, WeightsKind
from kvcomm.model.registry import SMOLLM2_135M
from kvcomm.reuse.policy import DEFAULT_HEAL_WITHIN
from kvcomm.server.hosts import ANY_ORIGIN, parse_authority, parse_origin
from kvcomm.server.kv_events.settings import KVEventSettings
from kvcomm.tiers.keys import read_secret
from kvcomm.tiers.store import shown_url

if TYPE_CHECKING:
    from kvcomm.tiers.tier import Tier

ENV_PREFIX = "KVCOMM_SERVE_"
ENV_NESTED = "__"
MODEL_VARIABLE = "KVCOMM_MODEL"
"""Names the model for every command; `KVCOMM_SERVE_MODEL` wins over it."""

WhenFull = Literal["queue", "refuse"]

ToolParser = Literal["hermes", "llama3_json", "mistral", "pythonic", "qwen3_xml"]

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Limits(BaseModel):
    """What one tenant may take; None is no limit.

    Attributes:
        requests_per_minute: requests it may start, on average; a minute's worth may come at once.
        max_requests: requests of its in flight at once; over it, 429.
        held_tokens: tokens that its requests in flight may grow to; over it, as `when_full` says.
        when_full: "queue" waits for its own requests to end, for `queue_timeout_s` at most; "refuse" answers 429.
        cached_tokens: of its cached prefixes; over it, its own are dropped, by the policy of `EngineConfig.eviction`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_requests: Positive | None = None
    held_tokens: Positive | None = None
    when_full: WhenFull = "queue"
    cached_tokens: Positive | None = None


def _engine_config(value: object) -> EngineConfig:
    if isinstance(value, EngineConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a table of engine settings, not {value!r}")
    try:
        return EngineConfig.from_mapping({name: _number(item) for name, item in value.items()})
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(str(error)) from error


def _number(value: object) -> object:
    """What an environment variable spells: numbers, truth values and lists become such."""
    if not isinstance(value, str):
        return value
    try:
        parsed = parse_toml(f"value = {value}".encode(errors="surrogateescape"))["value"]
    except BadContent:
        return value
    return parsed if isinstance(parsed, int | float | bool | list) else value


EngineFields = Annotated[
    EngineConfig,
    PlainValidator(_engine_config),
    PlainSerializer(lambda config: {name: getattr(config, name) for name in config.__dataclass_fields__}),
]


def _listed(value: object) -> object:
    """What an environment variable spells: items with commas between them."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _dtype_name(name: str) -> str:
    if name not in (*DTYPE_NAMES, AUTO):
        raise ValueError(f"must be one of {', '.join(DTYPE_NAMES)} and {AUTO}")
    return name


def _host(text: str) -> str:
    authority = parse_authority(text)
    if authority is None:
        raise ValueError("must be a host such as host.docker.internal, with or without a port, and no URL")
    return str(authority)


def _origin(text: str) -> str:
    origin = parse_origin(text)
    if text != ANY_ORIGIN and origin is None:
        raise ValueError("must be an origin such as https://app.example, without a path, or *")
    return text if origin is None else str(origin)


Hosts = Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], BeforeValidator(_listed)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_listed)]


class ServerSettings(BaseModel):
    """How a server is set up; every field is a flag, an environment variable and a key of the file.

    Attributes:
        model: a packaged name, folder, GGUF file or hub id.
        served_name: what clients call the model; by default the last part of `model`.
        adapters: folders of adapters that PEFT has saved, by the names that clients call them as models.
        dtype, device, weights: as for `Engine.load`; None: its defaults.
        host, port: where to listen; port 0 takes a free one.
        allowed_hosts: names besides this machine's own by which clients may call it, with a port or for all of them.
            Without keys every other one is refused; with keys all are allowed, unless some are named here.
        cors_origins: of web pages that may use it from a browser; "*" is all of them, which needs keys. Without keys
            they may use what is for tenants, not what is for the operator.
        keys: the file written by `kvcomm serve keys`; None: no keys, which only loopback addresses allow.
        remove_revoked: what a tenant has, all but its snapshots, goes when its last key does, and its requests are
            cancelled; else it stays until the operator removes it.
        max_requests: engine requests in flight at once, waiting ones included; over it, 503.
        kept_requests: how many of those are kept for tenants that hold few, so that no tenant takes them all; over its
            share, 429. None: one in eight, where there are keys of more than one tenant.
        max_connections: open at once; over it, those go that have waited longest without sending a whole header, and
            where there are none, the new ones.
        max_body_bytes: of a request; over it, 413.
        max_archive_bytes: of an archive of anchors that the operator sends; over it, 413.
        header_timeout_s, body_timeout_s: to receive the headers, then the body of a request; then 408.
        body_pause_s: without a byte of a body that is not complete; then 408.
        keep_alive_s: how long an idle connection is kept.
        request_timeout_s: for a request from its body to the end of its answer; then 504.
        follow_timeout_s: for the answers that a request follows to end; then 409.
        queue_timeout_s: for a tenant's request to wait for room under the tenant's own quota; then 429.
        drain_timeout_s: for requests in flight to end after SIGTERM; then they are cancelled.
        retry_after_s: what clients are told to wait where the server cannot know better.
        default_max_tokens: of a chat answer, where the client does not say; less where the model's limit is nearer.
        max_answer_tokens: of an answer, whatever the client asks for; None: what the model's limit leaves.
        default_temperature: where the client does not say; OpenAI documents 1.
        max_salts: namespaces per tenant that `cache_salt` may open; the least recently used one is dropped.
        max_contexts: that one tenant may have at once; over it, 429.
        max_conversation_bytes: of messages, tools and the text made of them that one context may keep; over it, 400.
        max_kept_bytes: the same for all contexts of one tenant, what forks share once; over it, 429.
        context_ttl_s: how long a context lives after its last use where the client does not say.
        snapshots: the folder of contexts that clients save; None: they cannot.
        max_snapshots: that one tenant may have; over it, 429.
        max_segments: names of segments that one tenant may have; over it, 429.
        max_segment_bytes: of the texts of one tenant's named segments, all versions together; over it, 429.
        tool_parser: how calls of tools are read from answers; None: as the chat template writes them, or the checkpoint
            says.
        default_tools: describe tools in the system message where the chat template has no place for them; else such
            requests are refused.
        limits: of tenants whose key brings none of its own.
        max_divergence, confidence: the bound in force where a request does not say; 0 is exact reuse only.
        basis: the least that is accepted as grounds there: prior, pool or own.
        prior: a file of pairs measured on this model, for `kvcomm serve`; None: those that come with kvcomm, if any do.
        heal, heal_within: whether moved KV is replaced there by exact KV, and after how many tokens of the answer.
        log_level: of the structured log.
        log_prompts: write prompts and answers into the log.
        tier: URL or folder of a shared tier, for `kvcomm serve`; None: there is none.
        tier_secret_file: a file whose bytes are the tier's secret; without it only the default tenant uses the tier.
        tier_bytes: that the tier may hold, over all who use it; None: no limit.
        traces: URL of a collector of OpenTelemetry traces (OTLP over HTTP), for `kvcomm serve`; None: no traces.
            `make_app` takes a provider of them instead.
        kv_events: what routers are told about cached prefixes, for `kvcomm serve`; None: nothing.
        vllm_metrics: name some metrics as vLLM does, too; None: where there are KV events.
        engine: pool, pages, batch; see `EngineConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = SMOLLM2_135M.name
    served_name: str | None = None
    adapters: dict[str, Path] = Field(default_factory=dict)
    dtype: Annotated[str, AfterValidator(_dtype_name)] | None = None
    device: str | None = None
    weights: WeightsKind | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    allowed_hosts: Hosts = ()
    cors_origins: Origins = ()
    keys: Path | None = None
    remove_revoked: bool = False
    max_requests: Positive = 256
    kept_requests: Annotated[int, Field(ge=0)] | None = None
    max_connections: Positive = 768
    max_body_bytes: Positive = 4 * 2**20
    max_archive_bytes: Positive = 2**30
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    body_pause_s: Seconds = 10.0
    keep_alive_s: Positive = 30
    request_timeout_s: Seconds = 600.0
    follow_timeout_s: Seconds = 300.0
    queue_timeout_s: Seconds = 60.0
    drain_timeout_s: Positive = 30
    retry_after_s: Positive = 1
    default_max_tokens: Positive = 1024
    max_answer_tokens: Positive | None = None
    default_temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    max_salts: Positive = 256
    max_contexts: Positive = 1024
    max_conversation_bytes: Positive = 2**20
    max_kept_bytes: Positive = 64 * 2**20
    context_ttl_s: Seconds = 3600.0
    snapshots: Path | None = None
    max_snapshots: Positive = 64
    max_segments: Positive = 1024
    max_segment_bytes: Positive = 4 * 2**20
    tool_parser: ToolParser | None = None
    default_tools: bool = True
    limits: Limits = Limits()
    max_divergence: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    basis: Literal["own", "pool", "prior"] = "prior"
    prior: Path | None = None
    heal: bool = False
    heal_within: Positive = DEFAULT_HEAL_WITHIN
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: bool = False
    tier: str | None = None
    tier_secret_file: Path | None = None
    tier_bytes: Positive | None = None
    traces: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")] | None = None
    kv_events: KVEventSettings | None = None
    vllm_metrics: bool | None = None
    engine: EngineFields = Field(default_factory=EngineConfig)

    @model_validator(mode="after")
    def _require_names(self) -> ServerSettings:
        if self.name in self.adapters:
            raise ValueError(f"an adapter cannot be called {self.name!r}, as the model is")
        return self

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_name or Path(self.model).name

    @property
    def has_vllm_metrics(self) -> bool:
        """Whether some metrics have vLLM's names, too."""
        return self.kv_events is not None if self.vllm_metrics is None else self.vllm_metrics

    def max_bytes_of(self, path: str) -> int:
        """Bytes of the body of a request to a path."""
        return self.max_archive_bytes if path.startswith("/admin/") else self.max_body_bytes

    def require_safe_address(self, *, has_keys: bool) -> None:
        """Raises InvalidRequest when anybody on the network could use the server without a key."""
        if not has_keys and not is_loopback(self.host):
            raise InvalidRequest(
                f"refusing to listen on {self.host} without keys, where others could reach it: make a key with "
                "`kvcomm serve keys add NAME --keys FILE` and give --keys FILE, or listen on 127.0.0.1"
            )

    def require_safe_origins(self, *, has_keys: bool) -> None:
        """Raises InvalidRequest when any web page could use the server without a key."""
        if not has_keys and ANY_ORIGIN in self.cors_origins:
            raise InvalidRequest(
                "refusing --cors-origin '*' without keys, where any web page could use the server: name the origins, "
                "or make a key with `kvcomm serve keys add NAME --keys FILE` and give --keys FILE"
            )

    def open_tier(self) -> Tier | None:
        """The shared tier, the caller's to close; None: there is none.

        Raises:
            TierError: it cannot be opened, or its secret cannot be read or is too short.
            MissingExtra: a package that it needs is not installed.
            InvalidRequest: there are settings of a tier without one.
        """
        from kvcomm.tiers.tier import Tier

        if self.tier is None:
            if self.tier_secret_file is not None or self.tier_bytes is not None:
                raise InvalidRequest("tier_secret_file and tier_bytes are of a tier; name it with --tier URL")
            return None
        secret = None if self.tier_secret_file is None else read_secret(self.tier_secret_file)
        return Tier.open(self.tier, secret=secret, max_bytes=self.tier_bytes)

    def printable(self) -> dict[str, Any]:
        """The effective settings as JSON values; nothing secret is among them."""
        values = self.model_dump(mode="json")
        is_url = self.tier is not None and "://" in self.tier
        return values | {"tier": shown_url(self.tier or "") if is_url else self.tier}


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address; a name other than localhost counts as public."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def load_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: str | Path | None = None
) -> ServerSettings:
    """Put settings together.

    Args:
        flags: what the command line says, by field name; None values count as not given.
        environment: of the process.
        file: TOML.

    Raises:
        InvalidRequest: an unknown key or a bad value, with the place it comes from; a file that cannot be read.
    """
    sources = {
        str(file): _from_file(Path(file)) if file is not None else {},
        "the environment": _from_environment(environment),
        "the command line": {name: value for name, value in flags.items() if value is not None},
    }
    merged: dict[str, Any] = {}
    for source, values in sources.items():
        _validated(values, source)
        merged = _merge(merged, values)
    return _validated(merged, "the settings together")


def _from_file(file: Path) -> dict[str, Any]:
    try:
        return read_toml(file)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise InvalidRequest(f"{file} is not TOML: {error}") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if MODEL_VARIABLE in environment:
        values["model"] = environment[MODEL_VARIABLE]
    for name, text in sorted(environment.items()):
        if name.startswith(ENV_PREFIX):
            *path, last = name.removeprefix(ENV_PREFIX).lower().split(ENV_NESTED)
            nested: Any = text
            for key in [last, *reversed(path)]:
                nested = {key: nested}
            values = _merge(values, nested)
    return values


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _validated(values: Mapping[str, Any], source: str) -> ServerSettings:
    try:
        return ServerSettings.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(ServerSettings.model_fields))
            raise InvalidRequest(f"unknown setting {name!r} in {source}; known: {known}") from error
        raise InvalidRequest(
            f"setting {name!r} in {source}: {first['msg']}, not {reprlib.repr(first['input'])}"
        ) from error
