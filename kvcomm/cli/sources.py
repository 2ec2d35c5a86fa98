"""The texts and stored segments of a command line, and the segments they become with a model.

Everything is read before a model is loaded, so mistakes are found at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvcomm.cli.options import read_text
from kvcomm.cli.store import Store, StoredSegment
from kvcomm.errors import EmptyPrompt, InvalidRequest
from kvcomm.memory.segments import Segment

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine


class ContextSources:
    """What a command line says that a context shall hold; files and stored segments are read at once."""

    def __init__(self, store: Store, segments: list[str] | None, file: Path | None, text: str | None) -> None:
        """Raises InvalidRequest if nothing is given, and what `Store.segment` and `read_text` raise."""
        if not segments and file is None and text is None:
            raise InvalidRequest("give what the context shall hold: --text, --file or --segment")
        self._stored = [(name, store.segment(name)) for name in segments or ()]
        self._texts: list[tuple[str, str | None]] = []
        if file is not None:
            self._texts.append((read_text(file), file.stem))
        if text is not None:
            self._texts.append((text, None))

    def read(self, engine: Engine) -> list[Segment]:
        """The segments of the prompt.

        Raises:
            EmptyPrompt: no text has any tokens.
            InvalidRequest: a stored segment belongs to another model.
        """
        segments = [_checked(engine, name, stored) for name, stored in self._stored]
        segments += [engine.segment(text, name=name) for text, name in self._texts]
        if not any(segment.token_ids for segment in segments):
            raise EmptyPrompt("the texts given have no tokens")
        return segments


def _checked(engine: Engine, name: str, stored: StoredSegment) -> Segment:
    segment = engine.segment(stored.text, name=name)
    if stored.namespace != engine.namespace() or segment.token_ids != stored.token_ids:
        raise InvalidRequest(
            f"segment {name!r} was tokenized for another model ({stored.model}); give that one as --model, or add "
            f"the segment again with `kvcomm segment add {name} --force`"
        )
    return segment
