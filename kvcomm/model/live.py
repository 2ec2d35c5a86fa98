"""The weights of a live model, watched: what a pass computes with, under an identity that follows every change seen.

An identity is a digest of contents: of the model's own weights, and of the adapters that compute. So it comes back when
an adapter or former weights do, and is the same in every process. Hashing takes about 0.2 s per GB and happens only
when something cheap says that it must:

- before a request begins and after every pass: which modules, parameters and buffers there are, where their storage is
  and torch's version counters; of adapters also which are active, disabled or merged, and their scalings;
- when a request begins, before what it computed is offered to others, and when it ends (`closely`): besides, a few
  numbers of every tensor, since writing through `tensor.data`, as PEFT's merging does, or through numpy leaves no trace
  in version counters.

Measured on the modules of smollm2-135m: 0.1 ms of CPU after a pass, half a per cent of a decode step, and 0.2 ms when
looking closely; with two LoRAs in 60 of its layers 0.3 and 0.4 ms, and 0.1 ms more where a pass has to switch them.

Seen at once are `load_state_dict`, optimizer steps and all other writing by torch operations, exchanged tensors and
modules, and everything that is done to adapters by PEFT's methods. Writing past torch's counters is seen when a request
begins or ends if it touches a number that is looked at: a whole tensor practically always, a single number or row
rarely. Not seen at all are forward hooks, exchanged methods, and plain attributes such as a norm's epsilon. For what is
not seen there is `forget`.
"""

from __future__ import annotations

import ctypes
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress
from operator import attrgetter
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from kvcomm.errors import UnknownAdapter, WeightsChanged
from kvcomm.model.adapters import AdapterLayer, Choice, Loan, Names, Place, Setting, Tree, names_of, sort_tree
from kvcomm.model.rope import LENGTH_DEPENDENT_ROPES
from kvcomm.model.weights import plain_parts, tensor_digest, vocab_size_of, weights_digest

NUM_SAMPLED = 8
"""Numbers of each tensor on an accelerator that are looked at, from its first to its last."""

NUM_WINDOWS, WINDOW_BYTES = 4, 8
"""Places of each tensor on the CPU that are looked at, from its first to its last byte, and how wide they are."""

MAX_TRIES = 3
"""Looks at a tree that somebody changes meanwhile."""

# A check visits every module and tensor, so it must not run Python code for each.
_is_training = attrgetter("training")
_version_of = attrgetter("_version")
_address_of = attrgetter("_cdata")
_active_of = attrgetter("_active_adapter")
_flag_of = attrgetter("_disable_adapters")
_merged_of = attrgetter("merged_adapters")
_scaling_of = attrgetter("scaling")


@dataclass(frozen=True, eq=False)
class Weights:
    """What passes compute with.

    Attributes:
        digest: identity of the weights and of the adapters that compute.
        setting: which adapters those are.
    """

    digest: str
    setting: Setting


@dataclass
class Pass:
    """A pass that runs.

    Attributes:
        generation: of the modules that compute it.
        is_lent: the model's user has chosen other adapters.
        was_disturbed: adapters were chosen meanwhile, so nobody knows which of them computed.
    """

    generation: int
    is_lent: bool
    was_disturbed: bool = False


