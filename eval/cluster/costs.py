"""What things cost a simulated worker, in seconds and bytes; measured on a real one by `eval.cluster.measuring`.

The constants are those of SmolLM2-135M in float32 on one thread of a two-core machine without a GPU: 1,024 tokens of a
prompt take 2.6 s there, and their KV 20 ms from a tier in a folder. Decode steps are rounded. `python -m eval.cluster
--measure` prints what another machine takes. Gains are ratios under one set of costs, so another machine moves the
seconds far more than the gains.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_TOKENS = 512
"""Tokens of a prompt between two decode steps of the answers that run beside it."""


@dataclass(frozen=True)
class Costs:
    """What one worker takes for what.

    Attributes:
        token_s: to compute a token of a prompt, whatever stands before it.
        pair_s: more for every token that it attends to.
        step_s: a decode step of one answer.
        stream_s: more for every other answer in the step.
        token_bytes: KV of a token.
        get_s: to get one object from the tier, however small.
        get_byte_s: more for every byte: reading, checking and copying it, without the network.
        network_bytes_s: bytes a second between a worker and the tier.
    """

    token_s: float
    pair_s: float
    step_s: float
    stream_s: float
    token_bytes: int
    get_s: float
    get_byte_s: float
    network_bytes_s: float

    def prefill_s(self, start: int, end: int) -> float:
        """Computing tokens [start, end) of a prompt."""
        num_pairs = (end * (end + 1) - start * (start + 1)) / 2
        return (end - start) * self.token_s + num_pairs * self.pair_s

    def steps_s(self, num_tokens: int, num_answers: int) -> float:
        """Decode steps of `num_answers` that go on while `num_tokens` of a prompt are computed."""
        if not num_answers:
            return 0.0
        return -(-num_tokens // CHUNK_TOKENS) * (self.step_s + (num_answers - 1) * self.stream_s)

    def answer_s(self, num_tokens: int) -> float:
        """From an answer's first token to its last one."""
        return max(num_tokens - 1, 0) * self.step_s

    def get_tokens_s(self, num_tokens: int) -> float:
        """Getting KV of so many tokens from the tier."""
        num_bytes = num_tokens * self.token_bytes
        return self.get_s + num_bytes * (self.get_byte_s + 1 / self.network_bytes_s)

    def put_tokens_s(self, num_tokens: int) -> float:
        """Until KV of so many tokens can be had from the tier; nobody waits for it."""
        return self.get_tokens_s(num_tokens)


SMOLLM2 = Costs(
    token_s=2.4e-3,
    pair_s=2.5e-7,
    step_s=2.2e-2,
    stream_s=5.0e-3,
    token_bytes=46_080,
    get_s=2e-3,
    get_byte_s=4.0e-10,
    network_bytes_s=1.25e9,
)
