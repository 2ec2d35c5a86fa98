"""Estimator and sketch settings of engines: defaults change nothing, other ones have files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.errors import AnchorFileForeign, InvalidRequest
from tests.tiny import tiny_model


def engine(**settings: Any) -> Engine:
    tiny = tiny_model()
    return Engine(tiny.model, tiny.tokenizer, config=EngineConfig(**settings))


def test_defaults_keep_the_namespace_of_files() -> None:
    with engine() as made:
        assert made.reuse.parts.file_namespace(made.namespace()) == made.namespace()


@pytest.mark.parametrize(
    "settings", [{"neighbors": 4}, {"alpha": (0.8,)}, {"alpha": (0.8, 1.0)}, {"sketch_layers": 1}, {"sketch_groups": 1}]
)
def test_anchors_of_other_settings_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with engine(**settings) as made:
        made.reuse.save(tmp_path)
        assert made.reuse.load(tmp_path).banks == ()
    with engine() as other, pytest.raises(AnchorFileForeign):
        other.reuse.load(tmp_path)


def test_bad_settings_are_refused() -> None:
    for bad in ({"neighbors": 0}, {"sketch_groups": 0}, {"sketch_layers": 0}, {"alpha": ()}, {"alpha": (-1.0,)}):
        with pytest.raises(InvalidRequest, match=next(iter(bad))):
            EngineConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="one factor or one for each of 2 groups"):
        engine(alpha=(1.0, 0.5, 0.5))
