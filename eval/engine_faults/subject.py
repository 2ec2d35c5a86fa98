"""The model under test: a random two-layer Llama, its tokenizer, its adapters and edits, and stock copies to compare.

What can be changed about the weights is one `Weights` value: the active LoRA adapter and whether one layer was edited
in place. For every value there is a stock model of its own whose weights are computed here from the base and the
adapters' factors, so that what an answer is held against shares no module, no cache and no code of adapters with what
gave it.
"""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_CONTEXT = 512
VOCAB_SIZE = 300
SPECIAL_TOKENS = ("<|unknown|>", "<|start|>", "<|end|>")
TRAINED_ON = (
    "Two agents count apples: how many are left? One of them says three, the other says four.",
    "A tool call costs time; an answer that was cached costs none.",
)
ADAPTERS = ("first", "second")
LORA_RANK = 4
LORA_ALPHA = 16
ADAPTED = ("q_proj", "v_proj", "down_proj")
EDIT_FACTOR = 1.5


class Weights(NamedTuple):
    """Which weights are in force; `adapter` None is the base model."""

    adapter: str | None = None
    is_edited: bool = False


class Subject:
    """One model with everything that may be done to its weights.

    Attributes:
        model: what an engine gets.
        tokenizer: the same, without faults.
        weights: in force now.
    """

    def __init__(self, seed: int, *, with_adapters: bool) -> None:
        self.tokenizer = make_tokenizer()
        self.model = make_llama(len(self.tokenizer), seed)
        self.weights = Weights()
        self._stock: dict[Weights, LlamaForCausalLM] = {Weights(): copy.deepcopy(self.model)}
        self._peft: Any = _with_adapters(self.model, seed) if with_adapters and has_peft() else None
        self._unedited = _edited_weight(self.model).detach().clone()

    @property
    def adapters(self) -> tuple[str | None, ...]:
        """Adapters that can be activated, None for the base model."""
        return (None,) if self._peft is None else (None, *ADAPTERS)

    def activate(self, adapter: str | None) -> None:
        """Switch adapters as PEFT's users do. Nothing may run on the model meanwhile."""
        if self._peft is not None:
            if adapter is None:
                self._peft.base_model.disable_adapter_layers()
            else:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(adapter)
            self.weights = self.weights._replace(adapter=adapter)

    @torch.no_grad()
    def edit(self) -> None:
        """Change one weight in place, or change it back to the last bit."""
        is_edited = not self.weights.is_edited
        _edited_weight(self.model).copy_(self._unedited * EDIT_FACTOR if is_edited else self._unedited)
        self.weights = self.weights._replace(is_edited=is_edited)

    def reset(self) -> None:
        """Back to the base model, unedited."""
        self.activate(None)
        if self.weights.is_edited:
            self.edit()

    def stock(self, weights: Weights) -> LlamaForCausalLM:
        """A plain Llama with these weights, which nobody else uses."""
        if weights not in self._stock:
            self._stock[weights] = self._make_stock(weights)
        return self._stock[weights]

    @torch.no_grad()
    def _make_stock(self, weights: Weights) -> LlamaForCausalLM:
        stock = copy.deepcopy(self._stock[Weights()])
        if weights.is_edited:
            _edited_weight(stock).mul_(EDIT_FACTOR)
        if weights.adapter is not None:
            targets = dict(stock.named_modules())
            for name, module in self.model.named_modules():
                if hasattr(module, "lora_A"):
                    down, up = (factors[weights.adapter].weight for factors in (module.lora_A, module.lora_B))
                    targets[name].weight += up @ down * (LORA_ALPHA / LORA_RANK)
        return stock


def has_peft() -> bool:
    """Whether adapters can be tried here."""
    return find_spec("peft") is not None


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text encodes and decodes unchanged, and most tokens are single bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TRAINED_ON, trainer)
    unknown, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unknown, bos_token=start, eos_token=end, pad_token=end
    )


def make_llama(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Random weights, float32, grouped heads; spread so widely that tokens rarely tie."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=MAX_CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def _edited_weight(model: nn.Module) -> Tensor:
    weight = model.get_submodule("model.layers.0.self_attn.k_proj").weight
    assert isinstance(weight, Tensor)
    return weight


def _with_adapters(model: LlamaForCausalLM, seed: int) -> Any:
    """PEFT's view of the model, which it changes in place; the base model is in force."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=list(ADAPTED), lora_dropout=0.0, init_lora_weights=False
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that has been renamed
        torch.manual_seed(seed + 1)
        adapted = get_peft_model(model, config, adapter_name=ADAPTERS[0])
        for name in ADAPTERS[1:]:
            adapted.add_adapter(name, config)
    adapted.base_model.disable_adapter_layers()
    return adapted.eval()
