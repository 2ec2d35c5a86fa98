"""Adapters (LoRA and its kin) as PEFT attaches them to a model: which layers have them, which of them compute.

PEFT replaces modules of the tree by layers that hold the former module and, by name, the adapters' own tensors; each
layer says by itself which of its adapters are active. This module reads that, names the adapters by what they hold
instead of by what they are called, and can lend a layer another choice for the time of one pass. It recognizes layers
by what PEFT's base classes declare, and so imports nothing. It keeps no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcomm.errors import UnsupportedModel

FORMER_MODULES = frozenset({"base_layer", "original_module"})
"""Where a layer keeps the module whose place it took."""

Names = tuple[str, ...]


class AdapterChoice(NamedTuple):
    """Which adapters a layer was told to use, and whether it was told to use none at all."""

    active: Names = ()
    is_disabled: bool = False


@dataclass(frozen=True, eq=False)
class Setting:
    """Which adapters a pass uses.

    Attributes:
        adapter: one by name, in every layer that has it; None: `choices`.
        choices: by path of the layer, as its user left it; layers that are not listed use none.
    """

    adapter: str | None = None
    choices: Mapping[str, AdapterChoice] | None = None

    def of(self, path: str) -> AdapterChoice:
        """What the layer at a path is to use."""
        if self.adapter is not None:
            return AdapterChoice((self.adapter,))
        return (self.choices or {}).get(path, AdapterChoice())


class AdapterLayer:
    """One layer with adapters.

    Attributes:
        path: in the model without adapters, such as "model.layers.0.self_attn.q_proj".
        module: PEFT's layer.
    """

    def __init__(self, path: str, module: Any) -> None:
        self.path = path
        self.module = module

    @property
    def names(self) -> Names:
        """Adapters that this layer has, sorted."""
        found: set[str] = set()
        for attribute in self.module.adapter_layer_names:
            container = attrgetter(attribute)(self.module)
            if hasattr(container, "keys"):
                found.update(container.keys())
        return tuple(sorted(found))

    @property
    def choice(self) -> AdapterChoice:
        """What its user chose, also while it is lent another choice."""
        active, is_disabled = self.module._active_adapter, self.module._disable_adapters
        if type(active) is _LentNames:
            active = active.former
        if type(is_disabled) is _LentFlag:
            is_disabled = is_disabled.former
        return AdapterChoice((active,) if isinstance(active, str) else tuple(active), bool(is_disabled))

    @property
    def merged(self) -> Names:
        """Adapters that were added into the former module's weights."""
        return tuple(self.module.merged_adapters)

    @property
    def state(self) -> tuple[object, object, list[str], list[object]]:
        """All that decides what the layer computes, besides tensors; to be compared only."""
        module = self.module
        active, scaling = module._active_adapter, getattr(module, "scaling", None)
        return (
            active if isinstance(active, str) else list(active),
            module._disable_adapters,
            list(module.merged_adapters),
            [*scaling.values()] if isinstance(scaling, dict) else [],
        )

    def computing(self, choice: AdapterChoice) -> Names:
        """Adapters that take part in a pass under a choice."""
        if choice.is_disabled or not choice.active or self.merged:
            return ()
        names = self.names
        return tuple(name for name in choice.active if name in names)

    def settings(self, name: str) -> dict[str, object]:
        """What an adapter is besides its tensors, as JSON values: its kind, scaling and switches."""
        found: dict[str, object] = {"layer": type(self.module).__name__}
        for attribute, value in vars(self.module).items():
            if attribute.startswith("_") or not isinstance(value, dict) or name not in value:
                continue
            setting = value[name]
            is_plain = setting is None or isinstance(setting, bool | int | float | str)
            found[attribute] = setting if is_plain else type(setting).__name__
        return found

    def choose(self, choice: AdapterChoice) -> None:
        """Set what its user has chosen, as far as there are such adapters. Whether it is trained stays as it is."""
        names = self.names
        self.module._active_adapter = [name for name in choice.active if name in names]
        self.module._disable_adapters = choice.is_disabled

    def settle(self) -> None:
        """Take merged adapters out of the weights if the layer is told to use none, as its next pass would."""
        if self.merged and self.choice.is_disabled:
            self.module.unmerge()


class Loan:
    """Other choices for the layers of a model, for one pass. Whoever chooses meanwhile is not overruled."""

    def __init__(self, layers: Iterable[AdapterLayer], setting: Setting) -> None:
        self._lent: list[tuple[dict[str, Any], _LentNames, _LentFlag]] = []
        for layer in layers:
            # Not by assignment: that of a module takes longer than all the rest, and no tensor is assigned here.
            own = vars(layer.module)
            choice = setting.of(layer.path)
            names = _LentNames(choice.active, layer.module._active_adapter)
            flag = _LentFlag(choice.is_disabled, layer.module._disable_adapters)
            own["_active_adapter"], own["_disable_adapters"] = names, flag
            self._lent.append((own, names, flag))

    def end(self) -> bool:
        """Give every layer its user's choice back; whether the loan held until now."""
        held = True
        for own, names, flag in self._lent:
            for attribute, lent in (("_active_adapter", names), ("_disable_adapters", flag)):
                if own[attribute] is lent:
                    own[attribute] = lent.former
                else:
                    held = False
        return held


