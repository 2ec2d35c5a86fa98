"""What a request would find: its prompts are made and planned, and nothing else."""

from __future__ import annotations

from kvcomm.reuse.plan import Explanation, SpanKind
from kvcomm.server.sampling import policy_of
from kvcomm.server.schemas.cache import CacheExplanation, Cost, ExplainedPrompt
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.completions import CompletionRequest
from kvcomm.server.segments.prepared import PreparedPrompt
from kvcomm.server.segments.views import cached_segments
from kvcomm.server.state import ServerState
from kvcomm.server.tenants import namespace
from kvcomm.server.usage import plan_of


def explain(body: ChatRequest | CompletionRequest, state: ServerState, tenant: str) -> CacheExplanation:
    """The plans of a request of the tenant with that name; raises what making it would. For a worker thread."""
    policy, space = policy_of(body, state.settings), namespace(tenant, body.cache_salt)
    adapter = state.adapter_of(body.model)
    explained = []
    for prompt in _prompts(body, state, tenant):
        told = state.engine.explain(prompt.segments, adapter=adapter, tenant=space, policy=policy)
        cached = state.engine.cache.num_cached(prompt.segments, adapter=adapter, tenant=space)
        explained.append(_explained(prompt, told, cached))
    return CacheExplanation(prompts=explained)


def _prompts(body: ChatRequest | CompletionRequest, state: ServerState, tenant: str) -> list[PreparedPrompt]:
    if isinstance(body, ChatRequest):
        return [state.prompts.chat(body, tenant)]
    return [state.prompts.completion(prompt, body, tenant) for prompt in body.prompts]


def _explained(prompt: PreparedPrompt, told: Explanation, num_cached: int) -> ExplainedPrompt:
    plan = told.plan
    return ExplainedPrompt(
        tokens=prompt.num_tokens,
        cached_prefix_tokens=plan.num_tokens(SpanKind.EXACT),
        aligned_tokens=plan.num_tokens(SpanKind.ALIGNED),
        miss_reasons=plan.reasons,
        rung=told.share,
        predicted_divergence=told.predicted,
        cost=Cost(computed_tokens=plan.num_tokens(SpanKind.COMPUTE), prefill_s=told.prefill_s, cold_s=told.cold_s),
        segments=cached_segments(prompt.placed, num_cached),
        plan=plan_of(plan.spans),
    )
