"""Prompts from a file, and settings of a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from eval.workload import add_sizes, make_parser, parse, text_tokens
from kvcomm import Engine, EngineConfig
from kvcomm.errors import InvalidRequest
from tests.tiny import TinyModel


@pytest.fixture
def engine(tiny: TinyModel) -> Engine:
    return Engine(tiny.model, tiny.tokenizer, config=EngineConfig(pool_tokens=512))


def test_text_in_order_and_never_twice(engine: Engine, tmp_path: Path) -> None:
    text = "".join(chr(33 + i) for i in range(50))
    file = tmp_path / "text.txt"
    file.write_text(text)
    tokens = list(engine.segment(text).token_ids)
    take = text_tokens(engine, file)

    laps = [tuple(take(20)) for _ in range(8)]

    assert [*laps[0], *laps[1]] == tokens[:40]
    assert [*laps[2], *laps[3]] == tokens[1:41]
    assert len(set(laps)) == 8


def test_more_than_the_text_holds(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ab")

    assert len(text_tokens(engine, file)(7)) == 7


def test_records(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in ("one", "two"))))
    expected = list(engine.segment("one\n\ntwo").token_ids)

    assert text_tokens(engine, file)(len(expected)) == expected


def test_no_text(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.touch()

    with pytest.raises(InvalidRequest, match="holds no text"):
        text_tokens(engine, file)


@pytest.mark.parametrize(("arguments", "repeats"), [([], 9), (["--quick"], 2), (["--quick", "--repeats=4"], 4)])
def test_repeats(arguments: list[str], repeats: int) -> None:
    assert parse(make_parser("x", ""), arguments, repeats=9, quick_repeats=2).repeats == repeats


def test_sizes() -> None:
    parser = make_parser("x", "")
    add_sizes(parser, parent_tokens=2048)

    assert parser.parse_args([]).parent_tokens == 2048
    assert parser.parse_args(["--parent-tokens", "3"]).parent_tokens == 3
