"""The contexts of tenants: who has which, for how long, and how many bytes each branch takes.

A registry belongs to one tenant, so that another's id is as unknown as one that never was. Contexts form a forest; a
context that goes leaves its children to its own parent. Always holds: a parent stands before its children; every
context here is alive; `Tenant.context_tokens` is what all of them hold, `conversations` what they keep beside it.
Nothing here recurses, so a branch may be as deep as it likes. Used from the event loop's thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.server.contexts.conversation import KeptConversation
from kvcomm.server.contexts.quota import ConversationQuota
from kvcomm.server.contexts.turns import NewId, TenantContext, Turn, new_id
from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.contexts import Terms
from kvcomm.server.settings import ServerSettings
from kvcomm.server.tenants import Tenant


class ContextRegistry:
    """The contexts of one tenant.

    Attributes:
        conversations: what they keep beside their KV.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServerSettings,
        tenant: Tenant,
        clock: Callable[[], float],
        new_id: NewId = new_id,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._new_id = new_id
        self.tenant = tenant
        self.conversations = ConversationQuota(settings)
        self._clock = clock
        self._nodes: dict[str, TenantContext] = {}  # parents before children
        self._num_coming = 0

    @property
    def nodes(self) -> list[TenantContext]:
        """All of them, parents before children."""
        return list(self._nodes.values())

    def find(self, context_id: str) -> TenantContext:
        """A context, which counts as use.

        Raises:
            ApiError: 404.
        """
        self.sweep()
        node = self._nodes.get(context_id)
        if node is None:
            message = f"there is no context {context_id!r}; it may have expired or been deleted"
            raise ApiError(404, "context_not_found", message, param="context_id")
        node.used_s = self._clock()
        return node

    @contextmanager
    def place(self) -> Iterator[None]:
        """Keep a place for a context while it is made, however long that takes.

        Raises:
            ApiError: 429 when the tenant has as many contexts as it may, those that are being made included; 409 when
                the operator has removed it.
        """
        self.tenant.require_there()
        self.sweep()
        limit = self._settings.max_contexts
        while len(self._nodes) + self._num_coming >= limit and self._drop_spare():
            pass
        num_taken = len(self._nodes) + self._num_coming
        if num_taken >= limit:
            message = f"this tenant has {num_taken} of at most {limit} contexts; delete some, or let some expire"
            raise ApiError(429, "quota_exceeded", message, retry_after_s=self._settings.retry_after_s)
        self._num_coming += 1
        try:
            yield
        finally:
            self._num_coming -= 1

    def adopt(
        self, context: Context, terms: Terms, *, salt: str | None = None, conversation: KeptConversation | None = None
    ) -> TenantContext:
        """Take in a context without a parent; it is the registry's from now on.

        Raises:
            ApiError: 409 when the operator has removed the tenant; the context is released then.
        """
        if self.tenant.is_gone:
            context.release()
        self.tenant.require_there()
        node = TenantContext(context, salt=salt, conversation=conversation, id=self._new_id(None))
        self._add(node, terms, self._settings.context_ttl_s)
        self.count()
        return node

    def adopt_response(self, node: TenantContext, turn: Turn, *, behind: TenantContext | None) -> TenantContext:
        """Take in what a turn made with a response at its end; raises as `adopt`.

        Args:
            node: of the context that the turn hands over, with its response.
            behind: the context that the turn began with; it may be gone meanwhile.
        """
        assert node.response is not None, "a response is there to be kept"
        if self.tenant.is_gone:
            node.context.release()
        self.tenant.require_there()
        if behind is not None and behind.id in self._nodes:
            node.parent, node.num_inherited = behind, behind.context.num_tokens
        node.salt, node.conversation = turn.salt, turn.conversation
        self.conversations.keep(node.response, node.response)
        self._add(node, Terms(name=node.name), self._settings.context_ttl_s)
        self.count()
        return node

    def bring_back(self, node: TenantContext, parent: str | None) -> None:
        """Take in a context as another server had it, under its own id; raises as `adopt`.

        Args:
            parent: id of what it came from, which it stands behind if that is here.
        """
        if self.tenant.is_gone:
            node.release()
        self.tenant.require_there()
        node.parent = None if parent is None else self._nodes.get(parent)
        node.used_s = self._clock()
        self._nodes[node.id] = node
        self.conversations.keep(node, node.conversation)
        self.conversations.keep(node.response, node.response)
        self.count()

    def fork(self, parent: TenantContext, terms: Terms) -> TenantContext:
        """A second context with all that is known of a first at this moment."""
        context, conversation = parent.fork()
        child = TenantContext(
            context, salt=parent.salt, conversation=conversation, parent=parent, id=self._new_id(parent.id)
        )
        child.num_inherited = min(context.num_tokens, parent.context.num_tokens)
        self._add(child, terms, parent.ttl_s)
        if parent.turn is not None:
            self.count()
        return child

    def new_turn(self, context: Context, *, salt: str | None = None) -> Turn:
        """A request on a context that is to be adopted once it has succeeded."""
        return Turn(context, salt=salt, quota=self.conversations)

    def turn_behind(self, node: TenantContext, *, keeps: bool) -> Turn:
        """A request on a fork of a context, which is to be adopted once it has succeeded, if it `keeps` that."""
        quota = self.conversations if keeps else None
        return Turn(node.context.fork(), before=node.conversation, salt=node.salt, quota=quota)

    def begin_turn(self, node: TenantContext, *, keeps: bool) -> Turn:
        """A request on a context.

        Raises:
            ApiError: 409 while another one writes it, or when a response ends with it and it is to keep more.
        """
        if keeps and node.response is not None:
            message = (
                f"context {node.id} ends with a stored response, which stays as it is; fork it, and extend the fork"
            )
            raise ApiError(409, "context_of_response", message)
        if node.turn is not None:
            message = (
                f"context {node.id} is being extended by another request; wait for it, or fork the context and go on "
                "with the fork"
            )
            raise ApiError(409, "context_busy", message, retry_after_s=self._settings.retry_after_s)
        turn = Turn(node.context.fork(), node, quota=self.conversations, on_end=partial(self._ended, node))
        if keeps:
            node.turn = turn
        return turn

    def branch(self, node: TenantContext) -> list[TenantContext]:
        """A context and all that came from it, parents before children."""
        inside = {node}
        for each in self._nodes.values():
            if each.parent in inside:
                inside.add(each)
        return [each for each in self._nodes.values() if each in inside]

    def remove(self, gone: Iterable[TenantContext]) -> None:
        """Forget contexts; the caller releases them. Their children are their parents' from now on."""
        left = {node: node.parent for node in gone}
        for node in left:
            del self._nodes[node.id]
            self.conversations.let_go(node)
            self.conversations.let_go(node.response)
        for node in self._nodes.values():
            while node.parent in left:
                node.num_inherited = min(node.num_inherited, node.parent.num_inherited)
                node.parent = left[node.parent]
        self.count()

    def sweep(self) -> bool:
        """Let go of what has expired, if anything; what is in use has not."""
        now_s = self._clock()
        gone = [node for node in self._nodes.values() if self.left_s(node, now_s) == 0]
        if gone:
            self.remove(gone)
            for node in gone:
                node.release()
        return bool(gone)

    def left_s(self, node: TenantContext, now_s: float | None = None) -> float | None:
        """Seconds until a context expires; None: it does not now."""
        if node.is_pinned or node.turn is not None:
            return None
        return max(0.0, node.used_s + node.ttl_s - (self._clock() if now_s is None else now_s))

    def num_bytes(self) -> dict[TenantContext, int]:
        """Bytes of each context's branch: of pages that none before it holds. The sum is what all of them hold."""
        pool = self._engine.cache
        is_seen = np.zeros(pool.num_pages, dtype=bool)
        sizes = {}
        for node in self._nodes.values():  # no lock: nobody writes a context that is here, turns write forks of it
            pages = node.context.sequence.pages
            sizes[node] = int((~is_seen[pages]).sum()) * pool.page_bytes
            is_seen[pages] = True
        return sizes

    def count(self) -> None:
        """Tell the tenant what its contexts hold."""
        num_pages = sum(self.num_bytes().values()) // self._engine.cache.page_bytes
        self.tenant.context_tokens = num_pages * self._engine.cache.page_size

    def trim(self, max_tokens: int, max_bytes: int) -> None:
        """Let go of what is kept while there is room: what was used longest ago first, the latest one never.

        Args:
            max_tokens: token slots that all of it may hold.
            max_bytes: what the tenant may keep beside its KV for that.
        """
        slot_bytes = self._engine.cache.page_bytes // self._engine.cache.page_size
        while len(spare := [node for node in self._nodes.values() if node.is_spare]) > 1:
            sizes = self.num_bytes()
            num_tokens = sum(sizes[node] for node in spare) // slot_bytes
            if num_tokens <= max_tokens and self.conversations.num_bytes <= max_bytes:
                return
            self._drop_spare()

    def _drop_spare(self) -> bool:
        """Let go of the one that was used longest ago, if there is one."""
        spare = [node for node in self._nodes.values() if node.is_spare]
        if not spare:
            return False
        oldest = min(spare, key=lambda node: node.used_s)
        self.remove([oldest])
        oldest.release()
        return True

    def _ended(self, node: TenantContext) -> None:
        """A context is not busy any more, which was use to the end."""
        node.used_s = self._clock()
        if node.id in self._nodes:
            self.conversations.keep(node, node.conversation)
        self.count()

    def _add(self, node: TenantContext, terms: Terms, ttl_s: float) -> TenantContext:
        node.name, node.is_pinned = terms.name or node.context.name, terms.pinned
        node.ttl_s = ttl_s if terms.ttl_s is None else terms.ttl_s
        node.used_s = self._clock()
        self._nodes[node.id] = node
        self.conversations.keep(node, node.conversation)
        return node


