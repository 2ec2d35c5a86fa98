"""The simulation of clusters: cases small enough to work out by hand, and laws that hold for all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.cluster.__main__ import Row, Settings, gains_of, main, speed_for
from eval.cluster.caches import PrefixCache, SharedTier
from eval.cluster.costs import Costs
from eval.cluster.routers import BOUND, ROUTERS, Cluster
from eval.cluster.simulation import Outcome, Simulation
from eval.cluster.workload import AGENTIC as AGENTIC_FORMAT
from eval.cluster.workload import BLOCK_TOKENS, SESSION_S, Arrival, Workload, make_workload
from kvcomm.lab.load.trace_file import Trace, TraceRequest
from tests.lab.load.test_trace_file import AGENTIC, write

SECOND_A_TOKEN = Costs(
    token_s=1, pair_s=0, step_s=0, stream_s=0, token_bytes=4, get_s=2, get_byte_s=0, network_bytes_s=40
)
BLOCK = 10


def workload(*requests: tuple[float, Sequence[int], int], num_output: int = 1) -> Workload:
    """Requests of (when, path, tokens)."""
    arrivals = tuple(Arrival(at, np.array(path, dtype=np.int32), tokens, num_output) for at, path, tokens in requests)
    nodes = max((max(path, default=-1) for _, path, _ in requests), default=-1) + 1
    return Workload(arrivals, BLOCK, nodes, max((at for at, _, _ in requests), default=0.0) + 1)


def outcome(
    made: Workload,
    router: str = "round_robin",
    *,
    num_workers: int = 1,
    capacity_tokens: int = 1_000,
    costs: Costs = SECOND_A_TOKEN,
    has_tier: bool = False,
    seed: int = 0,
) -> Outcome:
    tier = SharedTier() if has_tier else None
    return Simulation(
        made,
        ROUTERS[router],
        costs,
        num_workers=num_workers,
        capacity_tokens=capacity_tokens,
        speed=1,
        seed=seed,
        tier=tier,
    ).run()


def test_a_queue_by_hand() -> None:
    """25 tokens from 0 to 25; then the second prompt's turn, of which 20 of 35 tokens are held by now."""
    done = outcome(workload((0, [0, 1], 25), (1, [0, 1, 2], 35)))
    assert done.ttft_s.tolist() == [25, 39]
    assert (done.hit_tokens, done.computed_tokens, done.prompt_tokens) == (20, 40, 60)
    assert (done.busy_s.tolist(), done.span_s, done.utilisation) == ([40], 40, 1)


def test_one_token_is_always_computed() -> None:
    done = outcome(workload((0, [0, 1], 20), (50, [0, 1], 20)))
    assert (done.ttft_s.tolist(), done.hit_tokens) == ([20, 1], 19)


def test_what_does_not_fit_is_computed_again() -> None:
    """Room for two blocks: the other prompt drives out what was used before it."""
    requests = ((0, [0, 1], 20), (100, [2, 3], 20), (200, [0, 1], 20))
    assert outcome(workload(*requests), capacity_tokens=20).hit_tokens == 0
    assert outcome(workload(*requests), capacity_tokens=40).hit_tokens == 19


def test_another_worker_gets_from_the_tier_what_is_quicker_to_get() -> None:
    """20 tokens are 80 bytes: 2 s and 2 s more on the network, where computing takes 20 s."""
    requests = workload((0, [0, 1], 25), (100, [0, 1, 2], 35))
    alone = outcome(requests, num_workers=2)
    assert (alone.ttft_s.tolist(), alone.computed_tokens) == ([25, 35], 60)
    shared = outcome(requests, num_workers=2, has_tier=True)
    assert shared.ttft_s.tolist() == [25, 4 + 15]
    assert (shared.tier_tokens, shared.computed_tokens, shared.bytes_read) == (20, 40, 80)
    assert shared.bytes_written == 3 * BLOCK * 4  # the third block is new
    slow = SECOND_A_TOKEN.__class__(**{**SECOND_A_TOKEN.__dict__, "get_s": 19.0})
    assert outcome(requests, num_workers=2, has_tier=True, costs=slow).ttft_s.tolist() == [25, 35]


def test_what_was_put_is_there_only_when_it_has_arrived() -> None:
    tier = SharedTier()
    assert tier.put([3, 4], at=10) == 2
    path = np.array([3, 4, 5])
    assert [tier.depth(path, now) for now in (9.9, 10)] == [0, 2]
    assert tier.put([4, 5], at=12) == 1
    assert [tier.depth(path, now) for now in (11, 12)] == [2, 3]


