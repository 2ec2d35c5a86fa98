"""`kvcomm serve`: the OpenAI-compatible server."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import typer

from kvcomm.cli.options import (
    AdapterFlag,
    WeightsFlag,
    adapter_folders,
    known_model,
    require_adapters,
    with_adapters,
)
from kvcomm.cli.output import JsonFlag, emit, table
from kvcomm.cli.serve_keys import app as keys_app
from kvcomm.cli.serve_options import (
    AllowedHostSetting,
    BodyTimeoutSetting,
    CheckFlag,
    ConfigFlag,
    CorsOriginSetting,
    DefaultMaxTokensSetting,
    DefaultToolsSetting,
    DeviceSetting,
    DtypeSetting,
    HostSetting,
    KeptRequestsSetting,
    KeysSetting,
    KVEventsBlockSizeSetting,
    KVEventsFormatSetting,
    KVEventsReplaySetting,
    KVEventsSeedSetting,
    KVEventsSetting,
    KVEventsTenantSetting,
    KVEventsTopicSetting,
    LogLevelSetting,
    LogPromptsSetting,
    MaxConnectionsSetting,
    MaxRequestsSetting,
    ModelSetting,
    PoolTokensSetting,
    PortSetting,
    PriorSetting,
    RequestTimeoutSetting,
    ServedNameSetting,
    SnapshotsSetting,
    TierBytesSetting,
    TierSecretFileSetting,
    TierSetting,
    ToolParserSetting,
    TracesSetting,
    VLLMMetricsSetting,
)
from kvcomm.cli.serve_tenants import app as tenants_app
from kvcomm.errors import MissingExtra
from kvcomm.starting import collector_paused

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine
    from kvcomm.server.kv_events.publisher import Publisher
    from kvcomm.server.settings import ServerSettings

EPILOG = (
    "Examples: kvcomm serve; kvcomm serve --model smollm2-135m --port 8080 --max-requests 64; "
    "kvcomm serve keys add ann --keys keys.json; kvcomm serve --host 0.0.0.0 --keys keys.json --config server.toml"
)
EXTRA_MODULES = ("fastapi", "uvicorn", "prometheus_client")

app = typer.Typer(
    help="Serve a model to OpenAI clients, with a shared KV cache.",
    epilog=EPILOG,
    invoke_without_command=True,
    add_completion=False,
)
app.add_typer(keys_app, name="keys")
app.add_typer(tenants_app, name="tenants")

SWITCH_S = 0.0005
"""How long a thread keeps the interpreter while others want it. The event loop asks for it several times a request, and
at Python's five milliseconds each would wait for every worker that reads a large body."""


