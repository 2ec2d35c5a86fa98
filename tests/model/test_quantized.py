"""Weights kept in 8 and 4 bits: the numbers, the modules, and models that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kvcomm import Engine
from kvcomm.errors import InvalidRequest, UnsupportedModel
from kvcomm.model.loading import load_model
from kvcomm.model.names import WeightsKind
from kvcomm.model.quantized import (
    GROUP,
    MAX_ROWS,
    QuantizedEmbedding,
    QuantizedLinear,
    from_bytes,
    from_nibbles,
    is_quantized,
    quantize,
    to_bytes,
    to_nibbles,
)
from kvcomm.model.rounding import measure_rounding
from kvcomm.model.weights import weights_digest
from tests.tiny import tiny_tokenizer

KINDS: tuple[WeightsKind, ...] = ("int8", "int4")
NUM_ROWS = (1, 2, 3, 4, 5, 8, MAX_ROWS, MAX_ROWS + 1, 40)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llama(*, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """Inputs in whole groups, but for nothing: hidden 64, MLP 128."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def dequantized(model: LlamaForCausalLM, original: LlamaForCausalLM) -> LlamaForCausalLM:
    """A stock model with the numbers that a quantized one stands for: an independent way to the same logits."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            original.get_submodule(name).weight.data = layer.dequantized(torch.float32)
        if isinstance(layer, QuantizedEmbedding):
            original.get_submodule(name).weight.data = layer.codes.float() * layer.scales[:, None]
    return original


def test_bytes_are_the_nearest() -> None:
    weight = random(6, 10)
    kept = to_bytes(weight)
    assert kept.codes.dtype == torch.int8
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (from_bytes(kept, torch.float32) - weight).abs()
    assert (error <= step / 2 * 1.001).all()
    assert error.max() > 0


def test_nibbles_are_the_nearest() -> None:
    weight = random(6, 4 * GROUP)
    kept = to_nibbles(weight)
    assert kept.codes.shape == (6, 2 * GROUP)
    groups = weight.view(6, -1, GROUP)
    step = (groups.amax(2) - groups.amin(2))[..., None] / 15
    error = (from_nibbles(kept, torch.float32) - weight).abs().view_as(groups)
    assert (error <= step / 2 * 1.001).all()
    assert error.max() > 0


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_constant_weight_comes_back(value: float) -> None:
    weight = torch.full((3, 2 * GROUP), value)
    for back in (from_bytes(to_bytes(weight), torch.float32), from_nibbles(to_nibbles(weight), torch.float32)):
        torch.testing.assert_close(back, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_a_layer_computes_with_the_dequantized_weight(num_rows: int, bits: int, dtype: torch.dtype) -> None:
    weight, bias, rows = random(37, 4 * GROUP), random(37, seed=1), random(num_rows, 4 * GROUP, seed=2).to(dtype)
    layer = QuantizedLinear((to_bytes if bits == 8 else to_nibbles)(weight), bias.to(dtype))
    assert (layer.num_bits, layer.in_features, layer.out_features) == (bits, 4 * GROUP, 37)
    expected = functional.linear(rows.float(), layer.dequantized(torch.float32), bias.to(dtype).float())
    got = layer(rows[None])
    assert got.dtype == dtype
    assert got.shape == (1, num_rows, 37)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got[0].float(), expected, rtol=tolerance, atol=tolerance * 10)


def test_a_row_depends_on_no_other_row() -> None:
    layer = QuantizedLinear(to_bytes(random(8, 64)), None)
    rows = random(7, 64, seed=3)
    louder = rows.clone()
    louder[1:] *= 1000
    torch.testing.assert_close(layer(rows)[0], layer(louder)[0], rtol=1e-6, atol=1e-6)


def test_gradients_go_through() -> None:
    layer = QuantizedLinear(to_nibbles(random(8, 2 * GROUP)), None)
    rows = random(2, 2 * GROUP).requires_grad_()
    layer(rows).sum().backward()
    torch.testing.assert_close(rows.grad[0], layer.dequantized(torch.float32).sum(0))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_with_the_dequantized_weights(kind: WeightsKind, tied: bool) -> None:
    model, token_ids = llama(tied=tied), torch.arange(3, 33)[None]
    quantize(model, kind)
    reference = dequantized(model, llama(tied=tied))
    for length in (5, 30):
        expected = reference(input_ids=token_ids[:, :length]).logits
        torch.testing.assert_close(model(input_ids=token_ids[:, :length]).logits, expected, rtol=1e-4, atol=1e-4)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(token_ids, **greedy), reference.generate(token_ids, **greedy))


@pytest.mark.parametrize("kind", KINDS)
def test_the_former_weights_are_gone_and_tied_codes_are_shared(kind: WeightsKind) -> None:
    model = llama(tied=True)
    quantize(model, kind)
    assert is_quantized(model)
    assert not any(type(layer) in (nn.Linear, nn.Embedding) for layer in model.modules())
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()} == {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
    }
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.codes.data_ptr() == embedding.codes.data_ptr()
    assert {layer.num_bits for layer in model.model.modules() if isinstance(layer, QuantizedLinear)} == {int(kind[3:])}
    assert head.num_bits == 8


def test_layers_that_four_bits_do_not_fit_keep_eight() -> None:
    model = nn.Sequential(nn.Linear(GROUP, 4))
    model.get_output_embeddings = model.get_input_embeddings = lambda: None
    model.device = torch.device("cpu")
    quantize(model, "int4")
    assert model[0].num_bits == 8


def test_a_model_without_linear_layers_is_refused() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = nn.Identity(), nn.Identity()
    with pytest.raises(UnsupportedModel, match="no linear layers"):
        quantize(model, "int8")


def test_identities_differ() -> None:
    digests = [weights_digest(llama())]
    for kind in KINDS:
        for _ in range(2):
            model = llama()
            quantize(model, kind)
            digests.append(weights_digest(model))
    assert digests[1] == digests[2]
    assert digests[3] == digests[4]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_is_exact_with_them_and_keeps_their_kv_apart(kind: WeightsKind) -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    quantize(model, kind)
    reference = dequantized(model, llama())
    with Engine(llama(), tokenizer) as plain, Engine(model, tokenizer) as engine, Engine(reference, tokenizer) as same:
        assert len({plain.namespace(), engine.namespace(), same.namespace()}) == 3
        text = "The quick brown fox jumps over the lazy dog."
        wanted = same.context(text).generate(max_new_tokens=12, temperature=0.0).token_ids
        cold = engine.context(text).generate(max_new_tokens=12, temperature=0.0)
        warm = engine.context(text).generate(max_new_tokens=12, temperature=0.0)
        assert cold.token_ids == warm.token_ids == wanted
        assert warm.usage.exact_tokens > 0


def test_a_snapshot_of_other_weights_is_refused(tmp_path: Path) -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    quantize(model, "int8")
    with Engine(llama(), tokenizer) as plain, Engine(model, tokenizer) as engine:
        plain.context("The quick brown fox.").save(tmp_path / "c.safetensors")
        with pytest.raises(Exception, match="belongs to another namespace"):
            engine.restore(tmp_path / "c.safetensors")


def test_adapters_are_refused(tmp_path: Path) -> None:
    wrapped = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.save_pretrained(tmp_path)
    model = llama()
    quantize(model, "int8")
    with Engine(model, tiny_tokenizer()) as engine:
        with pytest.raises(InvalidRequest, match=r"kept in fewer bits.*load the model without"):
            engine.adapters.load("tone", tmp_path)
        assert engine.adapters.names == ()


@pytest.mark.parametrize("name", ["int7", "", "INT8"])
def test_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="choose among int8, int4"):
        load_model("smollm2-135m", weights=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_model_answers(kind: WeightsKind) -> None:
    with Engine.load("smollm2-135m", weights=kind) as engine:
        assert "Paris" in engine.context("The capital of France is").generate(max_new_tokens=8, temperature=0.0).text


@pytest.mark.slow
def test_rounding_of_the_real_model() -> None:
    loaded = load_model("smollm2-135m")
    found = measure_rounding(loaded, "int8")
    assert found.num_tokens > 400
    assert 0 < found.mean_kl < 0.02
    assert found.mean_kl <= found.max_kl
    assert found.same_top > 0.9
    assert abs(found.loss - found.own_loss) < 0.02
    assert found.num_bytes < 0.3 * found.own_bytes
    assert is_quantized(loaded.model)
