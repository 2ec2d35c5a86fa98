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

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from threading import RLock
from weakref import WeakKeyDictionary

from blake3 import blake3
from transformers import PreTrainedModel

from kvcomm.errors import UnknownAdapter, WeightsChanged
from kvcomm.model.adapters import AdapterChoice, AdapterLayer, Loan, Names, Setting, names_of, sort_tree
from kvcomm.model.watched_tree import WatchedTree, parts_of
from kvcomm.model.weights import tensor_digest, weights_digest

MAX_TRIES = 3
"""Looks at a tree that somebody changes meanwhile."""

_is_training = attrgetter("training")


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


class LiveWeights:
    """Watches one model. Thread-safe.

    Attributes:
        generation: counts how often other modules were seen.
    """

    def __init__(self, model: PreTrainedModel, plain_digest: str | None = None) -> None:
        """Make one.

        Args:
            plain_digest: identity of the model without its adapters as it is now; None: it is hashed.

        Raises:
            UnsupportedModel: see `weights_digest`.
        """
        self.generation = 0
        self._model = model
        self._lock = RLock()
        self._settle(sort_tree(model).layers)
        self._tree = WatchedTree(model)
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
            self._replace_tree(WatchedTree(self._model))
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
                    layer.choose(before.get(layer.path, AdapterChoice()))
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
                    self._replace_tree(WatchedTree(self._model))
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

    def _replace_tree(self, tree: WatchedTree) -> None:
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
                for at, value in parts_of(tree, layer)[name]
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
