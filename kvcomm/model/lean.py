"""Layers of a model on the CPU that a pass computes by cheaper, equal means.

A pass in eager mode spends much of its time not on numbers: linear layers pack their weights anew in every call, and
between them every step makes a new tensor. Here linear layers are computed by whichever product is quickest for so many
rows on this machine (`linear`, `choice`), those that read the same rows together, and norms, rotations and gates by one
compiled loop each (`row_loops`).

Equal up to rounding, in float32. A pass that must be the stock forward to the last bit (a whole prompt of float32
computed alone) has stock products, and of the rest only what is the same to the last bit. In bfloat16 everything is
lean always. Known here are RMS norms, MLPs of the form down(silu(gate) * up), and attention of separate query, key and
value projections whose heads are rotated by halves: most decoders of transformers are made of these. Whether a module
is one is found out by computing a few rows both ways.

A layer is switched by a `forward` of its own, laid over its class's and taken away again after the pass: unlike torch's
function override, which visits every operation of a pass, it costs nothing elsewhere. Whoever calls the model meanwhile
from another thread gets the same numbers, up to the rounding. Layers that somebody has hooked, or has given a `forward`
of their own, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvcomm.errors import KVCommError
from kvcomm.model import compiled
from kvcomm.model.attention import hook
from kvcomm.model.choice import ProductChoice, choose
from kvcomm.model.compiled import numbers, one_caller
from kvcomm.model.linear import CANDIDATES, LOOPS, PRODUCTS, Joined

Forward = Callable[..., Any]

MAX_ROWS = 63
"""Rows up to which also a whole prompt of float32 is computed up to rounding: there it saves half of the time."""

NUM_TRIED = 32
"""Outputs of the product that compiles a loop."""

NUM_TRIAL_ROWS = 3

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of the results of a trial, as a share of the largest one: another formula is off by far more."""


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
        free = [block for block in blocks if not any(map(_is_taken, block.inner))]
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


class Block(NamedTuple):
    """A module and its other forward.

    Attributes:
        inner: modules that are computed within, the layer itself included.
    """

    layer: nn.Module
    forward: Forward
    inner: tuple[nn.Module, ...]


def _is_taken(module: nn.Module) -> bool:
    """Whether somebody has hooked a module or given it a `forward`."""
    members = vars(module)
    return bool("forward" in members or members["_forward_hooks"] or members["_forward_pre_hooks"])


def find_blocks(model: nn.Module, choice: ProductChoice, *, exact: bool) -> list[Block]:
    """The blocks of a model on the CPU; `exact`: by stock products, and only what is the same to the last bit."""
    hook.register()  # attention is tried with a step
    return [block for module in model.modules() for block in _block(model, module, choice, exact=exact)]


def _block(model: nn.Module, module: nn.Module, choice: ProductChoice, *, exact: bool) -> Iterator[Block]:
    if "RMSNorm" in type(module).__name__:
        forward = lean_norm(module, exact=exact)
        if forward is not None:
            yield Block(module, forward, (module,))
    elif _has_linears(module, ("gate_proj", "up_proj", "down_proj")):
        forward = lean_mlp(module, choice, exact=exact)
        if forward is not None:
            yield Block(module, forward, (module, *module.children()))
    elif _has_linears(module, ("q_proj", "k_proj", "v_proj", "o_proj")):
        forward = lean_attention(model, module, choice, exact=exact)
        if forward is not None:
            yield Block(module, forward, (module, *module.children()))


def _has_linears(module: nn.Module, names: tuple[str, ...]) -> bool:
    found = [getattr(module, name, None) for name in names]
    return all(type(layer) is nn.Linear and layer.weight.device.type == "cpu" for layer in found)


