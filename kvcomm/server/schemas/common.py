"""What request models share: strictness, values that are documented by OpenAI but not served, cache and reuse options.

A field that OpenAI documents and that cannot change what is answered here is accepted and ignored; its description says
so. A documented field whose value would change the answer, and cannot be honoured, is refused by name. Any other field
is an error, but in messages: clients send back what they got, wherever it is from. The JSON schema says exactly what is
accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from kvcomm.reuse.policy import DEFAULT_HEAL_WITHIN, ReusePolicy

MODEL_NAME, TOKEN_ID, TOKEN_NAMES = "model-name", "token-id", "token-names"
"""Formats of values of which only the running server knows which ones there are."""

CHAT_KIND, COMPLETION_KIND = REQUEST_KINDS = ("<chat>", "<completion>")
"""Branches of a body that may be the one request or the other; they stand in no client's path."""

MAX_CHOICES = 16
"""Answers to one prompt."""

MAX_MEMBERS = 128
"""Of an object whose members are fields; no model has so many."""

MAX_IDS = 2**20
"""Token ids of one prompt; the model's own limit is nearly always nearer."""

MAX_LABEL, MAX_STOP = 4096, 4096
"""Characters of what names something, and of a text that ends an answer."""

MAX_STOPS, MAX_STOP_IDS, MAX_BIASES = 64, 1024, 1024
"""Texts and tokens that end an answer, and tokens that are biased."""

MAX_LOGPROBS = 20
"""Alternatives to a token."""

MAX_TTL_S = 24 * 3600
UNIT_S = {"s": 1, "m": 60, "h": 3600}

LevelName = Literal["own", "pool", "prior"]
"""Whose pairs decide: the reader's own, those of all readers of the tenant, those that come with the model."""

IGNORED = "Accepted as OpenAI documents it; has no effect here."


class RequestModel(BaseModel):
    """Base of everything a client sends: exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _require_few_members(cls, value: object) -> object:
        """Or each unknown one would be an error of its own."""
        if isinstance(value, dict) and len(value) > MAX_MEMBERS:
            raise PydanticCustomError("too_long", "should have at most {most} members", {"most": MAX_MEMBERS})
        return value


class Body(RequestModel):
    """Base of request bodies; how much JSON one may be is checked before it is read, see `json_text`."""


class ResponseModel(BaseModel):
    """Base of everything a client gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def only(*allowed: Any, why: str) -> Any:
    """The type of a documented field of which only these values are served; others are refused: name, then `why`."""

    def check(value: Any) -> Any:
        for each in allowed:
            if value == each and (type(value) is type(each) or (_is_number(value) and _is_number(each))):
                return value
        raise PydanticCustomError("unsupported", "{why}", {"why": why})

    return Annotated[Any, PlainValidator(check), WithJsonSchema({"enum": list(allowed)})]


def needs(param: str, told: str) -> PydanticCustomError:
    """The error of a field that another one forbids; the message begins with its name."""
    return PydanticCustomError("needs", "{param} {told}", {"param": param, "told": told})


def one_or_many(value: object) -> str:
    """Discriminator of a text or a list: so that errors speak of the form that was sent."""
    return "many" if isinstance(value, list) else "one"


def _whole(value: object) -> object:
    """JSON knows one kind of number: 1.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
NonEmpty = Annotated[str, Field(min_length=1)]
Label = Annotated[str, Field(max_length=MAX_LABEL)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Stop = Annotated[
    Annotated[StopText, Tag("one")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("many")],
    Discriminator(one_or_many),
]
StopIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31), WHOLE]],
    Field(max_length=MAX_STOP_IDS, fail_fast=True, description="Tokens that end the answer, besides the model's own."),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenName = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
LogitBias = Annotated[
    dict[TokenName, Annotated[float, Field(ge=-100, le=100)]],
    Field(
        max_length=MAX_BIASES,
        description="Added to the logits of tokens, by id.",
        json_schema_extra={"format": TOKEN_NAMES},
    ),
]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE]
Ttl = Annotated[
    str,
    Field(
        pattern=r"^([1-9][0-9]{0,3}[sm]|([1-9]|1[0-9]|2[0-4])h)$",
        description="A lifetime such as 90s, 30m or 1h; at most 24h.",
    ),
]


def seconds(ttl: str) -> float:
    """A lifetime in seconds."""
    return float(min(int(ttl[:-1]) * UNIT_S[ttl[-1]], MAX_TTL_S))


class CacheControl(RequestModel):
    """Anthropic's breakpoint. Every prefix is cached here anyway, so its place changes nothing; its `ttl` counts."""

    type: Literal["ephemeral"]
    ttl: Ttl | None = None


class PromptCacheBreakpoint(RequestModel):
    """OpenAI's breakpoint. Every prefix is cached here anyway, so its place changes nothing; its `ttl` counts."""

    mode: Literal["explicit"]
    ttl: Ttl | None = None


class PromptCacheOptions(RequestModel):
    """How long the request's prompt should stay cached, unless its pages are needed; at least as long as by default."""

    mode: Annotated[Literal["implicit", "explicit"] | None, Field(description=IGNORED)] = None
    ttl: Ttl | None = None


