"""Text that comes out token by token equals the text decoded at once, up to the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.engine.detokenize import Detokenizer
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = st.text(st.sampled_from("ab \nxé漢🙂ß."), max_size=40)


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


def test_special_tokens_have_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert TOKENIZER.eos_token_id is not None
    assert detokenizer.push(TOKENIZER.eos_token_id) + detokenizer.finish() == ""
