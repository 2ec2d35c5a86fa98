"""Between texts and tokens of one model: what reads prompts, writes answers, and says which answers may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcomm.engine.chat import ChatPrompts
from kvcomm.engine.encoding import PromptReader, TextEncoder
from kvcomm.engine.grammar_compiler import GrammarCompiler
from kvcomm.engine.texts import Texts
from kvcomm.model.geometry import ModelGeometry


@dataclass(frozen=True, eq=False)
class Language:
    """Between texts and tokens of one model.

    Attributes:
        ends: tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    reader: PromptReader
    texts: Texts
    grammars: GrammarCompiler
    chats: ChatPrompts
    ends: frozenset[int]

    @classmethod
    def make(cls, model: PreTrainedModel, geometry: ModelGeometry, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Make that of a model and its tokenizer."""
        vocab_size, ends = geometry.vocab_size, end_token_ids(model, tokenizer)
        encoder, texts = TextEncoder(tokenizer), Texts(tokenizer)
        reader = PromptReader(encoder, vocab_size=vocab_size, max_context=geometry.max_context)
        grammars = GrammarCompiler(tokenizer, texts.plain, vocab_size=vocab_size, end_token_ids=ends)
        chats = ChatPrompts(tokenizer, encoder, reader, texts.plain)
        return cls(tokenizer, encoder, reader, texts, grammars, chats, ends)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer, from the generation config and the tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None)
