"""Open prompts: the same answers as those of prompts that were complete from the beginning, whatever was read when."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.engine.open_prompt import OpenPrompt
from kvcomm.engine.spare import Spare
from kvcomm.errors import (
    ContextBusy,
    EmptyPrompt,
    EngineClosed,
    InvalidRequest,
    PromptTooLong,
    QuotaExceeded,
    RequestCancelled,
    SourceFailed,
)
from kvcomm.memory.segments import Segment
from tests.engine.conftest import SMALL, greedy, some_tokens
from tests.limits import PATIENCE_S, wait_for
from tests.tiny import TinyModel

ROLE, QUESTION, TAIL = some_tokens(21, 1), some_tokens(30, 2), some_tokens(6, 3)


@pytest.fixture(autouse=True)
def settled(engine: Engine) -> Iterator[None]:
    """What is cancelled while a pass writes into it ends behind that pass."""
    yield
    wait_for(lambda: not engine.scheduler.has_work)


def read(opened: OpenPrompt) -> OpenPrompt:
    """Wait until all that is known of a prompt has been read."""
    wait_for(lambda: opened.num_read == opened.num_tokens)
    return opened


def test_what_is_known_is_read_before_the_prompt_is_complete(engine: Engine, shared_model: TinyModel) -> None:
    opened = read(engine.open_prompt(ROLE))
    assert opened.num_read == len(ROLE)
    read(opened.append(QUESTION))
    answer = opened.append(TAIL).close(max_new_tokens=8).result()
    assert list(answer.token_ids) == greedy(shared_model.model, [*ROLE, *QUESTION, *TAIL], 8)
    assert answer.usage.read_along_tokens == len(ROLE) + len(QUESTION)
    assert answer.usage.computed_tokens == answer.usage.prompt_tokens == len(ROLE) + len(QUESTION) + len(TAIL)
    assert answer.usage.reasons == {"read_along": len(ROLE) + len(QUESTION), "new": len(TAIL)}


def test_an_answer_is_read_while_it_is_written(engine: Engine, shared_model: TinyModel) -> None:
    solver = engine.submit(QUESTION, max_new_tokens=24)
    critic = engine.open_prompt(ROLE).follow(solver, name="solver").append(TAIL).close(max_new_tokens=8)
    solved = solver.result().token_ids
    answer = critic.result()
    assert list(answer.token_ids) == greedy(shared_model.model, [*ROLE, *solved, *TAIL], 8)
    assert answer.usage.prompt_tokens == len(ROLE) + len(solved) + len(TAIL)


def test_answers_of_prompts_that_are_still_open_are_followed(engine: Engine, shared_model: TinyModel) -> None:
    """A chain whose prompts are all opened, and closed, before anything has run."""
    with engine.held():
        first = engine.open_prompt(QUESTION)
        second = engine.open_prompt(ROLE).follow(first, name="first")
        third = engine.open_prompt(TAIL).follow(second, name="second").follow(first, name="first")
        handles = [opened.close(max_new_tokens=6) for opened in (third, second, first)]
    answers = [handle.result().token_ids for handle in handles]
    assert list(answers[2]) == greedy(shared_model.model, QUESTION, 6)
    assert list(answers[1]) == greedy(shared_model.model, [*ROLE, *answers[2]], 6)
    assert list(answers[0]) == greedy(shared_model.model, [*TAIL, *answers[1], *answers[2]], 6)


def test_what_a_stop_string_cuts_is_taken_back(engine: Engine, shared_model: TinyModel) -> None:
    whole = engine.generate(QUESTION, max_new_tokens=24)
    stop = whole.text[9:12]
    solver = engine.submit(QUESTION, max_new_tokens=24, stop=(stop,))
    critic = engine.open_prompt(ROLE).follow(solver).append(TAIL).close(max_new_tokens=8)
    cut = solver.result()
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)
    assert list(critic.result().token_ids) == greedy(shared_model.model, [*ROLE, *cut.token_ids, *TAIL], 8)


def test_a_prompt_cannot_follow_the_request_of_one_that_waits_for_it(engine: Engine) -> None:
    """Bug: by its handle it could, and both waited until their deadline."""
    first, second, third = (engine.open_prompt(some_tokens(5, seed=seed)) for seed in (1, 2, 3))
    waiting = second.follow(first).close(max_new_tokens=2)
    with pytest.raises(InvalidRequest, match="nor one that waits for it"):
        first.follow(waiting)
    last = third.follow(waiting).close(max_new_tokens=2)
    with pytest.raises(InvalidRequest, match="nor one that waits for it"):
        first.follow(last)
    first.close(max_new_tokens=2, ignore_eos=True)
    assert last.result(PATIENCE_S).usage.prompt_tokens == 5 + 2


def test_only_what_is_kept_of_an_answer_is_passed_on(engine: Engine, shared_model: TinyModel) -> None:
    solver = engine.submit(QUESTION, max_new_tokens=12)
    opened = engine.open_prompt(ROLE).follow(solver, keep=lambda token_ids: token_ids[:5])
    kept = solver.result().token_ids[:5]
    assert list(opened.close(max_new_tokens=4).result().token_ids) == greedy(shared_model.model, [*ROLE, *kept], 4)


def test_an_answer_that_has_ended_already_is_text_like_any_other(engine: Engine, shared_model: TinyModel) -> None:
    solver = engine.submit(QUESTION, max_new_tokens=5)
    solved = solver.result().token_ids
    opened = read(engine.open_prompt(ROLE).follow(solver))
    answer = opened.close(max_new_tokens=4).result()
    assert list(answer.token_ids) == greedy(shared_model.model, [*ROLE, *solved], 4)
    assert answer.usage.read_along_tokens == len(ROLE) + len(solved) - 1  # the last one's logits are needed


@pytest.mark.parametrize(("chunk", "is_read"), [(16, True), (48, False)])
def test_what_has_fallen_behind_waits_for_a_chunk_that_is_worth_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, chunk: int, is_read: bool
) -> None:
    beside: list[int] = []
    passed = Spare.passed

    def watched(spare: Spare, answers: int, prompts: int, others: int, *args: Any, **settings: Any) -> None:
        beside.append(others if answers else 0)
        passed(spare, answers, prompts, others, *args, **settings)

    monkeypatch.setattr(Spare, "passed", watched)
    monkeypatch.setattr(Spare, "num_rows", lambda *_: 20)
    monkeypatch.setattr(Spare, "chunk", property(lambda _: chunk))
    with engine.held():
        solver = engine.submit(QUESTION, max_new_tokens=24, ignore_eos=True)
        readers = [engine.open_prompt(some_tokens(60, seed)).follow(solver) for seed in (5, 6)]
    solver.result()
    assert (sum(beside) > 0) == is_read
    assert max(beside) <= 20
    for reader in readers:
        reader.cancel()


def test_an_empty_answer_is_read_as_nothing(engine: Engine, shared_model: TinyModel) -> None:
    solver = engine.submit(QUESTION, max_new_tokens=0)
    answer = engine.open_prompt(ROLE).follow(solver).close(max_new_tokens=4).result()
    assert list(answer.token_ids) == greedy(shared_model.model, ROLE, 4)


def test_the_caller_may_know_better_what_the_prompt_has_become(engine: Engine, shared_model: TinyModel) -> None:
    opened = read(engine.open_prompt([*ROLE, *QUESTION]))
    other = [*ROLE, *some_tokens(9, 7)]
    answer = opened.close(max_new_tokens=6, prompt=other).result()
    assert list(answer.token_ids) == greedy(shared_model.model, other, 6)
    assert answer.usage.read_along_tokens == len(ROLE)


def test_a_prompt_given_when_it_is_closed_waits_for_nobody(engine: Engine) -> None:
    with engine.held():
        solver = engine.submit(QUESTION, max_new_tokens=4)
        opened = engine.open_prompt(ROLE).follow(solver)
        handle = opened.close(max_new_tokens=4, prompt=ROLE)
        assert engine.scheduler.num_waiting == 2
    handle.result()


def test_final_text_enters_the_cache_and_no_other(engine: Engine) -> None:
    with engine.held():
        solver = engine.submit(QUESTION, max_new_tokens=16)
        opened = engine.open_prompt(ROLE).follow(solver)
    solved = solver.result().token_ids
    read(opened)
    whole = [*ROLE, *solved]
    assert engine.cache.num_cached(whole) == len(whole) // SMALL.page_size * SMALL.page_size
    opened.cancel()
    wait_for(lambda: not engine.scheduler.read_along.readings)


def test_prompts_that_begin_alike_are_read_once(engine: Engine) -> None:
    with engine.held():
        first, second = (engine.open_prompt(ROLE).append([*QUESTION, each]) for each in (11, 12))
    read(first)
    read(second)
    passes = [each.close(max_new_tokens=1).result().usage for each in (first, second)]
    num_shared = (len(ROLE) + len(QUESTION)) // SMALL.page_size * SMALL.page_size
    assert sorted(usage.exact_tokens for usage in passes)[-1] >= num_shared


def test_behind_a_context(engine: Engine, shared_model: TinyModel) -> None:
    with engine.context(ROLE) as context:
        solver = engine.submit(QUESTION, max_new_tokens=10)
        opened = context.follow(solver, name="solver").append(TAIL)
        solved = solver.result().token_ids
        answer = opened.close(max_new_tokens=6).result()
        whole = [*ROLE, *solved, *TAIL]
        assert list(answer.token_ids) == greedy(shared_model.model, whole, 6)
        assert list(context.tokens) == [*whole, *answer.token_ids]
        assert [segment.name for segment in context.segments] == [None, "solver", None, "answer"]


def test_a_context_that_went_on_meanwhile_is_read_from_where_it_stands(engine: Engine, shared_model: TinyModel) -> None:
    with engine.context(ROLE) as context:
        solver = engine.submit(QUESTION, max_new_tokens=4)
        opened = context.follow(solver)
        solved = solver.result().token_ids
        context.extend(TAIL)
        answer = opened.close(max_new_tokens=6).result()
        assert list(answer.token_ids) == greedy(shared_model.model, [*ROLE, *TAIL, *solved], 6)


def test_a_context_that_is_busy_when_its_turn_comes_says_so(engine: Engine) -> None:
    with engine.context(ROLE) as context:
        solver = engine.submit(QUESTION, max_new_tokens=4)
        opened = context.follow(solver)
        solver.result()
        with engine.held():
            other = context.submit(max_new_tokens=4)
            with pytest.raises(ContextBusy):
                opened.close(max_new_tokens=2)
        other.result()
        with pytest.raises(InvalidRequest, match="closed"):
            opened.append(TAIL)


class TestBadInput:
    def test_itself(self, engine: Engine) -> None:
        with engine.open_prompt(ROLE) as opened, pytest.raises(InvalidRequest, match="cannot follow itself"):
            opened.follow(opened)

    def test_a_circle(self, engine: Engine) -> None:
        with engine.open_prompt(ROLE) as first, engine.open_prompt(ROLE) as second, engine.open_prompt(ROLE) as third:
            second.follow(first)
            third.follow(second)
            with pytest.raises(InvalidRequest, match="nor one that waits for it"):
                first.follow(third)

    def test_another_tenants_request_is_no_request(self, engine: Engine) -> None:
        theirs = engine.submit(QUESTION, max_new_tokens=2, tenant="other")
        with engine.open_prompt(ROLE) as opened:
            with pytest.raises(InvalidRequest, match="there is no request"):
                opened.follow(theirs)
            with engine.open_prompt(ROLE, tenant="other") as other, pytest.raises(InvalidRequest, match="no such"):
                opened.follow(other)
        theirs.result()

    def test_a_request_of_another_engine(self, engine: Engine, shared_model: TinyModel) -> None:
        with Engine(shared_model.model, shared_model.tokenizer, config=SMALL) as other:
            theirs = other.submit(QUESTION, max_new_tokens=2)
            with engine.open_prompt(ROLE) as opened, pytest.raises(InvalidRequest, match="none of this engine's"):
                opened.follow(theirs)
            theirs.result()

    def test_a_prompt_of_another_engine(self, engine: Engine, shared_model: TinyModel) -> None:
        with (
            Engine(shared_model.model, shared_model.tokenizer, config=SMALL) as other,
            other.open_prompt(QUESTION) as theirs,
            engine.open_prompt(ROLE) as opened,
            pytest.raises(InvalidRequest, match="another engine"),
        ):
            opened.follow(theirs)

    @pytest.mark.parametrize("kept", ["text", 7, [1.5], [-1], [2**40], ["1"]])
    def test_a_keep_that_gives_no_ids_ends_its_own_prompt_alone(self, engine: Engine, kept: Any) -> None:
        with engine.held():
            solver = engine.submit(QUESTION, max_new_tokens=4)
            reader = engine.open_prompt(ROLE).follow(solver, keep=lambda _: kept).close(max_new_tokens=2)
        with pytest.raises(SourceFailed):
            reader.result()
        assert len(solver.result().token_ids) == 4
        assert engine.generate(TAIL, max_new_tokens=1).token_ids

    def test_a_deadline_that_never_comes(self, engine: Engine, shared_model: TinyModel) -> None:
        opened = read(engine.open_prompt(ROLE, deadline_s=float("inf")))
        engine.generate(TAIL, max_new_tokens=1)
        answer = opened.close(max_new_tokens=4).result()
        assert list(answer.token_ids) == greedy(shared_model.model, ROLE, 4)

    def test_what_is_no_request(self, engine: Engine) -> None:
        with engine.open_prompt(ROLE) as opened, pytest.raises(InvalidRequest, match="follow a RequestHandle"):
            opened.follow("solver")  # type: ignore[arg-type]

    def test_a_closed_prompt_takes_no_more(self, engine: Engine) -> None:
        opened = engine.open_prompt(ROLE)
        handle = opened.close(max_new_tokens=2)
        for change in (lambda: opened.append(TAIL), lambda: opened.follow(handle), lambda: opened.close()):
            with pytest.raises(InvalidRequest, match="closed"):
                change()
        handle.result()

    def test_nothing_at_all(self, engine: Engine) -> None:
        with engine.open_prompt() as opened, pytest.raises(InvalidRequest, match="holds nothing"):
            opened.close()

    @pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), "soon"])
    def test_a_deadline_that_is_none(self, engine: Engine, deadline_s: float) -> None:
        with pytest.raises(InvalidRequest, match="deadline_s"):
            engine.open_prompt(ROLE, deadline_s=deadline_s)

    def test_what_cannot_be_opened_holds_nothing(self, engine: Engine) -> None:
        solver = engine.submit(QUESTION, max_new_tokens=2)
        with engine.context(ROLE) as context:
            with pytest.raises(InvalidRequest, match="deadline_s"):
                context.follow(solver, deadline_s=-1)
            with pytest.raises(InvalidRequest, match="follow a RequestHandle"):
                context.follow("solver")  # type: ignore[arg-type]
            with pytest.raises(EmptyPrompt):
                engine.open_prompt([])
            solver.result()
            assert not engine.scheduler.read_along.readings
            engine.check_integrity()

    def test_a_prompt_that_grows_too_long(self, engine: Engine) -> None:
        with engine.held():  # nothing is written before it is followed
            solver = engine.submit(QUESTION, max_new_tokens=4)
            opened = engine.open_prompt(some_tokens(engine.max_context - 1)).follow(solver)
            handle = opened.close(max_new_tokens=1)
        with pytest.raises(PromptTooLong, match="limit"):
            handle.result()
        solver.result()

    def test_what_is_too_long_when_it_is_followed(self, engine: Engine) -> None:
        solver = engine.submit(QUESTION, max_new_tokens=4)
        solver.result()
        opened = engine.open_prompt(some_tokens(engine.max_context - 1))
        with pytest.raises(PromptTooLong, match="limit"):
            opened.follow(solver)
        with pytest.raises(PromptTooLong, match="limit"):
            opened.close(max_new_tokens=1)
        wait_for(lambda: not engine.scheduler.read_along.readings)

    def test_an_answer_that_would_be_too_long(self, engine: Engine) -> None:
        opened = engine.open_prompt(ROLE)
        with pytest.raises(PromptTooLong):
            opened.close(max_new_tokens=engine.max_context)
        wait_for(lambda: not engine.scheduler.read_along.readings)

    def test_a_closed_engine(self, shared_model: TinyModel) -> None:
        with Engine(shared_model.model, shared_model.tokenizer, config=SMALL) as engine:
            opened = engine.open_prompt(ROLE)
        with pytest.raises(EngineClosed):
            opened.append(TAIL)
        with pytest.raises(EngineClosed):
            engine.open_prompt(ROLE)
        assert engine.cache.stats().num_in_requests == 0


class TestEnds:
    def test_a_source_that_is_cancelled(self, engine: Engine) -> None:
        with engine.held():
            solver = engine.submit(QUESTION, max_new_tokens=100)
            critic = engine.open_prompt(ROLE).follow(solver, name="solver").close(max_new_tokens=2)
            solver.cancel()
        with pytest.raises(SourceFailed, match="'solver'") as caught:
            critic.result()
        assert isinstance(caught.value.__cause__, RequestCancelled)

    def test_a_source_that_is_given_up_before_it_was_closed(self, engine: Engine) -> None:
        first = engine.open_prompt(QUESTION)
        second = engine.open_prompt(ROLE).follow(first)
        third = engine.open_prompt(ROLE).follow(second).close(max_new_tokens=2)
        handle = second.close(max_new_tokens=2)
        first.cancel()
        for each in (handle, third):
            with pytest.raises(SourceFailed):
                each.result()

    def test_one_that_an_idle_engine_has_forgotten(self, engine: Engine) -> None:
        opened = read(engine.open_prompt(ROLE))
        assert engine.wait_idle(PATIENCE_S)
        del opened
        gc.collect()
        engine.cache.clear()
        assert engine.cache.stats().num_free == engine.pool.num_pages

    def test_a_reader_that_is_cancelled(self, engine: Engine) -> None:
        with engine.held():
            solver = engine.submit(QUESTION, max_new_tokens=30)
            handle = engine.open_prompt(ROLE).follow(solver).close(max_new_tokens=2)
            handle.cancel()
        with pytest.raises(RequestCancelled):
            handle.result()
        assert len(solver.result().token_ids) == 30

    def test_a_reader_that_is_cancelled_once_it_runs(self, engine: Engine) -> None:
        handle = engine.open_prompt(ROLE).close(max_new_tokens=400)
        for _ in handle:
            break  # which cancels it
        with pytest.raises(RequestCancelled):
            handle.result()

    def test_a_source_that_never_ends(self, engine: Engine) -> None:
        never = engine.open_prompt(QUESTION)  # which nobody closes
        with engine.held():  # however long it takes to close it, it is closed before it is due
            handle = engine.open_prompt(ROLE, deadline_s=0.01).follow(never, name="never").close(max_new_tokens=2)
        with pytest.raises(SourceFailed, match="'never' has not ended"):
            handle.result(PATIENCE_S)
        never.cancel()
        wait_for(lambda: not engine.scheduler.has_work)

    def test_a_prompt_that_nobody_closes(self, engine: Engine) -> None:
        opened = engine.open_prompt(ROLE, deadline_s=0.01)
        wait_for(lambda: not engine.scheduler.read_along.readings)
        with pytest.raises(SourceFailed, match="was not closed"):
            opened.append(TAIL)

    def test_a_prompt_that_its_user_forgets(self, engine: Engine) -> None:
        read(engine.open_prompt(ROLE))
        gc.collect()
        engine.generate(TAIL, max_new_tokens=1)
        assert not engine.scheduler.read_along.readings


def test_an_open_prompt_that_has_failed_holds_nothing_of_its_caller(engine: Engine) -> None:
    """Its error is kept, and the frames in which it was raised are not."""

    class Mine:
        pass

    with engine.held():
        solver = engine.submit(QUESTION, max_new_tokens=100)
        solver.cancel()
    with pytest.raises(RequestCancelled):
        solver.result()
    opened = engine.open_prompt(ROLE)

    def fails() -> weakref.ref[Mine]:
        mine = Mine()
        for attempt in (lambda: opened.follow(solver), lambda: opened.append(TAIL)):
            with pytest.raises(SourceFailed):
                attempt()
        return weakref.ref(mine)

    found = fails()
    gc.collect()
    assert found() is None
    wait_for(lambda: not engine.scheduler.has_work)


def test_an_open_prompt_that_the_error_of_its_source_knows_is_collected(engine: Engine) -> None:
    """Bug: frames of that error knew a prompt that was never closed, whose finalizer knew the error: both stayed."""

    def forgets() -> None:
        context = engine.context(ROLE)
        with engine.held():
            solver = engine.submit(QUESTION, max_new_tokens=100)
            opened = context.follow(solver)
            solver.cancel()
        with pytest.raises(RequestCancelled):
            solver.result()
        wait_for(lambda: not engine.scheduler.has_work)
        assert opened.num_tokens

    forgets()
    gc.collect()
    engine.cache.clear()
    stats = engine.cache.stats()
    assert (stats.num_in_contexts, stats.num_free) == (0, stats.num_pages)


def test_an_engine_is_not_idle_while_it_reads_for_a_user_who_has_forgotten(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is cleared meanwhile is cached again behind the back of whoever cleared it."""
    opened = [engine.open_prompt()]
    seen: list[bool] = []
    forward = engine.runner.forward

    def forgetful(*args: Any, **settings: Any) -> Any:
        opened.clear()
        gc.collect()
        seen.append(engine.wait_idle(0.0))
        return forward(*args, **settings)

    monkeypatch.setattr(engine.runner, "forward", forgetful)
    reader = opened[0]
    reader.append(ROLE)
    del reader
    wait_for(lambda: not engine.scheduler.read_along.readings or seen)
    assert not any(seen)
    engine.cache.stats()  # which gives back what was forgotten
    wait_for(lambda: not engine.scheduler.has_work)


