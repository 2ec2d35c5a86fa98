"""Values for settings and prompts, good ones and such as must be refused, each under a name that a file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

NAN, INFINITE = float("nan"), float("inf")
HUGE = 10**30

SPECIAL: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "nan": NAN,
    "inf": INFINITE,
    "-inf": -INFINITE,
    "2.0": 2.0,
    "0.5": 0.5,
    "huge": HUGE,
    "'5'": "5",
    "'abc'": "abc",
    "b'a'": b"a",
    "5": 5,
    "-1": -1,
    "-2": -2,
    "0": 0,
    "{}": {},
    "object": object(),
    "np.int64(5)": np.int64(5),
    "np.int32(2)": np.int32(2),
    "np.uint8(7)": np.uint8(7),
    "np.float32(0.75)": np.float32(0.75),
    "np.float64(1.5)": np.float64(1.5),
    "np.float32(nan)": np.float32("nan"),
    "np.array([1])": np.array([1]),
    "2": 2,
    "1": 1,
    "1e-30": 1e-30,
    "1e-310": 1e-310,
    "1e-9": 1e-9,
    "(b'a',)": (b"a",),
    "('',)": ("",),
    "(None,)": (None,),
    "(5,)": (5,),
    "(1.5,)": (1.5,),
    "('a',)": ("a",),
    "(True,)": (True,),
    "[1.5]": [1.5],
    "[None]": [None],
    "['a']": ["a"],
    "[-1]": [-1],
    "[huge]": [HUGE],
    "[]": [],
    "''": "",
    "surrogate": "a\ud800b",
    "101": 101,
    "2**63": 2**63,
    "10**6": 10**6,
}

REFUSED: Mapping[str, tuple[str, ...]] = {
    "max_new_tokens": ("True", "2.0", "None", "nan", "inf", "'5'", "b'a'", "-1", "np.float32(0.75)", "object"),
    "temperature": ("True", "None", "nan", "inf", "-1", "'abc'", "b'a'", "np.float32(nan)", "{}"),
    "top_k": ("True", "2.0", "None", "nan", "'5'", "-2", "np.float64(1.5)", "b'a'"),
    "top_p": ("True", "None", "nan", "0", "2", "-1", "'abc'", "inf"),
    "min_p": ("True", "None", "nan", "2", "-1", "'abc'"),
    "repetition_penalty": ("True", "None", "nan", "0", "-1", "inf", "'abc'", "b'a'"),
    "seed": ("True", "2.0", "nan", "-1", "'5'", "2**63", "b'a'", "huge"),
    "stop": ("None", "5", "(b'a',)", "('',)", "(None,)", "(5,)", "b'a'", "True"),
    "stop_token_ids": ("None", "5", "'abc'", "(None,)", "('a',)", "(1.5,)", "(True,)", "2.0"),
    "ignore_eos": ("None", "'abc'", "nan", "2.0", "b'a'"),
    "n": ("True", "0", "-1", "None", "2.0", "nan", "'5'"),
    "logprobs": ("True", "False", "2.0", "-1", "101", "nan", "'5'", "b'a'"),
    "unknown_setting": ("5",),
}
"""Values that are no valid setting, by setting."""

TAKEN: Mapping[str, tuple[str, ...]] = {
    "temperature": ("2", "1", "np.float32(0.75)", "np.float64(1.5)", "1e-30", "1e-310", "0"),
    "top_k": ("-1", "np.int64(5)", "np.int32(2)", "np.uint8(7)", "10**6", "1"),
    "top_p": ("1", "np.float32(0.75)", "1e-9"),
    "min_p": ("1", "0", "np.float32(0.75)"),
    "repetition_penalty": ("2", "1", "np.float32(0.75)", "np.float64(1.5)", "np.int64(5)"),
    "seed": ("np.int64(5)", "np.uint8(7)", "0"),
    "max_new_tokens": ("np.int64(5)", "np.int32(2)", "np.uint8(7)"),
    "n": ("np.int64(5)", "np.int32(2)"),
    "logprobs": ("np.int64(5)", "0", "np.int32(2)"),
}
"""Unusual values that are valid, by setting."""

REFUSED_PROMPTS = ("None", "5", "2.0", "b'a'", "[1.5]", "[None]", "['a']", "[-1]", "[huge]", "[]", "''", "surrogate")


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as an engine gets them: `{"special": name}` stands for the value of that name, lists are tuples."""
    return {name: _resolve(value) for name, value in settings.items()}


def _resolve(value: Any) -> Any:
    if isinstance(value, dict):
        return SPECIAL[value["special"]]
    return tuple(value) if isinstance(value, list) else value
