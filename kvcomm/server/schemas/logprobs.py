"""Log-probabilities of a prompt's tokens, in the shape of vLLM."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvcomm.server.schemas.common import ResponseModel


class PromptLogprob(ResponseModel):
    """One token that stands at a place of the prompt, or could."""

    logprob: float
    rank: Annotated[
        int | None, Field(ge=1, description="1 for the most probable one; null where it is none of the alternatives.")
    ]
    decoded_token: str


PromptLogprobs = Annotated[
    list[dict[str, PromptLogprob] | None],
    Field(description="One entry per token of the prompt, by token id; null for the first."),
]
