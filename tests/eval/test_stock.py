"""The stock side: its ways to the same answer agree, and agree with a loop over plain forward passes."""

from __future__ import annotations

import pytest
import torch

from eval.stock import Stock
from tests.tiny import TinyModel

PROMPT = [5, 80, 33, 120, 7, 64]


@pytest.fixture
def expected(tiny: TinyModel) -> tuple[int, ...]:
    """Greedy, with no cache at all."""
    tokens = list(PROMPT)
    for _ in range(4):
        tokens.append(int(tiny.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(PROMPT) :])


@pytest.mark.parametrize("num_rows", [1, 3])
def test_generate_from_the_prompt_and_from_a_cache(tiny: TinyModel, expected: tuple[int, ...], num_rows: int) -> None:
    stock = Stock(tiny.model)
    filled = stock.fill(PROMPT, num_rows=num_rows)

    whole = stock.generate(PROMPT, num_rows=num_rows, num_new_tokens=4)
    continued = stock.continue_from(filled, num_new_tokens=4)
    again = stock.continue_from(filled, num_new_tokens=4)

    assert whole.token_ids == continued.token_ids == again.token_ids == (expected,) * num_rows
    assert filled.cache.get_seq_length() == len(PROMPT) - 1
    for timed in (whole, continued):
        assert 0 < timed.decode_s < timed.total_s


def test_end_tokens_do_not_end(tiny: TinyModel, expected: tuple[int, ...]) -> None:
    """Every answer has the wanted length, whatever the model counts as an end."""
    tiny.model.generation_config.eos_token_id = expected[0]

    assert Stock(tiny.model).generate(PROMPT, num_rows=1, num_new_tokens=4).token_ids == (expected,)


def test_attention_is_sdpa(tiny: TinyModel) -> None:
    tiny.model.set_attn_implementation("eager")

    stock = Stock(tiny.model)

    assert tiny.model.config._attn_implementation == "sdpa"
    assert stock.prefill_s(PROMPT, use_cache=True) > 0
    assert stock.prefill_s(PROMPT, use_cache=False) > 0
