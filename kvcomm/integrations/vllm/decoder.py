"""A model that lives elsewhere, as a decoder that kvcomm's engine can run.

The host (vLLM) has the weights and computes everything but attention; each layer's attention is handed to the step of
the pass, so runs, pages and the rest of kvcomm work on it unchanged: its geometry is measured like any model's. Knows
nothing of vLLM; the host is whatever fulfils `Host`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from kvcomm.model.attention.contract import AttentionStep

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Of a layer: its id, query [num_tokens, num_heads, dim], key and value [num_tokens, num_kv_heads, dim], the scale of
the scores -> [num_tokens, num_heads, dim]."""


class Host(Protocol):
    """A model in another program. One pass at a time."""

    @property
    def device(self) -> torch.device:
        """Where tokens are wanted and results are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys, values and logits."""
        ...

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Compute [num_tokens] ids at [num_tokens] positions -> [num_tokens, hidden]; `attend` once for each layer."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden] -> [num_rows, vocab_size]."""
        ...


class HostedDecoder(nn.Module):
    """Looks like a transformers decoder, as far as kvcomm's engine looks.

    Attributes:
        config, generation_config: of the model as transformers has them.
    """

    def __init__(self, host: Host, like: PreTrainedModel) -> None:
        """Make one.

        Args:
            like: the same model of transformers, whose weights are not used; its rotary modules say how keys turn.
        """
        super().__init__()
        # Not a child: how its modules are named and packed is the host's matter.
        self._host = [host]
        self.config = like.config
        self.generation_config = like.generation_config
        self.rotary = nn.ModuleList(_rotary_modules(like))
        vocab_size = like.get_output_embeddings().weight.shape[0]
        self._head = [nn.Embedding(vocab_size, 1, device="meta")]
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the host computes."""
        return self._host[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys, values and logits."""
        return self._host[0].dtype

    def get_output_embeddings(self) -> nn.Module:
        """Only its shape means something."""
        return self._head[0]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        *,
        logits_to_keep: Tensor | None = None,
        kvcomm_step: AttentionStep | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Compute tokens [1, num_tokens]; without a step, causally among themselves.

        Returns:
            logits [1, num_rows, vocab_size] of the rows to keep, or of all.
        """
        host = self._host[0]
        token_ids = input_ids[0]
        positions = torch.arange(len(token_ids), device=host.device) if position_ids is None else position_ids[0]
        hidden = host.hidden(token_ids, positions, _causal if kvcomm_step is None else _by_step(kvcomm_step))
        if logits_to_keep is not None:
            hidden = hidden[logits_to_keep]
        vocab_size = self._head[0].num_embeddings
        if not len(hidden):
            return CausalLMOutput(logits=hidden.new_empty(1, 0, vocab_size))
        return CausalLMOutput(logits=host.logits(hidden)[None, :, :vocab_size])


def _by_step(step: AttentionStep) -> Attend:
    def attend(layer_id: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        queries, keys, values = (each.transpose(0, 1)[None] for each in (query, key, value))
        return step(layer_id, queries, keys, values, scale=scale, sliding_window=None)[0]

    return attend


def _causal(layer_id: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    del layer_id
    queries, keys, values = (each.transpose(0, 1)[None] for each in (query, key, value))
    attended = functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)


def _rotary_modules(model: nn.Module) -> Iterable[nn.Module]:
    """Modules that hold rotary frequencies themselves."""
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            yield module
