"""An engine lives as long as anybody has something of it, and no longer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest

from kvcomm.engine.engine import Engine
from tests.engine.conftest import some_tokens
from tests.limits import wait_for
from tests.tiny import TinyModel

USES: dict[str, Callable[[Engine], object]] = {
    "a context": lambda engine: engine.context(some_tokens(9)),
    "a fork": lambda engine: engine.context(some_tokens(9)).fork(),
    "a handle": lambda engine: engine.submit(some_tokens(9), max_new_tokens=2),
    "an open prompt": lambda engine: engine.open_prompt(some_tokens(9)),
}


def is_collected(seen: weakref.ref[Engine]) -> bool:
    gc.collect()
    return seen() is None


@pytest.mark.parametrize("what", USES)
def test_an_engine_is_kept_by_what_it_gave(what: str, shared_model: TinyModel) -> None:
    """Bug: a context whose engine nobody had by name was closed under its user."""
    engine = Engine(shared_model.model, shared_model.tokenizer)
    kept, seen = USES[what](engine), weakref.ref(engine)
    del engine
    gc.collect()
    assert seen() is not None
    if what in ("a context", "a fork"):
        assert len(kept.generate(max_new_tokens=2, ignore_eos=True).token_ids) == 2  # type: ignore[attr-defined]
    elif what == "a handle":
        kept.result()  # type: ignore[attr-defined]
    else:
        assert kept.close(max_new_tokens=1).result() is not None  # type: ignore[attr-defined]
    del kept
    wait_for(lambda: is_collected(seen))  # its thread may be at the end of the step that gave the answer
