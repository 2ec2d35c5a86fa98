"""Plans cover the prompt and count it right."""

from __future__ import annotations

import pytest

from kvcomm.reuse.plan import Plan, Reason, Span, SpanKind, exact_plan


@pytest.mark.parametrize(("num_reused", "num_tokens"), [(0, 5), (3, 5), (5, 5)])
def test_spans_cover_the_prompt(num_reused: int, num_tokens: int) -> None:
    plan = exact_plan(num_reused, num_tokens, Reason.EVICTED)
    covered = [position for span in plan.spans for position in range(span.start, span.end)]
    assert covered == list(range(num_tokens))
    assert plan.num_tokens(SpanKind.EXACT) == num_reused
    assert plan.reasons == ({"evicted": num_tokens - num_reused} if num_reused < num_tokens else {})


def test_reasons_add_up() -> None:
    compute = SpanKind.COMPUTE
    plan = Plan((Span(compute, 0, 2, Reason.NEW), Span(SpanKind.EXACT, 2, 4), Span(compute, 4, 9, Reason.NEW)))
    assert plan.reasons == {"new": 7}


def test_what_comes_while_a_prompt_is_computed_is_reused() -> None:
    plan = exact_plan(4, 20, Reason.NEW).reused(8, 16)
    kinds = [(span.kind, span.start, span.end) for span in plan.spans]
    assert kinds == [
        (SpanKind.EXACT, 0, 4),
        (SpanKind.COMPUTE, 4, 8),
        (SpanKind.EXACT, 8, 16),
        (SpanKind.COMPUTE, 16, 20),
    ]
    assert plan.reasons == {"new": 8}
    assert plan.stretches == ((4, 8), (16, 20))


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_is_said_in_words_of_its_own(reason: Reason) -> None:
    assert "_" not in reason.words
    assert reason.words[0].islower()
    assert [each for each in Reason if each.words == reason.words] == [reason]
