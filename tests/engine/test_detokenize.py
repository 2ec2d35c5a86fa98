"""Text that comes token by token equals the text decoded at once, up to the first stop string, for any tokenizer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.engine.detokenize import Detokenizer
from kvcomm.engine.encoding import TextEncoder
from tests.tiny import tiny_tokenizer
from tests.tokenizer_kinds import BYTES, KINDS, tokenizer_of

TOKENIZER = tiny_tokenizer()
REJOINED = [
    "byte-level",
    "byte-level-prefixed",
    "llama",
    "llama-bos",
    "llama-unprefixed",
    "llama-legacy",
    "added-tokens",
]
"""Kinds that have tokens for whatever a stop string leaves."""

TEXTS = st.text(st.sampled_from("ab \nxé漢🙂ß."), max_size=40)
ANY_TEXT = st.text(st.sampled_from("abhelo wr\n.,'!?)(é漢🙂\ufffd€<|>"), max_size=30)

ENCODERS = {kind: TextEncoder(tokenizer_of(kind)) for kind in KINDS}

every_kind = pytest.mark.parametrize("kind", KINDS)


def run(text: str, stop: tuple[str, ...] = ()) -> tuple[str, Detokenizer]:
    detokenizer = Detokenizer(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        pieces.append(detokenizer.push(token))
        assert detokenizer.text == "".join(pieces)
        if detokenizer.stopped is not None:
            break
    pieces.append(detokenizer.finish())
    return "".join(pieces), detokenizer


def stream(kind: str, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], list[int], Detokenizer]:
    """Pieces of text and all ids handed out; drawing ends where a stop string does, as the scheduler does it."""
    tokenizer = tokenizer_of(kind)

    detokenizer = Detokenizer(tokenizer, stop, encode=ENCODERS[kind].plain)
    pieces: list[str] = []
    taken: list[int] = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        taken += detokenizer.take_ids()
        if detokenizer.stopped is not None:
            break
    pieces.append(detokenizer.finish())
    taken += detokenizer.take_ids()
    assert detokenizer.text == "".join(pieces)
    assert tuple(taken) == detokenizer.answer_ids
    return pieces, taken, detokenizer


def some_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids at all, often those of bytes and of control tokens, and one that no token has."""
    tokenizer = tokenizer_of(kind)
    size = len(tokenizer)
    special = st.sampled_from([*tokenizer.all_special_ids, 0])
    ids = st.integers(0, size - 1) | special
    if "<0xC3>" in tokenizer.get_vocab():
        raw = "éé漢🙂\ufffd€a".encode()
        ids = ids | st.sampled_from([tokenizer.get_vocab()[BYTES[byte]] for byte in raw])
    if kind in ("byte-level", "added-tokens", "slow-bytes"):
        ids = ids | st.sampled_from([id for letter in "é漢🙂\ufffd" for id in tokenizer.encode(letter)])
    if tokenizer.is_fast:
        ids = ids | st.just(size + 100)
    return st.lists(ids, max_size=60)


@every_kind
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(kind: str, data: st.DataObject) -> None:
    ids = data.draw(some_ids(kind))
    pieces, taken, _ = stream(kind, ids)
    assert "".join(pieces) == tokenizer_of(kind).decode(ids, skip_special_tokens=True)
    assert taken == ids


@every_kind
@settings(deadline=None, max_examples=40)
@given(text=ANY_TEXT)
def test_any_text_streams_as_it_decodes(kind: str, text: str) -> None:
    ids = tokenizer_of(kind).encode(text)
    assert "".join(stream(kind, ids)[0]) == tokenizer_of(kind).decode(ids, skip_special_tokens=True)


