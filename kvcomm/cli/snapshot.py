"""`kvcomm snapshot`: contexts as files anywhere, to be looked at, handed on and taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kvcomm.cli.options import DEFAULT_MODEL, FolderFlag, ForceFlag, ModelFlag, load_engine
from kvcomm.cli.output import JsonFlag, emit, format_bytes
from kvcomm.cli.text import counted
from kvcomm.errors import InvalidRequest, SnapshotError
from kvcomm.files.writing import NameTaken

app = typer.Typer(
    help="Save contexts to files, look into such files, and restore them.",
    no_args_is_help=True,
    epilog="Contexts are those of `kvcomm context`. A snapshot is a safetensors file; nothing in it is ever executed.",
)

SnapshotFile = Annotated[Path, typer.Argument(metavar="FILE", help="A snapshot file.")]


@app.command("ls", epilog="Example: kvcomm snapshot ls backups/ left.safetensors")
def list_command(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR_OR_FILE", help="Files, or folders of them.")],
    as_json: JsonFlag = False,
) -> int:
    """List snapshot files, with what their headers say.

    Foreign and damaged files are refused in their row, and the exit code is 1.
    """
    from kvcomm.cli.entries import entries_table, entry_values
    from kvcomm.cli.store import context_entry

    entries = [context_entry(file) for path in paths for file in _files(path)]
    named = [entry._replace(name=str(entry.file)) for entry in entries]
    view = entries_table("file", named) if named else Text("no snapshots there")
    emit({"snapshots": [entry_values(entry) for entry in named]}, view, as_json=as_json)
    return int(any(entry.refusal for entry in entries))


@app.command("save", epilog="Example: kvcomm snapshot save left backups/left.safetensors")
def save_command(
    context: Annotated[str, typer.Argument(metavar="CONTEXT", help="A context; `kvcomm context ls` shows them.")],
    file: SnapshotFile,
    folder: FolderFlag = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Copy a context to a file of its own."""
    from kvcomm.cli.store import Store, place

    entry = Store(folder).usable_context(context)
    try:
        num_bytes = place(entry.file, file, link=False, is_new=not force)
    except NameTaken as error:
        raise InvalidRequest(f"{file} exists; choose another file or give --force") from error
    value = {"name": context, "file": str(file), "num_bytes": num_bytes}
    emit(value, Text(f"saved {context} to {file}, {format_bytes(num_bytes)}"), as_json=as_json)


@app.command("restore", epilog="Example: kvcomm snapshot restore backups/left.safetensors left")
def restore_command(
    file: SnapshotFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the new context.")],
    model: ModelFlag = DEFAULT_MODEL,
    folder: FolderFlag = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Check every byte of a snapshot against the model and keep it as a context."""
    from kvcomm.cli.store import Store, place
    from kvcomm.memory.snapshots import read_header

    store = Store(folder)
    target = store.new_context(name, force=force)
    read_header(file)  # refuses most bad files before a model is loaded
    with load_engine(model) as engine, engine.restore(file) as context:
        num_tokens = context.num_tokens
    with store.taking(name):
        num_bytes = place(file, target, link=False, is_new=not force)
    value = {"name": name, "file": str(target), "num_tokens": num_tokens, "num_bytes": num_bytes}
    emit(value, f"restored {name}: {counted(num_tokens, 'token')}, {format_bytes(num_bytes)}", as_json=as_json)


@app.command("rm", epilog="Example: kvcomm snapshot rm backups/left.safetensors")
def remove_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="The snapshot files to remove.")],
    force: Annotated[bool, typer.Option("--force", help="Remove files that are no whole snapshots, too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove snapshot files. What is not recognised as one stays, unless --force is given."""
    from kvcomm.cli.entries import emit_removed
    from kvcomm.cli.store import remove

    for file in files:
        _require_removable(file, force=force)
    emit_removed("file", [(str(file), remove(file)) for file in files], as_json=as_json)


def _files(path: Path) -> list[Path]:
    """A file itself, or the snapshot files in a folder."""
    from kvcomm.cli.store import folder_errors
    from kvcomm.memory.snapshots import SUFFIX

    if not path.exists():
        raise InvalidRequest(f"{path} does not exist")
    if not path.is_dir():
        return [path]
    with folder_errors("read", path):
        return sorted(file for file in path.iterdir() if file.suffix == SUFFIX)


def _require_removable(file: Path, *, force: bool) -> None:
    from kvcomm.memory.snapshots import read_header

    if not file.exists():
        raise InvalidRequest(f"{file} does not exist")
    try:
        read_header(file)
    except SnapshotError as error:
        if not force:
            raise InvalidRequest(f"not removed: {error}; give --force if you are sure") from error