def test_answers_that_run_slow_a_prompt_down() -> None:
    """A step of 2 s for each 512 tokens, and 3 s more for every other answer in it."""
    costs = Costs(1, 0, 2, 3, 4, 0, 0, 1)
    assert [costs.steps_s(600, answers) for answers in (0, 1, 3)] == [0, 2 * 2, 2 * (2 + 2 * 3)]
    done = outcome(workload((0, [], 10), (11, [], 10), num_output=6), costs=costs)
    assert done.ttft_s.tolist() == [10, 10 + 2]


def test_attention_costs_by_pairs() -> None:
    costs = Costs(0, 1, 0, 0, 4, 0, 0, 1)
    assert costs.prefill_s(0, 3) == 1 + 2 + 3
    assert costs.prefill_s(2, 4) == 3 + 4


paths = st.lists(st.integers(0, 2), min_size=1, max_size=4)


def as_nodes(prompts: list[list[int]]) -> list[list[int]]:
    """Prompts as paths in their trie."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        [numbers.setdefault(tuple(prompt[: at + 1]), len(numbers)) for at in range(len(prompt))] for prompt in prompts
    ]


@given(st.lists(paths, max_size=15), st.integers(1, 6))
@settings(deadline=None)
def test_a_cache_drops_the_least_recently_used_the_deepest_first(prompts: list[list[int]], capacity: int) -> None:
    cache, used = PrefixCache(capacity), dict[int, tuple[int, int]]()
    for stamp, path in enumerate(as_nodes(prompts)):
        kept = path[:capacity]
        before = set(used)
        expected_depth = next((at for at, node in enumerate(path) if node not in used), len(path))
        assert cache.depth(path) == expected_depth
        used |= {node: (stamp, -depth) for depth, node in enumerate(kept)}
        while len(used) > capacity:
            del used[min(used, key=lambda node: used[node])]
        came, went = cache.use(np.array(path))
        assert (set(came), set(went)) == (set(kept) - before, before - set(used))
        assert len(cache) == len(used)


def distinct_tokens(made: Workload) -> int:
    """Tokens that even one cache without bounds would have to compute."""
    in_blocks = sum(arrival.path.size for arrival in made.arrivals) * made.block_tokens
    return made.num_tokens - in_blocks + made.num_nodes * made.block_tokens


requests_ = st.lists(st.tuples(st.integers(0, 60), paths, st.integers(0, 9)), min_size=1, max_size=25)


@given(requests_, st.sampled_from(sorted(ROUTERS)), st.integers(1, 4), st.booleans(), st.integers(2, 40))
@settings(deadline=None, max_examples=150)
def test_laws(
    drawn: list[tuple[int, list[int], int]], router: str, num_workers: int, has_tier: bool, capacity_blocks: int
) -> None:
    drawn = sorted(drawn, key=lambda each: each[0])
    nodes = as_nodes([path for _, path, _ in drawn])
    made = workload(
        *((at, path, len(path) * BLOCK + rest) for (at, _, rest), path in zip(drawn, nodes, strict=True)), num_output=3
    )
    arguments = {"num_workers": num_workers, "has_tier": has_tier, "capacity_tokens": capacity_blocks * BLOCK}
    done = outcome(made, router, **arguments)  # type: ignore[arg-type]  # each has its own type
    assert done.hit_tokens + done.tier_tokens + done.computed_tokens == done.prompt_tokens == made.num_tokens
    assert done.computed_tokens >= distinct_tokens(made) - sum(path == [] for path in nodes)
    assert (done.ttft_s >= 1).all()  # a token is computed for each, and takes a second
    assert done.busy_s.sum() >= done.computed_tokens
    assert done.bytes_read == done.tier_tokens * SECOND_A_TOKEN.token_bytes
    assert done.bytes_written <= made.num_nodes * BLOCK * SECOND_A_TOKEN.token_bytes
    again = outcome(made, router, **arguments)  # type: ignore[arg-type]
    assert again.ttft_s.tolist() == done.ttft_s.tolist()


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_one_worker_with_time_and_room_computes_what_is_distinct(router: str) -> None:
    made = workload((0, [0, 1], 25), (1_000, [0, 1, 2], 35), (2_000, [0, 3], 20), (3_000, [0, 1, 2], 33))
    done = outcome(made, router)
    assert done.computed_tokens == distinct_tokens(made) == 25 + 15 + 10 + 3


def sent_to(router: str, made: Workload, *, num_workers: int) -> list[int]:
    """Which worker every request goes to."""
    chosen: list[int] = []

    def watched(cluster: Cluster, generator: np.random.Generator) -> object:
        inner = ROUTERS[router](cluster, generator)
        choose = inner.choose

        def noting(*arguments: object) -> int:
            chosen.append(choose(*arguments))  # type: ignore[arg-type]
            return chosen[-1]

        inner.choose = noting  # type: ignore[assignment]
        return inner

    Simulation(
        made,
        watched,
        SECOND_A_TOKEN,
        num_workers=num_workers,
        capacity_tokens=10_000,
        speed=1,  # type: ignore[arg-type]
    ).run()
    return chosen


SAME = workload(*((at / 100, [0, 1, 2], 30) for at in range(16)))
APART = workload(*((40 * at, [0, 1, 2], 30) for at in range(16)))


def test_prefix_hash_is_bounded() -> None:
    assert len(set(sent_to("prefix_hash", APART, num_workers=4))) == 1
    counts = Counter(sent_to("prefix_hash", SAME, num_workers=4))
    assert max(counts.values()) <= -(-BOUND * 16 // 4)
    assert len(counts) == 4


def test_prefix_trie_knows_no_load() -> None:
    assert len(set(sent_to("prefix_trie", SAME, num_workers=4))) == 1


@pytest.mark.parametrize("router", ["prefix_score", "ours"])
def test_holders_first_until_they_are_busy(router: str) -> None:
    assert len(set(sent_to(router, APART, num_workers=4))) == 1
    assert len(set(sent_to(router, workload(*((at / 100, [0, 1], 2_000) for at in range(16))), num_workers=4))) == 4


def test_round_robin_and_least_loaded() -> None:
    assert sent_to("round_robin", SAME, num_workers=3)[:4] == [0, 1, 2, 0]
    assert sorted(Counter(sent_to("least_loaded", SAME, num_workers=4)).values()) == [4, 4, 4, 4]


def trace(prompts: list[list[int]], *, block_size: int = BLOCK_TOKENS, kind: str = "mooncake") -> Trace:
    requests = [TraceRequest(0, float(at), np.array(blocks, dtype=np.int32), 7) for at, blocks in enumerate(prompts)]
    return Trace(kind, block_size, 1, tuple(requests), "")


def test_copies_share_nothing_and_small_blocks_are_taken_together() -> None:
    made = make_workload(trace([[1, 2, 3, 4, 5], [1, 2, 9]], block_size=BLOCK_TOKENS // 2), copies=3)
    assert (len(made.arrivals), made.block_tokens, made.num_nodes) == (6, BLOCK_TOKENS, 3 * 2)
    assert Counter(int(node) for arrival in made.arrivals for node in arrival.path) == dict.fromkeys((0, 2, 4), 2) | {
        1: 1,
        3: 1,
        5: 1,
    }
    assert {arrival.num_tokens for arrival in made.arrivals} == {5 * BLOCK_TOKENS // 2, 3 * BLOCK_TOKENS // 2}
    times = [arrival.at for arrival in made.arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= made.span
    assert distinct_tokens(made) == made.num_tokens - 3 * BLOCK_TOKENS


def test_sessions_start_apart_from_each_other() -> None:
    requests = tuple(TraceRequest(session, 0.0, np.array([0], dtype=np.int32)) for session in range(50))
    made = make_workload(Trace("agentic", BLOCK_TOKENS, 50, requests, ""))
    assert len({arrival.at for arrival in made.arrivals}) == 50
    assert len({int(arrival.path[0]) for arrival in made.arrivals}) == 50


def test_a_session_waits_for_its_answer() -> None:
    """10 s for the prompt and 2 steps of 3 s for the rest of the answer: the next one is asked at 16, not at 1."""
    first, other = (Arrival(at, np.array([node], dtype=np.int32), 10, 3) for at, node in ((0.0, 0), (1.0, 0)))
    costs = Costs(1, 0, 3, 0, 4, 0, 0, 1)
    apart = Workload((first, other), BLOCK, 1, 2.0)
    chained = Workload((first, other._replace(after=0)), BLOCK, 1, 2.0)
    assert outcome(apart, costs=costs).ttft_s.tolist() == [10, 9 + 1 + 3]  # a step of the first answer within
    assert outcome(chained, costs=costs).ttft_s.tolist() == [10, 1]


def test_only_the_beginning_of_a_session_is_taken() -> None:
    requests = tuple(TraceRequest(0, 5.0 + at, np.array([0], dtype=np.int32)) for at in (0, SESSION_S - 1, SESSION_S))
    made = make_workload(Trace(AGENTIC_FORMAT, BLOCK_TOKENS, 1, requests, ""))
    assert (len(made.arrivals), made.span) == (2, SESSION_S)


def test_requests_of_a_session_follow_each_other() -> None:
    requests = tuple(TraceRequest(at % 2, float(at), np.array([at], dtype=np.int32)) for at in range(10))
    made = make_workload(Trace(AGENTIC_FORMAT, BLOCK_TOKENS, 2, requests, ""), copies=2, seed=3)
    followers = [arrival for arrival in made.arrivals if arrival.after is not None]
    assert len(followers) >= 20 - 2 * 2 * 2  # each session of each copy begins once, and wraps around once at most
    for arrival in followers:
        assert made.arrivals[arrival.after].at < arrival.at
        nodes = [int(each.path[0]) for each in (made.arrivals[arrival.after], arrival)]
        assert nodes[1] - nodes[0] == 2  # the next one of the same session


def test_the_speed_keeps_the_baseline_as_busy_as_wanted() -> None:
    made = workload(*((at, [at % 7], 15) for at in range(300)))
    wanted = Settings(("ours",), 1_000, 0.7, SECOND_A_TOKEN, False, 1, 0)

    def run(speed: float) -> Outcome:
        return Simulation(
            made, ROUTERS["prefix_hash"], SECOND_A_TOKEN, num_workers=3, capacity_tokens=1_000, speed=speed
        ).run()

    done = run(speed_for(made, 3, wanted, run))
    assert done.utilisation == pytest.approx(0.7, abs=0.05)


def test_gains_by_hand() -> None:
    def row(router: str, hits: int, times: float, num_workers: int) -> Row:
        made = Outcome(np.array([times]), 100, hits, 0, 100 - hits, 0, 0, np.array([1.0]), 1.0)
        return Row("mooncake", num_workers, router, made)

    rows = [row("prefix_hash", 20, 9.0, 64), row("ours", 30, 3.0, 64), row("random", 10, 6.0, 64)]
    rows += [row("prefix_hash", 20, 4.0, 8), row("ours", 20, 4.0, 8)]
    found = {figure.id: figure.value for figure in gains_of(rows)}
    assert (found["hit_gain"], found["p90_gain"]) == pytest.approx((1.5, 3))
    others = [found[name] for name in ("hit_gain_mooncake_8", "hit_gain_over_random", "p90_gain_over_random")]
    assert others == pytest.approx([1, 3, 2])
    assert gains_of([row("random", 1, 1.0, 64)]) == []


LINES = [{"timestamp": 100 * t, "hash_ids": [0, t % 5, t % 3], "output_length": 3} for t in range(40)]


def run_main(tmp_path: Path, *arguments: str) -> int:
    file = write(tmp_path / "tiny.jsonl.gz", LINES)
    return main(["--trace", str(file), "--out", str(tmp_path / "run.json"), *arguments])


def test_a_run_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(tmp_path, "--workers", "2,64", "--json", "--tier", "--copies", "1") == 0
    printed = json.loads(capsys.readouterr().out)
    values = {figure["id"]: figure["value"] for figure in printed["figures"]}
    assert {"hit_gain", "p90_gain", "hit_gain_over_random", "ttft_p90_s_mooncake_64_ours"} <= set(values)
    assert printed["config"]["workers"] == [2, 64]
    assert printed["config"]["costs"]["token_bytes"] == 46_080
    assert json.loads((tmp_path / "run.json").read_text())["figures"] == printed["figures"]
    for router in ROUTERS:
        assert values[f"hit_rate_mooncake_2_{router}"] + values[f"tier_rate_mooncake_2_{router}"] <= 100


def test_a_table_of_chosen_routers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agentic = write(tmp_path / "agentic.jsonl", AGENTIC)
    assert run_main(tmp_path, "--trace", str(agentic), "--workers", "1", "--routers", "ours,random", "--quick") == 0
    captured = capsys.readouterr()
    assert "ttft_p50_s_agentic_1_ours" in captured.out
    assert "prefix_trie" not in captured.out
    assert "mooncake, 1 workers, 3 x 40 requests: ours: hit" in captured.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--routers", "ours,best"], "unknown router 'best'; there are random"),
        (["--workers", "0"], "0 is not positive"),
        (["--utilisation", "1"], "1 is not below 1"),
        (["--gbit", "nan"], "nan is not a positive number"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_main(tmp_path, *arguments)
    assert told in capsys.readouterr().err


def test_a_missing_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert main(["--trace", str(tmp_path / "nowhere.jsonl")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
