"""`kvcomm anchors`: what has been learned about moving text, as folders of files: look, prune, hand on, take back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from kvcomm.cli.options import DryRunFlag
from kvcomm.cli.output import JsonFlag, emit, format_bytes, table
from kvcomm.cli.remote import DEFAULT_SERVER, KeyFlag, ServerFlag, ask
from kvcomm.cli.text import age_of, counted, printable
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvcomm.align.ladder import Ladder
    from kvcomm.align.levels import KeptWatch
    from kvcomm.cli.anchor_folder import AnchorFolder, BankEntry, ReaderEntry

app = typer.Typer(
    help="Look into what was learned about moving text, as `Engine.save_anchors` keeps it: banks of measured offsets "
    "(anchors), and for every reader, a kind of prompt, the pairs that were measured to keep its bound.",
    no_args_is_help=True,
    epilog="All files are safetensors; nothing in them is ever executed. Their format: anchors/FORMAT.md.",
)


def _is_there(folder: Path) -> Path:
    """The folder as it is. Raises InvalidRequest if there is none, before what reads it is imported."""
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is not a folder of anchors; `Engine.save_anchors` writes one")
    return folder


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder of anchors.", callback=_is_there)]
Prefix = Annotated[
    str, typer.Argument(metavar="DIGEST", help="The first digits of a bank's edge or of a reader; `ls` shows them.")
]
BOUNDS = ((0.02, 0.95), (0.05, 0.95), (0.05, 0.9))
"""Nats and confidence."""
CONFIDENCES = (0.9, 0.95)
TRANSFER_TIMEOUT_S = 300.0


@app.command("ls", epilog="Example: kvcomm anchors ls anchors/")
def list_command(folder: Folder, as_json: JsonFlag = False) -> int:
    """Show every bank and every reader, and how many pairs each still lacks.

    Pairs are exact prompts that were measured: `7 of 9` at a confidence says that from 9 on text may be moved with it,
    if none of them breaks the bound. Foreign and damaged files are refused by name, and the exit code is 1.
    """
    from kvcomm.cli.anchor_folder import AnchorFolder

    found = AnchorFolder(folder)
    refusals = list(dict.fromkeys(each for each in (found.refusal, found.leftover) if each))
    readers = [] if found.refusal else [_reader_values(entry, found) for entry in found.readers]
    pool = [] if found.refusal else _counts(found, None)
    views: list[RenderableType] = [_bank_table(found.entries)] if found.entries else []
    if readers:
        views += [_reader_table(readers), Text(f"all readers together: {_in_words(pool)}")]
    views += [Text(printable(each), style="red") for each in refusals]
    banks = [_bank_values(entry) for entry in found.entries]
    value = {"banks": banks, "readers": readers, "pool": pool, "refusals": refusals}
    emit(value, *(views or [Text("no anchors there")]), as_json=as_json)
    return int(bool(refusals) or any(entry.refusal for entry in found.entries))


@app.command("show", epilog="Example: kvcomm anchors show anchors/ 3fa9")
def show_command(folder: Folder, digest: Prefix, as_json: JsonFlag = False) -> None:
    """Show one bank, or one reader: how far each way to correct moved text was off, and which one would be chosen."""
    from kvcomm.cli.anchor_folder import AnchorFolder, ReaderEntry

    found = AnchorFolder(folder)
    entry = found.entry(digest)
    if isinstance(entry, ReaderEntry):
        _show_reader(entry, found, as_json=as_json)
        return
    header = entry.require()
    value = _bank_values(entry) | header.model_dump(mode="json", exclude={"keys", "values"})
    names = ("file", "edge", "slot", "source_slot", "source", "target", "num_tokens", "created")
    emit(value, table(None, [(name, printable(str(value[name]))) for name in names]), as_json=as_json)


@app.command("prune", epilog="Example: kvcomm anchors prune anchors/ --edge 3fa9 --dry-run")
def prune_command(
    folder: Folder,
    edge: Annotated[
        list[str] | None, typer.Option("--edge", metavar="EDGE", help="Remove these banks; may be repeated.")
    ] = None,
    reader: Annotated[
        list[str] | None, typer.Option("--reader", metavar="READER", help="Remove these readers; may be repeated.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", min=0, metavar="DAYS", help="Remove banks saved longer ago.")
    ] = None,
    keep_bytes: Annotated[
        int | None,
        typer.Option("--keep-bytes", min=0, metavar="N", help="Remove the oldest banks until so many bytes are left."),
    ] = None,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove banks or readers. What pairs say about corrections that need a removed bank goes, too.

    What pairs say about text that is only turned to its new positions needs no bank and stays.
    """
    if not edge and not reader and older_than is None and keep_bytes is None:
        raise InvalidRequest("say what to prune: --edge, --reader, --older-than or --keep-bytes")
    from kvcomm.cli.anchor_folder import AnchorFolder

    found = AnchorFolder(folder)
    banks, readers = found.choose(edge or (), older_than, keep_bytes), [found.reader(each) for each in reader or ()]
    pruned = found.prune(banks, readers, dry_run=dry_run)
    freed = sum(entry.num_bytes for entry in banks)
    value = {
        "removed": [entry.edge for entry in banks],
        "removed_readers": [entry.digest for entry in readers],
        "freed_bytes": freed,
        "cut_pairs": pruned.num_cut,
        "dry_run": dry_run,
    }
    did = "would remove" if dry_run else "removed"
    parts = [f"{counted(len(banks), 'bank')}, {format_bytes(freed)}", counted(len(readers), "reader")]
    cut = f"; {counted(pruned.num_cut, 'pair')} without rungs that need anchors" if pruned.num_cut else ""
    emit(value, f"{did} {' and '.join(parts)}{cut}", as_json=as_json)


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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make for its anchors.")],
    as_json: JsonFlag = False,
) -> None:
    """Unpack anchors into a new folder; everything is checked before anything is in place."""
    if folder.exists():
        raise InvalidRequest(f"{folder} exists; import into a new folder")
    if not file.is_file():
        raise InvalidRequest(f"{file} is no file; `kvcomm anchors export` writes one")
    from kvcomm.align.archive import import_archive

    num_banks = import_archive(file, folder)
    emit({"dir": str(folder), "num_banks": num_banks}, f"imported {counted(num_banks, 'bank')}", as_json=as_json)


