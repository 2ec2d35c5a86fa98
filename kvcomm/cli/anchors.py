"""`kvcomm anchors`: what has been learned about moving text, as folders of files: look, prune, hand on, take back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from kvcomm.cli.output import JsonFlag, emit, format_bytes, table
from kvcomm.cli.remote import DEFAULT_SERVER, KeyFlag, ServerFlag, ask
from kvcomm.cli.text import age_of, counted, printable
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from kvcomm.align.profile_file import GroupRecord
    from kvcomm.cli.anchor_folder import AnchorFolder, BankEntry

app = typer.Typer(
    help="What was learned about moving text: anchor banks and calibrations, as `Engine.save_anchors` writes them.",
    no_args_is_help=True,
    epilog="Banks are safetensors files; nothing in them is ever executed. Their format: anchors/FORMAT.md.",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder of anchors.")]
EdgePrefix = Annotated[str, typer.Argument(metavar="EDGE", help="The first digits of an edge; `ls` shows them.")]
BOUNDS = ((0.02, 0.05), (0.05, 0.05))
TRANSFER_TIMEOUT_S = 300.0


@app.command("ls", epilog="Example: kvcomm anchors ls anchors/")
def list_command(folder: Folder, as_json: JsonFlag = False) -> int:
    """Show every bank, and how well it is calibrated.

    Foreign and damaged files are refused in their row, and the exit code is 1.
    """
    from kvcomm.cli.anchor_folder import AnchorFolder

    found = AnchorFolder(folder)
    rows = [_row(entry, found) for entry in found.entries]
    columns = ["edge", "text", "tokens", "size", "age", "pairs"]
    if any(entry.refusal for entry in found.entries):
        columns.append("refused because")
    view = table(columns, [row[: len(columns)] for row in rows], numeric={"tokens", "size", "pairs"})
    value = {"banks": [_values(entry, found) for entry in found.entries], "num_groups": len(found.groups)}
    emit(value, view if rows else Text("no anchors there"), as_json=as_json)
    return int(any(entry.refusal for entry in found.entries))


@app.command("show", epilog="Example: kvcomm anchors show anchors/ 3fa9")
def show_command(folder: Folder, edge: EdgePrefix, as_json: JsonFlag = False) -> None:
    """Show one bank: where it leads from and to, and what its groups promise."""
    from kvcomm.cli.anchor_folder import AnchorFolder

    found = AnchorFolder(folder)
    entry = found.entry(edge)
    header = entry.require()
    value = _values(entry, found) | header.model_dump(mode="json", exclude={"keys", "values"})
    groups = found.groups_of(entry)
    value["groups"] = [_group_values(group) for group in groups]
    facts = table(
        None, [(name, value[name]) for name in ("file", "slot", "source_slot", "source", "target", "created")]
    )
    columns = (
        "group",
        "agents' segments",
        "strength",
        "pairs",
        "rung",
        "median nats",
        "95 % within",
        *_bound_columns(),
    )
    rows = [row for group in groups for row in _group_rows(group)]
    view = table(columns, rows, title="groups", numeric=set(columns[2:])) if rows else Text("no group rests on it")
    emit(value, facts, view, as_json=as_json)


@app.command("prune", epilog="Example: kvcomm anchors prune anchors/ --edge 3fa9 --dry-run")
def prune_command(
    folder: Folder,
    edge: Annotated[list[str] | None, typer.Option("--edge", metavar="EDGE", help="These banks. Repeatable.")] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", min=0, metavar="DAYS", help="Banks saved longer ago.")
    ] = None,
    keep_bytes: Annotated[
        int | None, typer.Option("--keep-bytes", min=0, metavar="N", help="The oldest, until so many bytes are left.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove banks, and the groups that rest on them: their calibration means nothing without."""
    from kvcomm.cli.anchor_folder import AnchorFolder

    if not edge and older_than is None and keep_bytes is None:
        raise InvalidRequest("say what to prune: --edge, --older-than or --keep-bytes")
    found = AnchorFolder(folder)
    chosen = found.choose(edge or (), older_than, keep_bytes)
    num_groups = found.prune(chosen, dry_run=dry_run)
    freed = sum(entry.num_bytes for entry in chosen)
    value = {
        "removed": [entry.edge for entry in chosen],
        "freed_bytes": freed,
        "removed_groups": num_groups,
        "dry_run": dry_run,
    }
    did = "would remove" if dry_run else "removed"
    banks, groups = counted(len(chosen), "bank"), counted(num_groups, "group")
    emit(value, f"{did} {banks}, {format_bytes(freed)}, and {groups}", as_json=as_json)


