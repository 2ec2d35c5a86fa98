"""What the contexts of one engine work with."""

from __future__ import annotations

from dataclasses import dataclass
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

from transformers.configuration_utils import PreTrainedConfig

from kvcomm.engine.adapters import Adapters
from kvcomm.engine.exchange import KVExchange
from kvcomm.engine.holdings import Holdings
from kvcomm.engine.language import Language
from kvcomm.engine.loop import EngineLoop
from kvcomm.engine.making import RequestMaker
from kvcomm.engine.open_prompt import OpenPrompts
from kvcomm.engine.scheduler import Scheduler
from kvcomm.engine.tenancy import Tenancy
from kvcomm.reuse.repair import Repairer


@dataclass(frozen=True, eq=False)
class ContextTools:
    """The same for all of them.

    Attributes:
        living: the contexts that have not been released, by id of their sequences.
        config: of the model.
    """

    lock: RLock
    adapters: Adapters
    tenancy: Tenancy
    language: Language
    maker: RequestMaker
    scheduler: Scheduler
    loop: EngineLoop
    open_prompts: OpenPrompts
    holdings: Holdings
    exchange: KVExchange
    repairer: Repairer
    config: PreTrainedConfig
    living: WeakValueDictionary[int, Any]
