"""The living contexts of an engine, as a tuple that notebooks show as a tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Self

from kvcomm.engine.context import Context
from kvcomm.memory.segments import Segment
from kvcomm.pictures import tree
from kvcomm.plain import short

MAX_SHOWN = 12
"""Tokens of a segment without a name that say which one it is."""


class ContextList(tuple[Context, ...]):
    """Contexts, and in notebooks a tree of what they are made of: what they have in common stands there once."""

    _decode: Callable[[Iterable[int]], str]

    @classmethod
    def of(cls, contexts: Iterable[Context], decode: Callable[[Iterable[int]], str]) -> Self:
        """Make one of these.

        Args:
            decode: text of token ids.
        """
        made = cls(contexts)
        made._decode = decode
        return made

    def _repr_html_(self) -> str:
        return tree([(self._path(context.segments), repr(context)) for context in self])

    def _path(self, segments: Sequence[Segment]) -> tuple[str, ...]:
        """Segments as people read them: the name and how the text begins, and the number of tokens."""
        return tuple(self._step(segment) for segment in segments)

    def _step(self, segment: Segment) -> str:
        name = "" if segment.name is None else f"{segment.name}: "
        return f"{name}{short(self._decode(segment.token_ids[:MAX_SHOWN]))}, {len(segment.token_ids)} tokens"
