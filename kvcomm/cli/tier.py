"""`kvcomm tier`: a shared tier as its owner sees it: look, check, prune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from kvcomm.cli.options import DryRunFlag
from kvcomm.cli.output import JsonFlag, emit, format_bytes, table
from kvcomm.cli.text import age_of, counted, printable
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.table import Table

    from kvcomm.tiers.inventory import Entry
    from kvcomm.tiers.store import ObjectStore

app = typer.Typer(
    help="A shared tier of KV in a folder, a bucket (s3://, gs://, az://) or Redis (redis://): look, check, prune.",
    no_args_is_help=True,
    epilog="Credentials come from the environment. No tenant's secret is needed: whoever may read the whole store "
    "is taken for its owner. What kvcomm has not written is never touched.",
)

Url = Annotated[str, typer.Argument(metavar="URL", help="A folder, or a URL such as s3://bucket/prefix.")]
DAY_S = 86_400
KEY_SHOWN = 12


@app.command("ls", epilog="Example: kvcomm tier ls s3://bucket/prefix")
def list_command(url: Url, as_json: JsonFlag = False) -> int:
    """Show what every object says of itself; only headers are read.

    What cannot be used is refused in its row, and the exit code is 1.
    """
    from kvcomm.tiers.inventory import entries

    with _opened(url) as store:
        found = list(entries(store))
    view = _table(found) if found else Text("nothing of kvcomm's there")
    emit({"objects": [each.to_dict() for each in found]}, view, as_json=as_json)
    return int(any(each.refusal for each in found))


@app.command("stat", epilog="Example: kvcomm tier stat /srv/kv")
def stat_command(url: Url, as_json: JsonFlag = False) -> None:
    """Show how much there is, by kind; nothing is read but names and sizes."""
    from kvcomm.tiers.inventory import totals

    with _opened(url) as store:
        found, kind, shown = totals(store), store.kind, store.url
    rows = [(each.kind, each.num_objects, format_bytes(each.num_bytes)) for each in found.kinds]
    line = f"{shown}: {counted(found.num_objects, 'object')}, {format_bytes(found.num_bytes)}"
    if found.oldest_s is not None and found.newest_s is not None:
        line += f", of {counted(found.spaces, 'space')}; written {_age(found.oldest_s)} to {_age(found.newest_s)} ago"
    views = [Text(printable(line))]
    views_of_kinds = [table(("kind", "objects", "size"), rows, numeric={"objects", "size"})] if rows else []
    emit({"kind": kind, "url": shown, **found.to_dict()}, *views, *views_of_kinds, as_json=as_json)


@app.command("verify", epilog="Example: kvcomm tier verify s3://bucket/prefix")
def verify_command(url: Url, as_json: JsonFlag = False) -> int:
    """Read every object and check all of its bytes; the exit code is 1 if one is bad. `prune --bad` removes those."""
    from kvcomm.tiers.inventory import entries

    with _opened(url) as store:
        found = list(entries(store, is_thorough=True))
    bad = [each for each in found if each.refusal]
    line = f"{counted(len(found), 'object')} read, {len(bad)} bad"
    value = {"num_objects": len(found), "num_bytes": _bytes(found), "bad": [each.to_dict() for each in bad]}
    emit(value, Text(line), *([_table(bad)] if bad else []), as_json=as_json)
    return int(bool(bad))


@app.command("prune", epilog="Example: kvcomm tier prune /srv/kv --keep-bytes 100000000000 --older-than 7 --dry-run")
def prune_command(
    url: Url,
    keep_bytes: Annotated[
        int | None,
        typer.Option(
            "--keep-bytes", min=0, metavar="N", help="Remove what was used longest ago until so many bytes are left."
        ),
    ] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", min=0, metavar="DAYS", help="Remove what was not used for so long.")
    ] = None,
    bad: Annotated[bool, typer.Option("--bad", help="Remove what cannot be used; every object is read.")] = False,
    leftovers: Annotated[
        bool,
        typer.Option("--leftovers", help="Remove what killed writers left, which always goes, and nothing else."),
    ] = False,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove objects; safe beside workers that read and write. Buckets and Redis go by when an object was written."""
    from kvcomm.tiers.inventory import entries
    from kvcomm.tiers.janitor import sweep

    if keep_bytes is None and older_than is None and not bad and not leftovers:
        raise InvalidRequest("say what to prune: --keep-bytes, --older-than, --bad or --leftovers")
    with _opened(url) as store:
        keys = [each.key for each in entries(store, is_thorough=True) if each.refusal] if bad else []
        age_s = None if older_than is None else older_than * DAY_S
        swept = sweep(store, max_bytes=keep_bytes, max_age_s=age_s, bad=keys, is_dry=dry_run)
    line = (
        f"{'would remove' if dry_run else 'removed'} {counted(swept.removed_objects, 'object')}, "
        f"{format_bytes(swept.removed_bytes)}; {counted(swept.num_objects, 'object')}, "
        f"{format_bytes(swept.num_bytes)} left"
    )
    if swept.leftovers:
        line += f"; swept {counted(swept.leftovers, 'leftover')} of killed writers"
    emit({"dry_run": dry_run, **swept.to_dict()}, Text(line), as_json=as_json)


@contextmanager
def _opened(url: str) -> Iterator[ObjectStore]:
    from kvcomm.tiers.opening import open_store

    store = open_store(url, is_made=False)
    try:
        yield store
    finally:
        store.close()


def _table(found: list[Entry]) -> Table:
    columns = ["object", "kind", "tokens", "fidelity", "name", "made by", "model", "size", "used"]
    if any(each.refusal for each in found):
        columns.append("refused because")
    return table(columns, [_row(each)[: len(columns)] for each in found], numeric={"tokens", "size"})


def _row(entry: Entry) -> tuple[Any, ...]:
    tokens = f"{entry.start}..{entry.start + entry.num_tokens}" if entry.num_tokens else None
    texts = (entry.fidelity, entry.name, entry.producer, entry.namespace[:8])
    return (
        entry.key.rpartition("/")[2][:KEY_SHOWN],
        entry.kind,
        tokens,
        *map(printable, texts),
        format_bytes(entry.num_bytes),
        _age(entry.used_s),
        printable(entry.refusal or ""),
    )


def _age(moment_s: float) -> str | None:
    try:
        return age_of(datetime.fromtimestamp(moment_s, UTC).isoformat())
    except (OverflowError, ValueError, OSError):  # a file's time can be anything
        return None


def _bytes(found: list[Entry]) -> int:
    return sum(each.num_bytes for each in found)
