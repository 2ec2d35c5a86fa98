"""A small snapshot: its header, its tensors, and how it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.snapshots import SegmentRecord, Snapshot, SnapshotHeader, read_snapshot, write_snapshot

NAMESPACE = "0123456789abcdef" * 4
SHAPES = [(1, 2, 4), (3, 2, 2)]
"""Per layer (num_kv_heads, key_dim, value_dim)."""
NUM_COMPUTED = 3
VOCAB_SIZE = 97


def make_header(**changes: Any) -> SnapshotHeader:
    values: dict[str, Any] = {
        "namespace": NAMESPACE,
        "architecture": "TinyForCausalLM",
        "dtype": "torch.float32",
        "name": "planner",
        "token_ids": (5, 0, 96, 7),
        "num_computed": NUM_COMPUTED,
        "path": (SegmentRecord(num_tokens=1, name="rôle"), SegmentRecord(num_tokens=3, name=None)),
        "fidelity": Fidelity.EXACT,
        "created": "2026-11-22T01:02:03+00:00",
        "payload_blake3": "",
    }
    return SnapshotHeader(**values | changes)


def make_tensors(
    *, num_tokens: int = NUM_COMPUTED, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    keys = [random(num_tokens, heads, key_dim) for heads, key_dim, _ in SHAPES]
    values = [random(num_tokens, heads, value_dim) for heads, _, value_dim in SHAPES]
    return keys, values, random(VOCAB_SIZE)


def read(file: Path, **changes: Any) -> Snapshot:
    wanted: dict[str, Any] = {
        "namespace": NAMESPACE,
        "shapes": SHAPES,
        "dtype": torch.float32,
        "vocab_size": VOCAB_SIZE,
    }
    return read_snapshot(file, **wanted | changes)


def write_file(folder: Path) -> Path:
    """A snapshot with logits."""
    file = folder / "planner.safetensors"
    write_snapshot(file, make_header(), *make_tensors())
    return file
