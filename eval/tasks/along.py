"""Asking as an agent asks that has read along: its prompt was open while others wrote what it reads.

Answers are known here, so nobody writes: a prompt is opened with all but the end of the newest answer, read as far as
there is time, and closed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvcomm import Engine, RequestHandle, ReusePolicy, SamplingParams, Segment
from kvcomm.lab.answers import MIN_CHUNK

NUM_LATE = MIN_CHUNK
"""Tokens of the newest answer that are not read when it ends: fewer are not worth a pass beside who writes them."""


def ask_along(
    engine: Engine,
    prompt: Sequence[Segment],
    sampling: SamplingParams,
    agents: Collection[str],
    timeout_s: float | None = None,
) -> RequestHandle:
    """Ask for an answer, exact, with what is known before the newest answer ends read already.

    Args:
        agents: names of segments that are answers; a prompt without any is asked as every other one.
        timeout_s: how long reading may take at most where the engine has other work; None: until it is done.
    """
    tokens = known_early(prompt, agents)
    if not tokens:
        return engine.submit(prompt, sampling, policy=ReusePolicy.exact())
    with engine.open_prompt(tokens, policy=ReusePolicy.exact()) as opened:
        engine.wait_idle(timeout_s)
        return opened.close(sampling, prompt=prompt)


def known_early(prompt: Sequence[Segment], agents: Collection[str]) -> list[int]:
    """Token ids of all that stands before the end of the newest answer; none where there is no answer."""
    newest = max((index for index, part in enumerate(prompt) if part.name in agents and part.token_ids), default=None)
    if newest is None:
        return []
    tokens = [token for part in prompt[: newest + 1] for token in part.token_ids]
    return tokens[: len(tokens) - min(NUM_LATE, len(prompt[newest].token_ids))]
