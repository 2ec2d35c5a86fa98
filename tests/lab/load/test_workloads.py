"""Shapes of workloads: who shares what with whom; and what a run's figures are."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest

from kvcomm.errors import InvalidRequest
from kvcomm.lab.load.client import Sample
from kvcomm.lab.load.summary import summarise
from kvcomm.lab.load.trace_file import Trace, TraceRequest
from kvcomm.lab.load.workloads import Session, WorkloadSizes, arriving, fan_out, multi_turn, replayed, shared_prefix

SHAPE = WorkloadSizes(
    num_requests=10, prefix_len=20, input_len=5, output_len=7, num_prefixes=2, turns=3, branches=4, seed=1
)


def texts(session: Session) -> list[str]:
    return [turn.text for stage in session.stages for turn in stage]


def test_shared_prefix() -> None:
    sessions = list(shared_prefix(SHAPE))
    assert [session.num_requests for session in sessions] == [1] * 10
    prefixes = [session.system for session in sessions]
    assert prefixes == prefixes[:2] * 5
    assert {len(str(prefix).split()) for prefix in prefixes} == {20}
    tails = [text for session in sessions for text in texts(session)]
    assert len(set(tails)) == 10
    assert {len(tail.split()) for tail in tails} == {5}
    assert list(shared_prefix(SHAPE)) == sessions
    assert list(shared_prefix(replace(SHAPE, seed=2))) != sessions


def test_whole_sessions() -> None:
    talks, fans = list(multi_turn(SHAPE)), list(fan_out(SHAPE))
    assert [[len(stage) for stage in session.stages] for session in talks] == [[1, 1, 1]] * 3
    assert [[len(stage) for stage in session.stages] for session in fans] == [[1, 4]] * 2
    assert fans[0].system != fans[1].system
    for make in (multi_turn, fan_out):
        with pytest.raises(InvalidRequest, match="2 requests are too few for one session"):
            list(make(replace(SHAPE, num_requests=2)))


def trace(kind: str, requests: list[tuple[int, float, list[int], int | None]]) -> Trace:
    made = tuple(TraceRequest(at, when, np.array(blocks, dtype=np.int32), out) for at, when, blocks, out in requests)
    return Trace(kind, 512, 2, made, "")


def test_a_trace_keeps_its_shape() -> None:
    lines = [
        (0, 3.0, [1, 2, 3], 2),
        (1, 4.0, [1, 2], 100),
        (0, 5.0, [1, 2, 9], None),
        (0, 6.0, [1], 2),
        (0, 7.0, [1], 2),
    ]
    first, second = replayed(trace("agentic", lines), SHAPE, block_len=4, max_input_len=8, slowdown=None)
    one, other, short = (text.split() for text in texts(first))  # of a session so many turns at most
    assert (len(one), len(other), len(short)) == (8, 8, 4)  # every second block
    assert one[:4] == other[:4] == short
    assert one[4:] != other[4:]
    assert texts(second)[0] != texts(first)[0]  # blocks are a session's own
    assert [turn.max_tokens for session in (first, second) for (turn,) in session.stages] == [2, 7, 2, 7]
    assert {turn.at_s for session in (first, second) for (turn,) in session.stages} == {0.0}


def test_as_many_requests_of_a_trace_as_wanted() -> None:
    lines = [(session, float(at), [at], 1) for at in range(4) for session in range(4)]
    shape = replace(SHAPE, num_requests=7)
    for kind, expected in (("agentic", [3, 3, 1]), ("mooncake", [1] * 7)):
        sessions = replayed(trace(kind, lines), shape, block_len=1, max_input_len=9, slowdown=None)
        assert [session.num_requests for session in sessions] == expected


def test_a_trace_keeps_its_times_and_requests_of_nobody_are_alone() -> None:
    lines = [(0, 3.0, [1], 2), (0, 4.0, [1, 2], 2), (0, 8.0, [], 2)]
    sessions = list(replayed(trace("mooncake", lines), SHAPE, block_len=4, max_input_len=99, slowdown=0.5))
    assert [turn.at_s for session in sessions for (turn,) in session.stages] == [0.0, 0.5, 2.5]
    assert texts(sessions[1])[0].startswith(texts(sessions[0])[0])


def test_arrivals() -> None:
    sessions = list(arriving(shared_prefix(replace(SHAPE, num_requests=400)), rate=4.0, seed=0))
    times = [session.stages[0][0].at_s for session in sessions]
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] / 399 == pytest.approx(0.25, rel=0.2)


def sample(events_s: tuple[float, ...], error: str | None = None, tokens: int | None = None) -> Sample:
    details = {"cached_tokens": 3}
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "prompt_tokens_details": details} if tokens else {}
    return Sample(0.0, events_s, 1.0, "text", usage, error)


def test_figures() -> None:
    samples = [sample((0.1, 0.3, 0.4), tokens=5), sample((0.3,), tokens=1), sample((9.0,), error="500: no")]
    values = {figure.id: figure.value for figure in summarise(samples, duration_s=2.0)}
    assert (values["completed"], values["failed"], values["total_cached_tokens"]) == (2, 1, 6)
    assert (values["request_throughput"], values["output_throughput"], values["total_token_throughput"]) == (1, 3, 13)
    assert values["mean_ttft_ms"] == pytest.approx(200)
    assert values["p99_ttft_ms"] == pytest.approx(298)
    assert values["mean_tpot_ms"] == pytest.approx(75)  # 0.3 s for the four tokens behind the first
    assert values["median_itl_ms"] == pytest.approx(1e3 * statistics.median([0.2, 0.1]))
    assert values["mean_e2el_ms"] == 1000


def test_nothing_has_worked() -> None:
    values = {figure.id: figure.value for figure in summarise([sample((), error="no")], duration_s=1.0)}
    assert (values["completed"], values["failed"], values["output_throughput"]) == (0, 1, 0)
    assert "mean_ttft_ms" not in values
