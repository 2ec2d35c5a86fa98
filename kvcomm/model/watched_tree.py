"""A module tree at one moment, and whether it is still what it was; see `kvcomm.model.live` for what is seen."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from kvcomm.model.adapters import AdapterChoice, AdapterLayer, TensorPlace, Tree, sort_tree
from kvcomm.model.rope import LENGTH_DEPENDENT_ROPES
from kvcomm.model.weights import plain_parts, tensor_digest, vocab_size_of

NUM_SAMPLED = 8
"""Numbers of each tensor on an accelerator that are looked at, from its first to its last."""

NUM_WINDOWS, WINDOW_BYTES = 4, 8
"""Places of each tensor on the CPU that are looked at, from its first to its last byte, and how wide they are."""

# A check visits every module and tensor, so it must not run Python code for each.
_version_of = attrgetter("_version")
_address_of = attrgetter("_cdata")
_active_of = attrgetter("_active_adapter")
_flag_of = attrgetter("_disable_adapters")
_merged_of = attrgetter("merged_adapters")
_scaling_of = attrgetter("scaling")


class Mark(NamedTuple):
    """What changes with a tensor, cheap to take."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    address: int
    version: int
    sample: bytes


class KVSpec(NamedTuple):
    """What the shape of KV, and the pool that it lies in, rest on."""

    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    num_layers: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers in {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"{self.vocab_size} tokens"
        )


def _kind_of(model: PreTrainedModel) -> KVSpec:
    num_layers = model.config.get_text_config().num_hidden_layers
    return KVSpec(model.dtype, model.device, vocab_size_of(model), num_layers)


class WatchedTree:
    """A module tree at one moment. Holds its modules, but does not keep tensors alive that were taken out of them.

    Attributes:
        merged: adapters by path of the layer whose former module's weights they were added into.
        computed: digest of what follows from the config.
        plain_marks, part_marks: of the model's own tensors, and of what adapters, by path and name, have in layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        tree = sort_tree(model)
        self.modules, self.layers = tree.modules, tree.layers
        children: list[dict[str, Any]] = [module._modules for module in self.modules]
        holders = [module for module in self.modules if not _sets_itself(module)]
        members: list[dict[str, Any]] = [each for module in holders for each in (module._parameters, module._buffers)]
        # Most are empty, and whether they still are is asked much faster than what they hold.
        self._empty = [each for each in (*children, *members) if not each]
        self._parents, self._owners = [*filter(None, children)], [*filter(None, members)]
        self._children, held = _values(self._parents), _values(self._owners)
        self._tensor_ids = [*map(id, held)]
        self._is_tensor = [each is not None for each in held]
        tensors = [*compress(held, self._is_tensor)]
        self._sampler = _Sampler(tensors)
        self._trace = self._sampler.trace(tensors)
        self._sample = self._sampler.sample(tensors)
        self._adapters = [layer.module for layer in self.layers]
        self._scaled = [module for module in self._adapters if isinstance(getattr(module, "scaling", None), dict)]
        self._choices, self._sums = self._raw_choices(), self._raw_sums()
        self.kind = _kind_of(model)
        self.merged = {layer.path: layer.merged for layer in self.layers if layer.merged}
        self.computed = _digest_of(tree.computed, {id(tensor) for tensor in tensors})
        self.plain_marks = {place.name: _mark(tensor) for place, tensor in tree.tensors if place.layer is None}
        self.part_marks = {
            (layer.path, name): (layer.settings(name), [(at, _mark(tensor)) for at, tensor in found])
            for layer in self.layers
            for name, found in parts_of(tree, layer).items()
        }

    def is_current(self, closely: bool = False, *, but_choices: bool = False) -> bool:
        """Whether nothing has changed, as far as that is seen; `but_choices`: except which adapters are active."""
        if any(self._empty) or _values(self._parents) != self._children:
            return False
        held = _values(self._owners)
        if [*map(id, held)] != self._tensor_ids:
            return False
        tensors = [*compress(held, self._is_tensor)]
        if self._sampler.trace(tensors) != self._trace:
            return False
        if self._adapters:
            if self._raw_sums() != self._sums:
                return False
            if not but_choices and self._raw_choices() != self._choices:
                return False
        return not closely or self._sampler.sample(tensors) == self._sample

    def has_modules_of(self, other: WatchedTree) -> bool:
        """Whether both have the same modules in the same places."""
        return self.modules == other.modules

    def choices(self) -> dict[str, AdapterChoice]:
        """What the model's user has chosen for every layer; from now on that is no change."""
        self._choices = self._raw_choices()
        return {layer.path: layer.choice for layer in self.layers}

    def _raw_choices(self) -> list[object]:
        # Copies: lists are changed in place, too. What a loan wrote differs from what was there.
        active = [each if isinstance(each, str) else [*each] for each in map(_active_of, self._adapters)]
        return [*active, *map(_flag_of, self._adapters)]

    def _raw_sums(self) -> list[object]:
        merged = [*map(list, map(_merged_of, self._adapters))]
        return [*merged, *[[*scaling.values()] for scaling in map(_scaling_of, self._scaled)]]


