"""kvcomm on Ray Serve: an ingress with the whole HTTP surface, and engines behind it that know of one another.

    serve run kvcomm.integrations.ray:app model=smollm2-135m replicas=2 tier=file:///srv/kv

`app` takes the arguments that `settings.AppSettings` documents, and every setting of `kvcomm serve` by its own name.
The other names are the policy of routing, which needs no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvcomm.starting import lazily

if TYPE_CHECKING:
    from ray.serve import Application

    from kvcomm.integrations.ray.routing import Policy, PromptPrefix, Wanted, candidates, rank, rendezvous

__all__ = ["Policy", "PromptPrefix", "Wanted", "app", "candidates", "rank", "rendezvous"]

__getattr__ = lazily(__name__, dict.fromkeys(set(__all__) - {"app"}, "kvcomm.integrations.ray.routing"))


def app(arguments: Mapping[str, Any]) -> Application:
    """The Ray Serve application for `serve run`, `serve build` and `serve.run`.

    Raises:
        InvalidRequest: an unknown argument or a bad value, by name.
        MissingExtra: Ray Serve, or what the server needs, is not installed.
    """
    from kvcomm.integrations.ray.building import build

    return build(arguments)
