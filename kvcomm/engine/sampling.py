"""How the next tokens of an answer are to be drawn, and what is told of those that were: plain values, checked.

Drawing itself is the matter of `kvcomm.engine.sampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, NamedTuple, TypedDict, cast

from kvcomm.engine.grammar import Grammar
from kvcomm.errors import InvalidRequest
from kvcomm.values import items, real_number, shown, text, told, truth_value, whole_number

MAX_CHOICES = 1024
"""Answers to one prompt at most: each takes memory of its own before anything is computed."""

MAX_BIASED = 4096
"""Tokens with a bias of their own."""

JSON_SCHEMA = "json_schema"
"""A setting that is short for a grammar."""


def _optional_whole_number(name: str, value: object) -> int | None:
    return None if value is None else whole_number(name, value)


def _stop_strings(name: str, value: object) -> tuple[str, ...]:
    return tuple(text(f"{name}[{at}]", item) for at, item in enumerate(items(name, value, "a tuple of strings")))


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    found = items(name, value, "a tuple of token ids")
    return tuple(whole_number(f"{name}[{at}]", item) for at, item in enumerate(found))


def _biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    """By token id, ascending."""
    wanted = "a mapping of token ids to numbers"
    found: dict[int, float] = {}
    for pair in value.items() if isinstance(value, Mapping) else items(name, value, wanted):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidRequest(f"{name} must be {wanted}, not {told(value)}")
        found[whole_number(f"{name}, a token id,", pair[0])] = real_number(f"{name}[{pair[0]}]", pair[1])
    return tuple(sorted(found.items()))


def _grammar(name: str, value: object) -> Grammar | None:
    if isinstance(value, Grammar | None):
        return value
    raise InvalidRequest(f"{name} must be a Grammar, such as Grammar.json_schema(...), or None, not {told(value)}")


_BROUGHT: Mapping[str, Callable[[str, object], object]] = {
    "max_new_tokens": whole_number,
    "temperature": real_number,
    "top_k": whole_number,
    "top_p": real_number,
    "min_p": real_number,
    "repetition_penalty": real_number,
    "seed": _optional_whole_number,
    "stop": _stop_strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": truth_value,
    "n": whole_number,
    "logprobs": _optional_whole_number,
    "skip_special_tokens": truth_value,
    "frequency_penalty": real_number,
    "presence_penalty": real_number,
    "logit_bias": _biases,
    "min_tokens": whole_number,
    "prompt_logprobs": _optional_whole_number,
    "grammar": _grammar,
}
"""How each setting becomes a value of Python's own types, or is refused."""


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn. The defaults are greedy.

    Attributes:
        max_new_tokens: tokens generated at most; 0 only prefills.
        temperature: 0 takes the most probable token; otherwise logits are divided by it, and the smaller it is, the
            surer the most probable token comes.
        top_k, top_p, min_p: keep the k most probable tokens; the smallest set with mass top_p; tokens at least
            min_p times as probable as the best one. 0 (or -1), 1.0 and 0.0 switch them off.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer.
        seed: of the random draws; None: a fresh one per request.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
        n: independent answers to the same prompt; answer i draws with seed + i.
        logprobs: report the log-probability of each token and of this many alternatives.
        skip_special_tokens: leave the texts of special tokens out of the answer's; the end token's always is.
        frequency_penalty, presence_penalty: taken from the logit of a token for every time that it stands in the
            answer, and once if it stands there at all.
        logit_bias: added to the logits of these tokens, by id; -100 and below all but forbid, 100 and above all but
            force.
        min_tokens: tokens before which neither the model's end tokens nor `stop_token_ids` come up, and in whose text
            no stop string counts. Where a grammar can only end, the answer ends all the same.
        prompt_logprobs: report the log-probability of every prompt token and of this many alternatives. The whole
            prompt is computed for it, whatever is cached.
        grammar: what the answer may be: the end comes where the grammar accepts, and at once where it can only end;
            what it forces is taken without a draw. An answer that `max_new_tokens` or a stop string cuts is a beginning
            of one. Control tokens come up where the grammar names them only.

    NumPy's scalars and whole numbers where a float is wanted are taken as what they say; lists become tuples.

    Raises:
        InvalidRequest: a value of another type or outside its range; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    skip_special_tokens: bool = True
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, bring in _BROUGHT.items():
            object.__setattr__(self, name, bring(name, getattr(self, name)))
        if self.top_k == -1:  # how other engines write "off"
            object.__setattr__(self, "top_k", 0)
        most = "None or in [0, 100]"
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or a positive number"),
            "top_k": (self.top_k >= 0, "0 or -1 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "a positive number"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "None or in [0, 2**63)"),
            "stop": (all(self.stop), "a tuple of non-empty strings"),
            "n": (1 <= self.n <= MAX_CHOICES, f"in [1, {MAX_CHOICES}]"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 100, most),
            "frequency_penalty": (isfinite(self.frequency_penalty), "a finite number"),
            "presence_penalty": (isfinite(self.presence_penalty), "a finite number"),
            "logit_bias": (all(isfinite(bias) for _, bias in self.biases), "of finite numbers"),
            "min_tokens": (0 <= self.min_tokens <= self.max_new_tokens, "in [0, max_new_tokens]"),
            "prompt_logprobs": (self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 100, most),
        }
        if len(self.biases) > MAX_BIASED:
            raise InvalidRequest(f"logit_bias names {len(self.biases)} tokens; the most are {MAX_BIASED}")
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise InvalidRequest(f"{name} must be {wanted}, not {shown(getattr(self, name))}")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` by token id, ascending."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken at every step, from logits as the model gives them."""
        penalties = self.frequency_penalty, self.presence_penalty, self.min_tokens
        is_plain = self.repetition_penalty == 1.0 and not any(penalties) and not self.biases
        return self.temperature == 0 and is_plain and self.grammar is None


class SamplingSettings(TypedDict, total=False):
    """The fields of `SamplingParams` by name, for calls that take them so; and what is short for one of them.

    `json_schema` beside others, or beside a ready `SamplingParams`, is short for `grammar=Grammar.json_schema(...)`.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    n: int
    logprobs: int | None
    skip_special_tokens: bool
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]
    min_tokens: int
    prompt_logprobs: int | None
    grammar: Grammar | None
    json_schema: Mapping[str, Any] | bool | str | None


def sampling_params(sampling: SamplingParams | None, settings: SamplingSettings) -> SamplingParams:
    """Either a ready object or its fields; with either of them `json_schema` is short for a grammar made of it.

    Raises:
        InvalidRequest: both are given, a field is unknown, or `sampling` is something else.
    """
    if not isinstance(sampling, SamplingParams | None):
        raise InvalidRequest(f"sampling must be a SamplingParams, not {told(sampling)}; or give its fields by name")
    fields: dict[str, Any] = {key: value for key, value in settings.items() if key != JSON_SCHEMA}
    if sampling is not None and fields:
        raise InvalidRequest(f"give either a SamplingParams or its fields, not both ({sorted(fields)})")
    unknown = sorted(fields.keys() - SamplingParams.__dataclass_fields__.keys())
    if unknown:
        known = sorted((*SamplingParams.__dataclass_fields__, JSON_SCHEMA))
        raise InvalidRequest(f"unknown sampling settings {unknown}; known: {known}")
    params = sampling or SamplingParams(**fields)
    schema = settings.get("json_schema")
    if schema is None:
        return params
    if params.grammar is not None:
        raise InvalidRequest("give either a grammar or a json_schema, not both")
    return replace(params, grammar=Grammar.json_schema(schema))


class TopLogprob(NamedTuple):
    """One of the most probable tokens of a position, and its natural log-probability."""

    token_id: int
    logprob: float


class TokenLogprob(NamedTuple):
    """Natural log-probability of one generated token under the model, before any shaping; and of the most probable."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...]
