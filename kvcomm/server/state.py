"""What all surfaces of one server share: the engine, and who is let in, counted and logged. One per app, no globals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from fastapi import Depends, Request

from kvcomm.engine.engine import Engine
from kvcomm.server.access import tenant_name
from kvcomm.server.admission import AdmissionControl
from kvcomm.server.contexts.registry import Contexts
from kvcomm.server.contexts.turns import NewId, new_id
from kvcomm.server.errors import ApiError
from kvcomm.server.keys import KeyRing
from kvcomm.server.logs import Ended
from kvcomm.server.metrics import Metrics
from kvcomm.server.prompts import PromptMaker
from kvcomm.server.segments.prepared import PreparedPrompt
from kvcomm.server.segments.registry import SegmentRegistries
from kvcomm.server.settings import ServerSettings
from kvcomm.server.tenants import Tenant, Tenants
from kvcomm.server.token_names import TokenNames
from kvcomm.server.vllm_metrics import VllmMetrics
from kvcomm.server.workers import Workers


@dataclass(eq=False)
class ServerState:
    """The parts of a running server.

    Attributes:
        keys: None: no keys, everybody who can connect is the one default tenant.
        new_id: makes the ids of contexts and responses.
        started_s: when it was made, on `clock`.
        is_engine_closed: a request has found the engine closed; nothing will be served any more.
    """

    engine: Engine
    settings: ServerSettings
    keys: KeyRing | None
    clock: Callable[[], float] = time.monotonic
    new_id: NewId = new_id
    created: int = field(default_factory=lambda: int(time.time()))
    is_engine_closed: bool = False
    started_s: float = field(init=False)
    admission: AdmissionControl = field(init=False)
    tenants: Tenants = field(init=False)
    contexts: Contexts = field(init=False)
    registries: SegmentRegistries = field(init=False)
    prompts: PromptMaker = field(init=False)
    metrics: Metrics = field(init=False)
    workers: Workers = field(init=False)
    token_names: TokenNames = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.clock()
        self.admission = AdmissionControl(self.settings, self.num_tenants)
        self.tenants = Tenants(self.engine, self.settings, self.keys, self.clock)
        self.contexts = Contexts(self.engine, self.settings, self.clock, self.new_id)
        self.registries = SegmentRegistries(self.settings.max_segment_bytes, self.settings.max_segments)
        self.prompts = PromptMaker(
            self.engine,
            self.registries,
            tool_parser=self.settings.tool_parser,
            default_tools=self.settings.default_tools,
        )
        self.token_names = TokenNames(self.engine)
        max_running = self.engine.config.max_running
        self.workers = Workers(max_running, lambda: self.admission.kept_of(max_running))
        self.metrics = Metrics(self.engine, self.admission, self.workers.engine)
        if self.settings.has_vllm_metrics:
            self.metrics.registry.register(self._vllm_metrics())

    def _vllm_metrics(self) -> VllmMetrics:
        events, turns = self.settings.kv_events, self.workers.engine
        return VllmMetrics(
            self.engine,
            lambda: self.engine.requests.num_waiting + turns.num_waiting,
            model=self.settings.name,
            block_size=self.engine.config.page_size if events is None else events.block_size,
        )

    def ended(self, ended: Ended) -> None:
        """Count a request that has ended, for the operator and for its own tenant."""
        self.metrics.ended(ended)
        tenant = None if ended.notes.tenant is None else self.tenants.find(ended.notes.tenant)
        if tenant is not None:
            tenant.tally.ended(ended)

    def num_tenants(self) -> int:
        """How many there may be at once: those with a key, or the one."""
        return 1 if self.keys is None else self.keys.num_tenants

    @cached_property
    def fingerprint(self) -> str:
        """Tells apart models, dtypes and formats; OpenAI's `system_fingerprint`."""
        return f"kvcomm-{self.engine.namespace('fingerprint')[:16]}"

    @property
    def models(self) -> tuple[str, ...]:
        """What requests may name: the model, and every adapter as a model of its own."""
        return (self.settings.name, *(name for name in self.engine.adapters.names if name != self.settings.name))

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a model's name stands for; None: the model itself.

        An adapter's name alone is enough; behind the model's and a colon it is understood, too.

        Raises:
            ApiError: 404, the server does not serve a model of that name.
        """
        base, models = self.settings.name, self.models
        if model == base:
            return None
        adapter = model.removeprefix(f"{base}:")
        if adapter not in models[1:]:
            message = f"there is no model {model!r} here; this server serves {', '.join(map(repr, models))}"
            raise ApiError(404, "model_not_found", message, param="model")
        return adapter

    def tenant_of(self, request: Request) -> Tenant:
        """Whose request this is.

        Raises:
            ApiError: 401 when its last key was removed while the request's body was read.
        """
        name = tenant_name(request.scope)
        if self.tenants.is_revoked(name):
            raise ApiError(401, "invalid_api_key", "this API key is not known any more")
        return self.tenants.get(name)

    def prolong(self, space: str, prompt: PreparedPrompt, adapter: str | None) -> None:
        """Let what is cached of a prompt live as long as its request says, unless its pages are needed."""
        engine, token_ids = self.engine, prompt.token_ids
        namespace = engine.namespace(space, adapter=adapter)
        for num_tokens, ttl_s, _ in prompt.lifetimes:
            engine.cache.prolong(namespace, token_ids[:num_tokens], ttl_s)


def state_of(request: Request) -> ServerState:
    """The state of the app that a request came to."""
    state = request.app.state.kvcomm
    assert isinstance(state, ServerState)
    return state


async def _state(request: Request) -> ServerState:
    return state_of(request)


StateDep = Annotated[ServerState, Depends(_state)]


async def _tenant_of(request: Request, state: StateDep) -> Tenant:  # no coroutine would go through a worker thread
    return state.tenant_of(request)


TenantDep = Annotated[Tenant, Depends(_tenant_of)]
"""The tenant whose key a request carries."""
