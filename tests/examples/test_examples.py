"""Every example, as a user runs it, against a real server whose model calls tools, or whose KV can be moved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.clients.reciter import make_engine
from eval.served import served
from kvcomm.engine.engine import Engine
from tests.limits import PATIENCE_S
from tests.tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"

SAYS = {
    "anthropic_client": ("get_weather({'city': 'Paris'}) gave sunny", "It is sunny", "tokens came from the cache"),
    "langgraph_forks": ("engineer: ", "treasurer: ", "editor: ", "agent: It is sunny"),
    "lm_eval_harness": ("accuracy ",),
    "openai_agents_handoff": ("Triage: handoff_output_item", "Meteorologist says: It is sunny"),
    "openai_client": ("gave sunny, 21 degrees in Paris", "structured: City(", "tokens were there already"),
    "pydantic_ai_agent": ("answer: It is sunny", "forecast: Forecast("),
    "rag_changing_order": ("How high is the tower?", "moved"),
    "tree_of_thoughts": ("level 2, rated ", "prompt tokens were computed"),
}
"""What each example prints at least."""


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, str]]:
    """A server whose model recites, and what it calls the model."""
    with make_engine(tiny_tokenizer()) as engine, served(engine) as (port, model):
        yield f"http://127.0.0.1:{port}", model
        assert engine.wait_idle(PATIENCE_S)
        engine.check_integrity()


def ran(name: str, address: str, model: str) -> str:
    """What an example prints."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": ""}
    run = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", address, model],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def test_all_are_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example(name: str, address: tuple[str, str]) -> None:
    said = ran(name, *address)
    for each in SAYS[name]:
        assert each in said, said


@pytest.mark.slow
def test_passages_on_a_model_whose_kv_can_be_moved() -> None:
    made = tiny_model()
    made.model.config.max_position_embeddings = 4096
    with Engine(made.model, made.tokenizer) as engine, served(engine) as (port, model):
        assert "moved" in ran("rag_changing_order", f"http://127.0.0.1:{port}", model)
