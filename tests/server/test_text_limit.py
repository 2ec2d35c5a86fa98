"""Texts that cannot fit: one that has few enough tokens is never refused, whatever it is made of."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from kvcomm.errors import PromptTooLong
from kvcomm.server.text_limit import CHARACTERS_PER_TOKEN, SURELY, TextLimit, TokenMeasure, _byte_letters
from tests.tiny import TEXTS, tiny_tokenizer


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers wraps it."""
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pieces(*, all_bytes: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback, as Llama's; without some of the bytes if so said."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256 if all_bytes else 200)}
    for piece in ("<unk>", "▁", "a", "b", "ab", "▁ab"):
        vocabulary[piece] = len(vocabulary)
    merges = [("a", "b"), ("▁", "ab")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(backend)


def composing() -> PreTrainedTokenizerFast:
    """Byte-level with NFC before it, as Qwen's."""
    made = tiny_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made


def few_bytes() -> PreTrainedTokenizerFast:
    """Byte-level, and ignorant of bytes that its training did not see: those characters vanish."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    return fast(backend)


def words() -> PreTrainedTokenizerFast:
    """Words between spaces, which are lost."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(backend)


MEASURED = {"byte-level": tiny_tokenizer, "pieces": pieces, "composing": composing, "few bytes": few_bytes}


@pytest.fixture(scope="module", params=MEASURED)
def measured(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of which it can be said how much a token holds."""
    return MEASURED[request.param]()


LETTERS = st.sampled_from(
    [*"ab e.\n\t", "e\u0301", "\u1100\u1161\u11a8", "\u1f80", "\u00e9", "\u20ac", "\U0001f600", "\x00"]
)
RUNS = st.builds(lambda part, times: part * times, LETTERS, st.integers(1, 60))


@settings(max_examples=200)
@given(parts=st.lists(RUNS, max_size=8))
def test_what_fits_is_never_refused(measured: Any, parts: list[str]) -> None:
    """At the number of tokens that a text has as the model's limit."""
    text = "".join(parts)
    num_tokens = len(measured.encode(text, add_special_tokens=False))
    TextLimit(measured, max(1, num_tokens)).require(text)


def test_every_byte_has_its_letter() -> None:
    assert set(_byte_letters().values()) == set(ByteLevel.alphabet())
    for text in (" ", "\n", "é", "€", "😀"):
        (piece, _), *rest = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert not rest
        assert piece == "".join(_byte_letters()[byte] for byte in text.encode())


def test_at_the_limit_and_one_past_it() -> None:
    tokenizer = tiny_tokenizer()
    measure = TokenMeasure.of(tokenizer)
    assert measure is not None
    longest = max(map(len, (*tokenizer.get_vocab(),)))
    assert measure.longest_bytes == longest
    limit = TextLimit(tokenizer, 10)
    assert limit.max_bytes == 10 * longest
    special = "<|endoftext|>"
    assert len(special) == longest
    limit.require(special * 10)
    with pytest.raises(PromptTooLong, match=rf"{10 * longest + 1} characters"):
        limit.require(special * 10 + "x")


@pytest.mark.parametrize(
    "make",
    [
        words,
        lambda: pieces(all_bytes=False),
        lambda: _with(tiny_tokenizer(), normalizers.Strip()),
        lambda: _with(tiny_tokenizer(), normalizers.Replace("aa", "a")),
        lambda: _with(tiny_tokenizer(), normalizers.StripAccents()),
        lambda: fast(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))),
    ],
)
def test_of_others_nothing_is_said(make: Any) -> None:
    """Text may vanish before it is tokenized, or any amount of it become one token."""
    assert TokenMeasure.of(make()) is None
    assert TextLimit(make(), 10).max_bytes is None


def _with(tokenizer: PreTrainedTokenizerFast, normalizer: Any) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def test_only_the_beginning_of_a_text_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, lengths = words(), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **more: lengths.append(len(text)) or encode(text, **more))
    limit = TextLimit(tokenizer, 10)
    with pytest.raises(PromptTooLong, match="the first 120 characters"):
        limit.require("a " * 100_000)
    assert lengths == [10 * CHARACTERS_PER_TOKEN]
    limit.require(" " * 100_000)  # no token at all
    limit.require("a " * 10 * SURELY + " " * 1000)  # as many as may be, by the beginning
