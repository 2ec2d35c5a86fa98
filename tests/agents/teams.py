"""A tiny team whose agents read each other, inputs for it that have nothing in common, and a machine to move on."""

from __future__ import annotations

import hashlib

from kvcomm.agents.agent import Agent
from kvcomm.agents.team import Team
from kvcomm.engine.sampling import SamplingParams
from kvcomm.reuse.policy import ReusePolicy

LOOSE = ReusePolicy(max_divergence=50.0, confidence=0.7)
SAMPLING = SamplingParams(max_new_tokens=24, ignore_eos=True)
TEAM = Team(
    "tiny",
    agents=(
        Agent("first", system="You answer.", prompt="Q: {question}", sampling=SAMPLING),
        Agent("second", system="You check what others say.", prompt="Q: {question} A: {first}", sampling=SAMPLING),
        Agent("third", system="You decide.", prompt="Q: {question} A: {first} B: {second}", sampling=SAMPLING),
    ),
)


def inputs(count: int, stem: str = "x") -> list[dict[str, str]]:
    """Texts that have nothing in common."""
    return [{"question": hashlib.sha256(f"{stem}{index}".encode()).hexdigest()} for index in range(count)]