@every_kind
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_stop_strings_are_found_in_the_text_that_decoding_gives(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    ids = data.draw(some_ids(kind))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [whole[at : at + 2] for at in range(0, max(1, len(whole) - 1), 3)]
    candidates = [text for text in (*ends, "a", "é", "\n", ". ") if text and "\ufffd" not in text]
    stops = tuple(data.draw(st.lists(st.sampled_from(candidates), max_size=2)))
    pieces, taken, detokenizer = stream(kind, ids, stops)
    text = "".join(pieces)
    assert not any(stop in text for stop in stops)
    if detokenizer.stopped is None:
        assert text == whole
    else:
        drawn = tokenizer.decode(detokenizer._token_ids, skip_special_tokens=True)
        assert drawn.startswith(text + detokenizer.stopped)
        kept = detokenizer.num_kept_tokens
        assert taken[:kept] == ids[:kept]
        assert text.startswith(tokenizer.decode(taken[:kept], skip_special_tokens=True))
        if kind in REJOINED:
            assert tokenizer.decode(taken, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", KINDS)
def test_known_sequences(kind: str) -> None:
    """What lost letters before: emoji in bytes, replacement marks in the text, a special token before an emoji."""
    tokenizer = tokenizer_of(kind)
    special = tokenizer.all_special_ids[-1:]
    for text in ("😀😁", "a\ufffdb\ufffd\ufffd\ufffd\ufffd\ufffdc", "漢字かな" * 5, " leading", "x  y"):
        plain = tokenizer.encode(text, add_special_tokens=False)
        for ids in (plain, special + plain, [id for token in plain for id in (token, *special)], special * 5 + plain):
            assert "".join(stream(kind, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True), (text, ids)


@every_kind
def test_a_long_answer_is_decoded_in_linear_time(kind: str) -> None:
    """Decoded tokens are counted, so that a slow machine changes nothing."""
    tokenizer = tokenizer_of(kind)
    ids = [random.Random(5).randrange(len(tokenizer)) for _ in range(3000)]
    detokenizer = Detokenizer(tokenizer, ("never there",))
    decode, counted = detokenizer._texts.decode_raw, []

    def counting(token_ids: list[int]) -> str:
        counted.append(len(token_ids))
        return decode(token_ids)

    detokenizer._texts.decode_raw = counting  # type: ignore[method-assign]
    text = "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert sum(counted) < 40 * len(ids)


def test_cleaning_up_depends_on_all_that_is_before() -> None:
    """Every second quote loses its spaces, wherever the run of quotes began."""
    tokenizer = tokenizer_of("wordpiece-cleaned")
    quote, word = tokenizer.convert_tokens_to_ids(["'", "do"])
    for num in range(1, 40):
        for ids in ([quote] * num, [word, *[quote] * num, word]):
            assert "".join(stream("wordpiece-cleaned", ids)[0]) == tokenizer.decode(ids)


def test_a_run_of_bytes_ends_at_its_stop_string() -> None:
    """A line break is a byte to many tokenizers: the answer ends with it, not a token later."""
    vocab = tokenizer_of("llama").get_vocab()
    ids = [vocab["h"], *(vocab[BYTES[byte]] for byte in "é\n".encode())]
    pieces, taken, detokenizer = stream("llama", ids, ("\n",))
    assert "".join(pieces) == "hé"
    assert detokenizer.stopped == "\n"
    assert tokenizer_of("llama").decode(taken) == "hé"


@given(TEXTS)
def test_pieces_add_up(text: str) -> None:
    out, detokenizer = run(text)
    assert out == text
    assert detokenizer.num_kept_tokens == len(TOKENIZER.encode(text, add_special_tokens=False))


@given(TEXTS, st.lists(st.text(st.sampled_from("ab \né漢"), min_size=1, max_size=3), min_size=1, max_size=3))
def test_stops_at_the_stop_string_that_is_complete_first(text: str, stops: list[str]) -> None:
    hits = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    out, detokenizer = run(text, tuple(stops))
    assert out == (text[: min(hits)[1]] if hits else text)
    assert (detokenizer.stopped is not None) == bool(hits)
    tokens = TOKENIZER.encode(text, add_special_tokens=False)[: detokenizer.num_kept_tokens]
    kept = TOKENIZER.decode(tokens)
    assert out.startswith(kept.rstrip("\ufffd"))


@given(TEXTS)
def test_nothing_is_given_out_that_a_stop_string_takes_back(text: str) -> None:
    stop = "ab"
    final = text.split(stop)[0]
    detokenizer = Detokenizer(TOKENIZER, (stop,))
    given_out = ""
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        given_out += detokenizer.push(token)
        assert final.startswith(given_out)


def test_a_truncated_character_is_flushed_at_the_end() -> None:
    tokens = TOKENIZER.encode("漢", add_special_tokens=False)
    assert len(tokens) == 3
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in tokens[:2]] == ["", ""]
    assert detokenizer.finish() == "\ufffd"


def test_text_comes_with_its_token() -> None:
    """Nobody waits for a text that cannot change any more."""
    for kind in ("byte-level", "llama", "unigram", "wordpiece", "added-tokens"):
        tokenizer = tokenizer_of(kind)
        detokenizer = Detokenizer(tokenizer)
        for token in tokenizer.encode("hello world. do", add_special_tokens=False):
            detokenizer.push(token)
            ids = detokenizer._token_ids
            assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=True)
            assert detokenizer.take_ids() == (token,)


def test_special_tokens_have_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert TOKENIZER.eos_token_id is not None
    assert detokenizer.push(TOKENIZER.eos_token_id) + detokenizer.finish() == ""


def test_what_a_tokenizer_raises_is_raised() -> None:
    detokenizer = Detokenizer(tokenizer_of("slow-words"))
    with pytest.raises(IndexError):
        detokenizer.push(1000)
