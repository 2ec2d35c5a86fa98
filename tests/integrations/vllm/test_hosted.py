"""kvcomm's engine on a model that another program computes: the same numbers, and what it prepares for pages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcomm import Engine
from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.ladder import Rung
from kvcomm.align.prior import Prior, write_prior
from kvcomm.config import EngineConfig
from kvcomm.errors import AnchorFileError, AnchorFileForeign
from kvcomm.integrations.vllm.decoder import HostedDecoder
from kvcomm.integrations.vllm.fair_lock import FairLock
from kvcomm.integrations.vllm.inner import kv_of, kv_of_context, make_engine
from kvcomm.integrations.vllm.messages import Load, Prepare, Release, Save
from kvcomm.integrations.vllm.params import PromptSpan, RequestParams, ReuseParams
from kvcomm.integrations.vllm.preparation import KVLists, Preparations
from kvcomm.integrations.vllm.settings import ConnectorSettings
from kvcomm.memory.segments import Segment
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.loading import LoadedModel
from kvcomm.model.weights import weights_digest
from tests.integrations.vllm.fake_host import ModelHost, TensorPages
from tests.limits import wait_for
from tests.tiny import TinyModel, tiny_model

PROMPT = tuple(range(10, 90))
MOVES = RequestParams(
    segments=(PromptSpan(start=20, end=60, slot="document", kind="dynamic"),),
    reuse=ReuseParams(max_divergence=5.0, confidence=0.5),
)
BLOCKS = (7, 2, 5, 1, 6, 3)
PAIR = Pair({Rung("rotate", 0.3): Measured(0.001, 0.2)})


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model()


def hosted(tiny: TinyModel, host: ModelHost) -> Engine:
    decoder: Any = HostedDecoder(host, tiny.model)
    return Engine(
        decoder,
        tiny.tokenizer,
        config=EngineConfig(pool_tokens=2048),
        weights_id=weights_digest(tiny.model),
        prior=None,
    )


@pytest.fixture
def host(tiny: TinyModel) -> ModelHost:
    return ModelHost(tiny.model)


@pytest.fixture
def engine(tiny: TinyModel, host: ModelHost) -> Iterator[Engine]:
    with hosted(tiny, host) as engine:
        yield engine
        engine.check_integrity()


class Shelf:
    """Keeps what it is given, in memory."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, ...], KVLists] = {}
        self.found: KVLists | None = None
        self.error: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    def find(self, token_ids: Sequence[int], params: RequestParams) -> KVLists | None:
        self.may_answer.wait(10)
        if self.error is not None:
            raise self.error
        return self.found

    def keep(self, token_ids: Sequence[int], kv: KVLists, start: int, params: RequestParams) -> None:
        self.kept[tuple(token_ids[start:])] = kv

    def close(self) -> None:
        self.may_answer.set()


@pytest.fixture
def pages() -> TensorPages:
    return TensorPages(num_blocks=8, block_size=16, num_layers=2, num_kv_heads=2, dim=8)


def prepared(preparations: Preparations, request_id: str, timeout_s: float = 60) -> int:
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        preparations.wait(1.0)
        found = preparations.take_prepared()
        if request_id in found:
            return found[request_id].num_tokens
    raise AssertionError("nothing was prepared")


def truth(tiny: TinyModel, token_ids: Sequence[int]) -> KVLists:
    """KV by the stock model."""
    cache = tiny.model(torch.tensor([list(token_ids)]), use_cache=True).past_key_values
    return (
        [each.keys[0].transpose(0, 1) for each in cache.layers],
        [each.values[0].transpose(0, 1) for each in cache.layers],
    )


def assert_close(found: KVLists, expected: KVLists) -> None:
    for got, wanted in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_geometry_is_the_models_own(tiny: TinyModel, host: ModelHost) -> None:
    decoder: Any = HostedDecoder(host, tiny.model)
    found, expected = ModelGeometry.from_model(decoder), ModelGeometry.from_model(tiny.model)
    assert found.layers == expected.layers
    assert (found.max_context, found.vocab_size, found.immovable) == (512, expected.vocab_size, None)


