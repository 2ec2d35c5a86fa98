"""From arguments to the application that Ray Serve deploys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvcomm.errors import MissingExtra
from kvcomm.integrations.ray.settings import AppSettings, read_arguments
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import ServerSettings

if TYPE_CHECKING:
    from ray.serve import Application

EXTRA_MODULES = ("ray", "fastapi", "prometheus_client")
INGRESS_CPUS = 0.1
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME")
"""Variables that replicas see as whoever deploys them does."""


def build(arguments: Mapping[str, Any]) -> Application:
    """See `kvcomm.integrations.ray.app`."""
    missing = [name for name in EXTRA_MODULES if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"kvcomm on Ray needs {', '.join(missing)}: pip install 'kvcomm[ray]'")
    settings, server = read_arguments(arguments)
    _try_out(server)
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from kvcomm.integrations.ray.deployments import EngineReplica, Ingress

    autoscaling = settings.autoscaling()
    engines = serve.deployment(
        EngineReplica,
        name="engines",
        max_ongoing_requests=settings.requests_per_replica,
        ray_actor_options=_actor(settings),
        health_check_period_s=settings.health_period_s,
        health_check_timeout_s=settings.health_timeout_s,
        graceful_shutdown_timeout_s=server.drain_timeout_s,
        graceful_shutdown_wait_loop_s=1.0,
        request_router_config=RequestRouterConfig(
            request_router_class="kvcomm.integrations.ray.router.KVRouter",
            request_routing_stats_period_s=settings.stats_period_s,
        ),
        **({"num_replicas": settings.replicas} if autoscaling is None else {"autoscaling_config": autoscaling}),
    )
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=settings.ingresses,
        max_ongoing_requests=server.max_connections,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    )
    return ingress.bind(engines.bind(settings, server), server)


def _try_out(server: ServerSettings) -> None:
    """Mistakes are found before a model is loaded for them."""
    if server.keys is not None:
        KeyRing(server.keys)
    if (tier := server.open_tier()) is not None:
        tier.close()


def _actor(settings: AppSettings) -> dict[str, Any]:
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(settings.num_threads), **passed_on}
    return {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "runtime_env": {"env_vars": variables}}
