"""Options that several commands share, and what they stand for: texts, files, sampling, the engine."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import TEXT_BYTES, BadContent, decoded, read_bytes
from kvcomm.model.registry import SMOLLM2_135M

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine

DEFAULT_MODEL = SMOLLM2_135M.name
MODEL_VARIABLE = "KVCOMM_MODEL"
FOLDER_VARIABLE = "KVCOMM_HOME"
STANDARD_INPUT = "-"

ModelFlag = Annotated[
    str,
    typer.Option("--model", envvar=MODEL_VARIABLE, metavar="MODEL", help="A packaged name, folder or hub id."),
]
FolderFlag = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        envvar=FOLDER_VARIABLE,
        metavar="DIR",
        help="The folder of contexts and segments; by default in the user's cache folder.",
        show_default=False,
    ),
]
TextFlag = Annotated[str | None, typer.Option("--text", metavar="TEXT", help="The text itself.")]
FileFlag = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="A file that holds the text; - reads standard input.")
]
ForceFlag = Annotated[bool, typer.Option("--force", help="Replace what has that name already.")]
MaxNewTokensFlag = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens of an answer at most.")
]
TemperatureFlag = Annotated[
    float | None, typer.Option("--temperature", min=0.0, metavar="T", help="0 takes the most probable token.")
]
SeedFlag = Annotated[int | None, typer.Option("--seed", min=0, metavar="SEED", help="Seed of the random draws.")]


AdapterFlag = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=FOLDER", help="An adapter, as PEFT saves it; may be repeated."),
]


DtypeFlag = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16; by default the checkpoint's. auto: bfloat16 where it is quick.",
    ),
]


def load_engine(model: str, dtype: str | None = None) -> Engine:
    """The engine for a command, with progress on stderr."""
    from kvcomm.engine.engine import Engine

    return Engine.load(model, dtype=dtype, progress=True)


def with_adapters(engine: Engine, adapters: Mapping[str, Path]) -> Engine:
    """The engine with these adapters; closed if one of them cannot be loaded."""
    try:
        for name, folder in adapters.items():
            engine.load_adapter(name, folder)
    except BaseException:
        engine.close()
        raise
    return engine


def adapter_folders(given: Sequence[str] | None) -> dict[str, Path]:
    """What --adapter says.

    Raises:
        InvalidRequest: one is not of the form NAME=FOLDER, or a name stands there twice.
    """
    folders: dict[str, Path] = {}
    for item in given or ():
        name, equals, folder = item.partition("=")
        if not equals or not name or not folder:
            raise InvalidRequest(f"--adapter {item!r} is not of the form NAME=FOLDER")
        if name in folders:
            raise InvalidRequest(f"--adapter {name!r} is given twice; an adapter has one folder")
        folders[name] = Path(folder).expanduser()
    return folders


def sampling_settings(
    max_new_tokens: int | None, temperature: float | None, seed: int | None
) -> dict[str, int | float | None]:
    """The sampling fields that were given on the command line."""
    given: dict[str, int | float | None] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    return {name: value for name, value in given.items() if value is not None}


def read_text(file: Path) -> str:
    """The text of a file, or of standard input for "-".

    Raises:
        InvalidRequest: it cannot be read, is no regular file, is larger than any prompt, or is not UTF-8.
    """
    try:
        if str(file) != STANDARD_INPUT:
            return decoded(read_bytes(file, max_bytes=TEXT_BYTES))
        content = sys.stdin.buffer.read(TEXT_BYTES + 1)
        if len(content) > TEXT_BYTES:
            raise InvalidRequest(f"standard input holds more than {TEXT_BYTES:,} bytes")
        return decoded(content)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise InvalidRequest(f"{file} is {error}") from error
