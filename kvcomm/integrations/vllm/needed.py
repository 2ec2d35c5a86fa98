"""What of vLLM kvcomm uses, by name, and whether the vLLM that is installed has it; `adapter` is where it is used."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from kvcomm.errors import UnsupportedModel

FIRST_VERSION, FIRST_UNTRIED_VERSION = (0, 32), (0, 33)
"""Versions of vLLM that this was written for: from the first, up to but without the second."""

NAMES = {
    "vllm.config": ("VllmConfig",),
    "vllm.distributed": ("get_tensor_model_parallel_rank",),
    "vllm.distributed.kv_transfer": ("get_kv_transfer_group", "has_kv_transfer_group"),
    "vllm.distributed.kv_transfer.kv_connector.factory": ("KVConnectorFactory",),
    "vllm.distributed.kv_transfer.kv_connector.v1.base": (
        "KVConnectorBase_V1",
        "KVConnectorMetadata",
        "KVConnectorRole",
        "KVConnectorWorkerMetadata",
        "SupportsHMA",
    ),
    "vllm.forward_context": ("set_forward_context",),
    "vllm.model_executor.layers.attention": ("Attention",),
    "vllm.model_executor.models.utils": ("extract_layer_index",),
    "vllm.platforms": ("current_platform",),
    "vllm.v1.attention.backend": ("CommonAttentionMetadata",),
    "vllm.v1.kv_cache_interface": ("FullAttentionSpec",),
    "vllm.v1.request": ("Request",),
    "vllm.v1.worker.gpu_worker": ("Worker",),
}
"""What is imported, by module."""

MEMBERS = {
    ("vllm.v1.request", "Request"): ("update_block_hashes",),
    ("vllm.v1.worker.gpu_worker", "Worker"): ("initialize_from_config", "execute_model", "sample_tokens"),
    ("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1"): (
        "build_connector_meta",
        "build_connector_worker_meta",
        "get_block_ids_with_load_errors",
        "get_finished",
        "get_num_new_matched_tokens",
        "on_new_request",
        "start_load_kv",
        "update_connector_output",
        "update_state_after_alloc",
        "wait_for_save",
    ),
}
"""What of it is called or overridden."""


def version() -> str:
    """The version of vLLM.

    Raises:
        UnsupportedModel: there is none.
    """
    try:
        return str(importlib.import_module("vllm").__version__)
    except ImportError as error:
        raise UnsupportedModel(f"vLLM cannot be imported here ({error})") from error


def is_tried_version(found: str) -> bool:
    """Whether a version is one that this was written for."""
    parts = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    return FIRST_VERSION <= parts < FIRST_UNTRIED_VERSION


def missing_names() -> list[str]:
    """What this vLLM lacks of all that kvcomm uses of it; empty: nothing."""
    missing: list[str] = []
    for module, names in NAMES.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    for (module, name), members in MEMBERS.items():
        if module not in missing and f"{module}.{name}" not in missing:
            owner = getattr(importlib.import_module(module), name)
            missing += [f"{module}.{name}.{member}" for member in members if not hasattr(owner, member)]
    return missing


class VllmSupport(NamedTuple):
    """What `kvcomm doctor --vllm` shows.

    Attributes:
        reason: why nothing is served, or what to know; empty: all is as it was tried.
    """

    version: str | None
    serves: bool
    reason: str


def look() -> VllmSupport:
    """Whether kvcomm serves in the vLLM that is installed here; starts nothing."""
    try:
        found = version()
        require_known()
    except UnsupportedModel as error:
        return VllmSupport(None, False, str(error))
    untried = "" if is_tried_version(found) else f"not tried with this version; written for {_versions()}"
    return VllmSupport(found, True, untried)


def require_known() -> None:
    """Raises UnsupportedModel where this vLLM lacks something, with the names and the versions that have it."""
    missing = missing_names()
    if missing:
        raise UnsupportedModel(
            f"vLLM {version()} lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}; kvcomm was "
            f"written for {_versions()}"
        )


def _versions() -> str:
    first, last = (".".join(map(str, version)) for version in (FIRST_VERSION, FIRST_UNTRIED_VERSION))
    return f"vLLM >= {first}, < {last}"
