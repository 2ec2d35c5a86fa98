"""`kvcomm serve`: the OpenAI-compatible server."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The model: a packaged name, folder, GGUF file or hub id."),
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", metavar="NAME", help="What clients call the model.")
    ] = None,
    adapters: AdapterFlag = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", help="The address to listen on; 127.0.0.1 by default. Others than this machine's own need --keys."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="The port to listen on; 8000 by default, 0 takes a free one.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE", help="The file of API keys that `kvcomm serve keys add` writes."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="HOST",
            help="Another host name by which clients may call the server; may be repeated.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin", metavar="ORIGIN", help="Web pages from here may use the server; may be repeated."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", envvar="KVCOMM_SERVE_CONFIG", metavar="FILE", help="A TOML file with any of these settings."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="The numbers to compute in: auto, float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="The device to compute on, such as cpu or cuda.")
    ] = None,
    weights: WeightsFlag = None,
    pool_tokens: Annotated[
        int | None, typer.Option("--pool-tokens", metavar="N", help="How many tokens' KV the cache has room for.")
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option("--max-requests", metavar="N", help="How many requests may be in flight; more get status 503."),
    ] = None,
    kept_requests: Annotated[
        int | None,
        typer.Option(
            "--kept-requests",
            metavar="N",
            help="How many of these places are kept for tenants that hold few, so that no tenant takes them all; one "
            "over its share gets status 429. One in eight by default, where there are keys of more than one tenant.",
        ),
    ] = None,
    max_connections: Annotated[
        int | None,
        typer.Option(
            "--max-connections",
            metavar="N",
            help="How many connections may be open; over it, those that have sent nothing for longest are closed.",
        ),
    ] = None,
    body_timeout: Annotated[
        float | None,
        typer.Option(
            "--body-timeout",
            metavar="SECONDS",
            help="How long the body of a request may take to come; then status 408.",
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option("--request-timeout", metavar="SECONDS", help="How long a whole answer may take; then status 504."),
    ] = None,
    default_max_tokens: Annotated[
        int | None,
        typer.Option(
            "--default-max-tokens",
            metavar="N",
            help="How many tokens a chat answer may have where the client does not say.",
        ),
    ] = None,
    snapshots: Annotated[
        Path | None,
        typer.Option(
            "--snapshots", metavar="DIR", help="The folder in which clients may save contexts; by default they cannot."
        ),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            "--tier",
            metavar="URL",
            help="Where KV is shared with other servers: a folder, s3://, gs://, az:// or redis://.",
        ),
    ] = None,
    tier_secret_file: Annotated[
        Path | None,
        typer.Option(
            "--tier-secret-file",
            metavar="FILE",
            help="The tier's secret, the same for all who share it; without it only the default tenant uses the tier.",
        ),
    ] = None,
    tier_bytes: Annotated[
        int | None,
        typer.Option(
            "--tier-bytes", metavar="N", help="How many bytes the tier may hold; over it, what is oldest is removed."
        ),
    ] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(
            "--tool-parser",
            metavar="NAME",
            help="How calls of tools are read: hermes, llama3_json, mistral, pythonic or qwen3_xml; by default as the "
            "chat template writes them.",
        ),
    ] = None,
    default_tools: Annotated[
        bool | None,
        typer.Option(
            "--default-tools/--no-default-tools",
            help="Whether tools are described in the system message where the chat template has no place for them; "
            "else such requests are refused.",
        ),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", help="The least that is logged: debug, info, warning or error.")
    ] = None,
    log_prompts: Annotated[
        bool | None, typer.Option("--log-prompts/--no-log-prompts", help="Write prompts and answers into the log.")
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(
            "--traces", metavar="URL", help="Where to send OpenTelemetry traces (a collector, OTLP over HTTP)."
        ),
    ] = None,
    kv_events: Annotated[
        str | None,
        typer.Option(
            "--kv-events",
            metavar="URL",
            help="Tell routers what is cached, in vLLM's KV events, such as on tcp://*:5557; whoever can connect "
            "reads the tokens.",
        ),
    ] = None,
    kv_events_topic: Annotated[
        str | None,
        typer.Option("--kv-events-topic", metavar="TOPIC", help="The topic of these events; by default kv@HOST@MODEL."),
    ] = None,
    kv_events_format: Annotated[
        str | None,
        typer.Option(
            "--kv-events-format", metavar="FORM", help="How events are written: map, or array for older readers."
        ),
    ] = None,
    kv_events_replay: Annotated[
        str | None,
        typer.Option(
            "--kv-events-replay",
            metavar="URL",
            help="Where readers ask for events that they missed, such as tcp://*:5558.",
        ),
    ] = None,
    kv_events_block_size: Annotated[
        int | None,
        typer.Option("--kv-events-block-size", metavar="N", help="Tokens of a block in these events; 16 by default."),
    ] = None,
    kv_events_seed: Annotated[
        str | None,
        typer.Option(
            "--kv-events-seed",
            metavar="TEXT",
            help="The PYTHONHASHSEED of the vLLM servers beside it, if they set one.",
        ),
    ] = None,
    kv_events_tenant: Annotated[
        list[str] | None,
        typer.Option(
            "--kv-events-tenant",
            metavar="NAME[=SALT]",
            help="With --keys: a tenant whose blocks are announced, and the salt in their hashes, by default its name; "
            "may be repeated.",
        ),
    ] = None,
    vllm_metrics: Annotated[
        bool | None,
        typer.Option(
            "--vllm-metrics/--no-vllm-metrics",
            help="Whether some metrics are also named as vLLM names them; by default where there are KV events.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Print the settings in force and end.")] = False,
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

    from kvcomm.server.keys import KeyRing
    from kvcomm.server.listening import address_of, bind
    from kvcomm.server.logs import logging_config
    from kvcomm.server.traces import exporting_provider, shut_down

    with ExitStack() as opened:
        # Mistakes are found before a model is loaded for them.
        keys = KeyRing(settings.keys) if settings.keys is not None else None
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
