"""A request inside the engine: its choices, its clock, and how it becomes a completion.

A request owns the sequences of its choices unless they were lent by a context. It knows neither the scheduler nor the
tree; the scheduler drives it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from kvcomm.align.ladder import Rung
from kvcomm.engine.detokenize import Detokenizer
from kvcomm.engine.grammar_state import GrammarState
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.read_ahead import Ask
from kvcomm.engine.reading import Reading
from kvcomm.engine.results import Choice, Chunk, Completion, Usage
from kvcomm.engine.sampler import Sampler, token_logprob
from kvcomm.engine.sampling import SamplingParams, TokenLogprob
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.live import Weights
from kvcomm.reuse.attempt import Attempt, ToCompute
from kvcomm.reuse.healing import Healing, NotHealed
from kvcomm.reuse.lesson import Lesson
from kvcomm.reuse.plan import BoundInForce, Plan, Reason, SpanKind
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import NUM_CONTINUATION

ANSWER = "answer"
"""Name of the segments that were generated here."""


@dataclass(eq=False)
class Branch:
    """One choice while it is generated.

    Attributes:
        make_sampler, make_detokenizer: for `sampler` and `detokenizer`, which are made when the first token is drawn.
        grammar: where it stands, behind the forced tokens that are still to come.
        forced: by the grammar, and not yet among its tokens.
        token_ids: as drawn; what the answer keeps of them is the detokenizer's to say.
        end_logprob: of the end token that was drawn behind them.
        num_guessed: tokens of the answer that a step had guessed right beforehand.
        num_matched: repeated tokens that stood before the guesses of the last step.
        num_told: drawn tokens of which the caller has been given the log-probability.
    """

    index: int
    sequence: KVSequence
    make_sampler: Callable[[], Sampler]
    make_detokenizer: Callable[[], Detokenizer]
    grammar: GrammarState | None = None
    forced: deque[int] = field(default_factory=deque)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    end_logprob: TokenLogprob | None = None
    num_guessed: int = 0
    num_matched: int = 0
    num_told: int = 0

    @cached_property
    def sampler(self) -> Sampler:
        """Draws its tokens."""
        return self.make_sampler()

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """Makes text of them."""
        return self.make_detokenizer()

    @property
    def is_over(self) -> bool:
        """Whether its grammar leaves nothing but to end."""
        return self.grammar is not None and not self.forced and self.grammar.is_over

    @property
    def tokens_a_pass(self) -> float:
        """Mean number that a pass has given so far: one, and those that were guessed right."""
        num_tokens = len(self.token_ids)
        return max(1, num_tokens) / max(1, num_tokens - self.num_guessed)

    def drew(self, token_id: int) -> None:
        """Let the grammar follow a token that was drawn, and say what must come behind it.

        Raises:
            InvalidRequest: the grammar costs more than a step may take.
        """
        if self.grammar is not None:
            self.grammar.take(token_id)
            self.forced += self.grammar.take_forced()

    def allowed(self, guesses: IntArray) -> IntArray:
        """The guesses at the next tokens up to the first one that cannot come."""
        return guesses if self.grammar is None else guesses[: self.grammar.num_allowed(guesses.tolist())]


@dataclass
class Clock:
    """Moments of a request, seconds on the monotonic clock."""

    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None


@dataclass(frozen=True)
class Carried:
    """Prompt tokens that earlier extensions of a context moved, or computed, by reason, for this request.

    Attributes:
        num_tier: exact tokens that a shared tier gave them.
    """

    reasons: Mapping[str, int] = field(default_factory=dict)
    num_aligned: int = 0
    num_tier: int = 0

    @property
    def num_tokens(self) -> int:
        """Computed tokens over all reasons."""
        return sum(self.reasons.values())

    def plus(self, plan: Plan, num_tier: int = 0) -> Carried:
        """With what one more plan moved and computed, and a tier gave."""
        reasons = {key: self.reasons.get(key, 0) + plan.reasons.get(key, 0) for key in {*self.reasons, *plan.reasons}}
        return Carried(reasons, self.num_aligned + plan.num_tokens(SpanKind.ALIGNED), self.num_tier + num_tier)


@dataclass(eq=False)
class Request:
    """One request from submission to completion.

    Attributes:
        tenant: whose it is.
        owner: what the tenant's quota goes by.
        adapter: what it names; None: the model as it was when the request was made.
        weights: what it is computed with. While it waits they may become others, see `Admission`.
        sequence: prompt and, for the first choice, its answer. Lent by a context if `is_lent`: then it is rolled back
            instead of released when the request fails, and keeps the answer when it succeeds.
        num_prompt_tokens: tokens of `sequence` at submission.
        num_kept_tokens: tokens of a lent sequence to roll back to.
        ready_logits: logits of the last prompt token, if its KV and they are at hand already.
        segments: what the sequence is made of; empty where nobody asked for moved segments.
        policy: how far reuse may depart from the exact answer.
        rung: reuse at exactly this rung with no bound, whatever the policy says; None: as the policy allows.
        lesson: what is to be learned from it whatever its policy says; None: as that says.
        reads_cache: whether anything known before may be used at all. What it computes is published either way.
        pending: `[start, end)` of prompt tokens still to be computed, ascending.
        attempt: how moved KV is reused; None: not at all.
        ask: what it wants to know of a shared tier; None: nothing.
        reading: the open prompt that it was, as long as what that has read may be of use.
        num_read: prompt tokens that were computed before the prompt was complete.
        num_offered: leading tokens that have been offered to the tier.
        is_trial: it is only planned, to explain it: what it finds does not count as used.
        published_s: when others could first move what this request computed, on the monotonic clock.
        prompt_logprobs: of the prompt tokens as far as it is computed, where they are wanted; the first has none.
        last_logits: [vocab_size] behind the prompt, set when the whole prompt is computed.
        healing: its exact twin, where its policy heals and there is something to heal; None: there is none.
        not_healed: why there is none, where its policy heals and its KV stays approximate.
        on_healed: called under the engine's lock when its sequence has become exact.
        on_success: called under the engine's lock before the request is settled with its completion.
    """

    request_id: int
    namespace: str
    sampling: SamplingParams
    sequence: KVSequence
    handle: RequestHandle
    branches: list[Branch]
    tenant: str
    owner: str
    weights: Weights
    adapter: str | None = None
    is_lent: bool = False
    num_kept_tokens: int = 0
    ready_logits: Tensor | None = None
    carried: Carried = field(default_factory=Carried)
    segments: tuple[Segment, ...] = ()
    policy: ReusePolicy = field(default_factory=ReusePolicy.exact)
    rung: Rung | None = None
    lesson: Lesson | None = None
    reads_cache: bool = True
    plan: Plan = field(default_factory=Plan)
    pending: list[tuple[int, int]] = field(default_factory=list)
    attempt: Attempt | None = None
    ask: Ask | None = None
    reading: Reading | None = None
    num_read: int = 0
    num_offered: int = 0
    is_trial: bool = False
    published_s: float | None = None
    clock: Clock = field(default_factory=Clock)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    last_logits: Tensor | None = None
    is_cancelled: bool = False
    healing: Healing | None = None
    not_healed: NotHealed | None = None
    on_healed: Callable[[], None] | None = None
    on_success: Callable[[], None] | None = None
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.sequence.num_tokens

    @property
    def is_prefilled(self) -> bool:
        """Whether the first token of every choice can be or has been drawn."""
        return self.last_logits is not None

    @property
    def may_move(self) -> bool:
        """Whether its caller and its prompt leave anything to decide about moved text."""
        is_wanted = self.rung is not None or not self.policy.is_exact
        return is_wanted and self.reads_cache and any(segment.name is not None for segment in self.segments)

    @property
    def approximate_from(self) -> int | None:
        """First position whose KV was not a cold run's when the answer began; None: all of it was."""
        return self.sequence.approximate_from if self.healing is None else self.healing.approximate_from

    @property
    def num_moved_tokens(self) -> int:
        """Tokens of the answer that are drawn before its sequence is healed, at most."""
        return min(self.policy.heal_within, self.sampling.max_new_tokens)

    @property
    def healed_after(self) -> int | None:
        """Tokens of the answer that were drawn before its sequence became exact; None: it did not."""
        if self.healing is None or not self.healing.is_in_place:
            return None
        return min(self.num_moved_tokens, len(self.branches[0].token_ids))

    @property
    def is_healing(self) -> bool:
        """Whether its answer is drawn on moved KV, and an exact twin is to take over."""
        return self.healing is not None and self.is_prefilled and not self.healing.is_in_place

    @property
    def awaits_twin(self) -> bool:
        """Whether it waits for its exact twin: for its next token, or to end."""
        if not self.is_healing:
            return False
        branch = self.branches[0]
        return branch.finish_reason is not None or len(branch.token_ids) >= self.policy.heal_within

    @property
    def exact_logits(self) -> Tensor | None:
        """`last_logits`, unless they are of approximate KV that has been replaced."""
        return self.last_logits if self.healed_after is None else None

    @property
    def num_tier_tokens(self) -> int:
        """Prompt tokens whose KV a shared tier gave for this request."""
        ask = self.ask
        if ask is None or ask.namespace != self.namespace:
            return 0
        reused = [span for span in self.plan.spans if span.kind is SpanKind.EXACT]
        return sum(ask.num_tokens(span.start, span.end) for span in reused)

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The first choice's tokens as drawn, as far as a divergence looks at them."""
        return tuple(self.branches[0].token_ids[:NUM_CONTINUATION])

    @property
    def num_choices(self) -> int:
        """Answers that were asked for."""
        return len(self.branches)

    def carry_out(self, todo: ToCompute) -> None:
        """Do what an attempt at moved KV asks for: change plan, what is pending, and what of the sequence counts."""
        self.plan, self.pending = todo.plan, list(todo.stretches)
        if todo.moved_from is None:
            self.sequence.rewind(todo.num_counted)
        else:
            self.sequence.place(todo.moved_from, todo.num_counted)

    def score(self, logits: Tensor, start: int) -> None:
        """Note how probable prompt tokens are.

        Args:
            logits: [num_tokens, vocab_size] of the tokens from `start` on; each tells about the token behind it.
        """
        num_top = self.sampling.prompt_logprobs
        assert num_top is not None
        following = self.sequence.token_ids[start + 1 : self.num_prompt_tokens][: len(logits)].tolist()
        self.prompt_logprobs += [
            token_logprob(row, each, num_top) for row, each in zip(logits, following, strict=False)
        ]

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence this request can grow to."""
        return self.num_prompt_tokens + self.sampling.max_new_tokens

    def num_own_pages(self, page_size: int) -> int:
        """Pages that each choice but the first needs at most besides the whole ones of the prompt, which it shares."""
        if self.sampling.max_new_tokens == 0:
            return 0
        return -(-self.max_tokens // page_size) - self.num_prompt_tokens // page_size

    def num_pages(self, page_size: int) -> int:
        """Distinct pages that this request and the context it forked, if any, refer to at most."""
        own = -(-self.max_tokens // page_size) + self.num_own_pages(page_size) * (len(self.branches) - 1)
        is_page_copied = not self.is_lent and self.sequence.num_computed % page_size > 0
        return own + is_page_copied

    @property
    def active_branches(self) -> list[Branch]:
        """Choices that go on."""
        return [branch for branch in self.branches if branch.finish_reason is None]

    def publish(self, branch: Branch, text: str) -> None:
        """Hand a piece of a choice to the caller, with the ids whose text is out."""
        chunk = Chunk(branch.index, text, branch.detokenizer.take_ids(), None, branch.finish_reason)
        if self.sampling.logprobs is not None:
            first, branch.num_told = branch.num_told, branch.detokenizer.num_placed
            chunk = chunk._replace(
                logprobs=tuple(branch.logprobs[first : branch.num_told]) or None,
                text_offsets=branch.detokenizer.starts(first, branch.num_told) or None,
                end_logprob=branch.end_logprob,
            )
        self.handle.publish(chunk)

    def completion(self) -> Completion:
        """The result; every choice must have finished."""
        scored = None if self.sampling.prompt_logprobs is None else tuple(self.prompt_logprobs)
        return Completion(tuple(self._choice(branch) for branch in self.branches), self._usage(), scored)

    def _choice(self, branch: Branch) -> Choice:
        assert branch.finish_reason is not None
        detokenizer = branch.detokenizer
        choice = Choice(
            branch.index,
            detokenizer.text,
            detokenizer.answer_ids,
            branch.finish_reason,
            None,
            stopped_by=detokenizer.stopped,
        )
        if self.sampling.logprobs is None:
            return choice
        num = detokenizer.num_placed
        return replace(
            choice,
            logprobs=tuple(branch.logprobs[:num]),
            text_offsets=detokenizer.starts(0, num),
            end_logprob=branch.end_logprob,
        )

    def _usage(self) -> Usage:
        now, clock = time.monotonic(), self.clock
        computed = self.plan.num_tokens(SpanKind.COMPUTE) + self.carried.num_tokens + self.num_read
        aligned = self.plan.num_tokens(SpanKind.ALIGNED) + self.carried.num_aligned
        exact = self.num_prompt_tokens - computed - aligned
        if self.approximate_from is not None:
            # What a context kept from earlier answers on moved KV is not exact either.
            exact = min(exact, self.approximate_from)
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            exact_tokens=exact,
            aligned_tokens=self.num_prompt_tokens - computed - exact,
            computed_tokens=computed,
            generated_tokens=sum(len(branch.token_ids) for branch in self.branches),
            guessed_tokens=sum(branch.num_guessed for branch in self.branches),
            queue_s=(clock.admitted or now) - clock.submitted,
            ttft_s=(clock.first_token or now) - clock.submitted,
            total_s=now - clock.submitted,
            reasons=self._reasons(),
            bound=self._bound(),
            approximation=None if self.attempt is None or not self.attempt.is_accepted else self.attempt.report(),
            healed_after=self.healed_after,
            not_healed=self.not_healed,
            spans=self.plan.exact_up_to(self.approximate_from).spans,
            tier_tokens=min(exact, self.num_tier_tokens + self.carried.num_tier),
            read_along_tokens=self.num_read,
        )

    def _reasons(self) -> dict[str, int]:
        reasons = dict(self.carried.plus(self.plan).reasons)
        return reasons | {Reason.READ_ALONG.value: self.num_read} if self.num_read else reasons

    def _bound(self) -> BoundInForce | None:
        bound = self.policy.bound
        if bound is None:
            return None
        acceptance = None if self.attempt is None or not self.attempt.is_accepted else self.attempt.acceptance
        if acceptance is None:
            return BoundInForce(*bound)
        return BoundInForce(*bound, acceptance.level, acceptance.num_pairs)
