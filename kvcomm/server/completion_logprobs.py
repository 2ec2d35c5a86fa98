"""Log-probabilities in the shape of plain completions: parallel lists, of answers and of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Choice, Chunk, Completion
from kvcomm.engine.sampling import TokenLogprob
from kvcomm.server.schemas.completions import CompletionLogprobs
from kvcomm.server.schemas.logprobs import PromptLogprob
from kvcomm.server.token_names import TokenNames


class LogprobEntry(NamedTuple):
    """A token of a prompt or an answer.

    Attributes:
        told: its log-probability; None: it is the first of a prompt, and has none.
        place: characters of the choice's text before that of the token.
    """

    token_id: int
    told: TokenLogprob | None
    place: int


class Echo(NamedTuple):
    """A prompt as it stands before its answers; `entries`: of its tokens, if they are wanted."""

    text: str
    entries: tuple[LogprobEntry, ...] = ()


def entries_of(piece: Choice | Chunk) -> list[LogprobEntry]:
    """Entries of an answer or a piece of it; places are in the answer's own text."""
    return [
        LogprobEntry(token.token_id, token, place)
        for token, place in zip(piece.logprobs or (), piece.text_offsets or (), strict=True)
    ]


def echo_of(engine: Engine, prompt: str | list[int], token_ids: Sequence[int], completion: Completion) -> Echo:
    """A prompt with the log-probabilities of its tokens, which the engine has been asked for."""
    assert completion.prompt_logprobs is not None
    text, places = engine.texts.locate(token_ids)
    if isinstance(prompt, str):
        num_before = len(text) - len(prompt) if text.endswith(prompt) else 0  # start tokens that nobody wrote
        text, places = prompt, tuple(min(max(0, place - num_before), len(prompt)) for place in places)
    told = zip(token_ids, completion.prompt_logprobs, places, strict=True)
    return Echo(text, tuple(LogprobEntry(token_id, logprob, place) for token_id, logprob, place in told))


def lists_of(names: TokenNames, entries: Sequence[LogprobEntry], num_top: int) -> CompletionLogprobs:
    """The lists of entries, with the drawn token and so many alternatives at each place; 0: none of these."""
    tokens, tops = [], list[dict[str, float] | None]()
    for entry in entries:
        top = () if entry.told is None else entry.told.top[:num_top]
        called = names.apart([*(each.token_id for each in top), entry.token_id])
        tokens.append(called[entry.token_id])
        if entry.told is None:
            tops.append(None)
        else:
            here = {called[each.token_id]: each.logprob for each in top}
            tops.append(here | {called[entry.token_id]: entry.told.logprob})
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[None if entry.told is None else entry.told.logprob for entry in entries],
        top_logprobs=tops if num_top else None,
        text_offset=[entry.place for entry in entries],
    )


def prompt_lists(
    names: TokenNames, told: Sequence[TokenLogprob | None], num_top: int
) -> list[dict[str, PromptLogprob] | None]:
    """A prompt's log-probabilities by token id, the token that stands there and so many alternatives."""
    return [None if each is None else _by_id(names, each, num_top) for each in told]


def _by_id(names: TokenNames, told: TokenLogprob, num_top: int) -> dict[str, PromptLogprob]:
    ranks = {each.token_id: rank for rank, each in enumerate(told.top, 1)}
    shown = dict.fromkeys([(told.token_id, told.logprob), *told.top[:num_top]])
    return {
        str(token_id): PromptLogprob(logprob=logprob, rank=ranks.get(token_id), decoded_token=names.text(token_id))
        for token_id, logprob in shown
    }
