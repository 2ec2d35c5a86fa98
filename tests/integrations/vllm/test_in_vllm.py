"""kvcomm inside a real vLLM: a tiny model, vLLM's engine in this process. Skipped where there is no vLLM."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcomm import ReusePolicy
from kvcomm.integrations.vllm import adapter, layout, needed, plugin
from kvcomm.memory.segments import Segment
from kvcomm.reuse.beginnings import MovedBeginnings
from tests.integrations.vllm.in_process import set_environment
from tests.tiny import tiny_tokenizer

set_environment()
vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: scripts/setup-env --integration vllm")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]

BOUND = {"max_divergence": 5.0, "confidence": 0.5, "audit": 0.0}
BEGINNINGS = {"reader": 20, "critic": 45}


def ids(seed: int, num: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(10, 290) for _ in range(num)]


class Server:
    """vLLM with kvcomm and a tier, and how it is asked."""

    def __init__(self, folder: Path) -> None:
        model, tokenizer = folder / "model", tiny_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).eval().save_pretrained(model)
        tokenizer.save_pretrained(model)
        plugin.register()  # as vLLM does where kvcomm is installed
        self.llm = vllm.LLM(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=128,  # prompts come in chunks
            enable_chunked_prefill=True,
            kv_transfer_config=vllm.config.KVTransferConfig(
                kv_connector="KVCommConnector",  # named by the plugin, as is the worker
                kv_role="kv_both",
                kv_connector_extra_config={"tier": str(folder / "tier")},
            ),
        )
        self.inside = adapter.inside(self.llm)
        self.preparations = self.inside.worker.preparations
        self.engine = self.preparations.engine
        self.num_free = self.inside.num_free_blocks()

    def prompt(self, reader: str, seed: int) -> tuple[list[int], list[dict[str, Any]]]:
        begin, document, end = ids(len(reader), BEGINNINGS[reader]), ids(seed, 180), ids(-len(reader), 15)
        at = len(begin)
        span = {"start": at, "end": at + len(document), "slot": "document", "kind": "dynamic"}
        return [*begin, *document, *end], [span]

    def sampling(self, params: dict[str, Any] | None, num_new: int) -> Any:
        extra = None if params is None else {"kv_transfer_params": {"kvcomm": params}}
        return vllm.SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, extra_args=extra)

    def ask(
        self, token_ids: list[int], params: dict[str, Any] | None = None, num_new: int = 12, salt: str | None = None
    ) -> tuple[list[int], dict[str, Any]]:
        prompt = {"prompt_token_ids": token_ids} | ({} if salt is None else {"cache_salt": salt})
        (output,) = self.llm.generate([prompt], self.sampling(params, num_new), use_tqdm=False)
        return list(output.outputs[0].token_ids), (output.kv_transfer_params or {}).get("kvcomm", {})

    def cold(self, token_ids: list[int], num_new: int = 12) -> list[int]:
        return self.ask(token_ids, num_new=num_new, salt=uuid.uuid4().hex)[0]

    def moved(self, reader: str, seed: int) -> tuple[list[int], dict[str, Any]]:
        token_ids, spans = self.prompt(reader, seed)
        found = self.ask(token_ids, {"segments": spans, "reuse": BOUND, "save": False})
        self.settle()
        return found

    def teach(self) -> None:
        """Until text is moved for the critic."""
        for seed in range(100, 110):
            self.moved("reader", seed)
            if self.moved("critic", seed)[1]["aligned_tokens"]:
                return
        raise AssertionError("nothing is moved")

    def settle(self) -> None:
        self.inside.drain()
        self.engine.wait_idle(60)
        self.preparations.shelf.tier.queue.flush(30)

    def check(self) -> None:
        """Nothing is held for anybody."""
        self.settle()
        assert self.inside.connector.ledger.num_requests == 0
        assert self.preparations.num_held == 0
        assert self.inside.num_free_blocks() == self.num_free
        self.engine.check_integrity()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("vllm"))
    server.teach()
    yield server
    server.check()


@pytest.fixture
def none_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is moved every time: otherwise a prompt that is sent again is computed."""
    monkeypatch.setattr(MovedBeginnings, "back_until", lambda *_, **__: 0)


def test_this_vllm_is_known() -> None:
    assert needed.missing_names() == []
    assert needed.look().serves


def test_both_kernels_agree(server: Server) -> None:
    assert server.inside.worker.difference <= layout.EXACT_TOLERANCE


@pytest.mark.usefixtures("none_comes_back")
def test_moved_text_is_what_kvcomms_engine_moves(server: Server) -> None:
    token_ids, spans = server.prompt("critic", 200)
    server.moved("reader", 200)
    answer, told = server.moved("critic", 200)
    assert told["aligned_tokens"] == 180
    assert told["loaded_tokens"] == len(token_ids) - 1
    (span,) = spans
    start, end = span["start"], span["end"]
    parts = ((token_ids[:start], None), (token_ids[start:end], "document"), (token_ids[end:], None))
    segments = [Segment(tuple(part), name) for part, name in parts]
    policy = ReusePolicy(5.0, 0.5, audit=0.0)
    own = server.engine.generate(segments, policy=policy, max_new_tokens=12, ignore_eos=True)
    assert own.usage.aligned_tokens == 180
    assert list(own.token_ids) == answer


