"""A tiny model as a folder, a folder for contexts, and proof that commands leave nothing behind in their engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcomm.engine.engine import Engine
from kvcomm.server.logs import logging_config
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with room for 8,192 tokens, saved with its tokenizer. Tests never change it."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A server that was started here, however far, leaves no handler that writes to the stderr of its own test."""
    loggers = [logging.getLogger(name) for name in logging_config("info")["loggers"]]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def home(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands keep contexts in, with the tiny model as their default; not there yet."""
    monkeypatch.setenv("KVCOMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KVCOMM_MODEL", str(model_folder))
    return tmp_path / "home"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Engine]]:
    """The engines that commands load; at the end, none of them holds a request or a context, or is still open."""
    loaded: list[Engine] = []
    load: Callable[..., Engine] = Engine.load

    def recorded(*arguments: Any, **settings: Any) -> Engine:
        loaded.append(load(*arguments, **settings))
        return loaded[-1]

    monkeypatch.setattr(Engine, "load", recorded)
    yield loaded
    for engine in loaded:
        assert engine.scheduler.requests() == []
        assert engine.contexts == ()
        engine.check_integrity()
        engine.cache.clear()
        assert engine.pool.num_free == engine.pool.num_pages
