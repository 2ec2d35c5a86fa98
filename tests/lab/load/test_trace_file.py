"""Both trace formats, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.lab.load.trace_file import TraceError, block_tokens, read_trace

MOONCAKE = [
    {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 1500, "input_length": 500, "output_length": 5, "hash_ids": [7]},
]
SUBAGENT = {"t": 5.0, "type": "subagent", "requests": [{"t": 1.0, "type": "n", "hash_runs": [[1, 1], [9, 2]]}]}
AGENTIC = [
    {
        "id": "a",
        "block_size": 64,
        "requests": [
            {"t": 0.0, "type": "n", "hash_runs": [[1, 3]]},
            SUBAGENT,
            {"t": 10.0, "type": "s", "hash_runs": [[1, 2], [7, 1]]},
        ],
    },
    {"id": "b", "block_size": 64, "requests": [{"t": 2.0, "type": "n", "hash_runs": [[1, 3]]}]},
]


def write(file: Path, lines: list[Any]) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_mooncake(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, MOONCAKE)
    trace = read_trace(file)
    assert (trace.format, trace.block_size, trace.num_sessions, trace.num_blocks) == ("mooncake", 512, 1, 3)
    assert [(r.session, r.at_s, r.blocks.tolist()) for r in trace.requests] == [(0, 0.0, [0, 1]), (0, 1.5, [7])]
    assert trace.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(read_trace(file, limit=1).requests) == 1


def test_agentic_sessions_run_side_by_side_with_their_subagents(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "trace.jsonl.gz", AGENTIC))
    assert (trace.format, trace.block_size, trace.num_sessions) == ("agentic", 64, 2)
    assert [(r.session, r.at_s, r.blocks.tolist()) for r in trace.requests] == [
        (0, 0.0, [1, 2, 3]),
        (1, 2.0, [1, 2, 3]),
        (0, 6.0, [1, 9, 10]),
        (0, 10.0, [1, 2, 7]),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no request"),
        ([[1, 2]], "line 1: expected an object, not list"),
        ([{"prompt": "hello"}], "neither a mooncake nor an agentic trace"),
        ([{"timestamp": 0, "hash_ids": [-1]}], "block ids must be integers"),
        ([{"timestamp": 0, "hash_ids": [2**31]}], "block ids must be integers"),
        ([{"timestamp": 0, "hash_ids": ["x"]}], "neither"),
        ([{**AGENTIC[0], "block_size": 32}, AGENTIC[1]], "block sizes"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, lines: list[Any], message: str) -> None:
    file = write(tmp_path / "other.jsonl", lines)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(file)
    assert "other.jsonl" in str(caught.value)


@pytest.mark.parametrize("raw", [b"not json\n", b"\x80\x81", b""])
def test_bytes_that_are_no_json_lines(tmp_path: Path, raw: bytes) -> None:
    for name in ("broken.jsonl", "broken.jsonl.gz"):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(TraceError, match="broken"):
            read_trace(tmp_path / name)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "cut.jsonl.gz", MOONCAKE * 100)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(TraceError, match="cut"):
        read_trace(file)


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.sampled_from([1, 64, 512]))
@settings(deadline=None)
def test_distinct_blocks_differ_at_every_offset(left: int, right: int, block_size: int) -> None:
    tokens = block_tokens(np.array([left, right, left], dtype=np.int32), block_size).reshape(3, block_size)
    assert tokens.dtype == np.int32
    assert (tokens >= 0).all()
    assert (tokens[0] == tokens[2]).all()
    assert ((tokens[0] == tokens[1]) == (left == right)).all()
