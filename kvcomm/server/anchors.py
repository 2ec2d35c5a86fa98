"""What was learned about moving a tenant's text, as one archive: a tenant takes it, the operator puts it in place.

An archive holds no text, but what it was learned on shaped it: a tenant gets its own only. Taking one over costs memory
and decides what is approximated, so it needs the operator's key.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParam
from starlette.responses import Response

from kvcomm.align.archive import export_archive, import_archive
from kvcomm.engine.engine import Engine
from kvcomm.errors import (
    AnchorFileCorrupt,
    AnchorFileError,
    AnchorFileForeign,
    AnchorFileTooNew,
    AnchorFileTooOld,
)
from kvcomm.files.reading import read_bytes
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.access import security
from kvcomm.server.errors import ApiError, documented, failed_file
from kvcomm.server.keys import NAME_PATTERN
from kvcomm.server.reuse_views import anchor_status
from kvcomm.server.sampling import default_policy
from kvcomm.server.schemas.admin import AnchorsTaken
from kvcomm.server.schemas.anchors import AnchorStatus
from kvcomm.server.schemas.common import LevelName, ReuseOptions
from kvcomm.server.state import StateDep, TenantDep
from kvcomm.server.workers import LONG_BYTES

router = APIRouter(dependencies=[Depends(security)])

TAR = "application/x-tar"
BINARY = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/v1/anchors",
    operation_id="exportAnchors",
    tags=["kvcomm"],
    response_class=Response,
    responses={200: {"content": {TAR: BINARY}}, **documented(401, 403, 429, 500, 503)},
)
async def export_anchors(state: StateDep, tenant: TenantDep) -> Response:
    """Every bank and all pairs of the caller, a tar archive that `kvcomm anchors` reads."""
    archive = await state.workers.run(tenant.name, LONG_BYTES, partial(_archive, state.engine, tenant.name))
    return Response(archive, media_type=TAR)


@router.get(
    "/v1/anchors/status",
    operation_id="anchorStatus",
    tags=["insight"],
    responses=documented(400, 401, 403, 429, 500),
)
async def get_anchor_status(
    state: StateDep,
    tenant: TenantDep,
    max_divergence: Annotated[
        float | None, Query(gt=0, allow_inf_nan=False, description="In nats; by default what the server promises.")
    ] = None,
    confidence: Annotated[float | None, Query(gt=0, lt=1)] = None,
    basis: Annotated[LevelName | None, Query(description="The least that is accepted as grounds.")] = None,
) -> AnchorStatus:
    """What is known of moving your text, and what is missing for a bound: pairs of each level, anchors of each edge."""
    policy = default_policy(state.settings)
    if policy.is_exact:  # then it promises nothing else; this is what a request gets that only says "approximate"
        policy = ReuseOptions().policy()
    policy = ReusePolicy(
        max_divergence=policy.max_divergence if max_divergence is None else max_divergence,
        confidence=policy.confidence if confidence is None else confidence,
        basis=policy.basis if basis is None else basis,
    )
    work = partial(anchor_status, state.engine, tenant.name, list(tenant.salts), policy)
    return await state.workers.run(tenant.name, 0, work)


def _archive(engine: Engine, tenant: str) -> bytes:
    with _scratch() as scratch:
        folder, file = scratch / "anchors", scratch / "anchors.tar"
        engine.reuse.save(folder, tenant=tenant)
        export_archive(folder, file)
        return read_bytes(file)


@router.put(
    "/admin/tenants/{tenant}/anchors",
    operation_id="importAnchors",
    tags=["operator"],
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": BINARY}}},
    responses=documented(400, 401, 403, 408, 413, 500, 503),
)
async def import_anchors(
    tenant: Annotated[str, PathParam(pattern=NAME_PATTERN)], request: Request, state: StateDep
) -> AnchorsTaken:
    """Put an archive's banks and pairs in place of what a tenant has of the same kinds, all of it or nothing."""
    with _scratch() as scratch:
        async with await anyio.open_file(scratch / "archive", "wb") as file:  # it may be as large as the memory
            async for piece in request.stream():
                await file.write(piece)
        return await anyio.to_thread.run_sync(_take, state.engine, tenant, scratch)


def _take(engine: Engine, tenant: str, scratch: Path) -> AnchorsTaken:
    file, folder = scratch / "archive", scratch / "anchors"
    try:
        num_banks = import_archive(file, folder)
        profile = engine.reuse.load(folder, tenant=tenant)
    except (AnchorFileCorrupt, AnchorFileForeign, AnchorFileTooNew, AnchorFileTooOld) as error:
        # Messages name files; where this server unpacks them is nobody's business.
        raise ApiError(400, "bad_anchors", str(error).replace(f"{scratch}/", "")) from error
    return AnchorsTaken(
        num_banks=num_banks,
        num_readers=len(profile.knowledge.readers),
        num_pairs=profile.num_pairs,
        num_missing=profile.num_missing,
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for a moment. Raises ApiError 503 where the disk fails, here or in the block."""
    try:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    except (AnchorFileError, OSError) as error:
        raise failed_file("anchors_failed", "anchors", error) from error
