"""`/v1/cache/*`: segments made ready, what is cached, and what a request would find."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends

from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.memory.segments import Segment
from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.errors import COMPUTING_TEXTS, ApiError, documented
from kvcomm.server.generation import CallDep, GenerationCall, GenerationJob
from kvcomm.server.sampling import policy_of
from kvcomm.server.schemas.cache import CacheExplanation, CacheTree, Warmed, WarmRequest
from kvcomm.server.schemas.explained import ExplainRequest
from kvcomm.server.segments.explaining import explain
from kvcomm.server.segments.prepared import PreparedPrompt
from kvcomm.server.segments.views import cache_tree, cached_segments
from kvcomm.server.state import ServerState, StateDep, TenantDep
from kvcomm.server.tenants import namespace
from kvcomm.server.usage import usage_of
from kvcomm.server.workers import LONG_BYTES

router = APIRouter(prefix="/v1/cache", dependencies=[Depends(security)], route_class=BodyRoute)

ONLY_PREFILL = SamplingParams(max_new_tokens=0)


@router.post("/warm", operation_id="warmCache", tags=["kvcomm"], responses=COMPUTING_TEXTS)
async def warm_cache(body: WarmRequest, call: CallDep) -> Warmed:
    """Compute segments now, so that requests which begin with them find them cached."""
    return await call.guard(_warm(body, call))


async def _warm(body: WarmRequest, call: GenerationCall) -> Warmed:
    state, tenant = call.state, call.tenant.name
    adapter = state.adapter_of(body.model)
    prompt = await call.make(
        partial(state.prompts.warm, body, tenant), more_bytes=state.registries.num_bytes(tenant, body.segments)
    )
    await call.submit(
        GenerationJob(prompt, ONLY_PREFILL, policy_of(body, state.settings), body.cache_salt, adapter=adapter)
    )
    (completion,) = await call.results()
    return await call.make(partial(_warmed, body, state, tenant, prompt, completion, adapter))


def _warmed(
    body: WarmRequest,
    state: ServerState,
    tenant: str,
    prompt: PreparedPrompt,
    completion: Completion,
    adapter: str | None,
) -> Warmed:
    space = namespace(tenant, body.cache_salt)
    num_cached = state.engine.cache.num_cached(prompt.segments, adapter=adapter, tenant=space)
    segments = cached_segments(prompt.placed, num_cached)
    return Warmed(
        cached_segments=sum(each.cached_tokens == each.tokens for each in segments),
        root_hash=state.prompts.segments.digest(Segment(tuple(prompt.token_ids)), tenant),
        tokens=prompt.num_tokens,
        segments=segments,
        usage=usage_of([completion.usage]),
    )


@router.post("/explain", operation_id="explainCache", tags=["insight"], responses=COMPUTING_TEXTS)
async def explain_cache(body: ExplainRequest, call: CallDep) -> CacheExplanation:
    """What a request would find in the cache, what not, why, and what it would take. It is not made."""
    call.state.adapter_of(body.model)
    if body.context_id is not None:
        call.state.contexts.of(call.tenant).find(body.context_id)
        message = "context_id cannot be explained: what a context holds is in place and not looked up"
        raise ApiError(400, "unsupported_value", message, param="context_id")
    more_bytes = call.state.registries.num_bytes(call.tenant.name, body.segments or ())
    return await call.guard(call.make(partial(explain, body, call.state, call.tenant.name), more_bytes=more_bytes))


@router.get("/tree", operation_id="cacheTree", tags=["insight"], responses=documented(401, 403, 429, 500))
async def get_cache_tree(state: StateDep, tenant: TenantDep) -> CacheTree:
    """Everything your own requests left in the cache: prefixes, segments and their renditions, by salt."""
    work = partial(cache_tree, state.engine, tenant.name, list(tenant.salts))
    return await state.workers.run(tenant.name, LONG_BYTES, work)
