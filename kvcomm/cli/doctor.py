"""`kvcomm doctor`: what is installed, what runs here and why the rest does not, and what a model supports."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from kvcomm import __version__
from kvcomm.cli.doctor_families import families_view, tried_families, write_page
from kvcomm.cli.options import WeightsFlag, known_model
from kvcomm.cli.output import JsonFlag, emit, format_bytes, table
from kvcomm.errors import InvalidRequest
from kvcomm.starting import collector_paused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcomm.model.geometry import ModelGeometry
    from kvcomm.model.loading import LoadedModel

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
EXTRAS = {
    "faiss": ("faiss-cpu", "faiss-gpu"),
    "triton": ("triton",),
    "server": ("fastapi", "uvicorn", "sse-starlette", "prometheus-client"),
    "tiers": ("obstore",),
    "redis": ("redis", "hiredis"),
    "eval": ("datasets", "jinja2", "matplotlib", "statsmodels"),
}
ALTERNATIVES = frozenset({"faiss"})
"""Extras of which one package is enough."""

ModelName = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A packaged name, folder, GGUF file or hub id to look at as well."),
]


VllmFlag = Annotated[bool, typer.Option("--vllm", help="Say whether kvcomm serves in the vLLM that is installed.")]
TierUrl = Annotated[
    str | None, typer.Option("--tier", metavar="URL", help="A shared tier to look at as well; see kvcomm serve.")
]
FamiliesFlag = Annotated[
    bool, typer.Option("--families", help="Try every family of models that transformers has; a minute or two.")
]
PageOption = Annotated[
    Path | None,
    typer.Option("--page", metavar="FILE", help="Write the table of families into this Markdown page as well."),
]


def doctor(
    model: ModelName = None,
    weights: WeightsFlag = None,
    tier: TierUrl = None,
    vllm: VllmFlag = False,
    families: FamiliesFlag = False,
    page: PageOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what is installed, what runs here and why the rest does not; with MODEL, what it supports."""
    if model is not None:
        known_model(model)
    elif weights is not None:
        raise InvalidRequest(f"--weights {weights} is said of a model: kvcomm doctor MODEL --weights {weights}")
    if page is not None and not families:
        raise InvalidRequest("--page is where the table of families goes: kvcomm doctor --families --page FILE")
    with collector_paused():
        report = _report()
    if tier is not None:
        report["tier"] = _tier(tier)
    if model is not None:
        report["model"] = _model(model, weights)
    if vllm:
        report["vllm"] = _vllm()
    if families:
        report["families"] = tried_families()
    if page is not None:
        write_page(page, report["families"])
    emit(report, *_views(report), as_json=as_json)


