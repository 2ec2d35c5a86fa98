"""`kvcomm serve keys`: the file of API keys that a server reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcomm.cli.output import JsonFlag, emit, table
from kvcomm.cli.remote import DEFAULT_SERVER, ServerFlag
from kvcomm.cli.serve_tenants import AdminKeyFlag, said_of, statuses, wait_until_revoked
from kvcomm.cli.serve_tenants import purge as purge_tenant
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from kvcomm.server.settings import Limits

EPILOG = (
    "Examples: kvcomm serve keys add ann --keys keys.json --requests-per-minute 60; "
    "kvcomm serve keys add root --role admin --keys keys.json; kvcomm serve keys ls --keys keys.json; "
    "kvcomm serve keys rm ann --keys keys.json --purge --key ADMIN_KEY"
)

app = typer.Typer(
    help="API keys: a file of their hashes, which a running server follows.",
    epilog=EPILOG,
    no_args_is_help=True,
)

KeysFlag = Annotated[
    Path, typer.Option("--keys", envvar="KVCOMM_SERVE_KEYS", metavar="FILE", help="The key file.", show_default=False)
]


@app.command("add", epilog=EPILOG)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the key; no other in the file may have it.")],
    keys: KeysFlag,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", metavar="NAME", help="The tenant whose cache it uses; by default one of its own."),
    ] = None,
    role: Annotated[
        str,
        typer.Option(
            "--role", help="What it may do: tenant (ask), admin (manage the server as well) or metrics (read them)."
        ),
    ] = "tenant",
    requests_per_minute: Annotated[
        float | None,
        typer.Option("--requests-per-minute", metavar="N", help="How many requests may begin in a minute."),
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option("--max-requests", metavar="N", help="How many of its requests may be in flight.")
    ] = None,
    held_tokens: Annotated[
        int | None,
        typer.Option("--held-tokens", metavar="N", help="How many tokens its requests in flight may grow to."),
    ] = None,
    when_full: Annotated[
        str | None, typer.Option("--when-full", help="What happens to requests over --held-tokens: queue or refuse.")
    ] = None,
    cached_tokens: Annotated[
        int | None,
        typer.Option(
            "--cached-tokens",
            metavar="N",
            help="How many tokens of its prefixes are kept; over it, its own are dropped.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key, write its hash, and print the key: it is shown this once."""
    from kvcomm.server.keys import Role, add_key

    limits = {
        "requests_per_minute": requests_per_minute,
        "max_requests": max_requests,
        "held_tokens": held_tokens,
        "when_full": when_full,
        "cached_tokens": cached_tokens,
    }
    try:
        kind = Role(role)
    except ValueError:
        raise InvalidRequest(f"--role {role!r} is none of {', '.join(each.value for each in Role)}") from None
    key = add_key(keys, name, role=kind, tenant=tenant, limits=_limits(limits))
    emit({"name": name, "role": role, "key": key}, key, as_json=as_json)


def _limits(given: dict[str, Any]) -> Limits | None:
    from pydantic import ValidationError

    from kvcomm.server.settings import Limits

    values = {name: value for name, value in given.items() if value is not None}
    try:
        return Limits(**values) if values else None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise InvalidRequest(f"{option}: {first['msg']}, not {first['input']!r}") from error


@app.command("rm", epilog=EPILOG)
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the key.")],
    keys: KeysFlag,
    purge: Annotated[
        bool,
        typer.Option("--purge", help="If it is its tenant's last one, remove what that tenant has in the server, too."),
    ] = False,
    snapshots: Annotated[bool, typer.Option("--snapshots", help="With --purge: its snapshots as well.")] = False,
    server: ServerFlag = DEFAULT_SERVER,
    key: AdminKeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Take a key out of the file; a running server refuses it within a second.

    What its tenant has in the server stays, and requests that run go on; --purge ends both.
    """
    from kvcomm.server.keys import remove_key

    if snapshots and not purge:
        raise InvalidRequest("--snapshots needs --purge")
    if purge:
        statuses(server, key)  # a server that is not there, or wants another key, is told before anything is done
    record = remove_key(keys, name)
    said = f"removed {record.name}"
    purged = _purge(keys, record.tenant, server, key, snapshots=snapshots) if purge else None
    if purge:
        said += f"\n{said_of(purged)}" if purged else "; its tenant has other keys, or nothing there"
    emit({"removed": record.name, **({"purged": purged} if purge else {})}, said, as_json=as_json)


def _purge(keys: Path, tenant: str | None, server: str, key: str | None, *, snapshots: bool) -> dict[str, Any] | None:
    """Remove what a tenant without keys has in a server; None: it has some, or nothing there."""
    from kvcomm.server.keys import KeyFile

    if tenant is None or any(each.tenant == tenant for each in KeyFile.read(keys).keys):
        return None
    wait_until_revoked(server, key, tenant)
    return purge_tenant(server, key, tenant, snapshots=snapshots) if tenant in statuses(server, key) else None


@app.command("ls", epilog=EPILOG)
def list_keys(keys: KeysFlag, as_json: JsonFlag = False) -> None:
    """List the keys of a file: names, roles, tenants and limits; nobody can list the keys themselves."""
    from kvcomm.server.keys import KeyFile

    records = KeyFile.read(keys).keys
    rows = []
    for record in records:
        limits = record.limits.model_dump(exclude_unset=True) if record.limits else {}
        said = ", ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
        rows.append([record.name, record.role.value, record.tenant, record.created, said])
    values = [record.model_dump(mode="json", exclude={"sha256"}) for record in records]
    emit({"keys": values}, table(["name", "role", "tenant", "created", "limits"], rows), as_json=as_json)
