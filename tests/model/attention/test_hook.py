"""What calls of somebody else get while the model's attention setting points here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcomm.errors import UnsupportedModel
from kvcomm.model.attention import hook
from kvcomm.model.families import random_model
from tests.model.architectures import FAMILIES

NUM_TOKENS = 40


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "llama", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_call_without_a_step_is_the_stock_one(name: str, padded: bool) -> None:
    """Another thread may call the model while a pass has its setting."""
    model = random_model(FAMILIES[name].config())
    token_ids = torch.arange(2 * NUM_TOKENS).view(2, -1) % 90 + 3
    mask = torch.ones_like(token_ids)
    if padded:
        mask[0, :7] = 0  # on the left, as for generation

    def logits() -> Tensor:
        with torch.inference_mode():
            given: Tensor = model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits
        return given[mask.bool()]

    expected = logits()
    hook.register()
    before = model.config._attn_implementation
    model.set_attn_implementation(hook.IMPLEMENTATION)
    got = logits()
    model.set_attn_implementation(before)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_sinks_that_are_not_one_for_each_head_are_refused() -> None:
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    module = torch.nn.Module()
    with pytest.raises(UnsupportedModel, match=r"Module has sinks of shape \[1, 4\], not one for each head"):
        hook.attention(module, query, key, key, None, kvcomm_step=_never, s_aux=torch.zeros(1, 4))


def _never(*_: object, **__: object) -> Tensor:
    raise AssertionError("nothing is to be attended")
