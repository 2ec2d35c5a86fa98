"""Whose turn it is among answers whose grammars are dear: what one of them takes, all others in the step wait for.

A grammar is bounded in what a look at all tokens may cost, but a step has many answers. Ordinary grammars take part in
every step. Dear ones, together, have so much time of a step and no more; who is left out comes first the next time.
Where all requests are one tenant's nobody else waits, and nobody is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvcomm.engine.grammar_state import DEAR_S, GrammarState

STEP_S = 0.02
"""Of computing, what dear grammars may take of a step; the one that goes beyond it is the last."""


def left_out(states: Iterable[GrammarState], step_s: float = STEP_S) -> set[GrammarState]:
    """Those that wait for another step, by what is expected of them; at least one takes part."""
    taken_s = 0.0
    waiting: set[GrammarState] = set()
    for state in in_turn(state for state in states if state.is_dear):
        if taken_s < step_s:
            taken_s += state.cost_s
            state.num_waited = 0
        else:
            state.num_waited += 1
            waiting.add(state)
    return waiting


def look(states: Iterable[GrammarState], step_s: float = STEP_S) -> set[GrammarState]:
    """Let them look at all tokens, the ordinary ones first, until dear looks have taken all of the time.

    Returns:
        Those that have not looked: they were thought cheap, and others turned out dear.
    """
    taken_s = 0.0
    waiting: set[GrammarState] = set()
    for state in in_turn(states):
        if taken_s >= step_s:
            state.num_waited += 1
            waiting.add(state)
            continue
        state.look()
        taken_s += state.cost_s if state.cost_s >= DEAR_S else 0.0
    return waiting


def in_turn(states: Iterable[GrammarState]) -> list[GrammarState]:
    """Ordinary ones first; then who has waited longest."""
    return sorted(states, key=lambda state: (state.is_dear, -state.num_waited))
