"""kvcomm in vLLM: exact KV from a shared tier, and segments moved within a bound, through vLLM's connector interface.

`params` says what a request may carry, `adapter` holds every private name of vLLM. Nothing here is imported by the rest
of the package, and only `adapter`, `connector` and `worker` import vLLM. `version` is that of the vLLM installed here,
`inside` finds what kvcomm is in a running one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm.starting import lazily

if TYPE_CHECKING:
    from kvcomm.integrations.vllm.adapter import inside
    from kvcomm.integrations.vllm.needed import version

__all__ = ["inside", "version"]

_HOMES = {"inside": "kvcomm.integrations.vllm.adapter", "version": "kvcomm.integrations.vllm.needed"}

__getattr__ = lazily(__name__, _HOMES)
