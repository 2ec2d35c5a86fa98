"""From what a user gives as a prompt to segments of token ids; from text to ids wherever it stands.

Every segment is tokenized on its own, as a piece of a text, so the same text has the same ids behind any prefix, and
behind none; a text given as one string is tokenized as one, at the start of a context as the tokenizer does it. Start
tokens stand at the very beginning of a context, once, if the tokenizer adds any; ids are taken as they are.

Some tokenizers put a space before every text that they are given. That is right at the start of a prompt and nowhere
else: a piece of a prompt is the middle of a text, so it is tokenized without that space, wherever it stands. Its ids
are the same behind any prefix then, also behind none. Only a prompt that is one text keeps the tokenizer's own start.

Control tokens are all added tokens, flagged as special or not, except those that are ordinary text for certain: runs
of white space, single letters, and words that the chat template does not write.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from kvcomm import values
from kvcomm.errors import EmptyPrompt, InvalidRequest, PromptTooLong, UnknownToken
from kvcomm.memory.segments import Prompt, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", "a", ".", "0", "|", "\u00a0")
"""Texts to put before a piece where a tokenizer's start cannot be switched off: the first one that stays apart."""

PROBES = ("b", " b", "hello", "1", "\n", "é")

METASPACE = "▁"

NUM_LOOKED_AT = 4
"""Tokens at the start of a prompt that tell whether it begins with a space."""

_CODE = re.compile(r"{[{%].*?[%}]}", re.DOTALL)


class TokenSpan(NamedTuple):
    """A token and the characters [start, end) of the text that it stands for."""

    token_id: int
    start: int
    end: int


class PromptReader:
    """Tokenizes and checks prompts for one model."""

    def __init__(self, encoder: TextEncoder, *, vocab_size: int, max_context: int) -> None:
        self._encoder = encoder
        self._vocab_size = vocab_size
        self._max_context = max_context

    def segment(self, text: str, *, name: str | None = None) -> Segment:
        """Tokenize a text on its own, as a piece of a prompt; see `TextEncoder.piece`.

        Raises:
            InvalidRequest: text or name is none.
        """
        checked = None if name is None else values.text("a segment's name", name)
        return Segment(self._encoder.piece(values.text("a segment", text)), checked)

    def read(self, prompt: Prompt, *, is_start: bool) -> tuple[Segment, ...]:
        """The segments of a prompt; those without tokens only where they have a name, as slots that nothing stands in.

        Args:
            is_start: nothing stands before it, so the tokenizer's start tokens (if any) belong to a text or segments.

        Raises:
            EmptyPrompt: not a single token.
            UnknownToken: an id outside the vocabulary.
            InvalidRequest: neither text, ids nor segments.
        """
        segments = self._segments(prompt, is_start)
        if not any(segment.token_ids for segment in segments):
            raise EmptyPrompt(f"the prompt has no tokens: {values.shown(prompt)}")
        return tuple(segment for segment in segments if segment.token_ids or segment.name is not None)

    def require_fits(self, num_tokens: int, max_new_tokens: int) -> None:
        """Raises PromptTooLong when prompt and answer exceed the model's limit; gives the numbers."""
        if num_tokens + max_new_tokens > self._max_context:
            raise PromptTooLong(
                f"{num_tokens} prompt tokens and up to {max_new_tokens} new ones exceed the model's limit of "
                f"{self._max_context}; shorten the prompt or lower max_new_tokens"
            )

    def checked(self, segment: Segment) -> Segment:
        """The same segment with ids of Python's own, all of them known to the model.

        Raises:
            UnknownToken: an id outside the vocabulary.
            InvalidRequest: ids or a name that are none.
        """
        ids = tuple(_token_id(item) for item in values.items("a segment", segment.token_ids, "a tuple of token ids"))
        self.require_known(ids)
        return Segment(ids, None if segment.name is None else values.text("a segment's name", segment.name))

    def require_known(self, token_ids: Iterable[int]) -> None:
        """Raises UnknownToken for an id outside the vocabulary."""
        unknown = next((token for token in token_ids if not 0 <= token < self._vocab_size), None)
        if unknown is not None:
            raise UnknownToken(f"token id {values.shown(unknown)} is outside the vocabulary of {self._vocab_size}")

    def _segments(self, prompt: Prompt, is_start: bool) -> Sequence[Segment]:
        if isinstance(prompt, str):
            text = values.text("the prompt", prompt)
            return [self.checked(Segment(self._encoder.start(text) if is_start else self._encoder.piece(text)))]
        found = values.items("the prompt", prompt, "a text, a list of token ids or a list of segments")
        segments = [item for item in found if isinstance(item, Segment)]
        if segments and len(segments) < len(found):
            raise InvalidRequest("a prompt is a text, a list of token ids or a list of segments, not a mixture")
        if not segments:
            return [self.checked(Segment(found))]  # type: ignore[arg-type]  # which is what is checked
        segments = [self.checked(segment) for segment in segments]
        first = next((segment.token_ids for segment in segments if segment.token_ids), ())
        before = self._encoder.before(first) if is_start and first else ()
        return [Segment(before), *segments] if before else segments