def test_answers_and_names_are_those_of_an_engine_of_its_own(engine: Engine) -> None:
    same = tiny_model()
    with Engine(same.model, same.tokenizer, config=EngineConfig(pool_tokens=2048), prior=None) as own:
        prompt = [Segment(PROMPT[:40]), Segment(PROMPT[40:], "document")]
        settings: Any = {"max_new_tokens": 20, "ignore_eos": True}
        assert engine.generate(prompt, **settings).token_ids == own.generate(prompt, **settings).token_ids
        assert engine.namespace("somebody") == own.namespace("somebody")


def test_a_prior_may_be_a_file(tiny: TinyModel, host: ModelHost, tmp_path: Path) -> None:
    """With it an engine inside vLLM knows at once what one of its own had learned."""
    loaded = LoadedModel(tiny.model, tiny.tokenizer, "tiny", weights_digest(tiny.model), "folder")
    with make_engine(host, loaded, ConnectorSettings(prior=None)) as without:
        own, foreign = (Prior(name, {"a": (PAIR,)}) for name in (without.prior_model, "other"))
    file = tmp_path / "prior.json"
    write_prior(own, file, name="tiny")
    with make_engine(host, loaded, ConnectorSettings(prior=str(file))) as engine:
        assert tuple(engine.reuse.parts.book.prior) == (PAIR,)
    write_prior(foreign, file, name="tiny")
    with pytest.raises(AnchorFileForeign, match="measured on another model"):
        make_engine(host, loaded, ConnectorSettings(prior=str(file)))
    with pytest.raises(AnchorFileError, match="cannot be read"):
        make_engine(host, loaded, ConnectorSettings(prior=str(tmp_path / "none.json")))


def test_kv_is_the_models(tiny: TinyModel, engine: Engine) -> None:
    with torch.inference_mode():
        assert_close(kv_of(engine, list(PROMPT)), truth(tiny, PROMPT))
    assert engine.cache.num_cached([Segment(PROMPT)], tenant="probe") == 0


def test_a_prepared_prompt_lands_in_pages(tiny: TinyModel, engine: Engine, host: ModelHost, pages: TensorPages) -> None:
    preparations = Preparations(pages, host.turns, engine, None)
    preparations.begin(Prepare("r", PROMPT, MOVES, True))
    assert prepared(preparations, "r") == len(PROMPT)
    assert preparations.load(Load("r", BLOCKS, 0, 50))
    assert preparations.load(Load("r", BLOCKS, 50, 79))
    with torch.inference_mode():
        expected = truth(tiny, PROMPT[:79])
    assert_close(pages.read(BLOCKS, 0, 79), expected)
    assert float(pages.keys[:, pages.slots(BLOCKS, 79, 80)].abs().max()) == 0
    preparations.drop(Release("r"))
    assert not preparations.load(Load("r", BLOCKS, 0, 10))
    preparations.close()
    assert preparations.num_held == 0


def test_moved_text_equals_what_the_engine_moves(tiny: TinyModel, engine: Engine, host: ModelHost, pages: Any) -> None:
    preparations = Preparations(pages, host.turns, engine, None)
    for index in range(3):  # the first prompts teach how far off moved text is
        document = tuple(100 + (7 * index + 3 * each) % 150 for each in range(40))
        for begin in (PROMPT[:20], PROMPT[30:50]):
            token_ids = (*begin, *document, *PROMPT[60:])
            preparations.begin(Prepare("r", token_ids, MOVES, True))
            prepared(preparations, "r")
            (work,) = engine.contexts
            expected = kv_of_context(work)
            assert preparations.load(Load("r", BLOCKS, 0, 79))
            assert_close(pages.read(BLOCKS, 0, 79), ([k[:79] for k in expected[0]], [v[:79] for v in expected[1]]))
            preparations.drop(Release("r"))
            engine.wait_idle(60)
    assert any(status.num_approximated for status in engine.reuse.status())
    preparations.close()


