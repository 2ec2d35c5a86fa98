"""`usage`: OpenAI's counts, and where the prompt's tokens came from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import LevelName, ResponseModel


class PromptTokensDetails(ResponseModel):
    """OpenAI's view of the cache."""

    cached_tokens: Annotated[int, Field(ge=0, description="Reused exactly; the same as cached_prefix_tokens.")]


class BoundObject(ResponseModel):
    """What was promised: P(divergence > max_divergence) <= 1 - confidence among accepted requests."""

    max_divergence: float
    confidence: float
    level: Annotated[
        LevelName | None,
        Field(
            description="Whose pairs it rests on: the same kind of prompt (own), your other traffic (pool), those that "
            "come with the model (prior). Null: nothing was moved."
        ),
    ]
    num_pairs: Annotated[int, Field(ge=0, description="How many those are.")]


class Timings(ResponseModel):
    """Seconds inside the engine, from submission; of the slowest prompt where there are several."""

    queue_s: float
    ttft_s: float
    total_s: float


class PlanSpan(ResponseModel):
    """Tokens [start, end) of the prompt and how this request came by their KV."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=1)]
    source: Literal["exact", "aligned", "computed"]
    reason: Annotated[str | None, Field(description="Why they were computed; null for reused tokens.")]


class RunningUsage(ResponseModel):
    """Tokens so far, while an answer is streamed."""

    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)]
    total_tokens: Annotated[int, Field(ge=0)]


class UsageObject(ResponseModel):
    """prompt_tokens = cached_prefix_tokens + aligned_tokens + computed_tokens."""

    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)]
    total_tokens: Annotated[int, Field(ge=0)]
    prompt_tokens_details: PromptTokensDetails
    input_tokens: Annotated[int, Field(ge=0, description="The same as prompt_tokens.")]
    output_tokens: Annotated[int, Field(ge=0, description="The same as completion_tokens.")]
    cached_prefix_tokens: Annotated[int, Field(ge=0, description="KV reused that equals a cold run's.")]
    tier_tokens: Annotated[
        int,
        Field(ge=0, description="Of the cached_prefix_tokens, from the shared tier for this request."),
    ] = 0
    aligned_tokens: Annotated[int, Field(ge=0, description="KV moved from another context and corrected.")]
    computed_tokens: Annotated[int, Field(ge=0, description="Prompt tokens computed for this request.")]
    read_along_tokens: Annotated[
        int,
        Field(ge=0, description="Of the computed_tokens, those computed while an answer that is followed was written."),
    ] = 0
    miss_reasons: Annotated[
        dict[str, int],
        Field(description="Why prompt tokens were computed: reason -> tokens; the sum is computed_tokens."),
    ]
    rung: Annotated[
        float | None, Field(description="Share of the moved tokens recomputed at most; null where nothing was moved.")
    ]
    rung_name: Annotated[
        str | None, Field(description="How moved text was reused, such as `token 10 % attention`; null as above.")
    ]
    healed_after: Annotated[
        int | None,
        Field(
            ge=0,
            description="Tokens of the answer after which all KV was exact, where moved KV was healed; of several "
            "answers the most. Null: it was exact from the start, or was not healed.",
        ),
    ] = None
    not_healed: Annotated[
        Literal["no_room", "quota", "several_answers", "no_answer"] | None,
        Field(description="Why moved KV was not healed although the request asked for it; null otherwise."),
    ] = None
    bound: Annotated[BoundObject | None, Field(description="The bound in force; null for exact requests.")]
    cache_breakpoints: Annotated[
        int, Field(ge=0, description="Breakpoints in the request. Every prefix is cached, with or without one.")
    ]
    tools: Annotated[
        Literal["template", "default"] | None,
        Field(
            description="Who showed the request's tools to the model: its chat template, or, where that has no place "
            "for them, a description in the system message; null without tools."
        ),
    ] = None
    timings: Timings
    plan: Annotated[
        list[PlanSpan] | None,
        Field(description="With `include_plan`: spans of the prompt, in order and without gaps."),
    ] = None