class TextEncoder:
    """Tokenizes for one engine. Safe to use from several threads.

    Attributes:
        controls: control token -> id.
        control_pattern: finds them, the longest one first; None: there are none.
        answer_pattern: the same without those that nobody flagged as special and that the chat template's code looks
            for: in a model's own earlier answers they are the template's to deal with.
        has_plain_controls: no added token takes what stands beside it into itself, or looks at it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self.has_plain_controls = not any(token.lstrip or token.rstrip or token.single_word for token in added)
        self.controls: Mapping[str, int] = _controls(tokenizer)
        self.control_pattern = _pattern(self.controls)
        code = "".join(_CODE.findall(_written(tokenizer)))
        special = {token.content for token in added if token.special}
        self.answer_pattern = _pattern(each for each in self.controls if each in special or each not in code)
        # What stands for unknown letters comes from ordinary text, too.
        self._control_ids = frozenset(self.controls.values()) - {tokenizer.unk_token_id}

    def start(self, text: str, *, adds_start: bool = True) -> tuple[int, ...]:
        """A prompt that is one text: as the tokenizer does it, start tokens included, end tokens left out.

        Control tokens in it are real. A start token that it spells out itself is not put there twice.

        Args:
            adds_start: False: leave out start tokens that it does not spell out.
        """
        ids = _encode(self._tokenizer, text)
        return ids if not adds_start or self.has_start(ids) else (*self.start_ids, *ids)

    def piece(self, text: str) -> tuple[int, ...]:
        """A piece of a prompt, without anything before or behind it; control tokens in it are real."""
        if self._middle is None:
            return self._behind_anchor(text)
        return _encode(self._middle, text)

    def plain(self, text: str, *, label: str = "the text") -> tuple[int, ...]:
        """As `piece`, of text that somebody else wrote: control tokens spelled out in it are ordinary text.

        Args:
            label: what the text is, for errors.

        Raises:
            InvalidRequest: the tokenizer takes one of them for real whatever is done; names it.
        """
        if self._is_spelled_out(text) and self._literal is not None:
            ids = _encode(self._literal, text)
            if self._control_ids.isdisjoint(ids):
                return ids
        ids = tuple(token for part in self._parts(text) for token in self.piece(part))
        self._require_plain(ids, label)
        return ids

    def spans(self, text: str) -> list[TokenSpan]:
        """As `plain`, with the place of every token; parts of one character all cover it.

        Raises:
            InvalidRequest: the tokenizer does not say where its tokens lie, or takes control tokens for real.
        """
        if self._middle is None or not self._middle.is_fast:
            raise InvalidRequest("this model's tokenizer does not say where its tokens lie: choose boundary separate")
        if self._is_spelled_out(text) and self._literal is not None:
            spans = _spans(self._literal, text)
            if self._control_ids.isdisjoint(span.token_id for span in spans):
                return spans
        spans, start = [], 0
        for part in self._parts(text):
            spans += [TokenSpan(id, start + first, start + end) for id, first, end in _spans(self._middle, part)]
            start += len(part)
        self._require_plain(tuple(span.token_id for span in spans), "the text")
        return spans

    def control_in(self, ids: tuple[int, ...]) -> str | None:
        """A control token that is among the ids, or None."""
        if self._control_ids.isdisjoint(ids):
            return None
        return next(content for content, token_id in self.controls.items() if token_id in ids)

    def require_ordinary(self, ids: tuple[int, ...], *, label: str) -> tuple[int, ...]:
        """The ids of somebody's segment, if no control token is among them.

        Raises:
            InvalidRequest: one is; names it.
        """
        if (real := self.control_in(ids)) is not None:
            raise InvalidRequest(
                f"{label} is a segment with the control token {real!r}, which would be real in the prompt; give its "
                "text instead (in messages as {'type': 'text', 'text': ..., 'name': ...}), where it is ordinary text"
            )
        return ids

    def has_start(self, ids: tuple[int, ...]) -> bool:
        """Whether ids begin with the tokenizer's start tokens, or it has none."""
        return ids[: len(self.start_ids)] == self.start_ids

    def before(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """What has to stand before a prompt's first piece: start tokens, if it does not begin with them.

        Where there are none and decoding takes a space from the start of a text, a piece that begins with a space gets
        one more, as it would from tokenizers that put a space there themselves.
        """
        if not self.has_start(ids):
            return self.start_ids
        if self.start_ids or not self._space or ids == self._space:
            return ()
        beginning = ids[:NUM_LOOKED_AT]
        behind = self._decode((*self._known, *beginning)).removeprefix(self._decode(self._known))
        return self._space if self._decode(beginning) != behind == self._decode((*self._space, *beginning)) else ()

    @cached_property
    def _space(self) -> tuple[int, ...]:
        """A space as a piece, where decoding takes one from the start of a text; else nothing."""
        return self.piece(" ") if self._decode(self.piece(" b")) == "b" else ()

    @cached_property
    def _known(self) -> tuple[int, ...]:
        return _encode(self._tokenizer, "b")

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before any prompt: nothing, or a begin-of-sequence token."""
        bare, full = _encode(self._tokenizer, "a"), tuple(self._tokenizer.encode("a"))
        places = range(len(full) - len(bare) + 1)
        return full[: next((at for at in places if full[at : at + len(bare)] == bare), 0)]

    @cached_property
    def _middle(self) -> PreTrainedTokenizerBase | None:
        """A tokenizer that puts nothing before a text: the model's own, or a copy of it; None: there is none."""
        unprefixed = without_prefix(self._tokenizer) if self._tokenizer.is_fast else self._tokenizer
        # Texts that always have spaces between them cannot be joined in any way.
        return unprefixed if self._joins(unprefixed) or self._anchor is None else None

    @cached_property
    def _literal(self) -> PreTrainedTokenizerBase | None:
        """A copy of the middle's tokenizer to which special tokens are ordinary text."""
        if self._middle is None:
            return None
        literal = copy.deepcopy(self._middle)
        literal.split_special_tokens = True
        return literal

    def _joins(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether texts tokenized one by one are the same text behind one another."""
        first = _encode(self._tokenizer, "a")
        before = self._decode(first)
        return all(self._decode((*first, *_encode(tokenizer, probe))) == before + probe for probe in self._known_probes)

    @cached_property
    def _known_probes(self) -> list[str]:
        """Those that the tokenizer gives back as they are, behind other text."""
        whole = {probe: self._decode(_encode(self._tokenizer, "a" + probe)) for probe in PROBES}
        alone = self._decode(_encode(self._tokenizer, "a"))
        return [probe for probe, text in whole.items() if text == alone + probe]

    @cached_property
    def _anchor(self) -> tuple[str, tuple[int, ...]] | None:
        for anchor in ANCHORS:
            ids = _encode(self._tokenizer, anchor)
            texts = [(probe, _encode(self._tokenizer, anchor + probe)) for probe in self._known_probes]
            before = self._decode(ids)
            if texts and all(
                whole[: len(ids)] == ids and self._decode(whole) == before + probe for probe, whole in texts
            ):
                return anchor, ids
        return None

    def _behind_anchor(self, text: str) -> tuple[int, ...]:
        assert self._anchor is not None
        anchor, ids = self._anchor
        whole = _encode(self._tokenizer, anchor + text)
        # Where the anchor has grown together with the text, the text is tokenized as the tokenizer does it.
        return whole[len(ids) :] if whole[: len(ids)] == ids else _encode(self._tokenizer, text)

    def _decode(self, ids: tuple[int, ...]) -> str:
        return cast("str", self._tokenizer.decode(list(ids)))

    def _is_spelled_out(self, text: str) -> bool:
        return self.control_pattern is not None and self.control_pattern.search(text) is not None

    def _parts(self, text: str) -> Iterator[str]:
        """The text in parts none of which holds a control token: each of these is cut behind its first letter."""
        start = at = 0
        while self.control_pattern is not None and (found := self.control_pattern.search(text, at)):
            at = found.start() + 1
            yield text[start:at]
            start = at
        yield text[start:]

    def _require_plain(self, ids: tuple[int, ...], label: str) -> None:
        real = self.control_in(ids)
        if real is None:
            return
        raise InvalidRequest(
            f"{label} contains the control token {real!r}, and this tokenizer cannot take it as ordinary text; "
            "remove it"
        )


def _token_id(item: object) -> int:
    if type(item) is int:  # nearly always
        return item
    try:
        return values.whole_number("a token id", item)
    except InvalidRequest:
        raise InvalidRequest(f"{values.shown(item)} is neither a token id nor a segment") from None


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return tuple(cast("list[int]", encoded["input_ids"]))


def _spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[TokenSpan]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = cast("list[int]", encoded["input_ids"]), cast("list[tuple[int, int]]", encoded["offset_mapping"])
    return [TokenSpan(token_id, *place) for token_id, place in zip(ids, places, strict=True)]


def _pattern(contents: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _written(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat templates as they are written."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _controls(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    written = _written(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    return {
        token.content: token_id
        for token_id, token in added
        if token.content and (token.special or not _is_ordinary(token.content, written))
    }


def _is_ordinary(content: str, template: str) -> bool:
    letters = content.replace(METASPACE, " ")
    if letters.isspace() or len(content) == 1:
        return True
    return letters.replace(" ", "").isalnum() and content not in template


def without_prefix(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A fast tokenizer, or a copy of it, that puts nothing before a text as far as its parts can be looked at."""
    try:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # parts written in Python cannot be described, which is said with a bare Exception
        return tokenizer
    parts = {name: _unprefixed(whole[name]) for name in ("normalizer", "pre_tokenizer")}
    if all(whole[name] == part for name, part in parts.items()):
        return tokenizer
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    stub = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))
    unprefixed = copy.deepcopy(tokenizer)
    backend = unprefixed.backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = stub.normalizer, stub.pre_tokenizer
    return unprefixed


def _unprefixed(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer without what it puts before a text; None where nothing is left of it."""
    if step is None or step["type"] == "Prepend":
        return None
    step = dict(step)
    for steps in ("normalizers", "pretokenizers"):
        if steps in step:
            step[steps] = [each for each in map(_unprefixed, step[steps]) if each is not None]
    if "prepend_scheme" in step:
        step["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        step["add_prefix_space"] = False
    return step
