"""The one primitive: compute any set of runs of any sequences in one forward pass of an unmodified decoder.

The keys and values of all runs are written to their slots first, then each run attends to everything before it in its
own sequence (DESIGN section 2). Prefill, chunked prefill, decode and recomputation in the middle of a sequence are all
just runs. The runner knows slots and positions; who owns the pages, and whether they may be written, is not its matter.
What a pass returns was computed by the weights that it was for (`serving`), from its first layer to its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcomm.errors import WeightsChanged
from kvcomm.model.attention import hook
from kvcomm.model.attention.contract import AttentionBackend, AttentionStep, IntArray, RunTable
from kvcomm.model.lean import LeanLayers
from kvcomm.model.live import MAX_TRIES, LiveWeights, Pass, Weights


class Run(NamedTuple):
    """`[start, start + len(token_ids))` of one sequence, to be computed.

    Attributes:
        token_ids: [num_tokens] int32, at least one.
        pages: page ids of positions 0..end-1 in order; the pages of [start, end) are written.
        start: position of the first token; the KV of everything before it must be in place or in this pass.
        num_logits: logits wanted, counted from the end of the run.
    """

    token_ids: IntArray
    pages: IntArray
    start: int
    num_logits: int = 1

    @property
    def end(self) -> int:
        """One past the last position computed."""
        return self.start + len(self.token_ids)


ScoreWatch = Callable[[int, Tensor, float], None]


class ModelRunner:
    """Runs a decoder over KV that lies in pages."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        page_size: int,
        backend: AttentionBackend,
        live: LiveWeights | None = None,
    ) -> None:
        """Make one.

        Args:
            keys, values: per layer [num_slots, num_kv_heads, dim]; written by `forward`.
            page_size: tokens per page.
            live: watches the model's weights; None: whoever calls vouches for them.
        """
        hook.register()
        self.backend = backend
        self._model = model
        self._keys, self._values = keys, values
        self._page_size = page_size
        self._pass_lock = hook.pass_lock(model)
        self._live = live
        self._weights: Weights | None = None
        self._looks_closely = False
        self._device = model.device
        self._read_modules()

    @contextmanager
    def serving(self, weights: Weights | None, *, closely: bool = False) -> Iterator[None]:
        """Let passes within be for these weights, with their adapters; None: for whichever there are.

        Args:
            closely: how changes are looked for after each pass, see `live`.
        """
        before = self._weights, self._looks_closely
        self._weights, self._looks_closely = weights, closely
        try:
            yield
        finally:
            self._weights, self._looks_closely = before

    @torch.inference_mode()
    def forward(self, runs: Sequence[Run], *, watch: ScoreWatch | None = None) -> Tensor:
        """Compute runs; their KV is in its slots afterwards.

        Args:
            watch: called behind every layer's attention with the layer's id, the queries
                [1, num_heads, num_tokens, key_dim] and the scale of the scores.

        Returns:
            [sum of num_logits, vocab_size], the wanted logits of the runs in order, in the model's dtype.
        """
        for _ in range(MAX_TRIES):
            logits, this = self._pass(runs, watch)
            if this is None or self._weights is None or self._live is None:
                return logits
            if self._live.confirm(this, self._weights, closely=self._looks_closely):
                return logits
            if watch is not None:  # it has seen what does not count
                break
        raise WeightsChanged("modules or adapters of the model are exchanged while it computes; submit again")

    def _read_modules(self) -> None:
        """Prepare what is prepared once, for the modules that there are."""
        self._generation = 0 if self._live is None else self._live.generation
        self._configs = hook.configs_of(self._model)
        self._layers = LeanLayers(self._model)

    def _pass(self, runs: Sequence[Run], watch: ScoreWatch | None) -> tuple[Tensor, Pass | None]:
        """The wanted logits, and what is to be confirmed about the pass."""
        if self._live is not None and self._live.generation != self._generation:
            self._read_modules()
        tables = [RunTable(run.pages, run.start, run.end) for run in runs]
        step = self.backend.prepare(tables, self._keys, self._values, self._page_size)
        if watch is not None:
            step = _Watched(step, watch)
        token_ids = np.concatenate([run.token_ids for run in runs]).astype(np.int64)
        positions = np.concatenate([np.arange(run.start, run.end) for run in runs])
        rows = self._to_device(_wanted_rows(runs))
        is_whole_prompt = len(runs) == 1 and runs[0].start == 0  # which is the stock forward's, to the last bit
        layers = self._layers.switched(len(token_ids), up_to_rounding=not is_whole_prompt)
        adapters = nullcontext() if self._live is None else self._live.switched(self._weights)
        with self._pass_lock, adapters as this, hook.switched(self._configs), layers:
            output = self._model(
                input_ids=self._to_device(token_ids)[None],
                position_ids=self._to_device(positions)[None],
                use_cache=False,
                logits_to_keep=rows,
                **{hook.STEP_KEYWORD: step},
            )
        logits = output.logits[0].contiguous()
        assert isinstance(logits, Tensor)
        # A few old models do not know `logits_to_keep` and return them all.
        logits = logits if len(logits) == len(rows) else logits[rows]
        if this is not None:
            this.generation = self._generation
        return logits, this

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


class _Watched:
    """An attention step that somebody looks at."""

    def __init__(self, step: AttentionStep, watch: ScoreWatch) -> None:
        self._step, self._watch = step, watch

    def __call__(
        self,
        layer_id: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        attended = self._step(
            layer_id, query, key, value, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
        )
        self._watch(layer_id, query, scale)
        return attended


def _wanted_rows(runs: Sequence[Run]) -> np.ndarray:
    ends = np.cumsum([len(run.token_ids) for run in runs])
    return np.concatenate([np.arange(end - run.num_logits, end) for end, run in zip(ends, runs, strict=True)])