class Contexts:
    """The contexts of all tenants."""

    def __init__(
        self, engine: Engine, settings: ServerSettings, clock: Callable[[], float], new_id: NewId = new_id
    ) -> None:
        """`new_id` makes the ids of contexts, and of responses, which share them."""
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self.new_id = new_id
        self._registries: dict[str, ContextRegistry] = {}

    def of(self, tenant: Tenant) -> ContextRegistry:
        """A tenant's own; raises ApiError 409 when the operator has removed it."""
        tenant.require_there()
        if tenant.name not in self._registries:
            self._registries[tenant.name] = ContextRegistry(
                self._engine, self._settings, tenant, self._clock, self.new_id
            )
        return self._registries[tenant.name]

    def find(self, tenant: str) -> ContextRegistry | None:
        """That of the tenant with that name, if it has asked for contexts."""
        return self._registries.get(tenant)

    def remove(self, tenant: str) -> list[TenantContext]:
        """Forget a tenant's contexts; the caller releases them."""
        registry = self._registries.pop(tenant, None)
        nodes = [] if registry is None else registry.nodes
        if registry is not None:
            registry.remove(nodes)
        return nodes

    async def sweep(self) -> None:
        """Let go of what has expired."""
        for registry in list(self._registries.values()):
            if registry.sweep():
                await registry.tenant.freed()

    def close(self) -> None:
        """Release every context; what runs on them is cancelled and waited for."""
        for registry in self._registries.values():
            nodes = registry.nodes
            registry.remove(nodes)
            for node in nodes:
                node.release()