@pytest.fixture
def crowded(shared_model: TinyModel) -> Iterator[Engine]:
    """An engine whose pool holds little more than one request."""
    config = EngineConfig(page_size=4, pool_tokens=160, max_batch_tokens=48, prefill_chunk=8)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as made:
        yield made
        made.check_integrity()
        made.cache.clear()
        assert made.cache.stats().num_free == made.pool.num_pages


def test_requests_take_the_pages_of_open_prompts(crowded: Engine, shared_model: TinyModel) -> None:
    opened = read(crowded.open_prompt(some_tokens(100, 5)))
    other = crowded.generate(some_tokens(120, 6), max_new_tokens=20)
    assert list(other.token_ids) == greedy(shared_model.model, some_tokens(120, 6), 20)
    answer = opened.close(max_new_tokens=4).result()
    assert list(answer.token_ids) == greedy(shared_model.model, some_tokens(100, 5), 4)


def test_open_prompts_keep_to_the_tenants_quota(engine: Engine) -> None:
    engine.cache.set_quota(held_tokens=40)
    opened = engine.open_prompt(some_tokens(100, 5))
    engine.generate(TAIL, max_new_tokens=1)
    assert opened.num_read <= 40
    with pytest.raises(QuotaExceeded):
        opened.close(max_new_tokens=4)
    engine.cache.set_quota()


def test_a_segment_without_text_keeps_its_place(engine: Engine) -> None:
    solver = engine.submit(QUESTION, max_new_tokens=0)
    with engine.context(ROLE) as context:
        context.follow(solver, name="solver").append(TAIL).close(max_new_tokens=1).result()
        assert Segment((), "solver") in context.segments
