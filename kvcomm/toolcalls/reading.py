"""Readers for the answers of one model: its way of writing calls and reasoning, and the tokens in which it does.

Where a marker of calls or reasoning is a special token, an answer's text does not have it; so the text is made from the
answer's ids then, with those special tokens and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from kvcomm.engine.detokenize import Detokenizer
from kvcomm.engine.results import Choice, Chunk
from kvcomm.engine.token_texts import TokenTexts
from kvcomm.toolcalls.choice import CallGrammars
from kvcomm.toolcalls.declared import DeclaredParser
from kvcomm.toolcalls.events import Answer, Event
from kvcomm.toolcalls.formats import Tools
from kvcomm.toolcalls.reader import AnswerReader, PlainParser, ReasoningTags
from kvcomm.toolcalls.template import ToolTemplate
from kvcomm.toolcalls.writer import AnswerWriter, CallParser, NewId

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = tuple(
    ReasoningTags(*each)
    for each in (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
)
"""What models write around reasoning; those count that the chat template knows."""

NUM_PROMPT_TOKENS = 1024
"""At the end of a prompt: enough to see whether it leaves reasoning open."""


class ShownTexts(TokenTexts):
    """Texts of ids with some special tokens in them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shown: frozenset[int]) -> None:
        super().__init__(tokenizer, skip_special_tokens=False)
        self._hidden = TokenTexts(tokenizer)
        self._shown = shown

    def shows(self, token_id: int) -> bool:
        """Whether a token has text here."""
        return token_id in self._shown or not self._hidden.is_silent(token_id)


class ChoiceReader:
    """Reads one choice of a request, in pieces or whole."""

    def __init__(self, reader: AnswerReader, texts: ShownTexts | None, tokenizer: PreTrainedTokenizerBase) -> None:
        """`texts`: of its ids, where special tokens are to be seen; those that are not are left out of it."""
        self._reader = reader
        self._texts = texts
        self._detokenizer = None if texts is None else Detokenizer(tokenizer, texts=texts)

    def chunk(self, chunk: Chunk) -> list[Event]:
        """The events of the next piece; with the last one the `Finish` comes."""
        text = chunk.text
        if self._texts is not None and self._detokenizer is not None:
            text = "".join(map(self._detokenizer.push, self._seen(chunk.token_ids)))
            text += self._detokenizer.finish() if chunk.finish_reason is not None else ""
        events = self._reader.read(text)
        return events if chunk.finish_reason is None else [*events, *self._reader.finish(chunk.finish_reason)]

    def whole(self, choice: Choice) -> Answer:
        """All of it; nothing else may have been read."""
        text = choice.text if self._texts is None else self._texts.decode(self._seen(choice.token_ids))
        return self._reader.whole(text, choice.finish_reason)

    def _seen(self, token_ids: Sequence[int]) -> list[int]:
        assert self._texts is not None
        return [token for token in token_ids if self._texts.shows(token)]


class AnswerReaders:
    """Makes readers for one model. Safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ToolTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    @cached_property
    def tags(self) -> ReasoningTags | None:
        """What the model writes around its reasoning; None: nobody knows that it reasons."""
        written = self._tokenizer.chat_template or ""
        sources = "\n".join(written.values()) if isinstance(written, dict) else written
        return next((tags for tags in TAGS if tags.close in sources), None)

    @cached_property
    def grammars(self) -> CallGrammars | None:
        """Makes grammars of calls; None: nobody knows how the model's calls look."""
        template = self._template
        if template.shape is None:
            return None
        return CallGrammars(template.format, template.shape, self._special, self.tags)

    def is_reasoning(self, prompt: str) -> bool:
        """Whether an answer begins in the middle of reasoning; `prompt`: the end of what stands before it.

        Special tokens are shown in it.
        """
        if self.tags is None:
            return False
        _, tag, behind = prompt.rpartition(self.tags.open)
        ends = (self.tags.close, *(each for each in self._special if each not in self.tags))
        return bool(tag) and not any(end in behind for end in ends)

    def make(
        self, tools: Tools | None, prompt: str, *, shows_all: bool = False, new_id: NewId | None = None
    ) -> ChoiceReader:
        """A reader of one choice.

        Args:
            tools: that it may call; None: calls are text.
            prompt: the end of its prompt, special tokens shown.
            shows_all: its text has all special tokens in it as it is.
        """
        ids = new_id or self._template.format.new_id
        writer = AnswerWriter(ids, holds_space=tools is not None)
        declared = self._template.response_template
        if declared is not None:
            parser: CallParser = DeclaredParser(writer, declared, prompt=prompt, tools=tools)
            reader = AnswerReader(writer, parser)
        else:
            parser = PlainParser(writer) if tools is None else self._template.format.make(writer, tools)
            reader = AnswerReader(writer, parser, tags=self.tags, is_reasoning=self.is_reasoning(prompt))
        return ChoiceReader(reader, None if shows_all else self._texts, self._tokenizer)

    @property
    def needs_prompt(self) -> bool:
        """Whether the end of the prompt makes a difference."""
        return self.tags is not None or self._template.response_template is not None

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return {token.content: token_id for token_id, token in added if token.special and token.content}

    @cached_property
    def _texts(self) -> ShownTexts | None:
        if self._template.response_template is not None:
            shown = frozenset(self._special.values())
        else:
            markers = (*self._template.format.markers, *(self.tags or ()))
            shown = frozenset(self._special[each] for each in markers if each in self._special)
        return ShownTexts(self._tokenizer, shown) if shown else None