@app.callback(epilog=EPILOG)
def serve(
    context: typer.Context,
    model: ModelSetting = None,
    served_name: ServedNameSetting = None,
    adapters: AdapterFlag = None,
    host: HostSetting = None,
    port: PortSetting = None,
    keys: KeysSetting = None,
    allowed_host: AllowedHostSetting = None,
    cors_origin: CorsOriginSetting = None,
    config: ConfigFlag = None,
    dtype: DtypeSetting = None,
    device: DeviceSetting = None,
    weights: WeightsFlag = None,
    pool_tokens: PoolTokensSetting = None,
    max_requests: MaxRequestsSetting = None,
    kept_requests: KeptRequestsSetting = None,
    max_connections: MaxConnectionsSetting = None,
    body_timeout: BodyTimeoutSetting = None,
    request_timeout: RequestTimeoutSetting = None,
    default_max_tokens: DefaultMaxTokensSetting = None,
    snapshots: SnapshotsSetting = None,
    prior: PriorSetting = None,
    tier: TierSetting = None,
    tier_secret_file: TierSecretFileSetting = None,
    tier_bytes: TierBytesSetting = None,
    tool_parser: ToolParserSetting = None,
    default_tools: DefaultToolsSetting = None,
    log_level: LogLevelSetting = None,
    log_prompts: LogPromptsSetting = None,
    traces: TracesSetting = None,
    kv_events: KVEventsSetting = None,
    kv_events_topic: KVEventsTopicSetting = None,
    kv_events_format: KVEventsFormatSetting = None,
    kv_events_replay: KVEventsReplaySetting = None,
    kv_events_block_size: KVEventsBlockSizeSetting = None,
    kv_events_seed: KVEventsSeedSetting = None,
    kv_events_tenant: KVEventsTenantSetting = None,
    vllm_metrics: VLLMMetricsSetting = None,
    check: CheckFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Serve a model to OpenAI clients, with a shared KV cache.

    Settings come from flags, from KVCOMM_SERVE_* variables, from the file, in this order. The log is JSON on stderr.
    """
    if context.invoked_subcommand is not None:
        return
    from kvcomm.server.kv_events.settings import parse_tenants
    from kvcomm.server.settings import load_settings

    events = {
        "url": kv_events,
        "topic": kv_events_topic,
        "format": kv_events_format,
        "replay": kv_events_replay,
        "block_size": kv_events_block_size,
        "seed": kv_events_seed,
        "tenants": parse_tenants(kv_events_tenant or []) or None,
    }
    flags = {
        "model": model,
        "served_name": served_name,
        "adapters": adapter_folders(adapters) or None,
        "host": host,
        "port": port,
        "allowed_hosts": allowed_host or None,
        "cors_origins": cors_origin or None,
        "keys": keys,
        "dtype": dtype,
        "device": device,
        "weights": weights,
        "engine": None if pool_tokens is None else {"pool_tokens": pool_tokens},
        "max_requests": max_requests,
        "kept_requests": kept_requests,
        "max_connections": max_connections,
        "body_timeout_s": body_timeout,
        "request_timeout_s": request_timeout,
        "default_max_tokens": default_max_tokens,
        "snapshots": snapshots,
        "prior": prior,
        "tier": tier,
        "tier_secret_file": tier_secret_file,
        "tier_bytes": tier_bytes,
        "log_level": log_level,
        "tool_parser": tool_parser,
        "default_tools": default_tools,
        "log_prompts": log_prompts,
        "traces": traces,
        "kv_events": {name: value for name, value in events.items() if value is not None} or None,
        "vllm_metrics": vllm_metrics,
    }
    environment = {name: text for name, text in os.environ.items() if name != "KVCOMM_SERVE_CONFIG"}
    settings = load_settings(flags, environment, config)
    known_model(settings.model)
    require_adapters(settings.adapters, settings.weights)
    settings.require_safe_address(has_keys=settings.keys is not None)
    settings.require_safe_origins(has_keys=settings.keys is not None)
    if settings.kv_events is not None:
        settings.kv_events.require_somebody(has_keys=settings.keys is not None)
    if check:
        _print(settings, None, as_json=as_json)
    else:
        _require_extra()
        _serve(settings, as_json=as_json)


def _require_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in EXTRA_MODULES if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"the server needs {', '.join(missing)}: pip install 'kvcomm[server]'")


def _serve(settings: ServerSettings, *, as_json: bool) -> None:
    from logging.config import dictConfig

    from kvcomm.align.prior import read_prior
    from kvcomm.server.keys import KeyRing
    from kvcomm.server.listening import address_of, bind
    from kvcomm.server.logs import logging_config
    from kvcomm.server.traces import exporting_provider, shut_down

    with ExitStack() as opened:
        # Mistakes are found before a model is loaded for them.
        keys = KeyRing(settings.keys) if settings.keys is not None else None
        prior = "shipped" if settings.prior is None else read_prior(settings.prior)
        traces = exporting_provider(settings.traces) if settings.traces is not None else None
        if traces is not None:
            opened.callback(shut_down, traces)
        if (tier := settings.open_tier()) is not None:
            opened.callback(tier.close)
        listener = bind(settings)
        opened.callback(listener.close)
        dictConfig(logging_config(settings.log_level))

        with collector_paused():
            from kvcomm.engine.engine import Engine
            from kvcomm.server.app import make_app
            from kvcomm.server.kv_events.feed import open_publisher
            from kvcomm.server.running import make_server

        publisher = open_publisher(settings.kv_events, settings.name) if settings.kv_events is not None else None
        if publisher is not None:
            opened.callback(publisher.close)
        engine = Engine.load(
            settings.model,
            dtype=settings.dtype,
            device=settings.device,
            weights=settings.weights,
            config=settings.engine,
            prior=prior,
            tier=tier,
            progress=True,
        )
        with with_adapters(engine, settings.adapters), _announcing(engine, publisher, settings):
            server = make_server(make_app(engine, settings, keys=keys, traces=traces))
            sys.setswitchinterval(SWITCH_S)
            gc.collect()
            gc.freeze()  # what stays as long as the server is never looked through again: half a second for everybody
            listener.listen()  # whoever reads the address can connect at once
            _print(settings, address_of(listener), as_json=as_json)
            server.run(sockets=[listener])


def _announcing(
    engine: Engine, publisher: Publisher | None, settings: ServerSettings
) -> AbstractContextManager[object]:
    """Within: KV events are published, if any are wanted."""
    if publisher is None or settings.kv_events is None:
        return nullcontext()
    from kvcomm.server.kv_events.feed import make_feed

    has_keys = settings.keys is not None
    return make_feed(engine, publisher, settings.kv_events, has_keys=has_keys, adapters=settings.adapters)


def _print(settings: ServerSettings, address: str | None, *, as_json: bool) -> None:
    values = settings.printable()
    rows = [[name, "" if value is None else str(value)] for name, value in _flat(values)]
    title = "settings" if address is None else f"listening on {address}, model {settings.name!r}"
    emit({"address": address, "settings": values}, table(["setting", "value"], rows, title=title), as_json=as_json)
    sys.stdout.flush()


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows
