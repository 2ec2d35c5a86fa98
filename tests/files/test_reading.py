"""Reading what anybody may have put there: nothing that waits, nothing without end, no parser's own errors."""

from __future__ import annotations

import gzip
import os
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.files import reading
from kvcomm.files.reading import (
    MAX_DEPTH,
    BadContent,
    open_regular,
    parse_json,
    parse_toml,
    path_of,
    read_bytes,
    read_lines,
    read_text,
    read_toml,
)
from tests.files.special import SPECIAL, make_special

READERS: list[Callable[[Path], object]] = [read_bytes, read_text, read_toml, lambda file: list(read_lines(file))]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, kind: str, reader: Callable[[Path], object]
) -> None:
    with make_special(tmp_path / "x", kind) as file, pytest.raises(OSError, match="not a regular file") as caught:
        reader(file)
    assert caught.value.filename == str(file)


def test_a_link_to_a_fifo_is_refused_and_one_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "link").symlink_to("text")
    assert read_text(tmp_path / "link") == "text"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bad").symlink_to("fifo")
    with pytest.raises(OSError, match="it is a FIFO"):
        read_text(tmp_path / "bad")


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "x" * 300, "text/x"])
def test_what_cannot_be_opened_is_an_os_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").write_text("")
    for reader in READERS:
        with pytest.raises(OSError, match=r".+"):
            reader(tmp_path / name)


def test_the_open_file_is_the_one_that_is_looked_at(tmp_path: Path) -> None:
    """Whoever opens it again by `path_of` gets that file, though another one has its name by then."""
    file = tmp_path / "file"
    file.write_text("one")
    with open_regular(file) as stream:
        (tmp_path / "other").write_text("two")
        (tmp_path / "other").replace(file)
        assert path_of(stream, file).read_text() == "one"
    assert file.read_text() == "two"


def test_limits(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert len(read_bytes(file, max_bytes=100)) == 100
    with pytest.raises(OSError, match="more than 99 bytes"):
        read_bytes(file, max_bytes=99)


def test_a_small_archive_of_something_large_stays_small(tmp_path: Path) -> None:
    file = tmp_path / "bomb.jsonl.gz"
    file.write_bytes(gzip.compress(b"\n" * 3_000_000))
    assert len(read_text(file, max_bytes=3_000_000)) == 3_000_000
    with pytest.raises(OSError, match="more than 2,999,999 bytes"):
        read_text(file, max_bytes=2_999_999)
    with pytest.raises(OSError, match="more than 1,000,000 bytes"):
        list(read_lines(file, max_bytes=1_000_000))


@pytest.mark.parametrize("content", [b"", b"plain", b"\x1f\x8b", gzip.compress(b"x" * 1000, mtime=0)[:-3]])
def test_what_is_no_whole_archive_is_bad_content(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.gz"
    file.write_bytes(content)
    if content:
        with pytest.raises(BadContent, match="not a whole gzip file"):
            read_text(file)


def test_lines_are_numbered_and_empty_ones_left_out(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n\n  \n[2]\r\n"three"')
    assert list(read_lines(file)) == [(1, {"a": 1}), (4, [2]), (5, "three")]
    file.write_text('{"a": 1}\n\n{"a":\n')
    with pytest.raises(BadContent, match="line 3: not JSON"):
        list(read_lines(file))


NINES = "9" * 5000
ODD_TOML = {
    "digits": f"a = {NINES}",
    "hexadecimal": f"a = 0x{'f' * 5000}",
    "just too large": f"a = {2**63}",
    "in an array": f"a = [1, [2, -{2**63 + 1}]]",
    "brackets": f"a = {'[' * 3000}{']' * 3000}",
    "tables": f"a = {'{b = ' * 3000}1{'}' * 3000}",
    "dotted": f"{'.'.join('a' * 3000)} = 1",
    "a header of dots": f"[{'.'.join('a' * 3000)}]\n",
    "a little too deep": f"a = {'[' * MAX_DEPTH}{']' * MAX_DEPTH}",
    "open": "a = [",
    "no encoding": "a = '\udcff'",
    "zero": "\0",
    "date": "a = 2020-02-31",
    "twice": "a = 1\na = 2",
}


@pytest.mark.parametrize("name", ODD_TOML)
def test_odd_toml_is_bad_content(name: str) -> None:
    with pytest.raises(BadContent):
        parse_toml(ODD_TOML[name].encode(errors="surrogateescape"))


def test_numbers_and_depth_at_the_limit_are_read() -> None:
    text = f"a = {2**63 - 1}\nb = -{2**63}\nc = {'[' * (MAX_DEPTH - 2)}{']' * (MAX_DEPTH - 2)}"
    assert parse_toml(text.encode())["a"] == 2**63 - 1


ODD_JSON = [
    "",
    "[",
    "[" * 100_000,
    '{"a":' * 100_000,
    NINES,
    f'{{"a": {NINES}}}',
    '"\\ud800"',
    b"\xff",
    "nul",
    "[1,]",
    "1 2",
]


@pytest.mark.parametrize("text", ODD_JSON, ids=lambda text: repr(text[:12]))
def test_odd_json_is_bad_content(text: str | bytes) -> None:
    with pytest.raises(BadContent):
        parse_json(text)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_bad_content(content: bytes) -> None:
    for parse in (parse_json, parse_toml):
        try:
            parse(content)
        except BadContent:
            continue


PLAIN = st.recursive(
    st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), PLAIN, max_size=4))
def test_whole_toml_is_what_the_library_reads(values: dict[str, Any]) -> None:
    text = "\n".join(f"{name} = {_toml(value)}" for name, value in values.items())
    assert parse_toml(text.encode()) == tomllib.loads(text) == values


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(char):08x}" for char in value) + '"'
    return str(value).lower()


def test_special_files_really_are_what_they_are_called(tmp_path: Path) -> None:
    """Otherwise the tests above would show nothing."""
    with make_special(tmp_path / "fifo", "fifo") as file:
        assert file.is_fifo()
    with make_special(tmp_path / "socket", "socket") as file:
        assert file.is_socket()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(file))
    assert reading.OPEN_DESCRIPTORS.is_dir() or os.name != "posix"
