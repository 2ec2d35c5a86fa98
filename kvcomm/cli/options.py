"""Options that several commands share, and what they stand for: texts, files, sampling, the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcomm.cli.output import JsonFlag
from kvcomm.cli.remote import KeyFlag, OptionalServerFlag
from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import TEXT_BYTES, BadContent, decoded, read_bytes
from kvcomm.model.names import dtype_choice, require_adapter_name, source_of, weights_kind
from kvcomm.model.registry import SMOLLM2_135M
from kvcomm.starting import collector_paused

if TYPE_CHECKING:
    from kvcomm.config import EngineConfig
    from kvcomm.engine.engine import Engine

DEFAULT_MODEL = SMOLLM2_135M.name
MODEL_VARIABLE = "KVCOMM_MODEL"
FOLDER_VARIABLE = "KVCOMM_HOME"
STANDARD_INPUT = "-"


def known_model(name: str) -> str:
    """A model's name as it is, if it can be one: nothing heavy is imported for one that cannot.

    Raises:
        UnknownModel, ModelLoadError: see `source_of`.
    """
    source_of(name)
    return name


def known_dtype(name: str | None) -> str | None:
    """The name of a dtype as it is. Raises InvalidRequest."""
    return None if name is None else dtype_choice(name)


def known_weights(name: str | None) -> str | None:
    """How weights are to be kept, as it is. Raises InvalidRequest."""
    return None if name is None else weights_kind(name)


ModelFlag = Annotated[
    str,
    typer.Option(
        "--model",
        envvar=MODEL_VARIABLE,
        metavar="MODEL",
        help="The model: a packaged name, folder, GGUF file or hub id.",
        callback=known_model,
    ),
]
WeightsFlag = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="KIND",
        help="Keep the weights in fewer bits, int8 or int4: less memory, other answers; see kvcomm doctor.",
        callback=known_weights,
    ),
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
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]
MaxNewTokensFlag = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="How many tokens an answer may have.")
]
TemperatureFlag = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        metavar="T",
        help="How random answers are; 0 always takes the most probable token.",
    ),
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
        help="The numbers to compute in: auto, float32, bfloat16 or float16; by default the checkpoint's. auto: "
        "bfloat16 where it is quick.",
        callback=known_dtype,
    ),
]


@dataclass(frozen=True)
class PlaceOptions:
    """Where named things are: in a folder of this machine, or on a server."""

    folder: FolderFlag = None
    server: OptionalServerFlag = None
    key: KeyFlag = None


@dataclass(frozen=True)
class WriteOptions(PlaceOptions):
    """Where a named thing is written, whether over one that has its name, and how that is told."""

    force: ForceFlag = False
    as_json: JsonFlag = False


@dataclass(frozen=True)
class EngineOptions:
    """The model of a command, and how it is loaded."""

    model: ModelFlag = DEFAULT_MODEL
    dtype: DtypeFlag = None
    weights: WeightsFlag = None

    def load(self, config: EngineConfig | None = None) -> Engine:
        """The engine, with progress on stderr."""
        with collector_paused():
            from kvcomm.engine.engine import Engine

            return Engine.load(self.model, dtype=self.dtype, weights=self.weights, config=config, progress=True)


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is drawn; what is not given is as elsewhere."""

    max_new_tokens: MaxNewTokensFlag = None
    temperature: TemperatureFlag = None
    seed: SeedFlag = None

    @property
    def settings(self) -> dict[str, int | float | None]:
        """The sampling fields that were given on the command line."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def load_engine(model: str, dtype: str | None = None, weights: str | None = None) -> Engine:
    """The engine for a command, with progress on stderr."""
    return EngineOptions(model, dtype, weights).load()


def with_adapters(engine: Engine, adapters: Mapping[str, Path]) -> Engine:
    """The engine with these adapters; closed if one of them cannot be loaded."""
    try:
        for name, folder in adapters.items():
            engine.adapters.load(name, folder)
    except BaseException:
        engine.close()
        raise
    return engine


def adapter_folders(given: Iterable[str] | None) -> dict[str, Path]:
    """What --adapter says.

    Raises:
        InvalidRequest: one is not of the form NAME=FOLDER, cannot be called that, or a name stands there twice.
    """
    folders: dict[str, Path] = {}
    for item in given or ():
        name, equals, folder = item.partition("=")
        if not equals or not name or not folder:
            raise InvalidRequest(f"--adapter {item!r} is not of the form NAME=FOLDER")
        if name in folders:
            raise InvalidRequest(f"--adapter {name!r} is given twice; an adapter has one folder")
        require_adapter_name(name)
        folders[name] = Path(folder).expanduser()
    return folders


def require_adapters(folders: Mapping[str, Path], weights: str | None) -> None:
    """Find what is wrong with adapters before a model is loaded for them.

    Raises:
        InvalidRequest: a folder is not there, or the weights are to be kept in fewer bits.
    """
    if folders and weights is not None:
        raise InvalidRequest(f"--adapter does not go with --weights {weights}: adapters need the weights as they are")
    for name, folder in folders.items():
        if not folder.is_dir():
            raise InvalidRequest(f"--adapter {name!r}: {folder} is no folder; give the one that PEFT has saved it in")


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
