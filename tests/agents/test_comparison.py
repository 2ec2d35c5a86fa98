"""The ways of a comparison: whose turn it is, and what goes on meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from kvcomm.agents.comparison import Comparison, Way, in_turns
from kvcomm.agents.group import KVCommAgentGroup
from kvcomm.agents.results import GroupResult
from kvcomm.engine.engine import Engine
from kvcomm.engine.spare import Spare
from kvcomm.errors import InvalidRequest
from tests.agents.teams import LOOSE, TEAM, inputs
from tests.engine.conftest import ROWS_ONLY
from tests.tiny import tiny_model


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Warm: it moves text."""
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        engine.reuse.parts.cost.model = ROWS_ONLY
        TEAM.group(engine, policy=LOOSE).warm(inputs(6))
        yield engine
        engine.check_integrity()


def run(group: KVCommAgentGroup, given: Mapping[str, str], index: int, way: Way) -> GroupResult:
    return group.run(**given)


def test_ways_take_turns_and_nobody_is_timed_beside_audits(engine: Engine) -> None:
    calls: list[tuple[int, Way]] = []

    def watched_run(group: KVCommAgentGroup, given: Mapping[str, str], index: int, way: Way) -> GroupResult:
        calls.append((index, way))
        assert given == inputs(4, "y")[index]
        assert not engine.reuse.parts.idle.jobs
        assert (group.engine is engine) == (way in (Way.MOVED, Way.HEALED))
        return run(group, given, index, way)

    comparison = Comparison(engine, TEAM)
    for results in in_turns(engine, TEAM, inputs(4, "y"), LOOSE, watched_run):
        comparison.add(results)
    ways = [*Way]
    assert [way for _, way in calls] == [way for first in range(4) for way in ways[first:] + ways[:first]]
    assert [index for index, _ in calls] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    for agent in comparison.agents[1:]:
        assert len(agent.rungs) == len(agent.audited) == 4


def test_each_way_reuses_what_it_may(engine: Engine) -> None:
    for results in in_turns(engine, TEAM, inputs(2, "y"), LOOSE, run):
        for name in results[Way.DENSE]:
            dense, exact, along, moved, healed = (results[way][name] for way in Way)
            assert dense.usage.computed_tokens == dense.usage.prompt_tokens
            assert exact.usage.exact_tokens > 0 == exact.usage.aligned_tokens
            assert (moved.usage.aligned_tokens > 0) == (healed.usage.aligned_tokens > 0) == (name != "first")
            assert (healed.usage.healed_after is not None) == (name != "first")
            assert exact.usage.read_along_tokens == moved.usage.read_along_tokens == 0
            assert (dense.prompt, dense.token_ids) == (exact.prompt, exact.token_ids) == (along.prompt, along.token_ids)


def test_what_is_read_along_is_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where answers leave time for all of it, agents who wait compute nearly all of their prompts meanwhile."""
    monkeypatch.setattr(Spare, "num_rows", lambda *_: 96)
    comparison = Comparison(engine, TEAM)
    for results in in_turns(engine, TEAM, inputs(2, "y"), LOOSE, run):
        comparison.add(results)
    first, *others = comparison.agents
    assert first.read == [0, 0]
    for agent in others:
        assert len(agent.along_s) == 2
        assert min(agent.read) > 0


def test_text_was_moved_before_anything_is_timed_and_that_is_not_audited(engine: Engine) -> None:
    before = {standing.reader.digest: standing.num_audited for standing in engine.reuse.readers()}
    ways = in_turns(engine, TEAM, inputs(1, "y"), LOOSE, run)
    next(ways)
    after = {standing.reader.digest: standing for standing in engine.reuse.readers()}
    counts = [(each.num_approximated, each.num_audited - before[digest]) for digest, each in after.items()]
    assert counts == [(3, 1), (3, 1)]  # of second and third; the first one of each and what is healed have no audit
    ways.close()


def test_no_inputs(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="there are no inputs to compare on"):
        next(in_turns(engine, TEAM, [], LOOSE, run))