def _is_plain(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows are those of a pass; who wants gradients, or brings another dtype, gets the stock layer."""
    return rows.dtype == dtype and torch.is_inference_mode_enabled() and not rows.requires_grad and rows.numel() > 0


def lean_linear(layer: nn.Linear, choice: ProductChoice) -> Callable[[Tensor], Tensor]:
    """`layer.forward` by the product that is chosen."""
    compute = choice.joined([layer])

    def forward(rows: Tensor) -> Tensor:
        if not _is_plain(rows, layer.weight.dtype):
            return functional.linear(rows, layer.weight, layer.bias)
        flat = rows.reshape(-1, rows.shape[-1])
        (out,) = compute(flat)
        return out.view(*rows.shape[:-1], -1)

    return forward


def lean_norm(layer: nn.Module, *, exact: bool) -> Forward | None:
    """`layer.forward` without new tensors at each step, or None if the layer is no RMS norm of the usual form."""
    weight = getattr(layer, "weight", None)  # some have none
    epsilon = "variance_epsilon" if hasattr(layer, "variance_epsilon") else "eps"
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(getattr(layer, epsilon, None), float):
        return None
    if weight.device.type != "cpu" or weight.dtype not in TOLERANCE:
        return None
    dtype = weight.dtype

    def in_place(rows: Tensor) -> Tensor:
        if rows.dtype != dtype:
            out: Tensor = type(layer).forward(layer, rows)
            return out
        weight = layer.weight  # read anew, as epsilon: a user may load others into the model
        assert isinstance(weight, Tensor)
        scale = (rows * rows).sum(-1, keepdim=True).div_(rows.shape[-1]).add_(getattr(layer, epsilon)).rsqrt_()
        return (rows * scale).mul_(weight)

    def by_loop(rows: Tensor) -> Tensor:
        from kvcomm.model.row_loops import norm

        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not _is_plain(rows, dtype) or weight.dtype != dtype:
            out: Tensor = type(layer).forward(layer, rows)
            return out
        rows = rows.contiguous()
        out, size = torch.empty_like(rows), rows.shape[-1]
        flat, target = numbers(rows.view(-1, size)), numbers(out.view(-1, size))
        with one_caller:
            norm(flat, numbers(weight.detach()), np.float32(getattr(layer, epsilon)), target)
        return out

    forward = in_place if exact else by_loop
    rows = _trial_rows(len(weight), dtype)
    with torch.inference_mode():
        try:
            # Not by calling the layer: hooks on it are for passes.
            expected = type(layer).forward(layer, rows)
        except (AttributeError, RuntimeError, TypeError):
            return None  # it wants more than rows, such as a gate
        return forward if _agree(forward(rows), expected, exact=exact) else None


def lean_mlp(layer: nn.Module, choice: ProductChoice, *, exact: bool) -> Forward | None:
    """`layer.forward` of down(silu(gate) * up), or None if it is another form."""
    gate, up, down = (getattr(layer, name) for name in ("gate_proj", "up_proj", "down_proj"))
    dtype, width = gate.weight.dtype, gate.out_features
    open_both, close = choice.joined([gate, up]), choice.joined([down])

    def forward(*operands: Tensor, **keywords: Tensor) -> Tensor:
        rows = operands[0] if len(operands) == 1 and not keywords else None
        if rows is None or not _is_plain(rows, dtype):
            out: Tensor = type(layer).forward(layer, *operands, **keywords)
            return out
        flat = rows.reshape(-1, rows.shape[-1])
        if exact:
            opened, beside = open_both.exactly(flat)
            (out,) = close.exactly(functional.silu(opened, inplace=True).mul_(beside))
        else:
            from kvcomm.model.row_loops import gate as multiply

            parts = open_both(flat)
            # New memory costs a pass more than the loop does.
            opened = parts[0] if parts[0].shape[1] == width else flat.new_empty(len(flat), width)
            with one_caller:
                multiply(numbers(parts[0]), numbers(parts[-1]), numbers(opened))
            (out,) = close(opened)
        return out.view(*rows.shape[:-1], -1)

    rows = _trial_rows(gate.in_features, dtype)
    with torch.inference_mode():
        try:
            expected = type(layer).forward(layer, rows)
            return forward if _agree(forward(rows), expected, exact=exact) else None
        except (AttributeError, RuntimeError, TypeError):
            return None


def lean_attention(model: nn.Module, layer: nn.Module, choice: ProductChoice, *, exact: bool) -> Forward | None:
    """`layer.forward` of a pass, or None if its heads are made in another way."""
    query, key, value = (getattr(layer, name) for name in ("q_proj", "k_proj", "v_proj"))
    dim, layer_id, config = (getattr(layer, name, None) for name in ("head_dim", "layer_idx", "config"))
    if not isinstance(dim, int) or not isinstance(layer_id, int) or config is None:
        return None
    widths = [linear.out_features for linear in (query, key, value)]
    if any(width % dim for width in widths) or widths[1] != widths[2]:
        return None
    dtype = query.weight.dtype
    rows = _trial_rows(query.in_features, dtype)
    angles = _trial_angles(dim, dtype)
    stock, lean = _Recorder(), _Recorder()
    with hook.pass_lock(model), hook.switched([config]), torch.inference_mode():
        try:
            expected = _attend(type(layer).forward, layer, rows, angles, stock)
        except (AttributeError, RuntimeError, TypeError, ValueError, KVCommError):
            return None
        if len(stock.seen) != 1 or stock.seen[0].layer_id != layer_id:
            return None
        if stock.seen[0].has_sinks:  # a parameter, to be read anew in each pass, under a name that is not known here
            return None
        forward = _attention_forward(layer, stock.seen[0], choice.joined([query, key, value]), choice, exact=exact)
        out = _attend(lambda _, **keywords: forward(**keywords), layer, rows, angles, lean)
    pairs = [(out, expected), *zip(lean.seen[0].tensors, stock.seen[0].tensors, strict=True)]
    return forward if all(_agree(one, other, exact=exact) for one, other in pairs) else None


def _attention_forward(
    layer: nn.Module, seen: _Seen, project: Joined, choice: ProductChoice, *, exact: bool
) -> Forward:
    layer_id, scale, window, softcap = seen.layer_id, seen.scale, seen.sliding_window, seen.softcap
    dim = layer.head_dim
    assert isinstance(dim, int)
    assert isinstance(layer.o_proj, nn.Linear)
    dtype = layer.o_proj.weight.dtype
    close = choice.joined([layer.o_proj])

    def forward(*operands: Any, **keywords: Any) -> Any:
        step, hidden = keywords.get(hook.STEP_KEYWORD), keywords.get("hidden_states")
        if operands or step is None or not isinstance(hidden, Tensor) or len(hidden) != 1:
            return type(layer).forward(layer, *operands, **keywords)
        cos, sin = keywords["position_embeddings"]
        if not (_is_plain(hidden, dtype) and cos.dtype == dtype and cos.shape[-1] == dim):
            return type(layer).forward(layer, *operands, **keywords)
        query, key, value = _heads(hidden[0], project, cos[0], sin[0], dim, exact=exact)
        out = step(layer_id, query, key, value, scale=scale, sliding_window=window, softcap=softcap)
        flat = out.reshape(out.shape[1], -1)
        (out,) = close.exactly(flat) if exact else close(flat)
        return out[None], None

    return forward


def _heads(
    rows: Tensor, project: Joined, cos: Tensor, sin: Tensor, dim: int, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated, and values of [num_rows, in]: [1, their heads, num_rows, dim] each."""
    from kvcomm.model.row_loops import rotate

    cos_numbers, sin_numbers = numbers(cos.contiguous()), numbers(sin.contiguous())
    made, width = [], project.widths[1]
    parts = project.exactly(rows) if exact else project(rows)
    are_apart = len(parts) > 1
    for part in parts[:2] if are_apart else parts:
        out = part.new_empty(len(part), part.shape[1] if are_apart else part.shape[1] - width)
        with one_caller:
            rotate(numbers(part), cos_numbers, sin_numbers, numbers(out))
        made.append(out)
    query, key = made if are_apart else (made[0][:, :-width], made[0][:, -width:])
    value = parts[-1][:, -width:]
    query, key, value = (part.unflatten(1, (-1, dim)).transpose(0, 1)[None] for part in (query, key, value))
    return query, key, value


class _Seen(NamedTuple):
    """What an attention step was asked for."""

    layer_id: int
    tensors: tuple[Tensor, Tensor, Tensor]
    scale: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool


class _Recorder:
    """An attention step that keeps what it is asked for, and attends to nothing but a row's own query."""

    def __init__(self) -> None:
        self.seen: list[_Seen] = []

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
        tensors = query.clone(), key.clone(), value.clone()
        self.seen.append(_Seen(layer_id, tensors, scale, sliding_window, softcap, sinks is not None))
        return query.transpose(1, 2).contiguous()


def _attend(forward: Forward, layer: nn.Module, rows: Tensor, angles: tuple[Tensor, Tensor], step: _Recorder) -> Tensor:
    out: Tensor = forward(
        layer,
        hidden_states=rows[None],
        position_embeddings=angles,
        attention_mask=None,
        **{hook.STEP_KEYWORD: step},
    )[0]
    return out


def _trial_rows(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(NUM_TRIAL_ROWS, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _trial_angles(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines as models make them, [1, num_rows, dim] each: the same for both halves of a head."""
    angles = torch.rand(1, NUM_TRIAL_ROWS, dim // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _agree(one: Tensor, other: Tensor, *, exact: bool) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if exact:
        return torch.equal(one, other)
    limit = TOLERANCE[one.dtype] * float(other.float().abs().max())
    return float((one.float() - other.float()).abs().max()) <= limit
