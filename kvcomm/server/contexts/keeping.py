"""Where a server keeps its tenants' snapshots: in the operator's folder, or else in the shared tier."""

from __future__ import annotations

from kvcomm.server.contexts.snapshots import SnapshotFolder
from kvcomm.server.contexts.tier_snapshots import TierSnapshots
from kvcomm.server.state import ServerState

Snapshots = SnapshotFolder | TierSnapshots


def snapshots_of(state: ServerState, tenant: str) -> Snapshots | None:
    """The snapshots of the tenant with that name; None: nowhere."""
    root, tier, most = state.settings.snapshots, state.engine.tiering.tier, state.settings.max_snapshots
    if root is not None:
        return SnapshotFolder(root, tenant, max_snapshots=most)
    if tier is not None and tier.serves(tenant):
        return TierSnapshots(state.engine, tier, tenant, max_snapshots=most)
    return None
