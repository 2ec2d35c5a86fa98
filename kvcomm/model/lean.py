"""Layers of a model on the CPU that a pass computes by cheaper, equal means.

A pass in eager mode spends much of its time not on numbers: linear layers pack their weights anew in every call, and
between them every step makes a new tensor. Here linear layers are computed by whichever product is quickest for so many
rows on this machine (`linear`, `choice`), those that read the same rows together, and norms, rotations and gates by one
compiled loop each (`row_loops`, `lean_blocks`).

Equal up to rounding, in float32. A pass that must be the stock forward to the last bit (a whole prompt of float32
computed alone) has stock products, and of the rest only what is the same to the last bit. In bfloat16 everything is
lean always. Whether a layer is one of those known here is decided by trying it, not by its name.

A layer is switched by a `forward` of its own, laid over its class's and taken away again after the pass: unlike torch's
function override, which visits every operation of a pass, it costs nothing elsewhere. Whoever calls the model meanwhile
from another thread gets the same numbers, up to the rounding. Layers that somebody has hooked, or has given a `forward`
of their own, are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kvcomm.model import compiled
from kvcomm.model.choice import ProductChoice, choose
from kvcomm.model.lean_blocks import Block, find_blocks, lean_linear
from kvcomm.model.linear import CANDIDATES, LOOPS, PRODUCTS

MAX_ROWS = 63
"""Rows up to which also a whole prompt of float32 is computed up to rounding: there it saves half of the time."""


class LeanLayers:
    """The layers of one model that can be switched. They are found once, when this is made."""

    def __init__(self, model: nn.Module, choice: ProductChoice | None = None) -> None:
        """Make one.

        Args:
            choice: of products; None: what was, or now is, measured on this machine.
        """
        linears = _linears(model)
        self._dtype = linears[0].weight.dtype if linears else None
        self.choice = choice or (choose(linears) if linears else ProductChoice())
        self._exact: list[Block] = []
        self._rounding: list[Block] = []
        if not linears:
            return
        _compile_loops(linears, self.choice)
        with compiled.threads():
            self._exact = find_blocks(model, self.choice, exact=True) if self._dtype == torch.float32 else []
            self._rounding = find_blocks(model, self.choice, exact=False)
        self._rounding += [Block(layer, lean_linear(layer, self.choice), (layer,)) for layer in linears]

    @contextmanager
    def switched(self, num_rows: int, *, up_to_rounding: bool = False) -> Iterator[None]:
        """Switch what pays for a pass over this many rows, and back on leaving.

        A pass of float32 over more than `MAX_ROWS` rows stays the stock forward to the last bit unless `up_to_rounding`
        is enough.

        Not for two passes at once on one model, see `hook.pass_lock`: the first to leave would switch back for both.
        """
        is_exact = self._dtype == torch.float32 and num_rows > MAX_ROWS and not up_to_rounding
        blocks = self._exact if is_exact else self._rounding
        if blocks:
            compiled.share_threads()
        free = [block for block in blocks if block.is_free()]
        try:
            for block in free:
                vars(block.layer)["forward"] = block.forward
            yield
        finally:
            for block in free:
                vars(block.layer).pop("forward", None)


def choice_of(model: nn.Module) -> ProductChoice | None:
    """What a model's linear layers are computed by on this machine, measured if need be; None: it has none of ours."""
    linears = _linears(model)
    return choose(linears) if linears else None


def _linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers on the CPU, those of the dtype that the first one has."""
    found = [layer for layer in model.modules() if type(layer) is nn.Linear and _is_ours(layer.weight)]
    return [layer for layer in found if layer.weight.dtype == found[0].weight.dtype]


def _is_ours(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in CANDIDATES


def _compile_loops(linears: list[nn.Linear], choice: ProductChoice) -> None:
    """Now, not within a pass."""
    weight = linears[0].weight.detach()
    names = {choice.name(layer.weight, num_rows) for layer in linears for num_rows in (1, 16, 64)}
    with torch.inference_mode(), compiled.threads():
        for name in names & {*LOOPS, "tiles"}:
            PRODUCTS[name](weight.new_zeros(1, weight.shape[1]), weight[:NUM_TRIED], None)


NUM_TRIED = 32
"""Outputs of the product that compiles a loop."""