def parts_of(tree: Tree, layer: AdapterLayer) -> dict[str, list[tuple[str, Tensor]]]:
    """What each adapter of a layer is made of: tensors and their names there."""
    own = [(place, tensor) for place, tensor in tree.tensors if place.layer == layer.path]
    return {
        name: [
            part
            for place, tensor in own
            if place.adapter in ("", name)  # some kinds share tensors
            for part in plain_parts(place.name, tensor)
        ]
        for name in layer.names
    }


def _values(members: Sequence[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, members))]


class _Sampler:
    """How tensors of a tree are looked at: prepared once, since it is done often."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._is_plain = not any(hasattr(tensor, "__tensor_flatten__") for tensor in tensors)
        parts = self._parts(tensors)
        # References that keep addresses, but no memory, from being given to others. Not on the tensors themselves:
        # torch does not swap those that have any.
        self._storages = [StorageWeakRef(part.untyped_storage()) for part in parts]
        self._has_version = [not part.is_inference() for part in parts]
        self._pointers = self._data_pointers([part.untyped_storage() for part in parts])
        self._windows: list[ctypes.Array[ctypes.c_char]] = []
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, part in enumerate(parts):
            if part.device.type == "cpu" and part.numel():
                self._windows += _windows(part)
            elif part.numel() and not part.is_meta:
                groups.setdefault((part.dtype, part.device), []).append(index)
        self._groups = list(groups.values())
        self._strides = [_stride(part) for part in parts]

    def trace(self, tensors: Sequence[Tensor]) -> list[int]:
        """Where tensors are and how often torch has written them."""
        parts = self._parts(tensors)
        storages = map(_address_of, map(Tensor.untyped_storage, parts))
        return [*map(_version_of, compress(parts, self._has_version)), *storages]

    @torch.no_grad()
    def sample(self, tensors: Sequence[Tensor]) -> list[object]:
        """Which part of its storage every tensor is, and the bytes of some numbers of it."""
        parts = self._parts(tensors)
        storages = [*map(Tensor.untyped_storage, parts)]  # which keeps the memory that is read now
        pointers = self._data_pointers(storages)
        found: list[object] = [*map(Tensor.stride, parts), *map(Tensor.data_ptr, parts), *pointers]
        # By operations of torch this would take ten times as long.
        found.append(b"".join(self._windows) if pointers == self._pointers else b"")
        for indices in self._groups:
            views = [parts[index].as_strided(*_size_and_stride(self._strides[index])) for index in indices]
            found.append(_bytes(torch.cat(views)))
        return found

    def _data_pointers(self, storages: Sequence[torch.UntypedStorage]) -> list[int]:
        return [*map(torch.UntypedStorage.data_ptr, storages)]

    def _parts(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._is_plain:
            return tensors
        return [part for tensor in tensors for _, part in plain_parts("", tensor)]


def _windows(tensor: Tensor) -> list[ctypes.Array[ctypes.c_char]]:
    """Views on bytes of a tensor on the CPU, from its first to its last. They do not keep its memory."""
    num_bytes = (1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))) * (
        tensor.element_size()
    )
    width = min(WINDOW_BYTES, num_bytes)
    starts = {index * (num_bytes - width) // (NUM_WINDOWS - 1) for index in range(NUM_WINDOWS)}
    return [(ctypes.c_char * width).from_address(tensor.data_ptr() + start) for start in sorted(starts)]


def _stride(tensor: Tensor) -> tuple[int, int]:
    """How many numbers of a tensor are looked at, and how far apart they are in its storage."""
    if tensor.is_contiguous():
        num = min(tensor.numel(), NUM_SAMPLED)
        return num, (tensor.numel() - 1) // (num - 1) if num > 1 else 1
    return min(*tensor.shape, NUM_SAMPLED), sum(tensor.stride())  # the diagonal


def _size_and_stride(sampled: tuple[int, int]) -> tuple[tuple[int], tuple[int]]:
    num, stride = sampled
    return (num,), (stride,)


def _bytes(row: Tensor) -> bytes:
    return bytes(row.contiguous().view(torch.uint8).cpu().numpy().data)


@torch.no_grad()
def _mark(tensor: Tensor) -> list[Mark]:
    marks = []
    for _, part in plain_parts("", tensor):
        num, stride = _stride(part)
        sample = b"" if part.is_meta or not num else _bytes(part.as_strided((num,), (stride,)).clone())
        version = 0 if part.is_inference() else part._version
        address = part.untyped_storage()._cdata
        marks.append(Mark(part.dtype, part.shape, part.stride(), address, version, sample))
    return marks


def _sets_itself(module: nn.Module) -> bool:
    """Whether a module computes its buffers anew in every pass, from the positions."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    return any(each in LENGTH_DEPENDENT_ROPES for each in kinds if isinstance(each, str))


def _digest_of(computed: Sequence[tuple[TensorPlace, Tensor]], watched: set[int]) -> str:
    rows = [
        [place.name, str(tensor.dtype), list(tensor.shape), tensor_digest(tensor)]
        for place, tensor in computed
        if place.layer is None and id(tensor) in watched and not tensor.is_meta
    ]
    return blake3(json.dumps(sorted(rows, key=str)).encode()).hexdigest()
