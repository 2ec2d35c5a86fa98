"""`/v1/segments`: texts under names, with versions, for requests to refer to."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi import Path as PathParam

from kvcomm.errors import KVCommError
from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.errors import documented, translate
from kvcomm.server.schemas.segments import (
    SEGMENT_NAME,
    SegmentDeleted,
    SegmentDetails,
    SegmentList,
    SegmentObject,
    SegmentPut,
)
from kvcomm.server.segments.registry import NamedText
from kvcomm.server.state import ServerState, StateDep, TenantDep

router = APIRouter(prefix="/v1/segments", tags=["kvcomm"], dependencies=[Depends(security)], route_class=BodyRoute)

Name = Annotated[str, PathParam(pattern=SEGMENT_NAME)]
VersionQuery = Annotated[int | None, Query(ge=1, le=2**31, description="By default the latest.")]


@router.put(
    "/{name}",
    operation_id="putSegment",
    responses=documented(400, 401, 403, 408, 413, 429, 500, 503),
)
async def put_segment(name: Name, body: SegmentPut, state: StateDep, tenant: TenantDep) -> SegmentObject:
    """Let a name stand for a text from now on: its next version, or the latest again if nothing differs."""
    text = await state.workers.run(tenant.name, len(body.content), partial(_text, name, body, state, tenant.name))
    tenant.require_there()
    return record(state.registries.of(tenant.name).put(text))


@router.get("", operation_id="listSegments", responses=documented(401, 403, 429, 500))
async def list_segments(state: StateDep, tenant: TenantDep) -> SegmentList:
    """The latest version of every name."""
    return SegmentList(data=[record(each) for each in state.registries.of(tenant.name).latest])


@router.get("/{name}", operation_id="getSegment", responses=documented(400, 401, 403, 404, 429, 500))
async def get_segment(name: Name, state: StateDep, tenant: TenantDep, version: VersionQuery = None) -> SegmentDetails:
    """A version of a named segment, with its text."""
    found = state.registries.of(tenant.name).get(name, version)
    return SegmentDetails(**record(found).model_dump(), content=found.text)


@router.get("/{name}/versions", operation_id="listSegmentVersions", responses=documented(400, 401, 403, 404, 429, 500))
async def list_versions(name: Name, state: StateDep, tenant: TenantDep) -> SegmentList:
    """The versions of a name that are kept, the latest last."""
    return SegmentList(data=[record(each) for each in state.registries.of(tenant.name).versions(name)])


@router.delete("/{name}", operation_id="deleteSegment", responses=documented(400, 401, 403, 404, 429, 500))
async def delete_segment(name: Name, state: StateDep, tenant: TenantDep) -> SegmentDeleted:
    """Forget a name and its versions."""
    return SegmentDeleted(name=name, versions=state.registries.of(tenant.name).remove(name))


def _text(name: str, body: SegmentPut, state: ServerState, tenant: str) -> NamedText:
    reader = state.prompts.segments
    try:
        segment = reader.encode(name, body.content)
    except KVCommError as error:
        raise translate(error) from error
    digest, created = reader.digest(segment, tenant), int(time.time())
    return NamedText(name, 1, body.content, segment.token_ids, digest, body.kind, body.ttl, created)


def record(text: NamedText) -> SegmentObject:
    """A version as clients see it."""
    return SegmentObject(
        name=text.name,
        version=text.version,
        hash=text.digest,
        tokens=len(text.token_ids),
        kind=text.kind,
        ttl=text.ttl,
        created=text.created,
    )
