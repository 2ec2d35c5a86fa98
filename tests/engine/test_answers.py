"""What an answer shows is what its ids say: for its reader, its context, its chunks and whoever moves its KV."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from kvcomm.agents.agent import Agent
from kvcomm.agents.group import KVCommAgentGroup
from kvcomm.engine.engine import Engine
from kvcomm.engine.request import ANSWER
from kvcomm.engine.results import Chunk, Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.memory.segments import Segment
from tests.engine.conftest import SMALL, greedy, stock_logits
from tests.scripted import draw
from tests.stored import renditions_by
from tests.tiny import tiny_llama
from tests.tokenizer_kinds import llama, tokenizer_of

PROMPT = "a list: "


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return llama()


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerBase) -> Iterator[Engine]:
    with Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config=SMALL) as made:
        yield made
        assert not made.scheduler.has_work
        made.check_integrity()
        for context in made.contexts:
            context.release()
        made.cache.clear()
        assert made.cache.stats().num_free == made.pool.num_pages


def ids_of(tokenizer: PreTrainedTokenizerBase, *pieces: str) -> list[int]:
    """Ids of single tokens, by their pieces."""
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    assert tokenizer.convert_ids_to_tokens(ids) == list(pieces)
    return ids


def text_of(engine: Engine, ids: tuple[int, ...]) -> str:
    text = engine.tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def joined(chunks: list[Chunk], choice: int = 0) -> tuple[str, tuple[int, ...]]:
    mine = [chunk for chunk in chunks if chunk.choice == choice]
    return "".join(chunk.text for chunk in mine), tuple(token for chunk in mine for token in chunk.token_ids)


CASES = {
    "inside a token": (["1", ")\n", "2"], ("\n",), "1)", 2),
    "a whole token": (["1", "\n", "2"], ("\n",), "1", 1),
    "over several tokens": (["1", ")\n", "2", "3"], ("\n23",), "1)", 2),
    "from the middle of one token into another": (["hell", "o", ".\n", "h", "e"], (".\nhe",), "hello", 2),
    "ending inside a token": (["1", ")", "he"], (")h",), "1", 1),
    "at the start": ([")\n", "2"], (")",), "", 0),
    "the first token, in part": ([")\n", "2"], ("\n",), ")", 1),
    "behind a space that the start of a text loses": (["▁", ")\n"], ("\n",), ")", 2),
    "a byte of its own": (["1", "<0x0A>", "2"], ("\n",), "1", 1),
    "behind a character in bytes": (["1", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", ")\n"], ("\n",), "1😀)", 6),
    "a character in bytes": (["1", ")\n", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], ("\n😀",), "1)", 2),
    "none": (["1", ")\n", "2", "3"], ("never",), "1)\n23", 4),
}
"""Pieces that are drawn, stop strings, the text that is shown, and how many pieces have put something into it."""


@pytest.mark.parametrize("case", CASES)
def test_the_next_reader_gets_the_text_that_the_answer_shows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The answer said "1)", its ids "1", and so did the context."""
    pieces, stop, shown, num_shown = CASES[case]
    drawn = ids_of(engine.tokenizer, *pieces)
    draw(monkeypatch, drawn)
    context = engine.context(PROMPT)
    before = context.num_tokens
    handle = context.submit(stop=stop, max_new_tokens=len(pieces), ignore_eos=True, logprobs=1)
    chunks, answer = list(handle), handle.result()
    assert answer.text == shown
    assert text_of(engine, answer.token_ids) == shown
    assert joined(chunks) == (shown, answer.token_ids)
    assert context.tokens[before:] == answer.token_ids
    assert context.segments[-1] == Segment(answer.token_ids, ANSWER) if shown else context.segments[-1].name != ANSWER
    assert context.text.endswith(shown)
    assert answer.logprobs is not None
    assert [each.token_id for each in answer.logprobs] == drawn[:num_shown]
    told = [each for chunk in chunks for each in chunk.logprobs or ()]
    assert told == list(answer.logprobs)
    places = answer.choices[0].text_offsets
    assert tuple(at for chunk in chunks for at in chunk.text_offsets or ()) == places
    assert places is not None
    assert len(places) == num_shown
    # What was tokenized anew is computed like anything else: the context goes on as a cold run does.
    monkeypatch.undo()
    tokens = context.tokens
    next_tokens = context.generate(max_new_tokens=5, ignore_eos=True).token_ids
    assert list(next_tokens) == greedy(engine.model, tokens, 5)


def test_a_space_that_the_answers_text_lacks_is_still_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(monkeypatch, ids_of(engine.tokenizer, "▁", ")\n"))
    with engine.context("so") as context:
        assert context.generate(stop=("\n",), max_new_tokens=9).text == ")"
        assert context.text == "so )"


