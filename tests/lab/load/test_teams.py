"""Teams on a real server with a tiny model: who reads whom, both ways, and what a failed request does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest, ServerError
from kvcomm.lab.load.client import Client, Sample
from kvcomm.lab.load.teams import SimulatedAgent, SimulatedTeam, measure_along, run_teams, teams
from kvcomm.lab.load.workloads import WorkloadSizes
from kvcomm.server.settings import ServerSettings
from tests.server.conftest import MODEL
from tests.server.live import Live, serving

SHAPE = WorkloadSizes(
    num_requests=8, prefix_len=6, input_len=3, output_len=5, num_prefixes=1, turns=1, branches=2, seed=3
)
TEAM = SimulatedTeam(
    (
        (SimulatedAgent("plan", "a", 5),),
        (SimulatedAgent("left", "b", 5), SimulatedAgent("right", "c", 5)),
        (SimulatedAgent("sum up", "d", 5),),
    )
)


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    with serving(engine, ServerSettings(model=MODEL, port=0)) as server:
        yield server


class Recording(Client):
    """A client that keeps what it sends."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sent: dict[str, tuple[dict[str, Any], Sample]] = {}

    def send(self, *arguments: Any, **fields: Any) -> Sample:
        sample = super().send(*arguments, **fields)
        self.sent[fields["segments"][0]["content"]] = fields, sample
        return sample


def test_agents_read_the_stage_before_both_ways(live: Live) -> None:
    client = Recording(live.url)
    for is_along in (True, False):
        client.sent.clear()
        run = run_teams(client, [TEAM], concurrency=1, is_along=is_along)
        assert len(run.samples) == TEAM.num_requests
        assert [sample.error for sample in run.samples] == [None] * TEAM.num_requests
        assert run.num_tokens("completion_tokens") == 4 * 5
        read = {name: fields["segments"][1:] for name, (fields, _) in client.sent.items()}
        assert [len(read[name]) for name in ("plan", "left", "right", "sum up")] == [0, 1, 1, 2]
        if not is_along:
            assert read["left"][0]["content"] == client.sent["plan"][1].text
            assert [each["content"] for each in read["sum up"]] == [
                client.sent[name][1].text for name in ("left", "right")
            ]
        else:
            assert read["left"][0]["response_id"] == read["right"][0]["response_id"]


def test_both_ways_are_told(live: Live) -> None:
    told: list[str] = []
    figures = measure_along(Client(live.url), SHAPE, num_pairs=2, concurrency=2, tell=told.append)
    values = {figure.id: figure.value for figure in figures}
    assert values["requests"] == 4 * 8
    assert values["along_load_cost"] > 0
    assert [line.rpartition(", ")[2] for line in told] == ["waiting", "reading along", "reading along", "waiting"]


def test_texts_of_runs_are_their_own() -> None:
    first, again = list(teams(SHAPE)), list(teams(SHAPE))
    assert first == again
    assert [team.num_requests for team in first] == [4, 4]
    assert len({agent.role for team in first for stage in team.stages for agent in stage}) == 8
    with pytest.raises(InvalidRequest, match="3 requests are too few for one team of 4"):
        list(teams(replace(SHAPE, num_requests=3)))


@pytest.mark.parametrize("is_along", [True, False])
def test_a_failed_request_is_told(live: Live, is_along: bool) -> None:
    team = SimulatedTeam(((SimulatedAgent("plan", "a", 5),), (SimulatedAgent("x " * 5000, "b", 5),)))
    with pytest.raises(ServerError, match="an agent's request failed: 400"):
        run_teams(Client(live.url), [team], concurrency=1, is_along=is_along)
