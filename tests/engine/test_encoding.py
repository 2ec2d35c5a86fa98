"""Texts put together from pieces read as they were written, and nobody's text becomes a control token."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvcomm.engine.encoding import PromptReader, TextEncoder
from kvcomm.errors import InvalidRequest
from tests.tiny import tiny_tokenizer
from tests.tokenizer_kinds import KINDS, llama, tokenizer_of, with_tools

UNJOINABLE = ("wordpiece", "wordpiece-cleaned", "suffixed", "joined", "slow-words")
JOINABLE = [kind for kind in KINDS if kind not in UNJOINABLE]
"""Kinds that give a text back as it was."""

PREFIXED = ["byte-level-prefixed", "llama", "llama-bos", "llama-legacy", "unigram", "slow-sentencepiece"]

ENCODERS = {kind: TextEncoder(tokenizer_of(kind)) for kind in KINDS}

PIECE = st.text(st.sampled_from("abhelo wr\n.,'!?)(é"), min_size=1, max_size=8)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("kind", JOINABLE)
@settings(deadline=None, max_examples=40)
@given(first=PIECE, others=st.lists(PIECE, max_size=4))
def test_pieces_behind_a_text_read_as_they_were_written(kind: str, first: str, others: list[str]) -> None:
    tokenizer, encoder = tokenizer_of(kind), ENCODERS[kind]
    start = encoder.start(first)
    ids = (*start, *(token for text in others for token in encoder.piece(text)))
    assert decoded(tokenizer, ids) == decoded(tokenizer, start) + "".join(others)


@pytest.mark.parametrize("kind", JOINABLE)
@settings(deadline=None, max_examples=40)
@given(texts=st.lists(PIECE, min_size=1, max_size=4))
def test_a_prompt_of_pieces_reads_as_they_were_written(kind: str, texts: list[str]) -> None:
    """Also where the first one begins with a space, which decoding takes from the start of a text."""
    assume(texts[0] != " ")  # a space alone at the start is the space that is put there
    tokenizer, encoder = tokenizer_of(kind), ENCODERS[kind]
    reader = PromptReader(encoder, vocab_size=len(tokenizer), max_context=1000)
    segments = reader.read([reader.segment(text) for text in texts], is_start=True)
    ids = tuple(token for segment in segments for token in segment.token_ids)
    assert decoded(tokenizer, ids) == decoded(tokenizer, encoder.start_ids) + "".join(texts)
    again = reader.read(segments, is_start=True)
    assert again == segments
    assert all(reader.segment(text) in segments for text in texts)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(text=PIECE)
def test_a_prompt_of_one_text_is_tokenized_as_by_the_tokenizer(kind: str, text: str) -> None:
    tokenizer, ids = tokenizer_of(kind), ENCODERS[kind].start(text)
    stock = tuple(tokenizer.encode(text))
    assert ids == stock[: len(ids)]
    assert set(stock[len(ids) :]) <= {tokenizer.eos_token_id}


@pytest.mark.parametrize("kind", PREFIXED)
def test_only_the_start_has_the_space_of_the_tokenizer(kind: str) -> None:
    """`hello` and `world` read `hello world` before."""
    tokenizer, encoder = tokenizer_of(kind), ENCODERS[kind]
    assert encoder.start("hello")[len(encoder.start_ids) :] != encoder.piece("hello")
    together = decoded(tokenizer, (*encoder.piece("<|im_start|>"), *encoder.piece("hello"), *encoder.piece("world")))
    assert together.endswith("helloworld")
    assert "> " not in together


def test_start_tokens_stand_once_and_end_tokens_not_at_all() -> None:
    for kind in ("llama-bos", "llama-bos-eos"):
        encoder = ENCODERS[kind]
        assert encoder.start_ids == (1,)
        assert encoder.start("hello").count(1) == 1
        assert encoder.start("<s>hello").count(1) == 1
        assert 2 not in encoder.start("hello")
        assert not {1, 2} & set(encoder.piece("hello"))
    assert ENCODERS["slow-bytes"].start("a") == tuple(tokenizer_of("slow-bytes").encode("a"))[:1]


@pytest.mark.parametrize("kind", [*JOINABLE, "added-tokens"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_no_text_of_a_user_becomes_a_control_token(kind: str, data: st.DataObject) -> None:
    tokenizer, encoder = tokenizer_of(kind), ENCODERS[kind]
    controls = [*encoder.controls] or ["<none>"]
    parts = data.draw(st.lists(st.sampled_from(controls) | PIECE, max_size=6))
    cut = [half for text in controls[:3] for half in (text[:2], text[2:], text[:-1])]
    text = "".join(parts + data.draw(st.lists(st.sampled_from(cut), max_size=2)))
    ids = encoder.plain(text)
    unknown = {tokenizer.unk_token_id}
    assert set(ids) & set(encoder.controls.values()) <= unknown
    if kind != "unigram":  # it does not know all the letters
        behind = decoded(tokenizer, (*encoder.piece("a"), *ids))
        assert behind == decoded(tokenizer, encoder.piece("a")) + text
    if tokenizer.is_fast:
        spans = encoder.spans(text)
        assert tuple(span.token_id for span in spans) == ids
        assert all(0 <= span.start <= span.end <= len(text) for span in spans)
        assert all(before.start <= after.start for before, after in pairwise(spans))


def test_added_tokens_are_control_tokens_unless_they_are_ordinary_text() -> None:
    tokenizer = with_tools()
    encoder = TextEncoder(tokenizer)
    assert "<|tool_call|>" in encoder.controls
    assert not {"   ", "kvcomm"} & set(encoder.controls)
    tool, spaces, word = (tokenizer.convert_tokens_to_ids(text) for text in ("<|tool_call|>", "   ", "kvcomm"))
    text = "a   b <|tool_call|> kvcomm"
    assert tool in encoder.piece(text)
    ids = encoder.plain(text)
    assert tool not in ids
    assert {spaces, word} <= set(ids)
    assert decoded(tokenizer, ids) == text


def test_words_that_the_chat_template_writes_are_control_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("HUMAN", special=False), AddedToken("OTHER", special=False)])
    tokenizer.chat_template = "HUMAN{{ messages[0]['content'] }}"
    encoder = TextEncoder(tokenizer)
    assert tokenizer.convert_tokens_to_ids("HUMAN") not in encoder.plain("I am HUMAN")
    assert tokenizer.convert_tokens_to_ids("OTHER") in encoder.plain("I am OTHER")


def test_a_control_token_in_the_models_own_vocabulary() -> None:
    """A tokenizer may find the piece without looking at its added tokens, as Unigram does."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "ab<>/s▁")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    ids = TextEncoder(tokenizer).plain("a </s> b")
    assert 1 not in ids
    assert tokenizer.convert_ids_to_tokens(list(ids)) == [*"a▁</s>▁b"]


def test_a_control_token_that_other_letters_become_is_refused() -> None:
    """A normalizer makes the token of letters that do not spell it."""
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<|call|>", special=False, normalized=True)])
    encoder = TextEncoder(tokenizer)
    with pytest.raises(InvalidRequest, match=r"input 'x' contains the control token '<\|call\|>'"):
        encoder.plain("now <|CALL|>", label="input 'x'")
    assert encoder.plain("now <|call|>")


def test_looking_at_texts_leaves_the_tokenizer_alone() -> None:
    tokenizer = llama(adds_bos=True)
    before = tokenizer.backend_tokenizer.to_str()
    encoder = TextEncoder(tokenizer)
    encoder.piece("a"), encoder.plain("<s>"), encoder.start("b")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.split_special_tokens
