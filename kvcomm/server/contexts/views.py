"""Contexts as clients see them."""

from __future__ import annotations

from kvcomm.engine.results import Completion
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.contexts.turns import TenantContext
from kvcomm.server.schemas.contexts import ContextBranch, ContextObject, ExtendedContext
from kvcomm.server.usage import usage_of


def views(registry: ContextRegistry) -> list[ContextObject]:
    """All contexts of a registry, parents before children."""
    return [_view(registry, node, num_bytes) for node, num_bytes in registry.num_bytes().items()]


def view(registry: ContextRegistry, node: TenantContext) -> ContextObject:
    """One of them."""
    return _view(registry, node, registry.num_bytes()[node])


def extended(registry: ContextRegistry, node: TenantContext, completion: Completion) -> ExtendedContext:
    """One of them, and what computing it took."""
    return ExtendedContext(**view(registry, node).model_dump(), usage=usage_of([completion.usage]))


def branch_of(registry: ContextRegistry, node: TenantContext) -> ContextBranch:
    """One of them in its tree."""
    sizes = registry.num_bytes()
    branch = registry.branch(node)
    ancestors, at = [], node.parent
    while at is not None:
        ancestors.append(at.id)
        at = at.parent
    return ContextBranch(
        **_view(registry, node, sizes[node]).model_dump(),
        ancestors=ancestors[::-1],
        descendants=[_view(registry, each, sizes[each]) for each in branch[1:]],
        branch_bytes=sum(sizes[each] for each in branch),
    )


def _view(registry: ContextRegistry, node: TenantContext, num_bytes: int) -> ContextObject:
    context = node.context
    return ContextObject(
        id=node.id,
        name=node.name,
        parent=None if node.parent is None else node.parent.id,
        tokens=context.num_tokens,
        own_tokens=context.num_tokens - node.num_inherited,
        bytes=num_bytes,
        conversation_bytes=0 if node.conversation is None else node.conversation.num_bytes,
        fidelity=context.fidelity.value,
        busy=node.turn is not None,
        pinned=node.is_pinned,
        expires_in_s=registry.left_s(node),
        created=node.created,
    )
