"""Tokens of texts that come again: never another namespace's, never more than fit, never other tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcomm.engine.encoding import TextEncoder
from kvcomm.engine.engine import Engine
from kvcomm.server.sections import Sections
from kvcomm.server.token_cache import MIN_CHARACTERS, TokenCache
from tests.server.conftest import chat
from tests.tiny import tiny_tokenizer

LONG = "x" * MIN_CHARACTERS
ANN, BOB, SALTED = ("ann", None), ("bob", None), ("ann", "salt")


def counting() -> tuple[list[str], Callable[[str], tuple[int, ...]]]:
    """Texts that were tokenized, and what does it."""
    made: list[str] = []

    def make(text: str) -> tuple[int, ...]:
        made.append(text)
        return tuple(map(ord, text))

    return made, make


def test_a_text_is_tokenized_once_in_each_namespace() -> None:
    cache, (made, make) = TokenCache(), counting()
    for space in (ANN, BOB, SALTED, ANN, BOB, SALTED):
        assert cache.tokens(space, LONG, make) == (120,) * MIN_CHARACTERS
    assert made == [LONG] * 3


def test_short_texts_are_not_kept() -> None:
    cache, (made, make) = TokenCache(), counting()
    for _ in range(2):
        cache.tokens(ANN, LONG[1:], make)
    assert len(made) == 2


def test_the_least_recently_used_go_first() -> None:
    cache, (made, make) = TokenCache(3 * (MIN_CHARACTERS + 1)), counting()
    texts = [LONG + letter for letter in "abcd"]
    for index in (0, 1, 2, 0, 3, 0, 2, 1):
        cache.tokens(ANN, texts[index], make)
    assert made == [texts[index] for index in (0, 1, 2, 3, 1)]


def test_texts_without_tokens_and_texts_that_do_not_fit_drop_no_others() -> None:
    cache, (made, make) = TokenCache(MIN_CHARACTERS), counting()
    cache.tokens(ANN, LONG, make)
    cache.tokens(ANN, LONG + "y", make)
    for _ in range(2):
        assert cache.tokens(ANN, "z" * MIN_CHARACTERS, lambda text: make(text)[:0]) == ()
    cache.tokens(ANN, LONG, make)
    assert len(made) == 4


def test_a_tenant_is_forgotten_under_all_salts() -> None:
    cache, (made, make) = TokenCache(), counting()
    for space in (ANN, BOB, SALTED):
        cache.tokens(space, LONG, make)
    cache.forget("ann")
    for space in (ANN, BOB, SALTED):
        cache.tokens(space, LONG, make)
    assert len(made) == 5


@pytest.mark.parametrize(
    "text", ["", "<|im_start|>user\nhow many? 12 <|im_end|>\n<|im_start|>", " a<|im_end|> b", "plain"]
)
def test_cut_texts_have_the_tokens_of_the_whole(engine: Engine, text: str) -> None:
    parts = list(Sections(engine.encoder).of(text))
    ids: list[int] = []
    for part in parts:
        ids += (part,) if isinstance(part, int) else engine.segment(part).token_ids
    assert tuple(ids) == engine.segment(text).token_ids
    assert (len(parts) > 1) == ("<|" in text)


def test_a_space_before_the_first_piece_is_no_part_of_any() -> None:
    """One that puts a space before the start of a text: pieces of a prompt never have it."""
    vocabulary = {letter: index for index, letter in enumerate("▁abcdefghijklmnopqrstuvwxyzE12\n ")}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="E"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    text = "a</s>b"
    assert tokenizer.encode(text, add_special_tokens=False) != [
        *tokenizer.encode("a", add_special_tokens=False),
        tokenizer.eos_token_id,
        *tokenizer.encode("b", add_special_tokens=False),
    ]
    encoder = TextEncoder(tokenizer)
    assert list(Sections(encoder).of(text)) == ["a", tokenizer.eos_token_id, "b"]
    assert encoder.piece(text) == (*encoder.piece("a"), tokenizer.eos_token_id, *encoder.piece("b"))


def test_a_control_token_that_takes_spaces_into_itself_is_left_alone() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|call|>", lstrip=True, special=False)])
    text = "a <|call|>b"
    assert list(Sections(TextEncoder(tokenizer)).of(text)) == [text]


def test_the_same_prompt_again_has_the_same_tokens(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    state = client.app.state.kvcomm  # type: ignore[attr-defined]
    made: list[str] = []
    whole = state.engine.segment
    monkeypatch.setattr(state.engine, "segment", lambda text, **more: made.append(text) or whole(text, **more))
    body = chat(messages=[{"role": "system", "content": "be brief. " * 40}, {"role": "user", "content": "why?"}])
    first = client.post("/v1/chat/completions", json=body).json()
    num_long = sum(len(text) >= MIN_CHARACTERS for text in made)
    again = client.post("/v1/chat/completions", json=body).json()
    assert num_long == 1
    assert sum(len(text) >= MIN_CHARACTERS for text in made) == 1
    assert first["choices"] == again["choices"]
    assert first["usage"]["prompt_tokens"] == again["usage"]["prompt_tokens"]
    client.delete("/admin/tenants/default/cache")
    client.post("/v1/chat/completions", json=body)
    assert sum(len(text) >= MIN_CHARACTERS for text in made) == 2
