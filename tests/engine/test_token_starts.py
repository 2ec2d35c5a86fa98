"""Where the tokens of an answer begin in its text, against what the tokenizer says of its beginnings and of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.engine.detokenize import Detokenizer
from kvcomm.engine.encoding import TextEncoder
from kvcomm.engine.token_texts import REPLACEMENT, TokenTexts
from tests.engine.test_detokenize import some_ids
from tests.tokenizer_kinds import BYTES, KINDS, tokenizer_of

TEXTS = {kind: TokenTexts(tokenizer_of(kind)) for kind in KINDS}
SHOWN = {kind: TokenTexts(tokenizer_of(kind), skip_special_tokens=False) for kind in KINDS}
ENCODERS = {kind: TextEncoder(tokenizer_of(kind)) for kind in KINDS}

OF_BYTES = ("byte-level", "added-tokens", "llama", "llama-legacy", "llama-unprefixed")
"""Kinds whose texts are the bytes of their tokens, but for a space at the start."""

every_kind = pytest.mark.parametrize("kind", KINDS)


def placed(
    kind: str, ids: list[int], stop: tuple[str, ...] = (), *, texts: dict[str, TokenTexts] = TEXTS
) -> tuple[str, list[int], list[int]]:
    """Text and starts as they come, and the tokens that were drawn; what was said once is never taken back."""
    detokenizer = Detokenizer(tokenizer_of(kind), stop, texts=texts[kind], encode=ENCODERS[kind].plain)
    pieces: list[str] = []
    starts: list[int] = []
    drawn: list[int] = []

    def take() -> None:
        starts.extend(detokenizer.starts(len(starts), detokenizer.num_placed))
        assert len(starts) <= len(drawn)

    for token in ids:
        drawn.append(token)
        pieces.append(detokenizer.push(token))
        take()
        if detokenizer.stopped is not None:
            break
    pieces.append(detokenizer.finish())
    take()
    assert tuple(starts) == detokenizer.starts(0, detokenizer.num_placed)
    return "".join(pieces), starts, drawn


def require_fits(text: str, starts: list[int], beginnings: list[str | None]) -> None:
    """Starts grow from 0 on and stay in the text; a beginning that the text has as it is ends at the next start.

    Args:
        beginnings: of the text, of its first tokens, one token after the other; None: later tokens rewrite it, or its
            last token is a byte of a run that goes on, whose text the next bytes may change even where a stripped space
            leaves nothing to see of it.
    """
    assert starts == sorted(starts)
    assert not starts or starts[0] == 0
    assert all(start <= len(text) for start in starts)
    for start, before in zip(starts, beginnings, strict=False):
        if before is not None and text.startswith(before) and not before.endswith(REPLACEMENT):
            assert start == len(before)


def beginnings_of(texts: TokenTexts, ids: list[int]) -> list[str | None]:
    """What the tokenizer makes of the first tokens, as far as more tokens leave it as it is."""
    decoded = [texts.decode(ids[:at]) for at in range(len(ids) + 1)]
    beginnings = list[str | None]()
    for at, before in enumerate(decoded[:-1]):
        spoken = [[token for token in half if not texts.is_silent(token)] for half in (ids[:at], ids[at:])]
        beside = [*spoken[0][-1:], *spoken[1][:1]]
        goes_on = len(beside) == 2 and all(texts.byte_of(token) is not None for token in beside)
        # "d@@@" may become "d@" and then "d@@" by other letters than those of its first token.
        is_rewritten = not all(later.startswith(before.rstrip(REPLACEMENT)) for later in decoded[at:])
        beginnings.append(None if is_rewritten or (goes_on and not before) else before)
    return beginnings


@every_kind
@pytest.mark.parametrize("texts", [TEXTS, SHOWN], ids=["skipped", "shown"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_token_begins_where_the_text_before_it_ends(
    kind: str, texts: dict[str, TokenTexts], data: st.DataObject
) -> None:
    ids = data.draw(some_ids(kind))
    text, starts, drawn = placed(kind, ids, texts=texts)
    assert text == texts[kind].decode(ids)
    assert drawn == ids
    assert len(starts) == len(ids)
    require_fits(text, starts, beginnings_of(texts[kind], ids))


def by_bytes(kind: str, ids: list[int]) -> list[int]:
    """Starts by the bytes of tokens: letters of all bytes that end where a token begins, or before."""
    texts = TEXTS[kind]
    parts = [b"" if texts.is_silent(token) else texts.bytes_of(token) for token in ids]
    whole, starts = b"".join(parts), []
    num_lost = len(whole.decode()) - len(texts.decode(ids))
    for at in range(len(parts)):
        before = b"".join(parts[:at])
        starts.append(max(0, len(before.decode("utf-8", "ignore")) - num_lost))
    return starts


@pytest.mark.parametrize("kind", OF_BYTES)
@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("ab \nhé漢🙂👩‍🚀.€"), max_size=20), cut=st.integers(1, 5))
def test_letters_over_several_tokens_begin_once(kind: str, text: str, cut: int) -> None:
    """Every `cut`th letter is written in tokens of a byte each."""
    tokenizer = tokenizer_of(kind)
    ids: list[int] = []
    for at, letter in enumerate(text):
        if at % cut == 0 and kind.startswith("llama"):
            ids += tokenizer.convert_tokens_to_ids([BYTES[byte] for byte in letter.encode()])
        else:
            ids += ENCODERS[kind].plain(letter)
    shown, starts, _ = placed(kind, ids)
    assert starts == by_bytes(kind, ids)
    for at, token in enumerate(ids[1:], 1):  # the text of a token is what stands at its place, or a letter goes on
        own = TEXTS[kind].bytes_of(token).decode("utf-8", "ignore")
        assert shown.startswith(own, starts[at])


@every_kind
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_a_stop_string_leaves_of_a_token_has_a_place(kind: str, data: st.DataObject) -> None:
    ids = data.draw(some_ids(kind))
    whole = tokenizer_of(kind).decode(ids, skip_special_tokens=True)
    ends = [whole[at : at + 2] for at in range(0, max(1, len(whole) - 1), 3)]
    candidates = [text for text in (*ends, "a", "é", "\n", ". ") if text and REPLACEMENT not in text]
    stops = tuple(data.draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=2)))
    text, starts, drawn = placed(kind, ids, stops)
    require_fits(text, starts, beginnings_of(TEXTS[kind], drawn))
    beginnings = [TEXTS[kind].decode(drawn[:at]) for at in range(len(drawn))]
    # Whoever begins inside the text has put something into it, and nobody who begins behind it has.
    for at in range(len(starts), len(drawn)):
        assert not text.startswith(beginnings[at]) or len(beginnings[at]) == len(text) or text == ""
    assert text == "" or starts


@pytest.mark.parametrize(
    ("kind", "pieces", "stop", "text", "starts"),
    [
        ("byte-level", ["a", "ð", "Ł", "ĺ", "Ģ", "b"], "", "a😀b", [0, 1, 1, 1, 1, 2]),
        ("byte-level", ["a", "ð", "Ł"], "", "a\ufffd", [0, 1, 1]),
        ("byte-level", ["ð", "ð", "a"], "", "\ufffd\ufffda", [0, 1, 2]),
        ("byte-level", ["a", "Ċ", "b"], "\n", "a", [0]),
        ("byte-level", ["a", "pp", "b"], "pb", "ap", [0, 1]),
        ("byte-level", ["<|im_end|>", "a", "<|im_end|>", "b"], "", "ab", [0, 0, 1, 1]),
        ("llama", ["▁h", "<0xC3>", "<0xA9>", "<0xC3>", "<0xA9>", "h"], "", "hééh", [0, 1, 1, 2, 2, 3]),
        ("llama", ["h", "<0xC3>", "<0xA9>", "<0xC3>", "h"], "", "h\ufffd\ufffd\ufffdh", [0, 1, 2, 3, 4]),
        ("llama", ["h", "<0xC3>", "<0xA9>", "<0x0A>"], "\n", "hé", [0, 1, 1]),
        ("llama", ["h", ")\n"], "\n", "h)", [0, 1]),
        ("llama", ["<0x20>", "<0xC3>", "<0xA9>"], "", "é", [0, 0, 0]),
        ("llama", ["<0x20>", "<0x80>"], "", "\ufffd\ufffd", [0, 1]),
        ("wordpiece", ["hello", "world", "##n"], "", "hello worldn", [0, 5, 11]),
        ("joined", ["d@@", " ", "@"], "", "d@", [0, 1, 1]),
        ("joined", ["d@@", "@", " ", "@"], "", "d@@", [0, 2, 2, 2]),
    ],
)
def test_known_places(kind: str, pieces: list[str], stop: str, text: str, starts: list[int]) -> None:
    ids = tokenizer_of(kind).convert_tokens_to_ids(pieces)
    assert None not in ids
    assert placed(kind, ids, (stop,) if stop else ())[:2] == (text, starts)