class ReuseOptions(RequestModel):
    """How far reuse may depart from the exact answer. Only segments are ever moved; a plain prompt is always exact."""

    mode: Literal["exact", "approximate"] = "approximate"
    max_divergence: Annotated[
        float, Field(ge=0, description="Nats: KL(exact || reused), mean over the next 32 tokens.")
    ] = 0.02
    confidence: Annotated[
        float, Field(gt=0, lt=1, description="Probability with which the bound holds among accepted requests.")
    ] = 0.95
    basis: Annotated[
        LevelName,
        Field(
            description="The least that is accepted as grounds: pairs that come with the model (prior), of your own "
            "traffic (pool), or of the same kind of prompt (own)."
        ),
    ] = "prior"
    heal: Annotated[
        bool,
        Field(
            description="Replace moved KV by exact KV while the answer is decoded: the first token comes as soon, and "
            "what is kept is exact."
        ),
    ] = False
    heal_within: Annotated[
        int, Field(ge=1, lt=2**31, description="Tokens of the answer that are drawn on moved KV."), WHOLE
    ] = DEFAULT_HEAL_WITHIN

    def policy(self) -> ReusePolicy:
        """The same for the engine."""
        if self.mode == "exact":
            return ReusePolicy.exact()
        return ReusePolicy(
            max_divergence=self.max_divergence,
            confidence=self.confidence,
            basis=self.basis,
            heal=self.heal,
            heal_within=self.heal_within,
        )


class StreamOptions(RequestModel):
    """What a stream holds besides the answer."""

    include_usage: Annotated[bool, Field(description="One more chunk at the end, with the usage and no choices.")] = (
        False
    )
    continuous_usage_stats: Annotated[
        bool | None, Field(description="With include_usage: every chunk counts the tokens so far.")
    ] = None
    include_obfuscation: Annotated[bool | None, Field(description=IGNORED)] = None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


CONTEXT_ID = r"^ctx_[0-9a-f]{24}$"


def context_rule(*, behind: JsonDict, stored: JsonDict, without: JsonDict) -> JsonDict:
    """The rule about `context_id` as JSON schema; one for all, as tools that make examples try all rules in turn.

    Args:
        behind: schemas of more fields of requests on a context.
        stored: of those whose answer it is to keep.
        without: of requests without a context.
    """
    return {
        "if": {"properties": {"context_id": {"type": "string"}}, "required": ["context_id"]},
        "then": {
            "properties": {
                "cache_salt": {"type": "null"},
                "segments": {"type": ["null", "array"], "maxItems": 0},
                "prompt_logprobs": {"type": "null"},
                **behind,
            },
            "if": {"properties": {"store": {"const": True}}, "required": ["store"]},
            "then": {"properties": {"n": {"enum": [None, 1]}, **stored}},
        },
        "else": {"properties": without},
    }


Salt = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        description="Requests with different salts share no cache, also within one tenant.",
    ),
]


class GenerationRequest(Body):
    """Fields that chat and plain completions share."""

    model: Annotated[Label, Field(json_schema_extra={"format": MODEL_NAME})]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    seed: Annotated[int, WHOLE] | None = None
    stop: Stop | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, description="An upper bound; the server has others."), WHOLE] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    user: Annotated[Label | None, Field(description=IGNORED)] = None

    top_k: (
        Annotated[int, Field(ge=-1, description="Keep the k most probable tokens; 0 and -1 are off."), WHOLE] | None
    ) = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    ignore_eos: Annotated[bool, Field(description="Go on after the model's end tokens.")] | None = None
    min_tokens: (
        Annotated[
            int,
            Field(ge=0, description="The answer has so many before an end token, stop token or stop string ends it."),
            WHOLE,
        ]
        | None
    ) = None
    stop_token_ids: StopIds | None = None
    skip_special_tokens: Annotated[
        bool | None, Field(description="False: special tokens that the model writes are seen; end tokens never are.")
    ] = None
    prompt_logprobs: Annotated[
        NumLogprobs | None,
        Field(
            description="Log-probabilities of the prompt's tokens and so many alternatives; all of it is computed. Not "
            "with stream or context_id."
        ),
    ] = None

    cache_salt: Salt | None = None
    prompt_cache_key: Annotated[
        Label | None, Field(description="Accepted; there is one cache, which needs no routing. Not a salt.")
    ] = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Annotated[Literal["in_memory", "24h"] | None, Field(description=IGNORED)] = None
    reuse: ReuseOptions | None = None
    context_id: (
        Annotated[str, Field(pattern=CONTEXT_ID, description="Answer behind this context; see /v1/contexts.")] | None
    ) = None
    store: Annotated[
        bool | None,
        Field(
            description="Let the context keep the prompt and the whole answer; else it stays as it is. Then n is 1. "
            "Without context_id it has no effect."
        ),
    ] = None

    @model_validator(mode="after")
    def _check_context(self) -> GenerationRequest:
        if self.prompt_logprobs is not None and self.stream:
            raise needs("prompt_logprobs", "is not allowed when stream is true")
        if self.context_id is None:
            return self
        if self.cache_salt is not None:
            raise needs("cache_salt", "is not allowed with context_id: the context has its own")
        if self.prompt_logprobs is not None:
            raise needs("prompt_logprobs", "is not allowed with context_id: what a context holds is not computed again")
        if self.store and self.n not in (None, 1):
            raise needs("n", "is only 1 when store is true")
        return self

    @property
    def is_stored(self) -> bool:
        """Whether a context is to keep the answer."""
        return bool(self.store) and self.context_id is not None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream says how many tokens there are so far."""
        return self.wants_usage_chunk and bool(self.stream_options and self.stream_options.continuous_usage_stats)
