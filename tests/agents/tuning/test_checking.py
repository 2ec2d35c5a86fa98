"""How many rows a check takes within its time."""

from __future__ import annotations

import pytest

from kvcomm.agents.tuning import checking
from kvcomm.agents.tuning.rows import Row


@pytest.mark.parametrize(
    ("budget_s", "took_s", "num_read"),
    [
        (0.0, [5.0], 8),  # the first batch always
        (9.9, [5.0, 5.0], 8),
        (10.0, [5.0, 5.0, 5.0], 16),
        (30.0, [4.0, 12.0, 9.0], 24),  # 25 s are over: another 12 do not fit, although 4 would
        (99.0, [5.0, 5.0, 5.0, 5.0], 27),
    ],
)
def test_a_check_takes_the_batches_that_fit(
    monkeypatch: pytest.MonkeyPatch, budget_s: float, took_s: list[float], num_read: int
) -> None:
    clock = [100.0]
    monkeypatch.setattr(checking.time, "monotonic", lambda: clock[0])
    rows = [Row({}, str(index)) for index in range(27)]
    said: list[str] = []
    read: list[Row] = []
    for batch, seconds in zip(checking._batches_within(rows, budget_s, said.append), took_s, strict=False):
        read += batch
        clock[0] += seconds
    assert read == rows[:num_read]
    assert any("--budget" in text for text in said) == (num_read < len(rows))
