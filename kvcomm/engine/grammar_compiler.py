"""From a grammar to what it means for the tokens of one model: compiled once, then copied for every answer.

Compiling takes milliseconds, and up to some tenths of a second at the limits, so it is done where a request is made and
never in a step; the interpreter is free meanwhile. What is compiled is kept for whoever asks again, for each tenant by
itself: how fast a grammar is there would tell others that somebody uses it. Whatever a grammar may cost is bounded:
its size before (`grammar`, `grammar_schema`), fuel while it is compiled, and fuel in every step.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from time import thread_time
from typing import NamedTuple, cast

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.hf import from_tokenizer
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvcomm.engine.encoding import without_prefix
from kvcomm.engine.grammar import Grammar
from kvcomm.engine.grammar_state import MAX_MESSAGE, GrammarState, MaskBytes
from kvcomm.engine.token_texts import TokenTexts
from kvcomm.errors import InvalidRequest

logger = logging.getLogger("kvcomm.engine")

MAX_COMPILED = 64
"""Grammars that are kept."""

LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=30_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""A step's fuel lasts for about ten milliseconds; a state takes one or two kilobytes."""

_UNKNOWN_KEYS = re.compile(r"Unimplemented keys: \[(.*?)\]")


class _Compiled(NamedTuple):
    """A grammar at the beginning of an answer, what it says about the first token, and what it cost to ask."""

    matcher: LLMatcher
    mask: MaskBytes
    cost_s: float


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: TokenTexts,
        *,
        vocab_size: int,
        end_token_ids: Iterable[int],
    ) -> None:
        """`vocab_size`: of the model, which may know more ids than the tokenizer, or fewer."""
        self._tokenizer = tokenizer
        self._texts = texts
        self._vocab_size = vocab_size
        self._end_token_ids = sorted(end_token_ids)
        self._compiled: OrderedDict[tuple[str, Grammar], _Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._making = threading.Lock()

    def compile(self, grammar: Grammar, *, owner: str = "") -> GrammarState:
        """The beginning of an answer under a grammar.

        Args:
            owner: for whom it is kept.

        Raises:
            InvalidRequest: it cannot be enforced, costs too much, or no answer satisfies it; says which keyword.
        """
        key = owner, grammar
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is not None:
                self._compiled.move_to_end(key)
        if compiled is None:
            compiled = self._compile(grammar)
            with self._lock:
                self._keep(key, compiled)
        matcher, mask, cost_s = compiled
        own = matcher.deep_copy()
        return GrammarState(own, grammar, self._end_token_ids, self._vocab_size, mask=mask, cost_s=cost_s)

    def prepare(self) -> None:
        """Look at all tokens now, so that the first grammar does not wait for it; nothing where they cannot be read."""
        with suppress(InvalidRequest):  # whoever brings a grammar is told
            self._known_tokens  # noqa: B018  # to look is what it is for

    def _compile(self, grammar: Grammar) -> _Compiled:
        matcher = LLMatcher(self._known_tokens, _notation(grammar), log_level=0, limits=LIMITS)
        if not matcher.is_error():
            # The first step is the dearest one, and shows whether there is any answer at all.
            probe = matcher.deep_copy()
            begun_s = thread_time()
            mask = np.frombuffer(probe.compute_bitmask(), dtype=np.uint8)
            if not probe.is_error() and (not probe.is_stopped() or probe.is_accepting()):
                return _Compiled(matcher, mask, thread_time() - begun_s)
            matcher = probe
        raise InvalidRequest(_explained(grammar, matcher))

    def _keep(self, key: tuple[str, Grammar], compiled: _Compiled) -> None:
        """Forget what the owner of most has not used for longest, where there are too many."""
        self._compiled[key] = compiled
        while len(self._compiled) > MAX_COMPILED:
            ((owner, _),) = Counter(owner for owner, _ in self._compiled).most_common(1)
            del self._compiled[next(each for each in self._compiled if each[0] == owner)]

    @property
    def _known_tokens(self) -> LLTokenizer:
        with self._making:
            return self._tokens

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """The tokens as grammars see them: takes a second or two for a large vocabulary, once."""
        size = max(self._vocab_size, len(self._tokenizer))
        # Where a model has no end token, an id that none of its tokens has stands for the end.
        ends = self._end_token_ids or [size]
        size = max(size, ends[-1] + 1)
        try:
            # What it puts before a text would be taken for what a grammar forces there.
            fast = cast("PreTrainedTokenizerFast", without_prefix(self._tokenizer))
            return from_tokenizer(fast, n_vocab=size, eos_token=ends)
        except ValueError as error:
            if _has_spaces_for_marks(self._tokenizer):
                spelled = _SpelledOut(without_prefix(self._tokenizer), self._texts, size, ends)
                return LLTokenizer(TokenizerWrapper(spelled), n_vocab=size, eos_token=ends)
            raise InvalidRequest(
                "the answers of this model cannot be constrained: nothing is known about the bytes of its tokens "
                f"({error})"
            ) from error


class _SpelledOut:
    """A tokenizer that the library does not know, by the bytes of its tokens; as `TokenizerWrapper` wants it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: TokenTexts, size: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0], None
        known = range(len(tokenizer))
        self.special_token_ids = [each for each in range(size) if each not in known or texts.is_silent(each)]
        self.tokens = [texts.bytes_of(each) if each in known else b"" for each in range(size)]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def _has_spaces_for_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its texts are those of its tokens, one after the other, with spaces for the marks of words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and isinstance(backend.decoder, decoders.Metaspace)


def _notation(grammar: Grammar) -> str:
    """As the library wants it."""
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.source)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    return LLMatcher.grammar_from_lark(grammar.source)


def _explained(grammar: Grammar, matcher: LLMatcher) -> str:
    what = {"json_schema": "the JSON schema", "regex": "the regular expression"}.get(grammar.kind, "the grammar")
    message = matcher.get_error().removesuffix("<non-verbose/>").strip()
    unknown = _UNKNOWN_KEYS.search(message)
    if unknown is not None:
        keys = unknown[1].replace('"', "'")
        return f"{what} uses {keys}, which cannot be enforced here; leave it out, or set strict to false"
    if not message or message.startswith("NoExtension"):
        return f"{what} cannot be enforced: nothing satisfies it"
    return f"{what} cannot be enforced: {message[:MAX_MESSAGE]}"
