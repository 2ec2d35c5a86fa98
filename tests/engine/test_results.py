"""Results of real requests outside of the engine: pickled, as JSON, and at a glance."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import pytest

from kvcomm.align.standings import Level
from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Completion, Usage
from kvcomm.memory.segments import Segment
from kvcomm.reuse.plan import ApproximationReport, BoundInForce
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import SMALL, some_tokens
from tests.limits import PATIENCE_S, threads
from tests.tiny import TinyModel

LINE = 200
"""Characters that everything fits in."""


@pytest.fixture
def completion(engine: Engine) -> Completion:
    """Two answers with log-probabilities, under a bound."""
    policy = ReusePolicy(max_divergence=0.02, confidence=0.95, learn=False)
    prompt = some_tokens(20)
    engine.generate(prompt[:10], max_new_tokens=1)
    return engine.generate(
        prompt, policy=policy, max_new_tokens=6, n=2, logprobs=2, temperature=1.0, seed=1, ignore_eos=True
    )


def test_a_completion_survives_pickling_and_copying(completion: Completion) -> None:
    for found in (pickle.loads(pickle.dumps(completion)), copy.deepcopy(completion)):
        assert found == completion
        assert found is not completion
        assert found.usage.bound.max_divergence == 0.02
        assert found.logprobs[0].top[0].token_id == completion.logprobs[0].top[0].token_id  # type: ignore[index]


def test_a_completion_as_json(completion: Completion) -> None:
    value = json.loads(json.dumps(completion.to_dict(), allow_nan=False))
    assert list(value) == ["choices", "usage", "prompt_logprobs"]
    first, second = value["choices"]
    names = ["index", "text", "token_ids", "finish_reason", "logprobs", "text_offsets", "end_logprob", "stopped_by"]
    assert list(first) == names
    assert (first["index"], second["index"]) == (0, 1)
    assert (first["text"], first["token_ids"]) == (completion.text, list(completion.token_ids))
    assert list(first["logprobs"][0]) == ["token_id", "logprob", "top"]
    assert [list(each) for each in first["logprobs"][0]["top"]] == [["token_id", "logprob"]] * 2
    usage = value["usage"]
    assert list(usage) == [
        "prompt_tokens",
        "exact_tokens",
        "aligned_tokens",
        "computed_tokens",
        "generated_tokens",
        "queue_s",
        "ttft_s",
        "total_s",
        "reasons",
        "bound",
        "approximation",
        "guessed_tokens",
        "spans",
        "tier_tokens",
        "read_along_tokens",
        "healed_after",
        "not_healed",
    ]
    assert (usage["prompt_tokens"], usage["generated_tokens"]) == (20, 12)
    assert usage["bound"] == {"max_divergence": 0.02, "delta": pytest.approx(0.05), "level": None, "num_pairs": 0}
    assert usage["approximation"] is None
    assert [list(span) for span in usage["spans"]] == [["kind", "start", "end", "reason"]] * len(usage["spans"])
    assert {span["kind"] for span in usage["spans"]} == {"exact", "compute"}
    assert sum(usage["reasons"].values()) == usage["computed_tokens"]
    assert value["usage"] == completion.usage.to_dict()
    assert value["choices"][1] == completion.choices[1].to_dict()


def test_moved_text_and_numbers_that_are_none(completion: Completion) -> None:
    report = ApproximationReport("abc", "rotate 15 % attention", 0.15, float("inf"), 0.5, None)
    bound = BoundInForce(0.02, 0.05, Level.POOL, 19)
    usage = Usage(4, 1, 2, 1, 1, 0.0, 0.1, 0.2, approximation=report, bound=bound)
    assert json.loads(json.dumps(usage.to_dict()["bound"])) == {
        "max_divergence": 0.02,
        "delta": 0.05,
        "level": "pool",
        "num_pairs": 19,
    }
    assert repr(usage).endswith(", bound 0.02 at 0.95 by 19 pairs (pool))")
    assert usage.to_dict()["approximation"] == {
        "reader": "abc",
        "rung": "rotate 15 % attention",
        "share": 0.15,
        "predicted": None,
        "distance": 0.5,
        "residual": None,
    }
    assert pickle.loads(pickle.dumps(usage)) == usage


def test_the_bound_names_its_numbers(completion: Completion) -> None:
    bound = completion.usage.bound
    assert isinstance(bound, BoundInForce)
    assert bound == (bound.max_divergence, bound.delta, bound.level, bound.num_pairs) == (0.02, 1 - 0.95, None, 0)
    assert bound.confidence == pytest.approx(0.95)
    assert ReusePolicy.exact().bound is None


def test_chunks_and_explanations_as_json(engine: Engine) -> None:
    chunks = [chunk.to_dict() for chunk in engine.submit(some_tokens(9), max_new_tokens=4, ignore_eos=True)]
    names = ("choice", "text", "token_ids", "logprobs", "finish_reason", "text_offsets", "end_logprob")
    assert {tuple(chunk) for chunk in chunks} == {names}
    assert chunks[-1]["finish_reason"] == "length"
    explanation = engine.explain(some_tokens(9))
    value = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
    assert list(value) == ["plan", "share", "predicted", "prefill_s", "cold_s"]
    assert [span["kind"] for span in value["plan"]["spans"]] == ["exact", "compute"]
    assert pickle.loads(pickle.dumps(explanation)) == explanation
    assert repr(explanation).startswith("Explanation(8 exact + 0 aligned + 1 computed, ")


def test_results_at_a_glance(completion: Completion) -> None:
    for result in (completion, completion.usage, *completion.choices):
        assert len(repr(result)) < LINE
        assert "\n" not in repr(result)
    assert repr(completion).endswith(
        f" and 1 more, length, 20 prompt, 12 generated tokens, {completion.usage.total_s:.3g} s)"
    )
    assert "20 prompt = " in repr(completion.usage)
    assert " computed (" in repr(completion.usage)
    assert "bound 0.02 at 0.95" in repr(completion.usage)
    assert repr(completion.choices[1]).startswith("Choice(1: ")
    assert "6 tokens, length" in repr(completion.choices[1])


def test_a_segment_at_a_glance() -> None:
    segment = Segment(tuple(range(1000)), "document")
    assert repr(segment) == "Segment('document', 1000 tokens: 0, 1, 2, 3, 4, 5, 6, 7, ...)"
    assert repr(Segment((3,))) == "Segment(None, 1 tokens: 3)"
    assert pickle.loads(pickle.dumps(segment)) == segment
    assert segment.to_dict() == {"token_ids": list(range(1000)), "name": "document"}


def test_an_engine_at_a_glance(shared_model: TinyModel) -> None:
    engine = Engine(shared_model.model, shared_model.tokenizer, config=SMALL)
    start = "Engine(LlamaForCausalLM, float32, cpu, 256 pages of 4, "
    try:
        assert repr(engine) == f"{start}0 contexts, 0 requests, running)"
        with engine.context(some_tokens(5)) as context, context.fork(), engine.lock:
            handle = engine.submit(some_tokens(9), max_new_tokens=5)
            assert repr(engine) == f"{start}2 contexts, 1 requests, running)"
            assert repr(handle) == f"RequestHandle({handle.request_id}, in flight, 0 chunks so far)"
        handle.result(PATIENCE_S)
    finally:
        engine.close()
    assert repr(engine) == f"{start}0 contexts, 0 requests, closed)"


def test_looking_at_an_engine_waits_for_nobody(engine: Engine) -> None:
    """Somebody else holds its lock, as a debugger finds it."""
    is_held, go_on, seen = threading.Event(), threading.Event(), list[str]()

    def hold() -> None:
        with engine.lock:
            is_held.set()
            assert go_on.wait(PATIENCE_S)

    with engine.context(some_tokens(5)) as context, threads(hold):
        try:
            assert is_held.wait(PATIENCE_S)
            seen += [repr(engine), repr(context)]
        finally:
            go_on.set()
    assert len(seen) == 2


def test_a_context_at_a_glance(engine: Engine) -> None:
    context = engine.context(some_tokens(5), name="planner " * 20)
    assert repr(context) == f"Context({('planner ' * 20)[:39] + '…'!r}, 5 tokens, exact, ready)"
    with engine.lock:
        handle = context.submit(max_new_tokens=2, ignore_eos=True)
        assert repr(context).endswith("5 tokens, exact, busy)")
    handle.result(PATIENCE_S)
    assert repr(context).endswith("7 tokens, exact, ready)")
    context.release()
    assert repr(context).endswith(", released)")
    nameless: Context = engine.context([5])
    assert repr(nameless) == "Context(1 tokens, exact, ready)"


def test_a_handle_at_a_glance(engine: Engine) -> None:
    handle = engine.submit(some_tokens(9), max_new_tokens=2, ignore_eos=True)
    completion = handle.result(PATIENCE_S)
    assert repr(handle) == f"RequestHandle({handle.request_id}, {completion!r})"
    with engine.lock:
        cancelled = engine.submit(some_tokens(9), max_new_tokens=2)
        cancelled.cancel()
    assert cancelled.wait(PATIENCE_S)
    assert repr(cancelled) == f"RequestHandle({cancelled.request_id}, ended by RequestCancelled)"
