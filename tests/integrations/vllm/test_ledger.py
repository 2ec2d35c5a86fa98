"""The ledger: single paths by hand, and all orders of events against a plain model of what must hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcomm.integrations.vllm.ledger import Ledger
from kvcomm.integrations.vllm.messages import Load, Prepare, Prepared, Release, Save
from kvcomm.integrations.vllm.params import RequestParams

PROMPT = tuple(range(100))


def test_what_is_prepared_is_loaded_and_dropped() -> None:
    ledger = Ledger()
    ledger.add("r", PROMPT, RequestParams(answer="critic"), moves=True, reads=False, saves=True)
    assert ledger.take_jobs() == [Prepare("r", PROMPT, RequestParams(answer="critic"), True)]
    assert ledger.num_matched("r", 100, 0) is None
    ledger.took({"r": [Prepared(100, {"aligned_tokens": 80})]})
    assert ledger.num_matched("r", 100, 32) == 67  # the last token is computed: its logits are wanted
    ledger.allocated("r", [5, 6, 7, 8], 32, 67)
    assert ledger.take_jobs() == [Load("r", (5, 6, 7, 8), 32, 99)]
    assert ledger.usage("r") == {"loaded_tokens": 99, "aligned_tokens": 80}
    # Its KV is not exact, so it is not saved.
    assert not ledger.finished("r", (*PROMPT, 7, 8), 101, [5, 6, 7, 8], is_whole=True)
    assert ledger.take_jobs() == [Release("r", (7, 8), "critic")]
    assert ledger.num_requests == 0


def test_after_a_preemption_the_prompt_is_loaded_again() -> None:
    ledger = Ledger()
    ledger.add("r", PROMPT, RequestParams(), moves=True, reads=False, saves=False)
    ledger.took({"r": [Prepared(100)]})
    assert ledger.num_matched("r", 130, 0) == 100
    ledger.allocated("r", [1, 2], 0, 100)
    ledger.take_jobs()
    assert ledger.num_matched("r", 140, 64) == 36
    ledger.allocated("r", [3, 4], 64, 36)
    assert ledger.take_jobs() == [Load("r", (3, 4), 64, 100)]


def test_an_aborted_answer_is_nobodys_source() -> None:
    ledger = Ledger()
    ledger.add("r", PROMPT, RequestParams(answer="a"), moves=True, reads=False, saves=False)
    ledger.take_jobs()
    assert not ledger.finished("r", (*PROMPT, 1), 100, [1], is_whole=False)
    assert ledger.take_jobs() == [Release("r", (), "a")]


def test_exact_tokens_are_saved_behind_those_that_were_there() -> None:
    ledger = Ledger()
    ledger.add("r", PROMPT, RequestParams(), moves=False, reads=True, saves=True)
    ledger.took({"r": [Prepared(64)]})
    ledger.take_jobs()
    assert ledger.finished("r", (*PROMPT, 1, 2), 101, [1, 2, 3], is_whole=False)
    assert ledger.take_jobs()[1:] == [Save("r", (1, 2, 3), (*PROMPT, 1), 64, RequestParams())]


def test_the_slowest_worker_decides() -> None:
    ledger = Ledger(num_workers=2)
    ledger.add("r", PROMPT, RequestParams(), moves=False, reads=True, saves=False)
    ledger.took({"r": [Prepared(64)]})
    assert ledger.num_matched("r", 100, 0) is None
    ledger.took({"r": [Prepared(32)]})
    assert ledger.num_matched("r", 100, 0) == 32


def test_strangers_are_left_alone() -> None:
    ledger = Ledger()
    assert ledger.num_matched("r", 100, 0) == 0
    ledger.allocated("r", [1], 0, 10)
    ledger.took({"r": [Prepared(10)]})
    assert ledger.usage("r") is None
    assert not ledger.finished("r", PROMPT, 100, [1], is_whole=True)
    assert ledger.take_jobs() == []


class LedgerMachine(RuleBasedStateMachine):
    """Requests come, are answered, scheduled, preempted and ended in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.living: dict[str, tuple[int, bool]] = {}  # tokens of the prompt, and whether it moves
        self.ready: dict[str, int] = {}
        self.asked: set[str] = set()
        self.dropped: set[str] = set()
        self.saving: set[str] = set()
        self.num = 0

    @rule(num_tokens=st.integers(1, 50), moves=st.booleans(), reads=st.booleans(), saves=st.booleans())
    def arrive(self, num_tokens: int, moves: bool, reads: bool, saves: bool) -> None:
        name, self.num = f"r{self.num}", self.num + 1
        self.ledger.add(name, range(num_tokens), RequestParams(), moves=moves, reads=reads, saves=saves)
        self.living[name] = (num_tokens, moves)
        if not (moves or reads):
            self.ready[name] = 0

    @rule()
    def step(self) -> None:
        for job in self.ledger.take_jobs():
            if isinstance(job, Prepare):
                assert job.request_id not in self.asked
                self.asked.add(job.request_id)
            elif isinstance(job, Load):
                assert job.request_id in self.living
                assert job.end <= self.ready[job.request_id]
            elif isinstance(job, Release):
                assert job.request_id not in self.living
                self.dropped.add(job.request_id)
            else:
                assert job.request_id in self.saving
                self.saving.discard(job.request_id)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        if name in self.ready:
            return
        most = self.living[name][0] if name in self.living else 10
        num = data.draw(st.integers(0, most))
        self.ledger.took({name: [Prepared(num)]})
        if name in self.living:
            self.ready[name] = num

    @precondition(lambda self: self.living)
    @rule(data=st.data(), num_answered=st.integers(0, 5))
    def schedule(self, data: st.DataObject, num_answered: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.living)))
        num_tokens = self.living[name][0] + num_answered
        num_local = data.draw(st.integers(0, num_tokens - 1))
        matched = self.ledger.num_matched(name, num_tokens, num_local)
        if name not in self.ready:
            assert matched is None
            return
        assert matched == max(0, min(self.ready[name], num_tokens - 1) - num_local)
        self.ledger.allocated(name, [1, 2, 3], num_local, matched)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.living)))
        num_tokens, moves = self.living.pop(name)
        keeps = self.ledger.finished(name, range(num_tokens + 3), num_tokens + 2, [1, 2, 3], is_whole=True)
        assert not (keeps and moves)
        if keeps:
            self.saving.add(name)
        self.ready.pop(name, None)

    @invariant()
    def counts_agree(self) -> None:
        assert self.ledger.num_requests == len(self.living)

    def teardown(self) -> None:
        for name in list(self.living):
            self.ledger.finished(name, range(5), 4, [1], is_whole=False)
        self.living.clear()
        # Whoever was asked is told that the request is over; one that never was is not asked any more.
        dropped = self.dropped | {job.request_id for job in self.ledger.take_jobs() if isinstance(job, Release)}
        assert self.asked <= dropped


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(deadline=None, max_examples=60)
