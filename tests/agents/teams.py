"""Teams whose agents read each other: a tiny one, inputs for it that have nothing in common, and random ones."""

from __future__ import annotations

import hashlib

from hypothesis import strategies as st

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


@st.composite
def reading_teams(draw: st.DrawFn) -> tuple[dict[str, str], int]:
    """Random prompts without cycles: agents read agents before them, anyone's previous answer, and an input."""
    num_agents = draw(st.integers(1, 6))
    prompts = {}
    for index in range(num_agents):
        reads = [f"{{a{i}}}" for i in range(index)]
        slots = [*reads, *(f"{{a{i}@previous}}" for i in range(num_agents)), "{q}"]
        prompts[f"a{index}"] = f"a{index}:" + ".".join(draw(st.lists(st.sampled_from(slots), max_size=5)))
    if not any("{q}" in prompt for prompt in prompts.values()):
        prompts["a0"] += "{q}"
    order = draw(st.permutations(sorted(prompts)))
    return {name: prompts[name] for name in order}, draw(st.integers(1, 3))
