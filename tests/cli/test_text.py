"""Ages, printable text, counts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from kvcomm.cli.text import age_of, counted, printable

NOW = datetime(2026, 5, 6, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("ago", "age"),
    [
        (timedelta(0), "0 s"),
        (timedelta(seconds=59.9), "59 s"),
        (timedelta(seconds=60), "1 min"),
        (timedelta(minutes=59, seconds=59), "59 min"),
        (timedelta(hours=1), "1 h"),
        (timedelta(hours=23), "23 h"),
        (timedelta(days=1), "1 d"),
        (timedelta(days=-3), "0 s"),
    ],
)
def test_age(ago: timedelta, age: str) -> None:
    assert age_of((NOW - ago).isoformat(), now=NOW) == age


def test_age_of_other_zones_and_of_no_time() -> None:
    assert age_of("2026-05-06T13:59:00+02:00", now=NOW) == "1 min"
    assert age_of("2026-05-06T11:59:00", now=NOW) == "1 min"
    assert age_of("yesterday") is None


def test_printable() -> None:
    assert printable("a\tb\né\x1b[31m\x07\u202e") == "a\tb\né\ufffd[31m\ufffd\ufffd"


def test_counted() -> None:
    assert [counted(number, "token") for number in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
