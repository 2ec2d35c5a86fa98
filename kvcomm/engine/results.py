"""What a request gives back: chunks while it runs, a completion with its usage at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvcomm.engine.sampling import TokenLogprob
from kvcomm.pictures import TokenSources, bar, shown
from kvcomm.plain import Plain, fields_of, short
from kvcomm.reuse.healing import NotHealed
from kvcomm.reuse.plan import ApproximationReport, BoundInForce, Span

MAX_REASONS = 3


class Chunk(NamedTuple):
    """A piece of one choice as it is generated; `finish_reason` is set on the last one.

    The texts of a choice's chunks joined are its text, their token ids its token ids. Either may lag behind what has
    been drawn: text while it may still become another character or a stop string, ids while a stop string may cut them.

    Attributes:
        logprobs: of the next drawn tokens, if they were asked for and there are any: of those of which it is known now
            where they begin in the text.
        text_offsets: of the same tokens, see `Choice`.
        end_logprob: with the last chunk, see `Choice`.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str | None
    text_offsets: tuple[int, ...] | None = None
    end_logprob: TokenLogprob | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every field under its name, as JSON values."""
        return fields_of(self)


@dataclass(frozen=True)
class Usage(Plain):
    """Where the tokens of a request came from and how long it took.

    Attributes:
        prompt_tokens: tokens before the answer; exact + aligned + computed.
        exact_tokens: reused KV that equals a cold run's.
        aligned_tokens: moved and corrected KV, and what a context keeps that was computed on top of such; always 0
            under an exact policy.
        computed_tokens: prompt tokens computed for this request.
        generated_tokens: over all choices, end-of-answer tokens not counted.
        queue_s, ttft_s, total_s: seconds from submission to admission, to the first token, to the end.
        reasons: why prompt tokens were computed, reason -> tokens.
        bound: the one in force and what it rests on, None under an exact policy.
        approximation: how moved KV was reused, None if it was not.
        spans: of the prompt, in order and without gaps: how this request came by their KV. What a context had computed
            before is a reused span here, and yet among the computed tokens of the request that reports it.
        guessed_tokens: generated tokens that came without a pass of their own, see `EngineConfig.draft_rows`.
        tier_tokens: of the exact tokens, those that a shared tier gave for this request.
        read_along_tokens: of the computed tokens, those that were computed before the prompt was complete.
        healed_after: tokens of the answer after which all KV was exact, see `ReusePolicy.heal`; None: it was exact from
            the start, or it was not healed.
        not_healed: why approximate KV stayed so, where the policy heals; None otherwise.
    """

    prompt_tokens: int
    exact_tokens: int
    aligned_tokens: int
    computed_tokens: int
    generated_tokens: int
    queue_s: float
    ttft_s: float
    total_s: float
    reasons: Mapping[str, int] = field(default_factory=dict)
    bound: BoundInForce | None = None
    approximation: ApproximationReport | None = None
    guessed_tokens: int = 0
    spans: tuple[Span, ...] = ()
    tier_tokens: int = 0
    read_along_tokens: int = 0
    healed_after: int | None = None
    not_healed: NotHealed | None = None

    def __repr__(self) -> str:
        most = sorted(self.reasons.items(), key=lambda each: -each[1])[:MAX_REASONS]
        reasons = ", ".join(f"{tokens} {reason}" for reason, tokens in most)
        tier = f" ({self.tier_tokens} from the tier)" if self.tier_tokens else ""
        along = f", {self.read_along_tokens} of them read along" if self.read_along_tokens else ""
        bound = "" if self.bound is None else f", bound {self.bound.max_divergence:g} at {self.bound.confidence:g}"
        if self.bound is not None and self.bound.level is not None:
            bound += f" by {self.bound.num_pairs} pairs ({self.bound.level})"
        healed = "" if self.healed_after is None else f", healed after {self.healed_after} tokens"
        if self.not_healed is not None:
            healed = f", not healed ({self.not_healed})"
        return (
            f"Usage({self.prompt_tokens} prompt = {self.exact_tokens} exact{tier} + {self.aligned_tokens} aligned + "
            f"{self.computed_tokens} computed ({reasons or 'nothing'}){along}, {self.generated_tokens} generated, "
            f"first token {self.ttft_s:.3g} s, all {self.total_s:.3g} s{bound}{healed})"
        )

    @property
    def sources(self) -> TokenSources:
        """Where the prompt's tokens came from."""
        return TokenSources(self.exact_tokens, self.aligned_tokens, self.computed_tokens)

    def _repr_html_(self) -> str:
        times = f"first token {self.ttft_s:.3g} s, {self.generated_tokens} generated, all {self.total_s:.3g} s"
        bound = "" if self.bound is None else f"; bound {self.bound.max_divergence:g} at {self.bound.confidence:g}"
        return f"<div>{bar(self.sources)}<br><small>{times}{bound}</small></div>"

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second after the first one; 0 if there were none."""
        decoding_s = self.total_s - self.ttft_s
        return max(0, self.generated_tokens - 1) / decoding_s if decoding_s > 0 else 0.0


@dataclass(frozen=True)
class Choice(Plain):
    """One answer.

    `finish_reason` is "stop" (end token, stop token or stop string) or "length". `text` is the tokenizer's text of
    `token_ids`, without special tokens unless they were wanted: no end token, nothing of a stop string. Where a stop
    string begins inside a token, the token's text before it is tokenized anew: these last ids were not drawn, and may
    be more than one. What reads the answer (the context behind it, other agents, moved segments) reads these ids.

    Attributes:
        logprobs: of every token drawn that has put text into the answer: of `token_ids` but those tokenized anew, and
            then of those that a stop string has cut. None: not asked for.
        text_offsets: of the same tokens: characters of `text` before that of the token; of one that goes on with a
            character, those before that character.
        end_logprob: of the end or stop token that ended the answer and is no part of it, if there was one and
            log-probabilities were asked for.
        stopped_by: the stop string that ended it, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None
    text_offsets: tuple[int, ...] | None = None
    end_logprob: TokenLogprob | None = None
    stopped_by: str | None = None

    def __repr__(self) -> str:
        return f"Choice({self.index}: {short(self.text)}, {len(self.token_ids)} tokens, {self.finish_reason})"


@dataclass(frozen=True)
class Completion(Plain):
    """The result of a request; text, token_ids, finish_reason and logprobs are those of the first choice.

    Attributes:
        prompt_logprobs: one per prompt token if they were asked for; the first token has none.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def __repr__(self) -> str:
        more = f" and {len(self.choices) - 1} more" if len(self.choices) > 1 else ""
        usage = f"{self.usage.prompt_tokens} prompt, {self.usage.generated_tokens} generated tokens"
        return f"Completion({short(self.text)}{more}, {self.finish_reason}, {usage}, {self.usage.total_s:.3g} s)"

    def _repr_html_(self) -> str:
        answers = "".join(f"<p>{shown(choice.text)}</p>" for choice in self.choices)
        return f"<div>{answers}{self.usage._repr_html_()}</div>"

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Log-probabilities of the first choice, if they were asked for."""
        return self.choices[0].logprobs