@app.command("fetch", epilog="Example: kvcomm anchors fetch --server http://localhost:8000 anchors/")
def fetch_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make for what was learned.")],
    server: ServerFlag = DEFAULT_SERVER,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Get what a running server has learned for you into a new folder, for `ls`, `show` and `export`."""
    if folder.exists():
        raise InvalidRequest(f"{folder} exists; fetch into a new folder")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "archive"
        file.write_bytes(ask("GET", f"{server.rstrip('/')}/v1/anchors", key=key, timeout_s=TRANSFER_TIMEOUT_S))
        from kvcomm.align.archive import import_archive

        num_banks = import_archive(file, folder)
    emit({"dir": str(folder), "num_banks": num_banks}, f"fetched {counted(num_banks, 'bank')}", as_json=as_json)


@app.command("send", epilog="Example: kvcomm anchors send anchors/ --server http://localhost:8000 --tenant ann")
def send_command(
    folder: Folder,
    server: ServerFlag = DEFAULT_SERVER,
    key: KeyFlag = None,
    tenant: Annotated[
        str, typer.Option("--tenant", metavar="NAME", help="The tenant that is to have them.")
    ] = "default",
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
    words = [counted(taken["num_banks"], "bank"), counted(taken["num_pairs"], "pair")]
    emit(taken, f"{server} has taken {' and '.join(words)}", as_json=as_json)


def _bank_values(entry: BankEntry) -> dict[str, Any]:
    from kvcomm.align.estimators import TokenSettings

    value: dict[str, Any] = {
        "edge": entry.edge,
        "file": str(entry.file),
        "num_bytes": entry.num_bytes,
        "refusal": entry.refusal,
    }
    if entry.header is not None:
        settings = TokenSettings()
        value |= {"num_tokens": entry.header.num_tokens, "created": entry.header.created}
        value |= {"num_needed": settings.min_tokens, "num_enough": settings.mature_tokens}
    return value


def _bank_table(entries: list[BankEntry], *, title: str = "banks") -> Table:
    columns = ["bank", "text", "anchor tokens", "size", "age"]
    if any(entry.refusal for entry in entries):
        columns.append("refused because")
    rows = [_bank_row(entry)[: len(columns)] for entry in entries]
    return table(columns, rows, title=title, numeric={"anchor tokens", "size"})


def _bank_row(entry: BankEntry) -> tuple[object, ...]:
    size = format_bytes(entry.num_bytes)
    if (header := entry.header) is None:
        return (entry.edge, None, None, size, None, printable(entry.refusal or ""))
    where = "any context" if header.edge.is_general else "one context"
    text = printable(f"{header.source_slot} -> {header.slot}, {where}")
    value = _bank_values(entry)
    return (entry.edge, text, _of(value["num_tokens"], value["num_enough"]), size, age_of(header.created), None)


def _reader_values(entry: ReaderEntry, found: AnchorFolder) -> dict[str, Any]:
    return {
        "reader": entry.digest,
        "slots": list(entry.reader.slots),
        "num_pairs": len(entry.pairs),
        "own": _counts(found, entry),
        "banks": [_bank_values(bank) for bank in found.banks_of(entry.reader)],
    }


def _reader_table(readers: list[dict[str, Any]]) -> Table:
    columns = ["reader", "slots", *(f"pairs at {confidence:g}" for confidence in CONFIDENCES), "anchor tokens"]
    rows = [
        (
            each["reader"],
            printable(", ".join(each["slots"])),
            *(_of(count["num_pairs"], count["num_needed"]) for count in each["own"]),
            _anchors_in_words(each["banks"]),
        )
        for each in readers
    ]
    return table(columns, rows, title="readers", numeric=set(columns[2:]))


def _counts(found: AnchorFolder, entry: ReaderEntry | None) -> list[dict[str, Any]]:
    """What a reader has of its own, or None: all of them together, at each confidence."""
    from kvcomm.align.bound import Bound
    from kvcomm.align.calibration import pairs_needed
    from kvcomm.align.readers import Reader
    from kvcomm.align.standings import Level

    level, reader = (Level.POOL, Reader("")) if entry is None else (Level.OWN, entry.reader)
    values = []
    for confidence in CONFIDENCES:
        bound = Bound(0.0, 1 - confidence)  # how many it takes does not depend on the nats
        best = max(found.counts(reader, bound, (level,)), key=lambda count: count.num_pairs)
        values.append(
            {
                "confidence": confidence,
                "estimator": best.ladder[0].estimator,
                "num_pairs": best.num_pairs,
                "num_needed": pairs_needed(bound.delta),
                "num_settled": best.num_needed,
            }
        )
    return values


def _in_words(counts: list[dict[str, Any]]) -> str:
    words = [f"{_of(each['num_pairs'], each['num_needed'])} at {each['confidence']:g}" for each in counts]
    return f"pairs {', '.join(words)}"


def _of(number: int, needed: int) -> str:
    return f"{number} of {needed}" if number < needed else str(number)


def _anchors_in_words(banks: list[dict[str, Any]]) -> str | None:
    """The anchors of the bank that has least."""
    least = min(banks, key=lambda bank: int(bank["num_tokens"]), default=None)
    return None if least is None else f"{_of(least['num_tokens'], least['num_enough'])} or more"


def _show_reader(entry: ReaderEntry, found: AnchorFolder, *, as_json: bool) -> None:
    rungs = [value for ladder in found.ladders for value in _rung_values(entry, ladder)]
    watches = [_watch_values(each) for each in found.knowledge.watches if each.reader == entry.reader.digest]
    value = _reader_values(entry, found) | {"digest": entry.reader.digest, "rungs": rungs, "watches": watches}
    facts = [
        ("reader", entry.reader.digest),
        ("slots", printable(", ".join(entry.reader.slots))),
        ("own", _in_words(value["own"])),
        ("all readers", _in_words(_counts(found, None))),
    ]
    columns = ["rung", "pairs", "median nats", "95 % within", *map(_bound_name, BOUNDS)]
    rows = [
        (
            printable(each["rung"]),
            each["num_pairs"],
            _nats(each["median"]),
            _nats(each["within_95"]),
            *("chosen" if each["chosen"][_bound_name(bound)] else "" for bound in BOUNDS),
        )
        for each in rungs
    ]
    views: list[RenderableType] = [
        table(None, facts),
        table(
            columns, rows, title="rungs, and which one its own pairs choose at (nats, confidence)", numeric=columns[1:4]
        ),
    ]
    if value["banks"]:
        views.append(_bank_table(found.banks_of(entry.reader), title="banks that lead to it"))
    if watches:
        names = ["level", "bound", "audits", "above", "working delta", "state"]
        shown = [
            (
                each["level"],
                _bound_name((each["max_divergence"], each["confidence"])),
                each["num_audited"],
                each["num_violations"],
                f"{each['working_delta']:.3g}",
                "tripped" if each["tripped"] else "holds",
            )
            for each in watches
        ]
        views.append(table(names, shown, title="audits", numeric=names[2:5]))
    emit(value, *views, as_json=as_json)


def _rung_values(entry: ReaderEntry, ladder: Ladder) -> list[dict[str, Any]]:
    """What each rung cost; whether it is chosen at a bound, along its ladder as a whole."""
    from kvcomm.align.calibration import Calibration

    whole = Calibration(ladder, entry.pairs)
    chosen = {_bound_name(bound): whole.choose(bound[0], 1 - bound[1]) for bound in BOUNDS}
    values = []
    for index, rung in enumerate(ladder):
        alone = Calibration((rung,), entry.pairs)
        has_pairs = alone.num_pairs > 0
        values.append(
            {
                "rung": str(rung),
                "estimator": rung.estimator,
                "share": rung.share,
                "chooser": rung.chooser,
                "num_pairs": alone.num_pairs,
                "median": alone.predicted(0, 0.5) if has_pairs else None,
                "within_95": alone.predicted(0, 0.95) if has_pairs else None,
                "chosen": {name: place == index for name, place in chosen.items()},
            }
        )
    return values


def _watch_values(kept: KeptWatch) -> dict[str, Any]:
    watch = kept.watch
    return {
        "level": kept.level.value,
        "max_divergence": watch.bound.max_divergence,
        "confidence": watch.bound.confidence,
        "working_delta": watch.working_delta,
        "num_audited": watch.breaker.num_observed,
        "num_violations": watch.breaker.num_violations,
        "tripped": watch.breaker.tripped,
    }


def _nats(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _bound_name(bound: tuple[float, float]) -> str:
    return f"({bound[0]:g}, {bound[1]:g})"
