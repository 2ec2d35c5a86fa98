"""Compile the Triton kernels ahead of time and read registers, spills and loads off the result.

    python scripts/compile_kernels.py
    python scripts/compile_kernels.py --target sm_90 --dtype bf16 --head-dim 64 --json

Every variant is compiled with the tile shape that the back end launches it with and as the launcher
specializes it for head sizes divisible by 16: pointers and strides divisible by 16, innermost strides of 1.
Exits with 1 when a variant spills, or loads keys, values, queries or offsets in pieces of less than 128 bits
where whole ones are meant. Bytes per token are what moving one of them, in one head of one layer, reads and
writes. Needs no GPU. It shows what the compiler made of the kernels, not that they are fast or right: the
tests show the latter, in the interpreter, and nothing here shows the former.

Must be a process of its own: in interpreter mode the kernels are not compilable.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import product
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcomm.align.ops import triton_kernels as move_kernels
from kvcomm.align.ops.triton_shapes import NUM_THREADS, RowKind
from kvcomm.model.attention import triton_kernels as kernels
from kvcomm.model.attention import triton_shapes as shapes
from kvcomm.model.attention.triton_plan import MAX_PARTS, SPLIT_FIELDS, TILE_FIELDS

GROUP_SIZE = 4
PAGE_SIZE = 16
SCORINGS = ((False, False), (True, False), (True, True))
"""Of `attend`: whether it has a window, whether its scores are capped."""

NUM_NEIGHBORS = 8
MOVES = ("keys", "keys rotated only", "interleaved keys", "values")


class TargetName(StrEnum):
    SM_80 = "sm_80"
    SM_90 = "sm_90"
    GFX942 = "gfx942"


class DtypeName(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class KernelName(StrEnum):
    WRITE_KV = "write_kv"
    ATTEND = "attend"
    MERGE_SPLITS = "merge_splits"
    MOVE_ROWS = "move_rows"


TARGETS = {
    TargetName.SM_80: GPUTarget("cuda", 80, 32),
    TargetName.SM_90: GPUTarget("cuda", 90, 32),
    TargetName.GFX942: GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    DtypeName.FP32: torch.float32,
    DtypeName.BF16: torch.bfloat16,
    DtypeName.FP16: torch.float16,
}


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch compiles it.

    `tiles`: of `attend`, wide, narrow, or parts (narrow tiles of split runs); of `move_rows`, what is moved.
    """

    kernel: KernelName
    target: TargetName
    dtype: DtypeName
    head_dim: int
    tiles: str | None = None
    has_window: bool = False
    has_softcap: bool = False

    @property
    def label(self) -> str:
        window, softcap = " window" * self.has_window, " softcap" * self.has_softcap
        return f"{self.kernel} {self.tiles or ''}{window}{softcap}".strip()

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Loads:
    """128-bit loads from global memory and narrower vector-register ones, per thread."""

    vector: int
    narrow: int


@dataclass(frozen=True)
class Report:
    """What the compiler made of a variant. Spills are bytes of local memory (CUDA) or registers (ROCm)."""

    variant: Variant
    registers: int
    spills: int
    shared_bytes: int
    loads: Loads
    min_vector: int
    max_narrow: int
    token_bytes: int | None = None

    @property
    def problems(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"spills {self.spills}")
        if self.loads.vector < self.min_vector:
            found.append(f"{self.loads.vector} vector loads, {self.min_vector} meant")
        if self.loads.narrow > self.max_narrow:
            found.append(f"{self.loads.narrow} narrow loads, at most {self.max_narrow} meant")
        return found

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "label": self.variant.label, "problems": self.problems}


@dataclass(frozen=True)
class Plan:
    """How to compile a variant, and how many loads a thread of it should issue."""

    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    min_vector: int
    max_narrow: int
    token_bytes: int | None = None


