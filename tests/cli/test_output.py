"""Tables for people, where stdout is no terminal."""

from __future__ import annotations

import pytest

from kvcomm.cli.output import PIPE_WIDTH, emit, table


def test_no_table_wraps_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: rows with long paths were wrapped, so that nobody could search for one."""
    path = "/".join(["folder"] * PIPE_WIDTH)
    emit(None, table(("file", "why"), [(path, "it is cut"), ("short", "it is foreign")]), as_json=False)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "why"]
    assert [row.rstrip().split(maxsplit=1) for row in rows] == [[path, "it is cut"], ["short", "it is foreign"]]