def _report() -> dict[str, Any]:
    """What is said in any case."""
    return {
        "versions": {"kvcomm": __version__, **{package: _version(package) for package in PACKAGES}},
        "extras": {extra: _extra(extra) for extra in EXTRAS},
        "machine": _machine(),
        "attention": _attention(),
        "moving": _moving(),
        "cache": _cache(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extra(extra: str) -> dict[str, Any]:
    found = {package: installed for package in EXTRAS[extra] if (installed := _version(package))}
    needed = 1 if extra in ALTERNATIVES else len(EXTRAS[extra])
    return {"installed": len(found) >= needed, "packages": found}


def _machine() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "accelerators": devices,
        "dtype_auto": _dtype_auto(),
    }


def _dtype_auto() -> str:
    from kvcomm.model.loading import auto_dtype, dtype_name

    found = auto_dtype()
    return f"{dtype_name(found.dtype)}, {found.reason}"


def _attention() -> list[dict[str, Any]]:
    from kvcomm.model.attention import available_backends

    return [info._asdict() for info in available_backends()]


def _moving() -> list[dict[str, Any]]:
    from kvcomm.align.ops.choice import available_ops

    return [info._asdict() for info in available_ops()]


def _cache() -> dict[str, Any]:
    import shutil

    from kvcomm.model.cache_folder import cache_root
    from kvcomm.model.packaged import list_models

    root = cache_root()
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    return {
        "folder": str(root),
        "writable": there.is_dir() and os.access(there, os.W_OK),
        "free_bytes": shutil.disk_usage(there).free,
        "models": {status.name: status.state for status in list_models()},
    }


def _vllm() -> dict[str, Any]:
    from kvcomm.integrations.vllm.needed import look

    return look()._asdict()


def _tier(url: str) -> dict[str, Any]:
    """Whether a tier can be opened and listed; nothing is written."""
    from kvcomm.errors import KVCommError
    from kvcomm.tiers.opening import open_store

    try:
        store = open_store(url)
        try:
            holds_anything = next(iter(store.list()), None) is not None
        finally:
            store.close()
    except KVCommError as error:
        return {"works": False, "reason": str(error)}
    return {"works": True, "kind": store.kind, "url": store.url, "holds_anything": holds_anything}


def _model(name: str, weights: str | None) -> dict[str, Any]:
    from kvcomm.errors import UnsupportedModel

    with collector_paused():
        from kvcomm.model.geometry import ModelGeometry
        from kvcomm.model.loading import load_model

    try:
        loaded = load_model(name, progress=True)
        rounded = {} if weights is None else _rounded(loaded, weights)
        geometry = ModelGeometry.from_model(loaded.model)
    except UnsupportedModel as refusal:
        return {"name": name, "supported": False, "reason": str(refusal)}
    return {"name": name, "supported": True, **_geometry(geometry), "products": _products(loaded.model), **rounded}


def _rounded(loaded: LoadedModel, weights: str) -> dict[str, Any]:
    """What keeping the weights in fewer bits costs and saves; quantizes the model."""
    from kvcomm.model.names import weights_kind
    from kvcomm.model.rounding import measure_rounding

    return {"weights": weights, "rounding": asdict(measure_rounding(loaded, weights_kind(weights)))}


def _products(model: PreTrainedModel) -> list[str]:
    """Which product serves how many rows, and whether that was measured here."""
    from kvcomm.model.lean import choice_of
    from kvcomm.model.linear import ROWS

    choice = choice_of(model)
    if choice is None or choice.table is None:
        return ["not measured"]
    return [*(f"{rows} rows: {name}" for rows, name in zip(ROWS, choice.table, strict=True)), choice.origin]


def _geometry(geometry: ModelGeometry) -> dict[str, Any]:
    windows = sorted({layer.sliding_window for layer in geometry.layers if layer.sliding_window})
    return {
        "architecture": geometry.architecture,
        "dtype": str(geometry.dtype).removeprefix("torch."),
        "num_layers": len(geometry.layers),
        "num_kv_heads": sorted({layer.num_kv_heads for layer in geometry.layers}),
        "key_dim": sorted({layer.key_dim for layer in geometry.layers}),
        "kv_bytes_per_token": geometry.kv_bytes_per_token,
        "max_context_tokens": geometry.max_context,
        "vocab_size": geometry.vocab_size,
        "sliding_windows": windows,
        "layers_without_rope": sum(layer.rope is None for layer in geometry.layers),
        "exact_reuse": True,
        "movable": geometry.immovable is None,
        "immovable_because": geometry.immovable,
    }


def _views(report: dict[str, Any]) -> list[RenderableType]:
    versions = [(package, installed or "not installed") for package, installed in report["versions"].items()]
    extras = [(extra, _extra_line(extra, found)) for extra, found in report["extras"].items()]
    backends, moving = (
        [(info["name"], "runs" if info["runs"] else "does not run", info["reason"]) for info in report[what]]
        for what in ("attention", "moving")
    )
    sections: list[RenderableType] = [
        table(None, versions, title="Installed"),
        table(None, extras, title="Extras"),
        table(None, _machine_rows(report["machine"]), title="Machine"),
        table(None, backends, title="Attention back ends"),
        table(None, moving, title="Moving KV"),
        table(None, _cache_rows(report["cache"]), title="Cache folder"),
    ]
    if "tier" in report:
        sections.append(table(None, _plain_rows(report["tier"]), title="Shared tier"))
    if "model" in report:
        model = dict(report["model"])
        rounding = model.pop("rounding", None)
        sections.append(table(None, _plain_rows(model), title="Model"))
        if rounding is not None:
            title = f"{model['weights']} against the weights as loaded, over a packaged text"
            sections.append(table(None, _rounding_rows(rounding), title=title))
    if "vllm" in report:
        sections.append(table(None, _plain_rows(report["vllm"]), title="vLLM"))
    if "families" in report:
        sections.append(families_view(report["families"]))
    return sections


def _rounding_rows(rounding: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("tokens", rounding["num_tokens"]),
        ("mean KL, nats per token", f"{rounding['mean_kl']:.4f}"),
        ("largest KL", f"{rounding['max_kl']:.3f}"),
        ("same most probable token", f"{rounding['same_top']:.1%}"),
        ("loss, nats per token", f"{rounding['own_loss']:.4f} as loaded, {rounding['loss']:.4f} rounded"),
        ("weights", f"{format_bytes(rounding['own_bytes'])} as loaded, {format_bytes(rounding['num_bytes'])} rounded"),
    ]


def _extra_line(extra: str, found: dict[str, Any]) -> str:
    if not found["installed"]:
        return f"not installed: pip install 'kvcomm[{extra}]'"
    return ", ".join(f"{package} {installed}" for package, installed in found["packages"].items())


def _machine_rows(machine: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("cores", machine["cores"]),
        ("torch threads", machine["torch_threads"]),
        ("OMP_WAIT_POLICY", machine["omp_wait_policy"] or "not set"),
        ("accelerators", ", ".join(machine["accelerators"]) or "none"),
        ("--dtype auto", machine["dtype_auto"]),
    ]


def _cache_rows(cache: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("folder", cache["folder"] + ("" if cache["writable"] else " (not writable)")),
        ("free", format_bytes(cache["free_bytes"])),
        *((f"model {name}", state) for name, state in cache["models"].items()),
    ]


def _plain_rows(model: dict[str, Any]) -> list[tuple[str, object]]:
    return [(key.replace("_", " "), _plain(value)) for key, value in model.items() if value is not None]


def _plain(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return value
