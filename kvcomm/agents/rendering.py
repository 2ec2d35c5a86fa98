"""From an agent's templates to the segments of its prompt.

The chat template is rendered once with an unlikely marker in place of every slot and the result is cut at the
markers. So static text keeps the exact form the chat template gives it (trimming, default system turns, turn
marks), while every slot's value is a segment of its own: the same text has the same ids wherever it stands.
Text of a run's inputs never becomes a control token. Without a chat template the prompt is plain: system
text, an empty line, prompt text, and nothing behind it. Rendering knows neither the graph nor the order in
which agents run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from kvcomm.agents.agent import Agent
from kvcomm.agents.templates import Part, Slot, Static, slots_of
from kvcomm.engine.encoding import TokenSpan
from kvcomm.errors import TemplateError
from kvcomm.memory.segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvcomm.engine.engine import Engine

Message = dict[str, str]


@dataclass(frozen=True)
class RenderedPrompt:
    """An agent's prompt with its static text tokenized and its slots still open.

    Attributes:
        parts: static segments and open slots in the order of the prompt; never empty.
    """

    parts: tuple[Segment | Slot, ...]

    def fill(self, values: Mapping[Slot, Sequence[int]]) -> tuple[Segment, ...]:
        """The prompt's segments; one without tokens for each slot without a value, since the reader is the same."""
        return tuple(
            part if isinstance(part, Segment) else Segment(tuple(values.get(part, ())), name=part.label)
            for part in self.parts
        )


class PromptRenderer:
    """Renders agents for one engine's tokenizer and chat template. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self._encoder = engine.encoder

    def render(self, agent: Agent) -> RenderedPrompt:
        """Apply the chat template to an agent.

        Raises:
            TemplateError: the chat template drops, repeats or reorders a placeholder, or rejects the
                conversation; or the prompt is empty. Names the agent and the placeholder.
        """
        slots = slots_of(agent.system_parts) + slots_of(agent.prompt_parts)
        marks = _Marks(agent.system + agent.prompt)
        system = marks.insert(agent.system_parts, first=0)
        prompt = marks.insert(agent.prompt_parts, first=len(slots_of(agent.system_parts)))
        pieces = marks.split(self._apply(agent.name, system, prompt), slots, agent.name)
        parts = [self._engine.segment(part.text) if isinstance(part, Static) else part for part in pieces]
        if not parts:
            raise TemplateError(f"agent {agent.name!r}: system and prompt are both empty")
        return RenderedPrompt(self._with_prefix(parts))

    def encode_input(self, name: str, text: str) -> tuple[int, ...]:
        """Tokenize a run's input on its own; control tokens spelled out in it are ordinary text.

        Raises:
            InvalidRequest: the tokenizer cannot take such a token as ordinary text; names it.
        """
        return self._encoder.plain(text, label=f"input {name!r}")

    def encode_spans(self, text: str) -> list[TokenSpan]:
        """As `encode_input`, with the place of every token; see `TextEncoder.spans`."""
        return self._encoder.spans(text)

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

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before any text by default: nothing, or a begin-of-sequence token."""
        return self._encoder.start_ids

    def _with_prefix(self, parts: Sequence[Segment | Slot]) -> tuple[Segment | Slot, ...]:
        prefix, first = self.start_ids, parts[0]
        if not prefix:
            return tuple(parts)
        if isinstance(first, Slot):
            return (Segment(prefix), *parts)
        if first.token_ids[: len(prefix)] == prefix:  # the chat template wrote it already
            return tuple(parts)
        return (Segment(prefix + first.token_ids), *parts[1:])

    def _apply(self, agent: str, system: str, prompt: str) -> str:
        if not self._tokenizer.chat_template:
            return "\n\n".join(text for text in (system, prompt) if text)
        if system and not self._takes_system:
            system, prompt = "", f"{system}\n\n{prompt}"
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        text, error = self._render_chat(messages)
        if error is not None:
            raise TemplateError(f"agent {agent!r}: the chat template rejects its prompt: {error}") from error
        return text

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the chat template neither refuses nor silently drops a system turn."""
        text, error = self._render_chat(
            [{"role": "system", "content": "SYSTEMTEXT"}, {"role": "user", "content": "USERTEXT"}]
        )
        return error is None and "SYSTEMTEXT" in text

    def _render_chat(self, messages: list[Message]) -> tuple[str, Exception | None]:
        from jinja2 import TemplateError as RefusedByTemplate

        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except RefusedByTemplate as error:
            return "", error
        return cast("str", text), None


class _Marks:
    """Markers that stand for slots while a chat template is rendered; found in no text of the agent."""

    def __init__(self, text: str) -> None:
        # Letters and digits only: a chat template that escapes or trims its content leaves them alone.
        seed = hashlib.sha256(text.encode()).hexdigest()
        while seed[:24] in text:
            seed = hashlib.sha256(seed.encode()).hexdigest()
        self._stem = f"SLOT{seed[:24]}N"

    def insert(self, parts: Sequence[Part], *, first: int) -> str:
        """The text with the i-th slot replaced by marker first + i."""
        texts: list[str] = []
        for part in parts:
            if isinstance(part, Static):
                texts.append(part.text)
            else:
                texts.append(f"{self._stem}{first:06d}")
                first += 1
        return "".join(texts)

    def split(self, text: str, slots: Sequence[Slot], agent: str) -> list[Part]:
        """Cut rendered text at the markers, which must be all there, once, in order."""
        pieces = re.split(self._stem + r"(\d{6})", text)
        found = [int(number) for number in pieces[1::2]]
        if found != list(range(len(slots))):
            raise TemplateError(f"agent {agent!r}, placeholder {_misplaced(found, slots)}")
        parts: list[Part] = [Static(pieces[0])]
        for slot, static in zip(slots, pieces[2::2], strict=True):
            parts += [slot, Static(static)]
        return [part for part in parts if part != Static("")]


def _misplaced(found: Sequence[int], slots: Sequence[Slot]) -> str:
    for index, slot in enumerate(slots):
        if index not in found:
            return f"{slot.placeholder}: the chat template drops it; move it to another place in the prompt"
        if found.count(index) > 1:
            return f"{slot.placeholder}: the chat template repeats it, so its text would stand there twice"
    index = next(i for i, number in enumerate(found) if i != number)
    return f"{slots[index].placeholder}: the chat template changes the order of the placeholders"