class _LentNames(list[str]):
    """Active adapters for one pass, with the user's own choice."""

    def __init__(self, names: Iterable[str], former: Any) -> None:
        super().__init__(names)
        self.former = former


class _LentFlag:
    """PEFT asks for its truth only."""

    def __init__(self, value: bool, former: Any) -> None:
        self.value = value
        self.former = former

    def __bool__(self) -> bool:
        return self.value


class TensorPlace(NamedTuple):
    """Where a tensor belongs.

    Attributes:
        name: in the model without adapters; for an adapter's tensor: within its layer, without the adapter's name.
        layer: path of the layer whose adapters it belongs to; None: it is one of the model itself.
        adapter: its name; empty: the tensor is shared by all adapters of the layer.
    """

    name: str
    layer: str | None = None
    adapter: str = ""


class Tree(NamedTuple):
    """A module tree, sorted.

    Attributes:
        modules: each once.
        tensors: parameters and buffers, each once, with their places.
        computed: those of them that are no state of the model but follow from its config, such as rotary frequencies.
    """

    modules: list[nn.Module]
    layers: list[AdapterLayer]
    tensors: list[tuple[TensorPlace, Tensor]]
    computed: list[tuple[TensorPlace, Tensor]]


def sort_tree(model: nn.Module) -> Tree:
    """Walk a model, and tell its own modules and tensors from those of adapters."""
    tree, taken, seen = Tree([], [], [], []), set[str](), set[int]()

    def visit(module: nn.Module, place: TensorPlace, names: Names, former: TensorPlace) -> None:
        """`names`: adapters of the layer that it is inside of, while it is open which of them it belongs to; `former`:
        the place of the module instead of which that layer stands."""
        if id(module) in seen:
            return
        seen.add(id(module))
        tree.modules.append(module)
        inside, layer = place, None
        if has_adapters(module):
            path = ".".join(part for part in (place.layer, place.name.rstrip(".")) if part)
            while path in taken:  # a layer in whose place there has come another one
                path += "~"
            taken.add(path)
            layer = AdapterLayer(path, module)
            tree.layers.append(layer)
            former = former if place.layer is not None else place
            inside, names = TensorPlace("", path), layer.names
        computed = module._non_persistent_buffers_set
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                (tree.computed if key in computed else tree.tensors).append((_below(inside, key, names), tensor))
        for key, child in module._modules.items():
            if child is None:
                continue
            if layer is not None and key in FORMER_MODULES:
                visit(child, former, (), former)
            else:
                below = _below(inside, key, names)
                is_found = below.adapter != inside.adapter
                visit(
                    child,
                    below if is_found else below._replace(name=f"{below.name}."),
                    () if is_found else names,
                    former,
                )

    visit(model, TensorPlace(""), (), TensorPlace(""))
    return tree


def _below(place: TensorPlace, key: str, names: Names) -> TensorPlace:
    if key in names:
        return place._replace(adapter=key)
    return place._replace(name=f"{place.name}{key}")


def plain_name(model: nn.Module, key: str) -> str | None:
    """The name that an entry of a model's state has without adapters; None if it is an adapter's."""
    module: nn.Module | None = model
    kept: list[str] = []
    for part in key.split("."):
        child = None if module is None else module._modules.get(part)
        if module is None or not has_adapters(module):
            kept.append(part)
        elif part not in FORMER_MODULES and (child is None or not has_adapters(child)):
            return None
        module = child
    return ".".join(kept)


def has_adapters(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers."""
    return hasattr(type(module), "adapter_layer_names")


def without_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, which has the adapters in its layers; others as they are.

    Raises:
        UnsupportedModel: its adapter stands before the prompt instead of in layers (prompt or prefix tuning).
    """
    if not (hasattr(model, "get_base_model") and hasattr(model, "peft_config")):
        return model
    if getattr(model, "prompt_encoder", None):
        raise UnsupportedModel(
            f"{type(model).__name__} puts learned tokens before every prompt; their KV belongs to no text. Adapters in"
            " layers, such as LoRA, can be used"
        )
    base: Any = model
    inner: PreTrainedModel = base.get_base_model()
    return inner


def names_of(layers: Sequence[AdapterLayer]) -> Names:
    """All adapters of a model, sorted."""
    return tuple(sorted({name for layer in layers for name in layer.names}))