@app.command("export", epilog="Example: kvcomm anchors export anchors/ team.tar")
def export_command(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to write, a plain .tar.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Pack a folder of anchors into one file."""
    from kvcomm.align.archive import export_archive
    from kvcomm.cli.anchor_folder import AnchorFolder

    num_banks = export_archive(AnchorFolder(folder).folder, file, is_new=not force)
    num_bytes = file.stat().st_size
    value = {"file": str(file), "num_banks": num_banks, "num_bytes": num_bytes}
    emit(value, f"exported {counted(num_banks, 'bank')} to {file}, {format_bytes(num_bytes)}", as_json=as_json)


@app.command("import", epilog="Example: kvcomm anchors import team.tar anchors/")
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive that `export` wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for what is in it.")],
    as_json: JsonFlag = False,
) -> None:
    """Unpack anchors into a new folder; everything is checked before anything is in place."""
    from kvcomm.align.archive import import_archive

    if folder.exists():
        raise InvalidRequest(f"{folder} exists; import into a new folder")
    num_banks = import_archive(file, folder)
    emit({"dir": str(folder), "num_banks": num_banks}, f"imported {counted(num_banks, 'bank')}", as_json=as_json)


@app.command("fetch", epilog="Example: kvcomm anchors fetch --server http://localhost:8000 anchors/")
def fetch_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for them.")],
    server: ServerFlag = DEFAULT_SERVER,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Get what a running server has learned for you into a new folder, for `ls`, `show` and `export`."""
    from kvcomm.align.archive import import_archive

    if folder.exists():
        raise InvalidRequest(f"{folder} exists; fetch into a new folder")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "archive"
        file.write_bytes(ask("GET", f"{server.rstrip('/')}/v1/anchors", key=key, timeout_s=TRANSFER_TIMEOUT_S))
        num_banks = import_archive(file, folder)
    emit({"dir": str(folder), "num_banks": num_banks}, f"fetched {counted(num_banks, 'bank')}", as_json=as_json)


@app.command("send", epilog="Example: kvcomm anchors send anchors/ --server http://localhost:8000 --tenant ann")
def send_command(
    folder: Folder,
    server: ServerFlag = DEFAULT_SERVER,
    key: KeyFlag = None,
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose they are to be.")] = "default",
    as_json: JsonFlag = False,
) -> None:
    """Put a folder of anchors in place on a running server; needs an operator's key where the server has keys.

    They have to come from a tenant of the same name and the same model.
    """
    from kvcomm.align.archive import export_archive
    from kvcomm.cli.anchor_folder import AnchorFolder

    url = f"{server.rstrip('/')}/admin/tenants/{quote(tenant, safe='')}/anchors"
    headers = {"content-type": "application/octet-stream"}
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "archive"
        export_archive(AnchorFolder(folder).folder, file)
        taken = json.loads(ask("PUT", url, file.read_bytes(), headers, key=key, timeout_s=TRANSFER_TIMEOUT_S))
    emit(taken, f"{server} has taken {counted(taken['num_banks'], 'bank')}", as_json=as_json)


def _values(entry: BankEntry, found: AnchorFolder) -> dict[str, Any]:
    value: dict[str, Any] = {
        "edge": entry.edge,
        "file": str(entry.file),
        "num_bytes": entry.num_bytes,
        "refusal": entry.refusal,
    }
    if entry.header is not None:
        value |= {"num_tokens": entry.header.num_tokens, "created": entry.header.created}
        value["num_pairs"] = sum(len(group.pairs) for group in found.groups_of(entry))
    return value


def _row(entry: BankEntry, found: AnchorFolder) -> tuple[object, ...]:
    size = format_bytes(entry.num_bytes)
    if (header := entry.header) is None:
        return (entry.edge, None, None, size, None, None, printable(entry.refusal or ""))
    where = "any context" if header.edge.is_general else "one context"
    text = printable(f"{header.source_slot} -> {header.slot}, {where}")
    num_pairs = sum(len(group.pairs) for group in found.groups_of(entry))
    return (entry.edge, text, header.num_tokens, size, age_of(header.created), num_pairs, None)


def _group_values(record: GroupRecord) -> dict[str, Any]:
    group = record.group()
    value: dict[str, Any] = {
        "group": group.key.digest[:12],
        "slots": [each.slot for each in record.edges],
        "estimator": record.estimator,
        "strength": group.strength,
        "num_pairs": group.calibration.num_pairs,
        "tripped": [list(bound) for bound, breaker in group.breakers.items() if breaker.tripped],
        "rungs": [],
    }
    for rung, share in enumerate(record.shares):
        divergences = sorted(pair.divergences[rung] for pair in group.calibration.pairs)
        median = divergences[len(divergences) // 2] if divergences else None
        predicted = group.calibration.predicted(rung, 0.95) if divergences else None
        value["rungs"].append({"share": share, "median": median, "predicted_95": predicted})
    value["chosen"] = {_bound_name(bound): _chosen(record, group.calibration.choose(*bound)) for bound in BOUNDS}
    return value


def _group_rows(record: GroupRecord) -> list[tuple[object, ...]]:
    value = _group_values(record)
    rows: list[tuple[object, ...]] = []
    for index, rung in enumerate(value["rungs"]):
        first = (value["group"], ", ".join(map(printable, value["slots"])), value["strength"], value["num_pairs"])
        chosen = ["chosen" if value["chosen"][_bound_name(bound)] == rung["share"] else "" for bound in BOUNDS]
        numbers = [None if number is None else f"{number:.4f}" for number in (rung["median"], rung["predicted_95"])]
        rows.append((*(first if not index else ("",) * 4), f"{rung['share']:.0%}", *numbers, *chosen))
    return rows


def _chosen(record: GroupRecord, rung: int | None) -> float | None:
    return None if rung is None else record.shares[rung]


def _bound_name(bound: tuple[float, float]) -> str:
    return f"({bound[0]}, {bound[1]})"


def _bound_columns() -> list[str]:
    return [f"at {_bound_name(bound)}" for bound in BOUNDS]
