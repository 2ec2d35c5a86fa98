"""The body of `POST /v1/cache/explain`: any request that generates, exactly as it would be made."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body
from pydantic import Discriminator, Tag

from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.common import CHAT_KIND, COMPLETION_KIND
from kvcomm.server.schemas.completions import CompletionRequest


def _kind(value: object) -> str:
    is_completion = isinstance(value, CompletionRequest) or (isinstance(value, dict) and "prompt" in value)
    return COMPLETION_KIND if is_completion else CHAT_KIND


ExplainRequest = Annotated[
    Annotated[ChatRequest, Tag(CHAT_KIND)] | Annotated[CompletionRequest, Tag(COMPLETION_KIND)],
    Discriminator(_kind),
    Body(description="A chat or completion request, as it would be made."),
]
