"""Transformers alone: greedy answers, times to the first token, kept prefixes, and forced continuations."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from eval.baselines.stock import StockServer
from eval.tasks.modes import DENSE, HEAL, KVCOMM, MODES, make_modes
from kvcomm import ReusePolicy
from kvcomm.errors import InvalidRequest
from kvcomm.lab.methods import METHODS
from kvcomm.memory.segments import Segment
from tests.tiny import TinyModel, tiny_model

ROLE, TEXT, TAIL = tuple(range(20, 50)), tuple(range(60, 85)), (30, 31, 32)
PROMPT = [Segment(ROLE[:10]), Segment(ROLE[10:]), Segment(TEXT, "question"), Segment(TAIL)]
TOKENS = [*ROLE, *TEXT, *TAIL]


@pytest.fixture(scope="module")
def shared() -> TinyModel:
    return tiny_model()


def server(shared: TinyModel, *, keeps_prefixes: bool, ends: tuple[int, ...] = ()) -> StockServer:
    """With a clock that goes on by one second every time somebody looks."""
    ticks = count()
    return StockServer(shared.model, ends, keeps_prefixes=keeps_prefixes, clock=lambda: float(next(ticks)))


@torch.no_grad()
def greedy(shared: TinyModel, num_tokens: int) -> list[int]:
    """From scratch for every token."""
    token_ids = list(TOKENS)
    for _ in range(num_tokens):
        token_ids.append(int(shared.model(torch.tensor([token_ids]), use_cache=False).logits[0, -1].argmax()))
    return token_ids[len(TOKENS) :]


@pytest.mark.parametrize("keeps_prefixes", [False, True])
def test_answers_are_greedy(shared: TinyModel, keeps_prefixes: bool) -> None:
    stock = server(shared, keeps_prefixes=keeps_prefixes)
    for _ in range(2):  # the second time from the prefix as the first one has left it
        found = stock.answer(PROMPT, 12, ignore_eos=True)
        assert list(found.token_ids) == greedy(shared, 12)
        assert found.num_cached == (len(ROLE) if keeps_prefixes else 0)


def test_an_end_token_ends_and_is_no_part_of_the_answer(shared: TinyModel) -> None:
    expected = greedy(shared, 12)
    end = next(token for place, token in enumerate(expected) if place > 2 and token not in expected[:place])
    found = server(shared, keeps_prefixes=False, ends=(end,)).answer(PROMPT, 12)
    assert list(found.token_ids) == expected[: expected.index(end)]
    assert len(server(shared, keeps_prefixes=False, ends=(end,)).answer(PROMPT, 12, ignore_eos=True).token_ids) == 12


def test_times_are_from_the_call(shared: TinyModel) -> None:
    """One look at the clock before, one at the prompt, one at the first token, one at the end."""
    found = server(shared, keeps_prefixes=True).answer(PROMPT, 5, ignore_eos=True)
    assert (found.ttft_s, found.total_s) == (2.0, 3.0)


def test_first_logits_are_those_of_the_prompt(shared: TinyModel) -> None:
    for keeps_prefixes in (False, True):
        found = server(shared, keeps_prefixes=keeps_prefixes).answer(PROMPT, 3, ignore_eos=True)
        with torch.no_grad():
            expected = shared.model(torch.tensor([TOKENS])).logits[0, -1]
        torch.testing.assert_close(found.first_logits, expected, atol=1e-4, rtol=0)


def test_forced_continuations(shared: TinyModel) -> None:
    continuation = greedy(shared, 6)
    with torch.no_grad():
        logits = shared.model(torch.tensor([[*TOKENS, *continuation[:-1]]])).logits[0, -6:]
    for keeps_prefixes in (False, True):
        found = server(shared, keeps_prefixes=keeps_prefixes).log_probs(PROMPT, continuation)
        torch.testing.assert_close(found, logits.log_softmax(-1), atol=1e-4, rtol=0)


def test_kept_prefixes_take_memory(shared: TinyModel) -> None:
    bare, kept = (server(shared, keeps_prefixes=keeps).answer(PROMPT, 4, ignore_eos=True) for keeps in (False, True))
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels, float32
    assert bare.kv_bytes == (len(TOKENS) + 3) * token_bytes  # the last token is never read
    assert kept.kv_bytes - bare.kv_bytes == len(ROLE) * token_bytes


def test_a_prompt_without_slots_has_no_static_beginning(shared: TinyModel) -> None:
    found = server(shared, keeps_prefixes=True).answer([Segment(tuple(TOKENS))], 4, ignore_eos=True)
    assert found.num_cached == 0
    assert list(found.token_ids) == greedy(shared, 4)


def test_modes() -> None:
    policy = ReusePolicy(0.02, 0.95)
    together = [name for name in MODES if name != HEAL]
    modes = {mode.name: mode for mode in make_modes(",".join(reversed(together)), policy)}
    assert next(iter(modes)) == DENSE
    assert modes.keys() == set(together)
    assert {name for name, mode in modes.items() if mode.moves} == {KVCOMM, *METHODS}
    assert {name for name, mode in modes.items() if mode.is_stock} == {"stock", "stock_prefix"}
    assert {name for name, mode in modes.items() if mode.bound} == {KVCOMM}
    assert modes[KVCOMM].bound == pytest.approx((0.02, 0.05))
    assert all(mode.describe()["served by"] in ("engine", "transformers") for mode in modes.values())
    assert [mode.name for mode in make_modes("paper, paper", policy)] == [DENSE, "paper"]
    assert not make_modes(KVCOMM, ReusePolicy.exact())[1].moves
    (healing,) = (mode for mode in make_modes(HEAL, policy) if mode.name == HEAL)
    assert healing.moves
    with pytest.raises(InvalidRequest, match=HEAL):
        make_modes(f"{KVCOMM},{HEAL}", policy)
    with pytest.raises(InvalidRequest, match="unknown mode 'vllm'"):
        make_modes("vllm", policy)
