"""What is moved, at which rung and for whom, and what an engine has spent and keeps for it: to compare ways of moving.

Rungs and ladders name the ways. Readers are for whom text is moved, spans and reasons say what became of a prompt, and
an outcome what one rung would have cost it. Knows no statistics; those are in `kvcomm.lab.bounds`.
"""

from __future__ import annotations

from kvcomm.align.ladder import CORRECTED, TURNED, Ladder, Rung, ladders_of
from kvcomm.align.readers import Reader, reader_of
from kvcomm.engine.engine import Engine
from kvcomm.memory.fidelity import Fidelity
from kvcomm.reuse.plan import Reason, Span, SpanKind
from kvcomm.reuse.replay import NUM_CONTINUATION, Outcome
from kvcomm.tiers.space import DEFAULT_TENANT

__all__ = [
    "CORRECTED",
    "NUM_CONTINUATION",
    "TURNED",
    "Fidelity",
    "Ladder",
    "Outcome",
    "Reader",
    "Reason",
    "Rung",
    "Span",
    "SpanKind",
    "anchor_bytes",
    "ladders_of",
    "learning_s",
    "reader_of",
]


def learning_s(engine: Engine) -> float:
    """Seconds that an engine has spent beside requests so far: on anchors, pairs and audits."""
    return engine.reuse.parts.idle.worked_s


def anchor_bytes(engine: Engine, *, tenant: str = DEFAULT_TENANT) -> int:
    """Bytes of the anchors that an engine keeps for a tenant, all edges together."""
    banks = engine.reuse.parts.anchors.banks(engine.namespace(tenant))
    with engine.lock:
        return sum(bank.snapshot().num_bytes for bank in banks)
