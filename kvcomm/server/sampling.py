"""From request fields to how the engine draws, moves and keeps: sampling, policy, lifetime."""

from __future__ import annotations

from collections.abc import Iterable

from kvcomm.engine.sampling import SamplingParams
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.cache import WarmRequest
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.common import GenerationRequest, seconds
from kvcomm.server.schemas.messages import TextPart
from kvcomm.server.settings import ServerSettings

NUM_SEEDS = 2**63


def sampling_of(
    request: GenerationRequest,
    settings: ServerSettings,
    *,
    num_prompt_tokens: int,
    max_context: int,
    wanted_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The sampling of one prompt.

    Args:
        wanted_tokens: the client's bound on the answer; the server's and what the model's limit leaves are others.
        logprobs, prompt_logprobs: alternatives to report per token of answer and prompt; None: no log-probabilities.

    Raises:
        ApiError: 400 when the prompt leaves no room for an answer that is wanted.
        InvalidRequest: settings that the engine refuses.
    """
    room = max_context - num_prompt_tokens
    if room < (wanted_tokens != 0):
        message = f"the prompt has {num_prompt_tokens} tokens and the model's limit, answer included, is {max_context}"
        raise ApiError(400, "context_length_exceeded", message)
    wanted = settings.default_max_tokens if wanted_tokens is None else wanted_tokens
    most = min(room, wanted, settings.max_answer_tokens or room)
    return SamplingParams(
        max_new_tokens=most,
        temperature=settings.default_temperature if request.temperature is None else request.temperature,
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        seed=None if request.seed is None else request.seed % NUM_SEEDS,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        min_tokens=min(request.min_tokens or 0, most),
        skip_special_tokens=request.skip_special_tokens is not False,
        n=request.n or 1,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def policy_of(request: GenerationRequest | WarmRequest, settings: ServerSettings) -> ReusePolicy:
    """How far reuse may depart from exact results: as the request says, else as the server does."""
    return default_policy(settings) if request.reuse is None else request.reuse.policy()


def default_policy(settings: ServerSettings) -> ReusePolicy:
    """How far reuse may depart from exact results where a request does not say."""
    return ReusePolicy(
        max_divergence=settings.max_divergence,
        confidence=settings.confidence,
        basis=settings.basis,
        heal=settings.heal,
        heal_within=settings.heal_within,
    )


def ttl_of(request: GenerationRequest) -> float | None:
    """Seconds for which the request's prompt should stay cached at least: the longest that it says anywhere."""
    said = [request.prompt_cache_options.ttl] if request.prompt_cache_options is not None else []
    if isinstance(request, ChatRequest):
        said += [each.ttl for part in _parts(request) for each in part.breakpoints]
    return max((seconds(ttl) for ttl in said if ttl is not None), default=None)


def num_breakpoints(request: ChatRequest) -> int:
    """Cache breakpoints in the messages."""
    return sum(len(part.breakpoints) for part in _parts(request))


def _parts(request: ChatRequest) -> Iterable[TextPart]:
    for message in request.messages:
        if isinstance(message.content, list):
            yield from message.content
