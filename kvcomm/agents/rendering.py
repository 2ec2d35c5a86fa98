"""From an agent's templates to the segments of its prompt.

The chat template is rendered once with a stand-in in place of every slot and the result is cut at these. So static
text keeps the exact form the chat template gives it (trimming, default system turns, turn marks), while every slot's
value is a segment of its own: the same text has the same ids wherever it stands. A slot that is given several passages
gets a segment for each, with an empty line between them, which is static text. Text of a run's inputs never becomes a
control token. Without a chat template the prompt is plain: system text, an empty line, prompt text, and nothing behind
it. Rendering knows neither the graph nor the order in which agents run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from kvcomm.agents.agent import Agent
from kvcomm.agents.templates import Slot, TemplatePart
from kvcomm.engine.chat_template import ChatTemplate, Static
from kvcomm.engine.marks import Marks
from kvcomm.errors import TemplateError
from kvcomm.memory.segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvcomm.engine.engine import Engine

SEPARATOR = "\n\n"
"""Static text between the passages of one slot."""

Input: TypeAlias = str | Segment | Sequence[str | Segment]
"""What a run may be given for a placeholder: one text, or passages in the order in which they are to stand."""

Filling: TypeAlias = tuple[tuple[int, ...], ...]
"""Token ids of each text that fills a slot."""


@dataclass(frozen=True)
class RenderedPrompt:
    """An agent's prompt with its static text tokenized and its slots still open.

    Attributes:
        parts: static segments and open slots in the order of the prompt; never empty.
        separator: what stands between passages of one slot.
    """

    parts: tuple[Segment | Slot, ...]
    separator: Segment

    def fill(self, values: Mapping[Slot, Filling]) -> tuple[Segment, ...]:
        """The prompt's segments; one without tokens for each slot without a value, since the reader is the same."""
        return tuple(segment for part in self.parts for segment in self.fill_part(part, values))

    def fill_part(self, part: Segment | Slot, values: Mapping[Slot, Filling]) -> tuple[Segment, ...]:
        """The segments of one part of the prompt."""
        if isinstance(part, Segment):
            return (part,)
        texts = [Segment(tuple(ids), name=part.label) for ids in values.get(part, ()) if ids]
        segments: list[Segment] = []
        for index, text in enumerate(texts or [Segment((), name=part.label)]):
            segments += [self.separator, text] if index else [text]
        return tuple(segments)


class PromptRenderer:
    """Renders agents for one engine's tokenizer and chat template. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self._encoder = engine.encoder
        self._template = ChatTemplate(engine.tokenizer)
        self._separator = engine.segment(SEPARATOR)

    def render(self, agent: Agent) -> RenderedPrompt:
        """Apply the chat template to an agent.

        Raises:
            TemplateError: the chat template drops, repeats or reorders a placeholder, or rejects the
                conversation; or the prompt is empty. Names the agent and the placeholder.
        """
        marks: Marks[Slot] = Marks()
        text = self._apply(agent.name, _marked(marks, agent.system_parts), _marked(marks, agent.prompt_parts))
        pieces = marks.cut(text, lambda slot: f"agent {agent.name!r}, placeholder {slot.placeholder}")
        parts = [self._engine.segment(piece) if isinstance(piece, str) else piece for piece in pieces]
        if not parts:
            raise TemplateError(f"agent {agent.name!r}: system and prompt are both empty")
        return RenderedPrompt(self._with_prefix(parts), self._separator)

    def encode_input(self, name: str, text: str) -> tuple[int, ...]:
        """Tokenize a run's input on its own; control tokens spelled out in it are ordinary text.

        Raises:
            InvalidRequest: the tokenizer cannot take such a token as ordinary text; names it.
        """
        return self._encoder.plain(text, label=f"input {name!r}")

    def read_input(self, name: str, value: Input) -> Filling:
        """What an input puts into its slots.

        Raises:
            InvalidRequest: as `encode_input`, or a segment holds a control token; names it.
        """
        if isinstance(value, str):
            return (self.encode_input(name, value),)
        if isinstance(value, Segment):
            return (self._encoder.require_ordinary(value.token_ids, label=f"input {name!r}"),)
        return tuple(ids for passage in value for ids in self.read_input(name, passage))

    def strip_end(self, token_ids: Sequence[int], stop_token_ids: Sequence[int] = ()) -> tuple[int, ...]:
        """An answer's ids without the end-of-turn and stop tokens behind it."""
        ends = self._end_ids | set(stop_token_ids)
        length = len(token_ids)
        while length and token_ids[length - 1] in ends:
            length -= 1
        return tuple(token_ids[:length])

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        unknown = {self._tokenizer.unk_token_id} - {self._tokenizer.eos_token_id}
        return frozenset(token_id for token_id, token in added if token.special) - unknown

    def _with_prefix(self, parts: Sequence[Segment | Slot]) -> tuple[Segment | Slot, ...]:
        prefix, first = self._encoder.start_ids, parts[0]
        if not prefix:
            return tuple(parts)
        if isinstance(first, Slot):
            return (Segment(prefix), *parts)
        if first.token_ids[: len(prefix)] == prefix:  # the chat template wrote it already
            return tuple(parts)
        return (Segment(prefix + first.token_ids), *parts[1:])

    def _apply(self, agent: str, system: str, prompt: str) -> str:
        if not self._template.exists:
            return "\n\n".join(text for text in (system, prompt) if text)
        if system and not self._template.takes_system:
            system, prompt = "", f"{system}\n\n{prompt}"
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        try:
            return self._template.render(messages)
        except TemplateError as error:
            raise TemplateError(f"agent {agent!r}: the chat template rejects its prompt: {error.__cause__}") from error


def _marked(marks: Marks[Slot], parts: Sequence[TemplatePart]) -> str:
    """The text with stand-ins for its slots."""
    return "".join(part.text if isinstance(part, Static) else marks.open(part) for part in parts)