def test_a_prompt_that_comes_back_is_computed_and_then_exact(server: Server) -> None:
    token_ids, _ = server.prompt("critic", 250)
    server.moved("reader", 250)
    assert server.moved("critic", 250)[1]["aligned_tokens"] == 180
    expected = server.cold(token_ids)
    answer, told = server.moved("critic", 250)
    assert (answer, told["aligned_tokens"], told["reasons"]["comes_back"]) == (expected, 0, 180)
    answer, told = server.moved("critic", 250)
    assert (answer, told["exact_tokens"]) == (expected, len(token_ids) - 1)


def test_plain_requests_never_read_what_was_moved(server: Server) -> None:
    num_changed = 0
    for seed in range(300, 306):
        token_ids, _ = server.prompt("critic", seed)
        expected = server.cold(token_ids)
        server.moved("reader", seed)
        answer, told = server.moved("critic", seed)
        assert told["aligned_tokens"]
        num_changed += answer != expected
        for _ in range(2):
            assert server.ask(token_ids)[0] == expected
        server.settle()
    assert num_changed  # else nothing could have shown


def test_without_a_salt_they_would(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail."""
    monkeypatch.setattr(adapter, "isolate", lambda request: None)
    wrong = 0
    for seed in range(320, 326):
        token_ids, _ = server.prompt("critic", seed)
        expected = server.cold(token_ids)
        server.moved("reader", seed)
        server.moved("critic", seed)
        wrong += server.ask(token_ids, {"save": False})[0] != expected
        server.settle()
    server.llm.reset_prefix_cache()
    assert wrong


def test_an_exact_prefix_comes_from_the_tier(server: Server) -> None:
    token_ids = ids(400, 600)
    expected = server.ask(token_ids)[0]
    server.settle()
    assert server.llm.reset_prefix_cache()
    answer, told = server.ask(token_ids, {})
    assert answer == expected
    assert told["tier_tokens"] == told["loaded_tokens"] == 512


def test_what_cannot_be_loaded_is_computed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = ids(401, 600)
    expected = server.ask(token_ids)[0]
    server.settle()

    def fail(load: Any) -> bool:
        raise OSError("gone")

    for lost in (fail, lambda load: False):
        assert server.llm.reset_prefix_cache()
        monkeypatch.setattr(server.preparations, "load", lost)
        assert server.ask(token_ids)[0] == expected
        server.settle()


@pytest.mark.usefixtures("none_comes_back")
@pytest.mark.parametrize("seed", range(4))
def test_storms(server: Server, seed: int) -> None:
    """Many requests at once; some are aborted, all are preempted now and then."""
    dice, engine = random.Random(seed), server.llm.llm_engine
    asked: dict[str, tuple[list[int], dict[str, Any] | None]] = {}
    for each in range(500, 504):
        token_ids, spans = server.prompt("critic", each)
        server.moved("reader", each)
        asked[f"moved-{each}"] = (token_ids, {"segments": spans, "reuse": BOUND, "save": False})
        asked[f"plain-{each}"] = (token_ids, None)
    expected = {name: server.ask(*each)[0] for name, each in asked.items()}
    server.settle()
    for name, (token_ids, params) in asked.items():
        engine.add_request(name, {"prompt_token_ids": token_ids}, server.sampling(params, 12))
    answers: dict[str, list[int]] = {}
    aborted: set[str] = set()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished and output.request_id not in aborted:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        if dice.random() < 0.2:
            with suppress(RuntimeError):  # all are preempted, but blocks that are being saved stay
                engine.reset_prefix_cache(reset_running_requests=True)
        living = sorted(asked.keys() - answers.keys() - aborted)
        if living and seed % 2 and dice.random() < 0.1:
            aborted.add(chosen := dice.choice(living))
            engine.abort_request([chosen])
    assert answers.keys() | aborted == asked.keys()
    assert answers == {name: expected[name] for name in answers}
    server.check()


@pytest.mark.parametrize("params", [7, {"segments": [{"start": 5, "end": 5000}]}, {"unknown": 1}])
def test_bad_parameters_cost_nobody_an_answer(server: Server, params: Any) -> None:
    token_ids = ids(600, 50)
    answer, told = server.ask(token_ids, params)
    assert answer == server.cold(token_ids)
    assert "kvcomm" in told["error"]


def test_a_clients_own_salt_is_left_alone(server: Server) -> None:
    token_ids = ids(601, 600)
    expected = server.cold(token_ids)
    server.settle()
    _, told = server.ask(token_ids, salt="mine")
    assert told == {}
    assert server.cold(token_ids) == expected
