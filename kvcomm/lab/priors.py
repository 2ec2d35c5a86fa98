"""Priors: files of pairs that ship with a model, found, read, written, and what goes into one of them."""

from __future__ import annotations

from kvcomm.align.prior import Prior, find_prior, read_prior, require_prior_fits, write_prior
from kvcomm.engine.engine import Engine
from kvcomm.tiers.space import DEFAULT_TENANT

__all__ = ["Prior", "find_prior", "head_weights", "read_prior", "require_prior_fits", "write_prior"]


def head_weights(engine: Engine, *, tenant: str = DEFAULT_TENANT) -> tuple[float, ...] | None:
    """By how much each attention head that is looked at says which tokens matter, as a tenant's prompts have shown.

    None: too few have.
    """
    with engine.lock:
        return engine.reuse.parts.book.heads(engine.namespace(tenant)).weights
