"""`kvcomm serve tenants`: what each tenant of a running server keeps, and removing it; for the operator."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from kvcomm.cli.output import JsonFlag, emit, format_bytes, table
from kvcomm.cli.remote import DEFAULT_SERVER, ServerFlag, ask_json, get_json
from kvcomm.cli.text import counted, printable
from kvcomm.errors import ServerError

EPILOG = (
    "Examples: kvcomm serve tenants ls --server URL; kvcomm serve tenants show ann; kvcomm serve tenants rm ann; "
    "kvcomm serve tenants rm ann --context ctx_0123456789abcdef01234567"
)
ADMIN_VARIABLE = "KVCOMM_ADMIN_KEY"
REMOVAL_TIMEOUT_S = 120.0
"""Requests that are cancelled are waited for."""

FOLLOWING_S = 10.0
"""In which a server must have seen that its key file has changed; it looks once a second."""

AdminKeyFlag = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar=ADMIN_VARIABLE,
        metavar="KEY",
        help="A key with the role admin, where the server has keys.",
        show_default=False,
    ),
]
SnapshotsFlag = Annotated[bool, typer.Option("--snapshots", help="Delete its snapshots, too.")]

app = typer.Typer(
    help="What tenants of a running server keep; needs the operator's key.", epilog=EPILOG, no_args_is_help=True
)


@app.command("ls", epilog=EPILOG)
def show_all(server: ServerFlag = DEFAULT_SERVER, key: AdminKeyFlag = None, as_json: JsonFlag = False) -> None:
    """List tenants and what they hold."""
    value = get_json(_url(server), key)
    rows = [
        [
            each["name"],
            "yes" if each["has_key"] else "no",
            each["requests_in_flight"],
            f"{each['contexts']} ({each['pinned_contexts']} pinned)",
            each["context_tokens"],
            each["cached_tokens"],
            each["segments"],
            format_bytes(each["conversation_bytes"] + each["segment_bytes"]),
        ]
        for each in value["data"]
    ]
    columns = ["tenant", "key", "requests", "contexts", "their tokens", "cached tokens", "segments", "texts"]
    emit(value, table(columns, rows, numeric=set(columns[2:]) - {"contexts"}), as_json=as_json)


@app.command("show", epilog=EPILOG)
def show(
    name: Annotated[
        str, typer.Argument(metavar="TENANT", help="The name of a tenant; `kvcomm serve tenants ls` shows them.")
    ],
    server: ServerFlag = DEFAULT_SERVER,
    key: AdminKeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Show one tenant, its contexts, segments and snapshots."""
    value = {"tenant": get_json(_url(server, name), key)}
    for kind in ("contexts", "segments"):
        value[kind] = get_json(_url(server, name, kind), key)["data"]
    try:
        value["snapshots"] = get_json(_url(server, name, "snapshots"), key)["data"]
    except ServerError:  # it keeps none
        value["snapshots"] = []
    facts = [(fact, printable(str(said))) for fact, said in value["tenant"].items()]
    contexts = [
        [each["id"], printable(each["name"] or ""), each["tokens"], format_bytes(each["bytes"]), _state(each)]
        for each in value["contexts"]
    ]
    segments = [[printable(each["name"]), each["version"], each["tokens"]] for each in value["segments"]]
    snapshots = [[printable(each["name"]), each["tokens"], format_bytes(each["bytes"])] for each in value["snapshots"]]
    emit(
        value,
        table(None, facts),
        table(["context", "name", "tokens", "size", "state"], contexts, numeric={"tokens", "size"}),
        table(["segment", "version", "tokens"], segments, numeric={"version", "tokens"}),
        table(["snapshot", "tokens", "size"], snapshots, numeric={"tokens", "size"}),
        as_json=as_json,
    )


@app.command("rm", epilog=EPILOG)
def remove(
    name: Annotated[
        str, typer.Argument(metavar="TENANT", help="The name of a tenant; `kvcomm serve tenants ls` shows them.")
    ],
    context: Annotated[
        list[str] | None, typer.Option("--context", metavar="ID", help="Remove only this context; may be repeated.")
    ] = None,
    segment: Annotated[
        list[str] | None, typer.Option("--segment", metavar="NAME", help="Remove only this segment; may be repeated.")
    ] = None,
    snapshot: Annotated[
        list[str] | None, typer.Option("--snapshot", metavar="NAME", help="Remove only this snapshot; may be repeated.")
    ] = None,
    snapshots: SnapshotsFlag = False,
    server: ServerFlag = DEFAULT_SERVER,
    key: AdminKeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove what a tenant has in a server, all but its snapshots or only what is named; its requests are cancelled."""
    named = {"contexts": context or [], "segments": segment or [], "snapshots": snapshot or []}
    if not any(named.values()):
        value = purge(server, key, name, snapshots=snapshots)
        emit(value, said_of(value), as_json=as_json)
        return
    for kind, things in named.items():
        for thing in things:
            ask_json("DELETE", _url(server, name, kind, thing), key=key, timeout_s=REMOVAL_TIMEOUT_S)
    removed = ", ".join(counted(len(things), kind[:-1]) for kind, things in named.items() if things)
    emit({"tenant": name, "removed": named}, f"removed {removed} of {printable(name)}", as_json=as_json)


def statuses(server: str, key: str | None) -> dict[str, dict[str, Any]]:
    """What each tenant holds; raises what `ask_json` does, where the key is no operator's."""
    return {each["name"]: each for each in get_json(_url(server), key)["data"]}


def purge(server: str, key: str | None, name: str, *, snapshots: bool) -> dict[str, Any]:
    """Remove all that a tenant has; raises what `ask_json` does."""
    url = f"{_url(server, name)}?snapshots={str(snapshots).lower()}"
    return dict(ask_json("DELETE", url, key=key, timeout_s=REMOVAL_TIMEOUT_S))


def wait_until_revoked(server: str, key: str | None, name: str) -> None:
    """Wait until a server has seen that a tenant has no key.

    Raises:
        ServerError: it does not see that; it reads another key file.
    """
    until_s = time.monotonic() + FOLLOWING_S
    while statuses(server, key).get(name, {"has_key": False})["has_key"]:
        if time.monotonic() > until_s:
            raise ServerError(
                f"{server} still knows a key of {name!r}, so it reads another file; nothing was removed there"
            )
        time.sleep(0.2)


def said_of(removed: Mapping[str, Any]) -> str:
    """A removal in words."""
    parts = [
        counted(removed["contexts"], "context"),
        counted(removed["segments"], "segment"),
        counted(removed["snapshots"], "snapshot"),
        counted(removed["cached_tokens"], "cached token"),
    ]
    cancelled = removed["cancelled_requests"]
    ended = f", {counted(cancelled, 'request')} cancelled" if cancelled else ""
    return printable(f"removed {removed['name']}: {', '.join(parts)}{ended}")


def _state(context: Mapping[str, Any]) -> str:
    return "busy" if context["busy"] else "pinned" if context["pinned"] else ""


def _url(server: str, *parts: str) -> str:
    return "/".join([f"{server.rstrip('/')}/admin/tenants", *(quote(part, safe="") for part in parts)])