def main(
    target: Annotated[list[TargetName] | None, typer.Option(help="Repeatable; default: all.")] = None,
    dtype: Annotated[list[DtypeName] | None, typer.Option(help="Repeatable; default: all.")] = None,
    kernel: Annotated[list[KernelName] | None, typer.Option(help="Repeatable; default: all.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 64 and 128.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Compiler processes.")] = 2,
    unaligned: Annotated[
        bool, typer.Option(help="Forget that strides are multiples of 16, to see the check on loads fail.")
    ] = False,
    max_registers: Annotated[
        int | None, typer.Option(help="Per thread, on CUDA targets, to see the check on spills fail.")
    ] = None,
) -> None:
    """Compile all kernel variants and fail on spills and narrow loads."""
    if kernels.INTERPRETED:
        raise typer.BadParameter("TRITON_INTERPRET is set; kernels cannot be compiled in interpreter mode")
    found = variants(target or list(TargetName), dtype or list(DtypeName), head_dim or [64, 128])
    found = [variant for variant in found if not kernel or variant.kernel in kernel]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(found)), mp_context=context) as pool:
        pending = [pool.submit(compile_variant, variant, unaligned, max_registers) for variant in found]
        progress = track(pending, "compiling", console=Console(stderr=True), disable=json_output)
        reports = [future.result() for future in progress]
    if json_output:
        document = {"triton": triton.__version__, "variants": [report.as_json() for report in reports]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        print_table(reports)
    if any(report.problems for report in reports):
        raise typer.Exit(1)


def variants(targets: list[TargetName], dtypes: list[DtypeName], head_dims: list[int]) -> list[Variant]:
    found = []
    for target, dtype, head_dim in product(targets, dtypes, head_dims):
        found.append(Variant(KernelName.WRITE_KV, target, dtype, head_dim))
        found.append(Variant(KernelName.MERGE_SPLITS, target, dtype, head_dim))
        # Parts are float32: for that dtype they are the narrow tiles.
        tiles = ("wide", "narrow") if dtype == DtypeName.FP32 else ("wide", "narrow", "parts")
        for tile, scoring in product(tiles, SCORINGS):
            found.append(Variant(KernelName.ATTEND, target, dtype, head_dim, tile, *scoring))
        found += [Variant(KernelName.MOVE_ROWS, target, dtype, head_dim, moved) for moved in MOVES]
    return found


def compile_variant(variant: Variant, unaligned: bool = False, max_registers: int | None = None) -> Report:
    """Compile one variant; runs in a worker process."""
    kernel = getattr(move_kernels if variant.kernel == KernelName.MOVE_ROWS else kernels, variant.kernel)
    plan = PLANS[variant.kernel](variant)
    signature, constants, attributes = specialize(kernel.arg_names, plan, aligned=not unaligned)
    target = TARGETS[variant.target]
    options = dict(plan.options)
    if max_registers is not None and target.backend == "cuda":
        options["maxnreg"] = max_registers
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    if target.backend == "cuda":
        registers, spills = cuda_resources(compiled.asm["cubin"])
        loads = cuda_loads(compiled.asm["ptx"])
    else:
        registers, spills = rocm_resources(compiled.asm["amdgcn"])
        loads = rocm_loads(compiled.asm["amdgcn"])
    return Report(
        variant,
        registers,
        spills,
        compiled.metadata.shared,
        loads,
        plan.min_vector,
        plan.max_narrow,
        plan.token_bytes,
    )


def specialize(
    names: list[str], plan: Plan, *, aligned: bool
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Argument types, constants and divisibility as the launcher finds them on contiguous tensors."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(plan.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(names):
        if name.endswith("_stride_dim") or (name.endswith("_stride_head") and "lse" in name):
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            signature[name] = "*" + plan.pointers[name.removesuffix("_ptr")]
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
        if name.endswith("_ptr") or (aligned and "_stride_" in name and "lse" not in name):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def attend_plan(variant: Variant) -> Plan:
    dim = variant.head_dim
    shape = shapes.tile_shape(DTYPES[variant.dtype], dim, dim, wide=variant.tiles == "wide")
    threads = shape.num_warps * TARGETS[variant.target].warp_size
    query = vectors(shape.block_rows, variant, threads, minimum=0)
    keys_and_values = 2 * vectors(shape.block_keys, variant, threads)
    constants = shapes.attend_constants(
        shape,
        key_dim=dim,
        value_dim=dim,
        group_size=GROUP_SIZE,
        page_size=PAGE_SIZE,
        has_window=variant.has_window,
        has_softcap=variant.has_softcap,
    )
    dtype = variant.dtype.value
    return Plan(
        pointers={
            "query": dtype,
            "key_cache": dtype,
            "value_cache": dtype,
            "page_table": "i32",
            "tiles": "i32",
            "out": "fp32" if variant.tiles == "parts" else dtype,
            "lse": "fp32",
        },
        constants={**constants, "DOT_FLOAT32": False},
        options={"num_warps": shape.num_warps, "num_stages": shape.num_stages},
        # The pipelined loop issues its loads at least twice in the text: ahead of it and inside.
        min_vector=query + 2 * keys_and_values,
        # The fields of the tile, one page id per row of keys or values in every copy, and a small query tile.
        max_narrow=len(TILE_FIELDS) + (shape.num_stages + 1) * keys_and_values + (query == 0),
    )


def write_plan(variant: Variant) -> Plan:
    dtype = variant.dtype.value
    threads = shapes.WRITE_WARPS * TARGETS[variant.target].warp_size
    loads = 2 * vectors(shapes.WRITE_TOKENS, variant, threads)
    return Plan(
        pointers={"key": dtype, "value": dtype, "key_cache": dtype, "value_cache": dtype, "slots": "i64"},
        constants=shapes.write_constants(variant.head_dim, variant.head_dim),
        options={"num_warps": shapes.WRITE_WARPS},
        min_vector=loads,
        max_narrow=loads,  # the slot of each row
    )


def merge_plan(variant: Variant) -> Plan:
    dtype = variant.dtype.value
    threads = shapes.MERGE_WARPS * TARGETS[variant.target].warp_size
    return Plan(
        pointers={"part_out": "fp32", "part_lse": "fp32", "splits": "i32", "out": dtype, "lse": "fp32"},
        constants=shapes.merge_constants(variant.head_dim),
        options={"num_warps": shapes.MERGE_WARPS},
        min_vector=MAX_PARTS * variant.head_dim * 4 // 16 // threads,
        max_narrow=len(SPLIT_FIELDS) + MAX_PARTS,
    )


def move_plan(variant: Variant) -> Plan:
    dim, dtype = variant.head_dim, DTYPES[variant.dtype]
    k = 0 if variant.tiles == "keys rotated only" else NUM_NEIGHBORS
    rotary = 0 if variant.tiles == "values" else dim
    kind = RowKind(dim, rotary, variant.tiles == "interleaved keys", k)
    num_elements = kind.block_tokens * dim
    sources = num_elements * variant.element_bytes // 16 // NUM_THREADS
    codes = k * max(1, num_elements // 16 // NUM_THREADS)
    return Plan(
        pointers={
            **dict.fromkeys(("stored", "codes", "scales", "sources", "targets"), "i64"),
            **dict.fromkeys(("groups", "ropes", "indices"), "i32"),
            **dict.fromkeys(("weights", "move", "place"), "fp32"),
        },
        constants={"ELEMENT": move_kernels.ELEMENTS[dtype], **kind.constants()},
        options={"num_warps": NUM_THREADS // TARGETS[variant.target].warp_size},
        min_vector=sources + codes,
        # A scale, an index and a weight of each neighbor; addresses of the layer, slots, and small parts of the tables.
        max_narrow=3 * k + 16,
        token_bytes=kind.token_bytes(variant.element_bytes),
    )


PLANS = {
    KernelName.WRITE_KV: write_plan,
    KernelName.ATTEND: attend_plan,
    KernelName.MERGE_SPLITS: merge_plan,
    KernelName.MOVE_ROWS: move_plan,
}


def vectors(num_rows: int, variant: Variant, threads: int, minimum: int = 1) -> int:
    """128-bit loads per thread for `num_rows` rows of one head."""
    return max(minimum, num_rows * shapes.padded(variant.head_dim) * variant.element_bytes // 16 // threads)


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory: no kernel here has local arrays, so all of them are spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def cuda_loads(ptx: str) -> Loads:
    """Loads from global memory into registers and asynchronous copies to shared memory."""
    plain = re.findall(r"\bld\.global\S*?(\.v[248])?\.[bsuf](8|16|32|64)\s", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\s[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx)
    bits = [int(vector[2:] or 1) * int(width) for vector, width in plain]
    bits += [int(size, 0) * 8 for size in copies]
    return Loads(sum(b >= 128 for b in bits), sum(b < 128 for b in bits))


def rocm_resources(assembly: str) -> tuple[int, int]:
    """Vector registers, and spilled vector and scalar registers."""
    fields = r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)"
    usage = {name: int(number) for name, number in re.findall(fields, assembly)}
    return usage["vgpr_count"], usage["vgpr_spill_count"] + usage["sgpr_spill_count"]


def rocm_loads(assembly: str) -> Loads:
    sizes = re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", assembly)
    num_vector = sum(size.startswith(("dwordx4", "b128")) for size in sizes)
    return Loads(num_vector, len(sizes) - num_vector)


def print_table(reports: list[Report]) -> None:
    table = Table("kernel", "target", "dtype", "head", title=f"Triton {triton.__version__}, ahead of time")
    for name in ("registers", "spills", "shared bytes", "128-bit loads", "narrow loads", "bytes/token"):
        table.add_column(name, justify="right")
    table.add_column("problems", style="red")
    for report in reports:
        variant = report.variant
        table.add_row(
            variant.label,
            variant.target,
            variant.dtype,
            str(variant.head_dim),
            str(report.registers),
            str(report.spills),
            str(report.shared_bytes),
            f"{report.loads.vector} (>= {report.min_vector})",
            f"{report.loads.narrow} (<= {report.max_narrow})",
            "-" if report.token_bytes is None else str(report.token_bytes),
            "; ".join(report.problems),
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
