"""What a request tells kvcomm inside vLLM: `kv_transfer_params = {"kvcomm": {...}}` of an OpenAI body.

    {"kvcomm": {"segments": [{"start": 0, "end": 40},
                             {"start": 40, "end": 740, "slot": "document", "kind": "dynamic"}],
                "reuse": {"max_divergence": 0.05, "confidence": 0.9}}}

Spans count tokens of the prompt as vLLM gets it, so whoever writes them gives the prompt as token ids. Text outside all
spans is static text between them. Every segment is tokenized on its own: only then has the same text the same ids
behind any prefix. The middleware makes all of this from texts. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import DEFAULT_AUDIT, ReusePolicy

KEY = "kvcomm"
"""Under which a request's parameters stand in `kv_transfer_params`."""

DEFAULT_TENANT = "default"
MAX_SPANS = 128
MAX_NAME = 160

Position = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class _Model(BaseModel):
    """Exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PromptSpan(_Model):
    """`[start, end)` of the prompt's tokens.

    A dynamic span is a text that differs from request to request, or that comes from elsewhere: a document, a question,
    another agent's answer. Its KV may be moved, and it needs the name of its slot. A static one is a part of the
    template; it is always computed, or exactly what was computed before.
    """

    start: Position
    end: Position
    slot: Name | None = None
    kind: Literal["static", "dynamic"] = "static"

    @model_validator(mode="after")
    def _check(self) -> PromptSpan:
        if self.end <= self.start:
            raise _wrong("a span needs at least one token, got [{start}, {end})", start=self.start, end=self.end)
        if self.kind == "dynamic" and self.slot is None:
            raise _wrong("the dynamic span [{start}, {end}) needs a slot", start=self.start, end=self.end)
        return self


class ReuseParams(_Model):
    """How far the answer may depart from the exact one; see `kvcomm.reuse.policy`."""

    mode: Literal["exact", "approximate"] = "approximate"
    max_divergence: Annotated[float, Field(ge=0, description="Nats, averaged over the next 32 tokens.")] = 0.05
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.9
    basis: Literal["own", "pool", "prior"] = "prior"
    audit: Annotated[float, Field(ge=0, le=1)] | None = None
    learn: bool = True

    @property
    def policy(self) -> ReusePolicy:
        """The same, as kvcomm's engine takes it."""
        if self.mode == "exact":
            return ReusePolicy.exact()
        audit = DEFAULT_AUDIT if self.audit is None else self.audit
        return ReusePolicy(self.max_divergence, self.confidence, basis=self.basis, learn=self.learn, audit=audit)


class RequestParams(_Model):
    """What one request asks of kvcomm.

    Attributes:
        segments: spans of the prompt, ascending, not overlapping.
        reuse: None: only exact KV is used.
        snapshot: name of a snapshot in the tier whose tokens begin the prompt; then nothing is moved. None: prefixes
            are found by their tokens.
        tenant: whose KV it is. A server that lets clients in from outside sets it itself and drops what they send.
        save: whether the prompt's exact KV is put to the tier once it is computed.
        answer: slot under which the answer may be moved into other prompts; None: it is nobody's source.
    """

    segments: Annotated[tuple[PromptSpan, ...], Field(max_length=MAX_SPANS, strict=False)] = ()
    reuse: ReuseParams | None = None
    snapshot: Name | None = None
    tenant: Name = DEFAULT_TENANT
    save: bool = True
    answer: Name | None = None

    @model_validator(mode="after")
    def _check(self) -> RequestParams:
        for before, after in zip(self.segments, self.segments[1:], strict=False):
            if after.start < before.end:
                raise _wrong(
                    "spans ascend and do not overlap, got [{a}, {b}) before [{c}, {d})",
                    a=before.start,
                    b=before.end,
                    c=after.start,
                    d=after.end,
                )
        return self

    @property
    def may_be_approximate(self) -> bool:
        """Whether KV that is not exact may serve this request."""
        is_wanted = self.reuse is not None and self.reuse.mode == "approximate" and self.reuse.max_divergence > 0
        return is_wanted and (self.snapshot is not None or self._has_dynamic)

    @property
    def may_move(self) -> bool:
        """Whether text of this request may be moved."""
        return self.may_be_approximate and self._has_dynamic and self.snapshot is None

    @property
    def _has_dynamic(self) -> bool:
        return any(span.kind == "dynamic" for span in self.segments)

    @property
    def policy(self) -> ReusePolicy:
        """How far reuse may depart from the exact answer."""
        return ReusePolicy.exact() if self.reuse is None else self.reuse.policy

    @property
    def end(self) -> int:
        """One past the last token of any span."""
        return self.segments[-1].end if self.segments else 0

    def require_fits(self, num_tokens: int) -> None:
        """Raises InvalidRequest where a span ends behind a prompt of `num_tokens`."""
        if self.end > num_tokens:
            last = self.segments[-1]
            raise InvalidRequest(
                f"kv_transfer_params.kvcomm.segments: the span [{last.start}, {last.end}) ends behind the prompt of "
                f"{num_tokens} tokens; spans count the token ids that vLLM gets"
            )

    def split(self, token_ids: Sequence[int]) -> tuple[Segment, ...]:
        """The prompt as segments: dynamic spans under the names of their slots, all else nameless.

        Raises:
            InvalidRequest: a span ends behind the prompt.
        """
        self.require_fits(len(token_ids))
        parts: list[Segment] = []
        at = 0
        for span in (*self.segments, None):
            start = len(token_ids) if span is None else span.start
            if start > at:
                parts.append(Segment(tuple(token_ids[at:start])))
            if span is not None:
                name = span.slot if span.kind == "dynamic" else None
                parts.append(Segment(tuple(token_ids[span.start : span.end]), name))
                at = span.end
        return tuple(parts)

    def as_transfer_params(self) -> dict[str, Any]:
        """The value of `kv_transfer_params` that says this."""
        return {KEY: self.model_dump(mode="json", exclude_defaults=True)}


def read_params(transfer_params: Mapping[str, Any] | None) -> RequestParams | None:
    """What a request asks of kvcomm, or None if it says nothing to it.

    Raises:
        InvalidRequest: it says something that is no `RequestParams`; names field and value.
    """
    if not transfer_params or KEY not in transfer_params:
        return None
    given = transfer_params[KEY]
    if isinstance(given, RequestParams):
        return given
    try:
        return RequestParams.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("kv_transfer_params", KEY, *first["loc"])))
        raise InvalidRequest(f"{place}: {first['msg']}, got {str(first['input'])[:100]!r}") from error


def _wrong(told: str, **values: int) -> PydanticCustomError:
    return PydanticCustomError("segments", told, values)