def test_an_answer_becomes_a_source(engine: Engine, host: ModelHost, pages: TensorPages) -> None:
    preparations = Preparations(pages, host.turns, engine, None)
    preparations.begin(Prepare("r", PROMPT, MOVES, True))
    prepared(preparations, "r")
    answer = tuple(range(200, 230))
    preparations.drop(Release("r", (*answer, 2), "answer"))  # 2 ends answers, and is passed on to nobody
    asked = [Segment(PROMPT[:5]), Segment(answer, "other"), Segment(PROMPT[5:9])]
    wait_for(lambda: "no_source" not in engine.explain(asked, policy=MOVES.policy).plan.reasons)
    preparations.close()


@pytest.mark.parametrize("when", ["waiting", "computing", "done"])
def test_an_abort_at_any_moment_leaves_nothing(engine: Engine, host: ModelHost, pages: TensorPages, when: str) -> None:
    preparations, begun, go_on = Preparations(pages, host.turns, engine, None), threading.Event(), threading.Event()

    def before_pass() -> None:
        begun.set()
        go_on.wait(10)

    if when != "done":
        host.before_pass = before_pass
    with host.turns.host(1) if when == "waiting" else threading.Lock():
        preparations.begin(Prepare("r", PROMPT, MOVES, True))
        if when == "computing":
            begun.wait(10)
        elif when == "done":
            prepared(preparations, "r")
        preparations.drop(Release("r"))  # returns although nobody may compute now
    go_on.set()
    assert preparations.take_prepared() == {}
    preparations.close()
    assert not engine.contexts


def test_a_prompt_that_cannot_be_is_left_to_vllm(engine: Engine, host: ModelHost, pages: TensorPages) -> None:
    preparations = Preparations(pages, host.turns, engine, None)
    preparations.begin(Prepare("long", tuple(range(10, 200)) * 4, MOVES, True))  # longer than the model sees
    assert prepared(preparations, "long") == 0
    preparations.begin(Prepare("unknown", (10, 20, 10**6), RequestParams(reuse=ReuseParams()), True))
    assert prepared(preparations, "unknown") == 0
    preparations.close()


def test_what_a_tier_has(tiny: TinyModel, pages: TensorPages) -> None:
    shelf = Shelf()
    with torch.inference_mode():
        shelf.found = truth(tiny, PROMPT[:64])
    preparations = Preparations(pages, FairLock(), None, shelf)
    preparations.begin(Prepare("r", PROMPT, RequestParams(), False))
    assert prepared(preparations, "r") == 64
    assert preparations.load(Load("r", BLOCKS, 16, 64))
    assert_close(pages.read(BLOCKS, 16, 64), ([k[16:] for k in shelf.found[0]], [v[16:] for v in shelf.found[1]]))
    preparations.save(Save("r", BLOCKS, PROMPT[:64], 16, RequestParams()))
    assert_close(shelf.kept[PROMPT[16:64]], pages.read(BLOCKS, 16, 64))
    preparations.drop(Release("r"))
    preparations.close()


def test_a_tier_that_fails_or_hangs_costs_no_answer(pages: TensorPages) -> None:
    shelf = Shelf()
    shelf.error = OSError("gone")
    preparations = Preparations(pages, FairLock(), None, shelf)
    preparations.begin(Prepare("r", PROMPT, RequestParams(), False))
    assert prepared(preparations, "r") == 0
    shelf.may_answer.clear()
    preparations.begin(Prepare("slow", PROMPT, RequestParams(), False))
    preparations.wait(0.01)
    assert preparations.take_prepared() == {}
    preparations.drop(Release("slow"))
    shelf.may_answer.set()
    preparations.close()
