"""The request router that Ray Serve calls: `choosing` with Ray's replicas, queue lengths and requests.

Ray's own mixin that keeps requests in the order of arrival is not used: it hands a replica that was chosen for one
request to whichever came first, and a context's requests would go to another replica than the context's.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from kvcomm.integrations.ray.choosing import ReplicaChooser
from kvcomm.integrations.ray.messages import ForwardedRequest
from kvcomm.integrations.ray.routing import Policy


class KVRouter(RequestRouter):  # type: ignore[misc]  # Ray ships no types
    """Sends a request to its context's replica, or to the one that has least left to compute for it."""

    def initialize_state(self, **policy: float) -> None:
        """Take the settings of a deployment: fields of `routing.Policy`."""
        self._chooser = ReplicaChooser(Policy(**policy))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each. Nothing where the request is for a replica that is full: it waits."""
        asked = _asked(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if asked is None:
            return [candidate_replicas]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        stats = {name: replica.routing_stats or {} for name, replica in replicas.items()}
        waiting = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in replicas.items()}
        return [[replicas[name]] for name in self._chooser.order(asked, stats, waiting)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember it."""
        asked = _asked(pending_request)
        if asked is not None:
            self._chooser.sent(asked, replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget it."""
        super().on_replica_actor_died(replica_id)
        self._chooser.forget(replica_id.unique_id)


def _asked(pending: PendingRequest | None) -> ForwardedRequest | None:
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, ForwardedRequest) else None
