"""The table of products: measured, kept, and never believed when it is not ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kvcomm.errors import InvalidRequest
from kvcomm.model import choice
from kvcomm.model.choice import FIXED, ProductChoice, choose
from kvcomm.model.linear import CANDIDATES, ROWS


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[nn.Linear]:
    """Small ones that are measured all the same."""
    monkeypatch.setattr(choice, "MIN_PROBED_BYTES", 0)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    return [nn.Linear(64, 32), nn.Linear(32, 64)]


@pytest.mark.parametrize("dtype", CANDIDATES)
def test_what_is_measured_is_kept_and_found_again(layers: list[nn.Linear], dtype: torch.dtype, tmp_path: Path) -> None:
    layers = [layer.to(dtype) for layer in layers]
    first, second = choose(layers, tmp_path), choose(layers, tmp_path)
    assert (first.origin, second.origin) == ("measured", "remembered")
    assert first.table == second.table
    assert first.table is not None
    assert len(first.table) == len(ROWS)
    assert set(first.table) <= set(CANDIDATES[dtype])


def test_another_model_has_a_table_of_its_own(layers: list[nn.Linear], tmp_path: Path) -> None:
    choose(layers, tmp_path)
    assert choose([*layers, nn.Linear(32, 32)], tmp_path).origin == "measured"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_quickest_is_taken(layers: list[nn.Linear], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"outputs": 1.0, "blocks": 0.9, "onednn": 0.5, "torch": 0.45}
    monkeypatch.setattr(choice, "_seconds", lambda name, *_: seconds[name])
    assert choose(layers, tmp_path).table == ("onednn",) * len(ROWS)  # hardly slower, and preferred


@pytest.mark.parametrize("damage", ["", "{", "[]", "[" * 100_000, '{"key": 1}', "null", '{"table": ["rm"]}'])
def test_a_damaged_file_is_measured_anew(layers: list[nn.Linear], damage: str, tmp_path: Path) -> None:
    choose(layers, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    assert choose(layers, tmp_path).origin == "measured"
    assert choose(layers, tmp_path).origin == "remembered"


@pytest.mark.parametrize(("field", "value"), [("key", {"scheme": 0}), ("table", ["tiles"] * len(ROWS)), ("table", [])])
def test_a_file_of_something_else_is_not_believed(
    layers: list[nn.Linear], field: str, value: object, tmp_path: Path
) -> None:
    choose(layers, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert choose(layers, tmp_path).origin == "measured"


def test_where_nothing_can_be_written_it_is_measured_each_time(layers: list[nn.Linear], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert [choose(layers, blocked / "products").origin for _ in range(2)] == ["measured"] * 2


def test_small_models_are_not_measured(tmp_path: Path) -> None:
    assert choose([nn.Linear(8, 8)], tmp_path) == ProductChoice()
    assert list(tmp_path.iterdir()) == []


def test_another_dtype_than_was_measured_is_computed_as_it_comes() -> None:
    """Bug: a model that was made float32 afterwards would have been read as if it still were bfloat16."""
    tiles = ProductChoice(("tiles",) * len(ROWS))
    for dtype in (torch.float32, torch.float16):
        assert tiles.name(torch.zeros(64, 64, dtype=dtype), 1) == "torch"
    assert ProductChoice(("blocks",) * len(ROWS)).name(torch.zeros(64, 64, dtype=torch.bfloat16), 1) == "torch"
    assert ProductChoice().name(torch.zeros(64, 64, dtype=torch.float16), 1) == "torch"


def test_another_wish_than_fixed_is_refused(layers: list[nn.Linear], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "fxied")
    with pytest.raises(InvalidRequest, match="KVCOMM_PRODUCTS is 'fxied'"):
        choose(layers)


def test_fixed_products_can_be_asked_for(
    layers: list[nn.Linear], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.VARIABLE, "fixed")
    found = choose(layers, tmp_path)
    assert found == ProductChoice()
    assert [found.name(layers[0].weight, rows) for rows in ROWS] == [*FIXED[torch.float32]]
