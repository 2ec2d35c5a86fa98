"""What a model is loaded by, read without torch: kinds of names, and names of dtypes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, cast, get_args

from kvcomm.errors import InvalidRequest, ModelLoadError, UnknownModel
from kvcomm.model import registry

Source = Literal["packaged", "folder", "gguf", "hub"]

GGUF_SUFFIX = ".gguf"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WeightsKind = Literal["int8", "int4"]
"""How weights are kept, where not as in the checkpoint; see `kvcomm.model.quantized`."""

ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")

DTYPE_NAMES = ("float32", "bfloat16", "float16")
AUTO = "auto"
"""Among dtypes: bfloat16 where the device multiplies it in hardware, else float32."""


def source_of(name: str | Path) -> Source:
    """Which kind of name it is: a packaged one, else an existing folder with a model in it or GGUF file, else a hub's.

    Raises:
        UnknownModel: it is none of these.
        ModelLoadError: another file, or a folder that holds no model.
    """
    if isinstance(name, str) and name in registry.PACKAGED:
        return "packaged"
    folder = Path(name).expanduser()
    if folder.suffix.lower() == GGUF_SUFFIX and not folder.is_dir():
        if not folder.exists():
            raise UnknownModel(f"there is no file {folder}; a GGUF file is given by its path")
        return "gguf"
    if folder.exists():
        _require_model_folder(folder)
        return "folder"
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not name.startswith("."):
        return "hub"
    packaged = ", ".join(sorted(registry.PACKAGED))
    raise UnknownModel(
        f"unknown model {str(name)!r}: not a packaged name ({packaged}), not an existing folder"
        ' or .gguf file, and not of the form of a hub id ("owner/name")'
    )


def require_adapter_name(name: str) -> None:
    """Raises InvalidRequest for what an adapter cannot be called."""
    if not ADAPTER_NAME.fullmatch(name):
        raise InvalidRequest(f"bad adapter name {name!r}; names are up to 64 letters, digits, '_' and '-'")


def dtype_choice(name: str) -> str:
    """The name of a dtype, or `AUTO`, as it is. Raises InvalidRequest."""
    if name not in (*DTYPE_NAMES, AUTO):
        raise InvalidRequest(f"dtype {name!r} cannot be used; choose among {', '.join(DTYPE_NAMES)} and {AUTO}")
    return name


def weights_kind(name: str) -> WeightsKind:
    """What a name says about how weights are kept. Raises InvalidRequest."""
    known = get_args(WeightsKind)
    if name not in known:
        raise InvalidRequest(f"weights {name!r} cannot be kept; choose among {', '.join(known)}, or leave it out")
    return cast(WeightsKind, name)


def _require_model_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelLoadError(
            f"{folder} is a file; give the folder that holds config.json and *.safetensors, or a .gguf file"
        )
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise ModelLoadError(f"{folder} has no {pattern}; weights are loaded from safetensors only")
