"""The options of `kvcomm serve` that stand for fields of `ServerSettings`, which says what is in force without them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelSetting = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="The model: a packaged name, folder, GGUF file or hub id."),
]
ServedNameSetting = Annotated[
    str | None, typer.Option("--served-name", metavar="NAME", help="What clients call the model.")
]
HostSetting = Annotated[
    str | None,
    typer.Option(
        "--host", help="The address to listen on; 127.0.0.1 by default. Others than this machine's own need --keys."
    ),
]
PortSetting = Annotated[
    int | None, typer.Option("--port", help="The port to listen on; 8000 by default, 0 takes a free one.")
]
KeysSetting = Annotated[
    Path | None,
    typer.Option("--keys", metavar="FILE", help="The file of API keys that `kvcomm serve keys add` writes."),
]
AllowedHostSetting = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="HOST",
        help="Another host name by which clients may call the server; may be repeated.",
    ),
]
CorsOriginSetting = Annotated[
    list[str] | None,
    typer.Option("--cors-origin", metavar="ORIGIN", help="Web pages from here may use the server; may be repeated."),
]
ConfigFlag = Annotated[
    Path | None,
    typer.Option(
        "--config", envvar="KVCOMM_SERVE_CONFIG", metavar="FILE", help="A TOML file with any of these settings."
    ),
]
DtypeSetting = Annotated[
    str | None, typer.Option("--dtype", help="The numbers to compute in: auto, float32, bfloat16 or float16.")
]
DeviceSetting = Annotated[str | None, typer.Option("--device", help="The device to compute on, such as cpu or cuda.")]
PoolTokensSetting = Annotated[
    int | None, typer.Option("--pool-tokens", metavar="N", help="How many tokens' KV the cache has room for.")
]
MaxRequestsSetting = Annotated[
    int | None,
    typer.Option("--max-requests", metavar="N", help="How many requests may be in flight; more get status 503."),
]
KeptRequestsSetting = Annotated[
    int | None,
    typer.Option(
        "--kept-requests",
        metavar="N",
        help="How many of these places are kept for tenants that hold few, so that no tenant takes them all; one "
        "over its share gets status 429. One in eight by default, where there are keys of more than one tenant.",
    ),
]
MaxConnectionsSetting = Annotated[
    int | None,
    typer.Option(
        "--max-connections",
        metavar="N",
        help="How many connections may be open; over it, those that have sent nothing for longest are closed.",
    ),
]
BodyTimeoutSetting = Annotated[
    float | None,
    typer.Option(
        "--body-timeout",
        metavar="SECONDS",
        help="How long the body of a request may take to come; then status 408.",
    ),
]
RequestTimeoutSetting = Annotated[
    float | None,
    typer.Option("--request-timeout", metavar="SECONDS", help="How long a whole answer may take; then status 504."),
]
DefaultMaxTokensSetting = Annotated[
    int | None,
    typer.Option(
        "--default-max-tokens",
        metavar="N",
        help="How many tokens a chat answer may have where the client does not say.",
    ),
]
SnapshotsSetting = Annotated[
    Path | None,
    typer.Option(
        "--snapshots", metavar="DIR", help="The folder in which clients may save contexts; by default they cannot."
    ),
]
PriorSetting = Annotated[
    Path | None,
    typer.Option(
        "--prior",
        metavar="FILE",
        help="What moved text costs on this model, as `python -m eval.prior` measures it; by default what comes with "
        "kvcomm for it, if anything does.",
    ),
]
TierSetting = Annotated[
    str | None,
    typer.Option(
        "--tier",
        metavar="URL",
        help="Where KV is shared with other servers: a folder, s3://, gs://, az:// or redis://.",
    ),
]
TierSecretFileSetting = Annotated[
    Path | None,
    typer.Option(
        "--tier-secret-file",
        metavar="FILE",
        help="The tier's secret, the same for all who share it; without it only the default tenant uses the tier.",
    ),
]
TierBytesSetting = Annotated[
    int | None,
    typer.Option(
        "--tier-bytes", metavar="N", help="How many bytes the tier may hold; over it, what is oldest is removed."
    ),
]
ToolParserSetting = Annotated[
    str | None,
    typer.Option(
        "--tool-parser",
        metavar="NAME",
        help="How calls of tools are read: hermes, llama3_json, mistral, pythonic or qwen3_xml; by default as the "
        "chat template writes them.",
    ),
]
DefaultToolsSetting = Annotated[
    bool | None,
    typer.Option(
        "--default-tools/--no-default-tools",
        help="Whether tools are described in the system message where the chat template has no place for them; "
        "else such requests are refused.",
    ),
]
LogLevelSetting = Annotated[
    str | None, typer.Option("--log-level", help="The least that is logged: debug, info, warning or error.")
]
LogPromptsSetting = Annotated[
    bool | None, typer.Option("--log-prompts/--no-log-prompts", help="Write prompts and answers into the log.")
]
TracesSetting = Annotated[
    str | None,
    typer.Option("--traces", metavar="URL", help="Where to send OpenTelemetry traces (a collector, OTLP over HTTP)."),
]
KVEventsSetting = Annotated[
    str | None,
    typer.Option(
        "--kv-events",
        metavar="URL",
        help="Tell routers what is cached, in vLLM's KV events, such as on tcp://*:5557; whoever can connect "
        "reads the tokens.",
    ),
]
KVEventsTopicSetting = Annotated[
    str | None,
    typer.Option("--kv-events-topic", metavar="TOPIC", help="The topic of these events; by default kv@HOST@MODEL."),
]
KVEventsFormatSetting = Annotated[
    str | None,
    typer.Option("--kv-events-format", metavar="FORM", help="How events are written: map, or array for older readers."),
]
KVEventsReplaySetting = Annotated[
    str | None,
    typer.Option(
        "--kv-events-replay",
        metavar="URL",
        help="Where readers ask for events that they missed, such as tcp://*:5558.",
    ),
]
KVEventsBlockSizeSetting = Annotated[
    int | None,
    typer.Option("--kv-events-block-size", metavar="N", help="Tokens of a block in these events; 16 by default."),
]
KVEventsSeedSetting = Annotated[
    str | None,
    typer.Option(
        "--kv-events-seed",
        metavar="TEXT",
        help="The PYTHONHASHSEED of the vLLM servers beside it, if they set one.",
    ),
]
KVEventsTenantSetting = Annotated[
    list[str] | None,
    typer.Option(
        "--kv-events-tenant",
        metavar="NAME[=SALT]",
        help="With --keys: a tenant whose blocks are announced, and the salt in their hashes, by default its name; "
        "may be repeated.",
    ),
]
VLLMMetricsSetting = Annotated[
    bool | None,
    typer.Option(
        "--vllm-metrics/--no-vllm-metrics",
        help="Whether some metrics are also named as vLLM names them; by default where there are KV events.",
    ),
]
CheckFlag = Annotated[bool, typer.Option("--check", help="Print the settings in force and end.")]
