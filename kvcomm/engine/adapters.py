"""Which weights a request means, and under which namespace their KV is cached.

A request names an adapter, or takes the model as its user has left it. What that means is fixed when the request is
made, and holds to its end: passes are for one identity of weights each, and a request whose weights are gone fails by
name. Adapters are switched for the time of a pass, by the engine's thread alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvcomm.errors import InvalidRequest, MissingExtra, ModelLoadError, UnknownAdapter, UnsupportedModel, WeightsChanged
from kvcomm.model.attention import hook
from kvcomm.model.live import LiveWeights, Weights
from kvcomm.model.names import require_adapter_name
from kvcomm.model.namespace import tenant_namespace
from kvcomm.model.progress import quiet_transformers
from kvcomm.model.quantized import is_quantized
from kvcomm.values import text

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Adapters:
    """The weights of one engine's model, and the namespaces that belong to them."""

    def __init__(
        self, given: nn.Module, model: PreTrainedModel, live: LiveWeights, identify: Callable[[str], str]
    ) -> None:
        """Make one.

        Args:
            given: what the engine was made for: the model itself or PEFT's wrapper around it.
            identify: the model's identity with weights of a digest.
        """
        self.live = live
        self._loader: Any = given
        self._model: Any = model
        self._identify = lru_cache(maxsize=64)(identify)
        self._home = self._identify(live.now().digest)

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that requests may name, sorted."""
        return self.live.adapters

    def weights(self, adapter: str | None) -> Weights:
        """What a request with this adapter would compute with now.

        Raises:
            UnknownAdapter: there is none of that name.
            WeightsChanged, UnsupportedModel: see `LiveWeights.now`.
        """
        return self.live.now(adapter, closely=True)

    def weights_to_go_on(self, adapter: str | None, former: Weights | None, what: str) -> Weights:
        """The weights to go on with behind KV that was computed before.

        Args:
            former: those that computed it; None: there is none yet.
            what: was computed, for messages.

        Raises:
            WeightsChanged: these are gone, or others now.
        """
        named = "the model as it is now" if adapter is None else f"adapter {adapter!r}"
        try:
            weights = self.weights(adapter)
        except UnknownAdapter as error:
            raise WeightsChanged(f"{named} of {what} is gone; load it again to go on") from error
        if former is not None and weights.digest != former.digest:
            raise WeightsChanged(
                f"{what} was computed by other weights than those of {named}; bring those back, or make it anew"
            )
        return weights

    def namespace(self, digest: str, tenant: str) -> str:
        """Where a tenant's KV of the weights with this digest is cached."""
        return tenant_namespace(self._identify(digest), tenant)

    def identity(self, weights: Weights) -> str:
        """What KV of these weights goes by where processes share it: the namespace but for the tenant."""
        return self._identify(weights.digest)

    def home(self, tenant: str) -> str:
        """What stands for a tenant whatever the weights are: for its quotas and the names of its segments.

        Raises:
            InvalidRequest: the tenant is no text.
        """
        return tenant_namespace(self._home, text("the tenant", tenant))

    def namespaces(self, tenant: str) -> tuple[str, ...]:
        """Every namespace that requests of a tenant can have: with no adapter named, with each, and the first one."""
        try:
            known = self.live.known()
        except (UnsupportedModel, WeightsChanged):  # nothing can be computed; what is cached stays where it is
            known = ()
        found = (*(self.namespace(digest, tenant) for digest in known), self.home(tenant))
        return tuple(dict.fromkeys(found))

    def load(self, name: str, folder: str | Path) -> None:
        """Attach an adapter that PEFT has saved; requests may name it from then on. What is active stays so.

        Its KV is cached under the digest of its weights and settings: the same in every process, whatever its name.

        Raises:
            InvalidRequest: the name cannot be used, or is taken, or the weights are kept in fewer bits.
            ModelLoadError: no adapter, or none that fits the model; nothing is attached.
            MissingExtra: PEFT is not installed.
        """
        require_adapter_name(name)
        folder = Path(folder)
        if name in self.names:
            raise InvalidRequest(f"there is an adapter {name!r} already; unload it first, or take another name")
        for file in ADAPTER_FILES:
            if not (folder / file).is_file():
                raise ModelLoadError(f"{folder} has no {file}; adapters are loaded as PEFT saves them")
        if is_quantized(self._model):
            raise InvalidRequest(
                f"adapter {name!r} cannot be attached: the model's weights are kept in fewer bits, and adapters "
                "were made for the weights as they are; load the model without `weights`"
            )
        require_peft()
        with hook.pass_lock(self._model), self.live.kept_choices():
            try:
                with quiet_transformers(bars=False), warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that there is more than one adapter, and the like
                    self._attach(name, folder)
            except ModelLoadError:
                raise
            except Exception as error:  # PEFT raises whatever it meets, from KeyError to RuntimeError
                self._detach_part(name)
                line = str(error).strip().splitlines()[:1] or [type(error).__name__]
                raise ModelLoadError(f"{folder} is no adapter that fits this model ({line[0]})") from error

    def unload(self, name: str) -> None:
        """Take an adapter out of the model. Requests that use it fail, contexts wait for it to come back.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        if name not in self.names:
            raise UnknownAdapter(f"there is no adapter {name!r}; loaded: {', '.join(self.names) or 'none'}")
        with hook.pass_lock(self._model), self.live.kept_choices():
            self._detach(name)

    def _attach(self, name: str, folder: Path) -> None:
        if self._loader is self._model:
            info = self._model.load_adapter(
                str(folder),
                adapter_name=name,
                adapter_kwargs={"local_files_only": True},
                use_safetensors=True,
                hotswap=False,
            )
        else:
            info = self._loader.load_adapter(str(folder), adapter_name=name, is_trainable=False, use_safetensors=True)
        missing = sorted(key for key in info.missing_keys if f".{name}." in key or key.endswith(f".{name}"))
        if missing:
            self._detach(name)
            raise ModelLoadError(f"{folder} lacks {len(missing)} tensors of the adapter, such as {missing[0]}")

    def _detach(self, name: str) -> None:
        self._loader.delete_adapter(name)

    def _detach_part(self, name: str) -> None:
        if name in self.live.adapters:
            self._detach(name)


def require_peft() -> None:
    """Raises MissingExtra when PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtra("adapters need PEFT: pip install 'kvcomm[adapters]'") from error
