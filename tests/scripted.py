"""A sampler that draws what a test wants, so that answers hold known tokens. Everything else is computed as ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvcomm.engine.sampler import Sampler


def draw(monkeypatch: pytest.MonkeyPatch, *scripts: Sequence[int]) -> None:
    """Let choice i of every request draw script i, over and over; further choices draw the last one."""
    made = Sampler.__init__

    def init(self: Sampler, params: Any, choice: int, **settings: Any) -> None:
        made(self, params, choice, **settings)
        self.script = list(scripts[min(choice, len(scripts) - 1)])  # type: ignore[attr-defined]

    def sample(self: Any, logits: Any, token_ids: Any, num_answer: int) -> int:
        token: int = self.script.pop(0)
        self.script.append(token)
        return token

    monkeypatch.setattr(Sampler, "__init__", init)
    monkeypatch.setattr(Sampler, "sample", sample)
