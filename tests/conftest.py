"""What every test relies on: quiet threads, no hub, no timings, the real model, hypothesis without deadlines."""

from __future__ import annotations

import os
import signal

# Both are read when torch and transformers are imported, so they come before any of those.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KVCOMM_PRODUCTS"] = "fixed"  # what a machine is quickest at is no matter of tests

from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest import mock

import hypothesis
import pytest

if TYPE_CHECKING:
    from kvcomm.model.loading import LoadedModel
    from tests.tiny import TinyModel

# Shells start background jobs with Ctrl-C ignored, and processes whose Ctrl-C is tested would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines, and whether examples are made fast enough, measure the machine, not the code.
UNTIMED = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
# CI repeats the same examples every time.
hypothesis.settings.register_profile("local", UNTIMED)
hypothesis.settings.register_profile("ci", UNTIMED, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", UNTIMED, max_examples=2000, stateful_step_count=200)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))


@pytest.fixture(scope="session", autouse=True)
def only_rows_take_time() -> Iterator[None]:
    """Whether moving pays is decided as if only computed rows took time: no test depends on how fast the machine is."""
    from kvcomm.reuse.cost import CostModel

    rows_only = CostModel(pass_s=0.0, row_s=1.0, pair_s=0.0, move_s=0.0)
    with mock.patch("kvcomm.reuse.parts.cached_cost", return_value=rows_only):
        yield


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real model in float32, fetched into the user's cache folder on first use. Tests never change it."""
    from kvcomm.model.loading import load_model

    return load_model("smollm2-135m", dtype="float32", device="cpu", progress=True)


@pytest.fixture
def tiny() -> TinyModel:
    """A fresh random two-layer Llama and its tokenizer."""
    from tests.tiny import tiny_model

    return tiny_model()
