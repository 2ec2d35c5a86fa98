"""Models in GGUF files, llama.cpp's format: weights (dequantized), tokenizer and chat template from one file.

transformers reads them by the package gguf, and knows some two dozen architectures. Reading takes time with every load:
about 40 s on two cores for 135 million parameters, most of it for the vocabulary. Whoever loads a file often saves the
model once as a folder.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kvcomm.errors import MissingExtra, ModelLoadError, UnsupportedModel, first_line
from kvcomm.model.progress import quiet_transformers

MAGIC = b"GGUF"


def read_gguf(file: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file.

    Args:
        dtype: of the parameters; None: float32.

    Raises:
        MissingExtra: the package gguf is not installed.
        UnsupportedModel: transformers cannot read this architecture from GGUF.
        ModelLoadError: no GGUF file, or a damaged or incomplete one.
    """
    if find_spec("gguf") is None:
        raise MissingExtra(f"{file}: GGUF files are read by the package gguf, which is not installed: pip install gguf")
    _require_magic(file)
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    # The GGUF reader of transformers draws its bar past transformers' own switch for bars.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), _errors(file):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            **where,
            dtype=dtype or torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(f"{file}: it lacks {len(missing)} parameters, such as {missing[0]}")
    return model, tokenizer


def _require_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(MAGIC))
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read ({error.strerror})") from error
    if magic != MAGIC:
        raise ModelLoadError(f"{file} is no GGUF file: it begins with {magic!r}, not with {MAGIC!r}")


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    """One clear line, whichever of three libraries gives up, and on whatever."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        line = first_line(error)
        if isinstance(error, ValueError | NotImplementedError) and "not supported" in str(error):
            raise UnsupportedModel(f"{file}: {line}") from error
        raise ModelLoadError(f"{file}: damaged, cut short, or not as its kind of model is ({line})") from error