def test_special_tokens_are_shown_if_they_are_wanted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(monkeypatch, ids_of(engine.tokenizer, "h", "<|im_start|>", "1"))
    answers = [
        engine.generate(PROMPT, max_new_tokens=3, skip_special_tokens=skips, ignore_eos=True, logprobs=0)
        for skips in (True, False)
    ]
    assert [answer.text for answer in answers] == ["h1", "h<|im_start|>1"]
    assert [answer.choices[0].text_offsets for answer in answers] == [(0, 1, 1), (0, 1, 13)]


def test_the_token_that_ends_an_answer_has_a_log_probability(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    end = engine.tokenizer.eos_token_id
    assert isinstance(end, int)
    draw(monkeypatch, [*ids_of(engine.tokenizer, "1"), end])
    handle = engine.submit(PROMPT, max_new_tokens=9, logprobs=1)
    (choice,) = handle.result().choices
    assert choice.text == "1"
    assert choice.logprobs is not None
    assert len(choice.logprobs) == 1
    assert choice.end_logprob is not None
    assert choice.end_logprob.token_id == end
    assert [chunk.end_logprob for chunk in handle][-1] == choice.end_logprob
    assert engine.generate(PROMPT, max_new_tokens=1).choices[0].end_logprob is None


@pytest.mark.parametrize("in_context", [False, True])
def test_every_choice_ends_where_its_own_text_does(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, in_context: bool
) -> None:
    scripts = (["1", ")\n"], ["hell", "o", ".\n"], ["2", "3", "1", "2"])
    draw(monkeypatch, *(ids_of(engine.tokenizer, *pieces) for pieces in scripts))
    sampling = SamplingParams(stop=("\n",), max_new_tokens=4, n=3, ignore_eos=True)
    context = engine.context(PROMPT)
    handle = context.submit(sampling) if in_context else engine.submit(PROMPT, sampling)
    chunks, answer = list(handle), handle.result()
    assert [choice.text for choice in answer.choices] == ["1)", "hello.", "2312"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop", "length"]
    for choice in answer.choices:
        assert text_of(engine, choice.token_ids) == choice.text
        assert joined(chunks, choice.index) == (choice.text, choice.token_ids)


def test_a_fork_taken_while_the_answer_is_written_stays_as_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(monkeypatch, ids_of(engine.tokenizer, "h", "e", "1", ")\n"))
    context = engine.context(PROMPT)
    stream = context.stream(stop=("\n",), max_new_tokens=9, ignore_eos=True)
    next(stream)
    fork = context.fork()
    list(stream)
    assert context.text.endswith("he1)")
    tokens = fork.tokens
    monkeypatch.undo()
    assert list(fork.generate(max_new_tokens=4, ignore_eos=True).token_ids) == greedy(engine.model, tokens, 4)


def test_the_next_agent_reads_what_the_answer_shows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(monkeypatch, ids_of(engine.tokenizer, "1", ")\n"))
    group = KVCommAgentGroup(engine, sampling=SamplingParams(max_new_tokens=4, stop=("\n",)))
    group.add(Agent("first", prompt="{q}"))
    group.add(Agent("second", system="judge.", prompt="they say: {first}!"))
    result = group.run(q="what?")
    assert result["first"].text == "1)"
    read = engine.texts.decode(token for segment in result["second"].prompt for token in segment.token_ids)
    messages = [{"role": "system", "content": "judge."}, {"role": "user", "content": "they say: 1)!"}]
    assert read == engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_what_others_may_move_is_the_answer_as_far_as_it_was_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(monkeypatch, ids_of(engine.tokenizer, "1", "2", ")\n", "3"))
    prompt = [engine.segment(PROMPT), engine.segment("what?", name="q")]
    answer = engine.generate(prompt, stop=("\n",), max_new_tokens=8, ignore_eos=True)
    assert answer.text == "12)"
    kept = Segment(answer.token_ids, ANSWER)
    (rendition,) = renditions_by(engine, kept)
    assert rendition.num_tokens == 2


def test_a_cut_answer_may_be_longer_than_what_was_drawn(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hell` cut before its last letter has two tokens; the context takes them also at the limit."""
    draw(monkeypatch, ids_of(tokenizer, "hell"))
    context = engine.context(PROMPT)
    answer = context.generate(stop=("ll",), max_new_tokens=1)
    assert (answer.text, answer.finish_reason) == ("he", "stop")
    answer = context.generate(stop=("ell",), max_new_tokens=1)
    assert answer.text == "h"
    assert context.text == "a list: heh"
    answer = context.generate(stop=("l",), max_new_tokens=1)
    assert context.text == "a list: hehhe"


def test_the_kv_behind_a_cut_equals_a_cold_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(monkeypatch, ids_of(engine.tokenizer, "h", "e", "l", "l", "o", "1", ")\n"))
    context = engine.context(PROMPT)
    context.generate(stop=("\n",), max_new_tokens=20)
    context.extend("more")
    assert context.text == PROMPT + "hello1)more"
    assert context.ready_logits is not None
    expected = stock_logits(engine.model, context.tokens)[-1]
    torch.testing.assert_close(context.ready_logits, expected, atol=1e-4, rtol=1e-4)


def test_a_restored_snapshot_reads_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    draw(monkeypatch, ids_of(engine.tokenizer, "1", ")\n"))
    context = engine.context(PROMPT)
    context.generate(stop=("\n",), max_new_tokens=20)
    again = engine.restore(context.save(f"{tmp_path}/cut.safetensors"))
    assert (again.text, again.tokens, again.segments) == (context.text, context.tokens, context.segments)
    monkeypatch.undo()
    expected = greedy(engine.model, again.tokens, 4)
    assert list(again.generate(max_new_tokens=4, ignore_eos=True).token_ids) == expected


TEXT = st.text(st.sampled_from("he1) .\no漢😀"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_text_ids_and_chunks_agree_for_any_answer(data: st.DataObject) -> None:
    tokenizer = tokenizer_of("llama")
    words = st.sampled_from(["1", ")\n", "hell", "he", "▁h", "▁▁", "<0xC3>", "<0xA9>", "<0x0A>", "\ufffd", ".\n", "漢"])
    pieces = data.draw(st.lists(words, min_size=1, max_size=12))
    stops = tuple(data.draw(st.lists(TEXT.map(lambda text: text[:3]), min_size=1, max_size=3)))
    with pytest.MonkeyPatch.context() as patch:
        draw(patch, ids_of(tokenizer, *pieces))
        engine = SHARED["engine"]
        context = engine.context(PROMPT)
        before = context.num_tokens
        handle = context.submit(stop=stops, max_new_tokens=len(pieces), ignore_eos=True)
        chunks, answer = list(handle), handle.result()
    agree(engine, chunks, answer)
    assert context.tokens[before:] == answer.token_ids
    assert not any(stop in answer.text for stop in stops)
    engine.check_integrity()
    context.release()


def agree(engine: Engine, chunks: list[Chunk], answer: Completion) -> None:
    assert text_of(engine, answer.token_ids) == answer.text
    assert joined(chunks) == (answer.text, answer.token_ids)


SHARED: dict[str, Engine] = {}


@pytest.fixture(autouse=True, scope="module")
def shared_engine() -> Iterator[None]:
    tokenizer = tokenizer_of("llama")
    with Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config=SMALL) as SHARED["engine"]:
        yield
    SHARED.clear()


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["llama", "llama-bos", "llama-bos-eos", "llama-legacy", "unigram", "byte-level-prefixed"]
)
def test_texts_behind_one_another_read_as_they_were_written(kind: str) -> None:
    """`context("hello").extend("world")` read "hello world"; a list of segments had no start token."""
    tokenizer = tokenizer_of(kind)
    with Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config=SMALL) as engine:
        before = engine.texts.decode(tokenizer.encode("hello")).removesuffix("</s>")
        context = engine.context("hello").extend("world").fork().extend([engine.segment(" he"), engine.segment("llo")])
        assert context.text == before + "world hello"
        start = engine.encoder.start_ids
        listed = engine.context([engine.segment("hel"), engine.segment("lo", name="lo")])
        assert listed.text == engine.texts.decode(start) + "hello"
        assert listed.tokens[: len(start)] == start
        assert listed.segments[-1] == engine.segment("lo", name="lo")
        again = engine.context([Segment(start), engine.segment("hello")]) if start else listed
        assert again.tokens.count(1) <= 1
        stock = tuple(tokenizer.encode("hello"))
        assert engine.context("hello").tokens == (stock[:-1] if kind == "llama-bos-eos" else stock)
        assert engine.cache.num_cached([engine.segment("hel"), engine.segment("lo")]) > 0


@pytest.mark.parametrize(
    "kind", ["llama", "llama-bos", "llama-legacy", "unigram", "byte-level-prefixed", "added-tokens"]
)
def test_an_agents_prompt_is_what_the_chat_template_gives(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    with Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config=SMALL) as engine:
        group = KVCommAgentGroup(engine, sampling=SamplingParams(max_new_tokens=1))
        group.add(Agent("first", system="You are.", prompt="hello {q} and {r}."))
        asked = {"q": "world <|im_end|>", "r": " he"} if kind != "unigram" else {"q": "world", "r": " he"}
        prompt = group.run(**asked)["first"].prompt
        ids = [token for segment in prompt for token in segment.token_ids]
        content = f"hello {asked['q']} and {asked['r']}."
        messages = [{"role": "system", "content": "You are."}, {"role": "user", "content": content}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert engine.texts.decode(ids) == engine.texts.decode(engine.encoder.start_ids) + expected
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