class Mark(NamedTuple):
    """What changes with a tensor, cheap to take."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    address: int
    version: int
    sample: bytes


class LiveWeights:
    """Watches one model. Thread-safe.

    Attributes:
        generation: counts how often other modules were seen.
    """

    def __init__(self, model: PreTrainedModel, plain_digest: str | None = None) -> None:
        """Args:
        plain_digest: identity of the model without its adapters as it is now; None: it is hashed.

        Raises:
            UnsupportedModel: see `weights_digest`.
        """
        self.generation = 0
        self._model = model
        self._lock = RLock()
        self._settle(sort_tree(model).layers)
        self._tree = _Tree(model)
        self._plain_digest: str | None = weights_digest(model) if plain_digest is None else plain_digest
        self._kind, self._computed = self._tree.kind, self._tree.computed
        self._forgotten = ""
        self._own = Setting(choices=self._tree.choices())
        self._named: dict[str, Setting] = {}
        self._parts: dict[tuple[str, str], str] = {}
        self._digests: WeakKeyDictionary[Setting, str] = WeakKeyDictionary()

    @property
    def adapters(self) -> Names:
        """Names of the adapters that are attached, sorted."""
        with self._lock:
            self._look()
            return names_of(self._tree.layers)

    def now(self, adapter: str | None = None, *, closely: bool = False) -> Weights:
        """What a pass would compute with now.

        Args:
            adapter: of that name alone; None: as the model's user has left it.
            closely: look at numbers, too.

        Raises:
            UnknownAdapter: there is none of that name.
            WeightsChanged: the model has become another kind of model than it was in the beginning, or its own weights
                have adapters merged into them, so that the one asked for would come on top.
            UnsupportedModel: its weights cannot be identified.
        """
        with self._lock:
            self._look(closely)
            if adapter is None:
                setting = self._own
            else:
                self._require_adapter(adapter)
                setting = self._named.setdefault(adapter, Setting(adapter))
            return Weights(self._digest(setting), setting)

    def forget(self) -> None:
        """Take the weights for others from now on, whatever they look like; no other process will know them."""
        with self._lock:
            self._forgotten = secrets.token_hex(16)
            self._replace_tree(_Tree(self._model))
            self._plain_digest = None

    @contextmanager
    def kept_choices(self) -> Iterator[None]:
        """Let adapters be attached or taken away; the user's choice among the others stays. Hold the `pass_lock`."""
        with self._lock:
            self._look()
            before = self._tree.choices()
        try:
            yield
        finally:
            with self._lock:
                for layer in sort_tree(self._model).layers:
                    layer.choose(before.get(layer.path, Choice()))
                self._look()

    @contextmanager
    def switched(self, weights: Weights | None) -> Iterator[Pass]:
        """For one pass: use their adapters, and evaluation mode. Hold the model's `pass_lock`.

        Afterwards the model is again as its user had left it, or has left it meanwhile.
        """
        this = Pass(self.generation, is_lent=weights is not None and weights.setting is not self._own)
        tree = self._tree
        training = list(filter(_is_training, tree.modules))
        loan = Loan(tree.layers, weights.setting) if weights is not None and this.is_lent else None
        for module in training:
            vars(module)["training"] = False  # assigning takes long: it looks for tensors
        try:
            yield this
        finally:
            for module in training:
                vars(module)["training"] = True
            if loan is not None:
                this.was_disturbed = not loan.end()

    def confirm(self, this: Pass, weights: Weights, *, closely: bool = False) -> bool:
        """Whether a pass that has ended was computed by these weights throughout; False: nobody knows, do it again.

        Raises:
            WeightsChanged: they are gone.
            UnsupportedModel: see `now`.
        """
        with self._lock:
            self.require(weights, closely=closely)
            is_own_choice = this.is_lent or weights.setting is self._own
            return is_own_choice and not this.was_disturbed and this.generation == self.generation

    def known(self) -> tuple[str, ...]:
        """Digests of what passes could compute with when somebody last looked: as the user left the model, then with
        each adapter."""
        with self._lock:
            names = () if self._tree.merged else names_of(self._tree.layers)
            settings = [self._own, *(self._named.setdefault(name, Setting(name)) for name in names)]
            return tuple(dict.fromkeys(self._digest(setting) for setting in settings))

    def require(self, weights: Weights, *, closely: bool = False) -> None:
        """Raises WeightsChanged when passes cannot compute with these weights any more; UnsupportedModel, see `now`."""
        with self._lock:
            self._look(closely)
            if self._digest(weights.setting) != weights.digest:
                raise WeightsChanged(
                    "the model's weights, or the adapter, are others now than those that this began with; what is"
                    " computed cannot be gone on with: begin anew, or bring the former ones back"
                )

    def _look(self, closely: bool = False) -> None:
        """Notice what has changed."""
        if self._tree.is_current(closely):
            return
        for attempt in range(MAX_TRIES):
            try:
                self._settle(self._tree.layers)
                if self._tree.is_current(closely, but_choices=True):
                    self._note_choices()
                else:
                    self._replace_tree(_Tree(self._model))
                return
            except (RuntimeError, KeyError) as error:  # changed while it was looked at
                if attempt == MAX_TRIES - 1:
                    raise WeightsChanged(f"the model is being changed while requests come in ({error})") from error

    def _settle(self, layers: Sequence[AdapterLayer]) -> None:
        for layer in layers:
            layer.settle()

    def _note_choices(self) -> None:
        choices = self._tree.choices()
        if choices != self._own.choices:
            self._own = Setting(choices=choices)

    def _replace_tree(self, tree: _Tree) -> None:
        former, self._tree = self._tree, tree
        self.generation += not tree.has_modules_of(former)
        self._digests.clear()
        # Merging changes weights by numbers that may be too small to be seen in a few of them.
        may_be_merged = former.merged != tree.merged or not former.part_marks.keys() <= tree.part_marks.keys()
        if may_be_merged or former.plain_marks != tree.plain_marks:
            self._plain_digest = None
        for key in list(self._parts):
            if former.part_marks.get(key) != tree.part_marks.get(key):
                del self._parts[key]
        self._note_choices()

    def _require_adapter(self, adapter: str) -> None:
        names = names_of(self._tree.layers)
        if adapter not in names:
            listed = ", ".join(names) or "none"
            raise UnknownAdapter(f"there is no adapter {adapter!r}; loaded: {listed}")
        if self._tree.merged:
            raise WeightsChanged(
                f"adapter {adapter!r} cannot be used while adapters are merged into the model's weights: unmerge them"
            )

    def _digest(self, setting: Setting) -> str:
        self._require_same_kind()
        found = self._digests.get(setting)
        if found is None:
            found = self._digests[setting] = self._make_digest(setting)
        return found

    def _make_digest(self, setting: Setting) -> str:
        if self._plain_digest is None:
            plain = weights_digest(self._model)
            forgotten = self._forgotten
            self._plain_digest = blake3(f"{plain} {forgotten}".encode()).hexdigest() if forgotten else plain
        computing = {layer: layer.computing(setting.of(layer.path)) for layer in self._tree.layers}
        computing = {layer: names for layer, names in computing.items() if names}
        if not computing:
            return self._plain_digest
        self._identify({(layer, name) for layer, names in computing.items() for name in names})
        rows = [[layer.path, [self._parts[layer.path, name] for name in names]] for layer, names in computing.items()]
        return blake3(json.dumps([self._plain_digest, sorted(rows)]).encode()).hexdigest()

    def _identify(self, parts: Iterable[tuple[AdapterLayer, str]]) -> None:
        """Find the identities of what adapters have in layers, where they are not known; their names do not count."""
        unknown = [(layer, name) for layer, name in parts if (layer.path, name) not in self._parts]
        tree = sort_tree(self._model) if unknown else None
        for layer, name in unknown:
            assert tree is not None
            tensors = [
                [at, str(value.dtype), list(value.shape), tensor_digest(value)]
                for at, value in _parts_of(tree, layer)[name]
            ]
            described = json.dumps([layer.settings(name), sorted(tensors, key=str)], sort_keys=True)
            self._parts[layer.path, name] = blake3(described.encode()).hexdigest()

    def _require_same_kind(self) -> None:
        if self._tree.kind != self._kind:
            raise WeightsChanged(
                f"the engine was made for a model of {self._kind}; it has become one of {self._tree.kind}: make a new"
                " engine"
            )
        if self._tree.computed != self._computed:
            raise WeightsChanged(
                "what the model derives from its config, such as rotary frequencies, has been changed: make a new"
                " engine"
            )


class _Kind(NamedTuple):
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


def _kind_of(model: PreTrainedModel) -> _Kind:
    num_layers = model.config.get_text_config().num_hidden_layers
    return _Kind(model.dtype, model.device, vocab_size_of(model), num_layers)


class _Tree:
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
            for name, found in _parts_of(tree, layer).items()
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

    def has_modules_of(self, other: _Tree) -> bool:
        """Whether both have the same modules in the same places."""
        return self.modules == other.modules

    def choices(self) -> dict[str, Choice]:
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


def _parts_of(tree: Tree, layer: AdapterLayer) -> dict[str, list[tuple[str, Tensor]]]:
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


def _digest_of(computed: Sequence[tuple[Place, Tensor]], watched: set[int]) -> str:
    rows = [
        [place.name, str(tensor.dtype), list(tensor.shape), tensor_digest(tensor)]
        for place, tensor in computed
        if place.layer is None and id(tensor) in watched and not tensor.is_meta
    ]
    return blake3(json.dumps(sorted(rows, key=str)).encode()).hexdigest()
