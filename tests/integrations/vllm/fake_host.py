"""Stand-ins for vLLM where it is not imported: a host with a transformers model, and pages as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcomm.integrations.vllm.decoder import Attend
from kvcomm.integrations.vllm.fair_lock import FairLock
from kvcomm.model.attention import hook


class ModelHost:
    """A transformers model as a host: its attention is handed on, layer by layer, in vLLM's shapes."""

    def __init__(self, model: PreTrainedModel, turns: FairLock | None = None) -> None:
        hook.register()
        self.model = model
        self.turns = turns or FairLock()
        self.num_passes = 0
        self.before_pass: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        def step(layer_id: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, **_: Any) -> Tensor:
            return attend(layer_id, *(each[0].transpose(0, 1) for each in (query, key, value)), scale)[None]

        with self.turns.guest(), torch.inference_mode(), hook.switched(hook.configs_of(self.model)):
            self.before_pass()
            self.num_passes += 1
            decoder = self.model.model
            found: Tensor = decoder(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                **{hook.STEP_KEYWORD: step},
            ).last_hidden_state[0]
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self.model.lm_head(hidden)
        return found


class TensorPages:
    """Pages of a few layers: per layer [num_slots, num_kv_heads, dim], keys and values."""

    def __init__(self, num_blocks: int, block_size: int, num_layers: int, num_kv_heads: int, dim: int) -> None:
        shape = (num_layers, num_blocks * block_size, num_kv_heads, dim)
        self.block_size = block_size
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def slots(self, blocks: Sequence[int], start: int, end: int) -> Tensor:
        at = torch.arange(start, end)
        return torch.tensor(list(blocks))[at // self.block_size] * self.block_size + at % self.block_size

    def read(self, blocks: Sequence[int], start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        slots = self.slots(blocks, start, end)
        return [each[slots] for each in self.keys], [each[slots] for each in self.values]

    def write(self, blocks: Sequence[int], start: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        slots = self.slots(blocks, start, start + len(keys[0]))
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer, slots], self.values[layer, slots] = key, value
