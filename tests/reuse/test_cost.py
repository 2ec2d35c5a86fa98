"""The cost model: what it says from what it was fitted to, and where it is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvcomm.align.spans import layer_stores
from kvcomm.engine.engine import Engine
from kvcomm.reuse import cost
from kvcomm.reuse.cost import NUM_TRIES, CostModel, ReuseCost, _non_negative_fit, cached_cost, measure_cost

MODEL = CostModel(pass_s=0.05, row_s=0.001, pair_s=1e-7, move_s=1e-5)


def test_a_pass_over_two_stretches_is_counted_pair_by_pair() -> None:
    stretches = [(3, 5), (9, 12)]
    pairs = sum(position + 0.5 for start, end in stretches for position in range(start, end))
    assert MODEL.compute_s(stretches) == pytest.approx(0.05 + 5 * 0.001 + pairs * 1e-7)


def test_reuse_has_to_pay() -> None:
    cost = ReuseCost(lambda: MODEL)
    assert not cost.is_worth_it([[(90, 100)]], 90, 0, 100)  # nothing is known yet
    cost.prepare()
    assert cost.is_worth_it([[(90, 100)]], 90, 0, 100)
    assert not cost.is_worth_it([[(2, 100)]], 2, 0, 100)
    assert not cost.is_worth_it([[(90, 100)]] * 9, 90, 0, 100)  # a pass at a time
    slow = ReuseCost(lambda: MODEL.model_copy(update={"move_s": 0.01}))
    slow.prepare()
    assert not slow.is_worth_it([[(90, 100)]], 90, 0, 100)


def test_it_is_measured_once_and_kept(tmp_path: Path) -> None:
    calls = []

    def measure() -> CostModel:
        calls.append(1)
        return MODEL

    file = tmp_path / "cost" / "model.json"
    assert cached_cost(file, measure) == cached_cost(file, measure) == MODEL
    assert len(calls) == 1


@pytest.mark.parametrize("content", ["", "{}", '{"pass_s": -1, "row_s": 0, "pair_s": 0, "move_s": 0}', "\0\1"])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    file = tmp_path / "model.json"
    file.write_text(content)
    assert cached_cost(file, lambda: MODEL) == MODEL
    assert CostModel.model_validate_json(file.read_text()) == MODEL


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "cost").write_text("a file where the folder should be")
    assert cached_cost(tmp_path / "cost" / "model.json", lambda: MODEL) == MODEL


def test_the_fit_finds_what_the_times_were_made_from() -> None:
    rows = np.array([[1, 16, 136], [1, 16, 16264], [1, 256, 32896], [1, 256, 229504]], dtype=float)
    assert _non_negative_fit(rows, rows @ [0.05, 1e-3, 1e-7]) == pytest.approx((0.05, 1e-3, 1e-7))
    assert min(_non_negative_fit(rows, np.array([0.2, 0.1, 0.4, 0.3]))) >= 0


def test_measuring_leaves_nothing_behind(engine: Engine) -> None:
    free = engine.pool.num_free
    parts = engine.reuse.parts
    layers = layer_stores(engine.pool, engine.geometry)
    model = measure_cost(engine.memory, parts.replayer._runner, layers, parts.ops.rotate, 128)
    assert model.compute_s([(0, 10)]) > 0
    assert engine.pool.num_free == free


@pytest.mark.parametrize(("takes_s", "num_tries"), [(0.001, NUM_TRIES), (3.0, 2)])
def test_on_an_overloaded_machine_nobody_waits_for_more_than_two_tries(
    takes_s: float, num_tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, tries = [0.0], [0, 0]

    def work(which: int) -> None:
        """Bug: on a new machine the first try compiled the loops that move, and that passed for what moving costs."""
        tries[which] += 1
        now[0] += takes_s * (1 + which) * (100 if tries[which] == 1 else 1)

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    assert cost._fastest([lambda: work(0), lambda: work(1)]) == pytest.approx([takes_s, 2 * takes_s])
    assert tries == [num_tries, num_tries]
