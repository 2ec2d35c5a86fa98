"""A model that recites: it answers with the text that its chat template puts at the end of the prompt.

A small model calls no tool by itself. This one calls whenever its template (`reciter.jinja`) says so, and all the rest
is as ever: the tokenizer, real keys and values in pages, logits, grammars, parsers and streams.

A prompt ends with `<|recite|>TEXT<|speak|>`. The first layer finds the latest of both marks, the second the token that
is next: as far behind `<|recite|>` as the current one is behind `<|speak|>`. Behind the text it ends its answer. So an
answer is a function of keys and values alone, and right only if every one of them is in its place. Where a grammar
forbids the recited token, the logits prefer what closes something, so that an answer ends soon whatever it has to be.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcomm import Engine, EngineConfig

RECITE, SPEAK = "<|recite|>", "<|speak|>"
TEMPLATE = Path(__file__).with_name("reciter.jinja")

MAX_CONTEXT = 32_768
NUM_CLOCKS = 16
DIM = 2 * NUM_CLOCKS
"""Of periods 2, 4, ... 65,536: two positions of a context differ in at least one by half a turn."""

SURENESS = 50.0
"""Nats by which attention prefers the wanted token, and logits the recited one."""

PREFERRED = ("}", "]", '"', ",", ":", "0", "true")
"""Where the recited token is forbidden, the first of these that is not."""


class ReciterConfig(PreTrainedConfig):
    """Two layers, and the ids of the marks."""

    model_type = "reciter"

    def __init__(self, vocab_size: int = 300, recite_id: int = 0, speak_id: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.vocab_size = vocab_size
        self.recite_id, self.speak_id = recite_id, speak_id
        self.hidden_size = DIM
        self.num_hidden_layers = 2
        self.num_attention_heads = self.num_key_value_heads = 2
        self.max_position_embeddings = MAX_CONTEXT


class Attention(nn.Module):
    """One call of the attention function that is in force."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: ReciterConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        """All [num_heads, num_tokens, DIM]; returns [num_tokens, num_heads, DIM]."""
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended: Tensor = attend(
            self, query[None], key[None], value[None], None, scaling=1.0, dropout=0.0, **settings
        )[0]
        return attended[0]


class Reciter(PreTrainedModel, GenerationMixin):
    """The model; float32."""

    config_class = ReciterConfig
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config: ReciterConfig) -> None:
        super().__init__(config)
        self.marks, self.recited = Attention(config, 0), Attention(config, 1)
        self.lm_head = nn.Linear(1, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Its weights are what each token gets where nothing is recited."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        **settings: Any,
    ) -> CausalLMOutput:
        """Logits [1, num_rows, vocab_size] of token ids [1, num_tokens]."""
        places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        token_ids, at = input_ids[0], places[0].float()
        wanted, speaks, found = self._where(token_ids, at, **settings)
        ids = self.recited(
            SURENESS * clocks(wanted)[None], clocks(at)[None], _padded(token_ids.float())[None], **settings
        )
        next_ids = torch.where(wanted < speaks, ids[:, 0, 0].round().long(), self.config.eos_token_id)
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        next_ids, found = next_ids[rows], found[rows]
        logits = self.lm_head(torch.ones(len(next_ids), 1)).contiguous()
        logits[found, next_ids[found].clamp(0, self.config.vocab_size - 1)] += SURENESS
        return CausalLMOutput(logits=logits[None])

    def _where(self, token_ids: Tensor, at: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """For each row: where its next token stands, where the text ends, and whether there is one."""
        is_mark = torch.stack([token_ids == self.config.recite_id, token_ids == self.config.speak_id])
        # Later marks outweigh earlier ones, and what is no mark does not count.
        key = _padded(is_mark * (2 + at) * SURENESS)
        value = _padded(at.expand(2, -1), is_mark.float())
        seen = self.marks(_padded(torch.ones_like(at).expand(2, -1)), key, value, **settings)
        (start, speaks), found = seen[..., 0].round().T, seen[..., 1].amin(-1) > 0.5
        return start + 1 + at - speaks, speaks, found


def clocks(positions: Tensor) -> Tensor:
    """[num_tokens] -> [num_tokens, DIM]: where each clock's hand is; equal positions agree the most."""
    turns = positions[:, None] / 2.0 ** torch.arange(1, NUM_CLOCKS + 1)
    angles = 2 * torch.pi * (turns - turns.floor())  # the part of a turn is exact
    return torch.cat([angles.cos(), angles.sin()], -1)


def _padded(*channels: Tensor) -> Tensor:
    """Channels, all of one shape, as the first of DIM."""
    stacked = torch.stack(channels, -1)
    return functional.pad(stacked, (0, DIM - len(channels)))


class Reciting(NamedTuple):
    """A model that recites, and its tokenizer."""

    model: Reciter
    tokenizer: PreTrainedTokenizerBase


def make_reciter(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> Reciting:
    """A model over a tokenizer, which is copied; `template`: a chat template with both marks at its end [our own]."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [RECITE, SPEAK]})
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8") if template is None else template
    recite, speak = tokenizer.convert_tokens_to_ids([RECITE, SPEAK])
    end = tokenizer.eos_token_id
    model = Reciter(
        ReciterConfig(vocab_size=len(tokenizer), recite_id=recite, speak_id=speak, bos_token_id=end, eos_token_id=end)
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(_preferences(tokenizer)[:, None])
    return Reciting(model.eval(), tokenizer)


def make_engine(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Engine:
    """An engine that recites; `settings` of its `EngineConfig`."""
    made = make_reciter(tokenizer)
    return Engine(made.model, made.tokenizer, config=EngineConfig(**{"pool_tokens": 2 * MAX_CONTEXT, **settings}))


def _preferences(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[vocab_size]: small numbers that fall from token to token, larger ones for what closes something."""
    preferences = torch.linspace(1, 0, len(tokenizer))
    for rank, text in enumerate(reversed(PREFERRED)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            preferences[ids[0]] = 5 + rank
    preferences[tokenizer.eos_token_id] = 5 + len(PREFERRED)
    return preferences
