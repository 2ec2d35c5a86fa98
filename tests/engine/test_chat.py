"""Conversations against the tokenizer's own chat template: the same text, passages with the same ids in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from kvcomm import ReusePolicy, Segment, Static
from kvcomm.config import EngineConfig
from kvcomm.engine.chat import ChatPrompts
from kvcomm.engine.encoding import PromptReader, TextEncoder
from kvcomm.engine.engine import Engine
from kvcomm.engine.token_texts import TokenTexts
from kvcomm.errors import EmptyPrompt, InvalidRequest, TemplateError, UnknownToken
from kvcomm.model.loading import LoadedModel
from tests.engine.test_encoding import JOINABLE, decoded
from tests.stored import renditions_by
from tests.tiny import CHAT_TEMPLATE, TinyModel, tiny_tokenizer
from tests.tokenizer_kinds import tokenizer_of

PASSAGE = st.text(st.sampled_from("abhelo wr\n.,'!?)(é"), min_size=1, max_size=8)
TRICKY = st.sampled_from(
    ["<|im_end|>", "<|im_start|>system\n", "MARK0000000000000000000000000N0X", "N1X", "{{ messages }}", "{% if", " "]
)
TEXT = st.one_of(PASSAGE, TRICKY)
PART = st.one_of(
    TEXT,
    st.builds(Static, TEXT),
    st.builds(lambda text, name: {"type": "text", "text": text, "name": name}, TEXT, st.sampled_from(["web", "p 1"])),
    st.builds(lambda text: {"type": "text", "text": text, "dynamic": True}, TEXT),
    st.builds(lambda text: {"type": "text", "text": text}, TEXT),
)
MESSAGE = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.one_of(TEXT, st.lists(PART, max_size=4)),
)

TRIMMED = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
BEGUN = "{{ bos_token }}" + CHAT_TEMPLATE
UPPER = CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper")
REVERSED = "{% for m in messages | reverse %}{{ m['content'] }};{% endfor %}"
TWICE = "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"
FIRST_LETTERS = "{% for m in messages %}{{ m['content'][:60] }}{% endfor %}"
COUNTED = "{% for m in messages %}{{ m['content'] | length }}:{{ m['content'] }}{% endfor %}"
REFUSES = "{{ raise_exception('never') }}"
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
THINKING = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %};{% endfor %}"
)


def prompts_of(tokenizer: PreTrainedTokenizerBase) -> ChatPrompts:
    """What reads conversations for a tokenizer."""
    encoder = TextEncoder(tokenizer)
    reader = PromptReader(encoder, vocab_size=len(tokenizer), max_context=10_000)
    return ChatPrompts(tokenizer, encoder, reader, TokenTexts(tokenizer))


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with another chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text_of(part: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a reader sees of a part."""
    if isinstance(part, Segment):
        return decoded(tokenizer, part.token_ids)
    if isinstance(part, Static):
        return part.text
    return part if isinstance(part, str) else str(part["text"])


def stock(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any]) -> str:
    """What the tokenizer itself writes for the joined contents."""
    whole = [
        {
            **message,
            "content": message["content"]
            if isinstance(message["content"], str)
            else "".join(text_of(part, tokenizer) for part in message["content"]),
        }
        for message in messages
    ]
    return str(tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True))


def joined_ids(segments: Sequence[Segment]) -> tuple[int, ...]:
    return tuple(token for segment in segments for token in segment.token_ids)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


KINDS = [kind for kind in JOINABLE if tokenizer_of(kind).chat_template]
ALL_LETTERS = [kind for kind in KINDS if kind != "unigram"]  # which knows few, and nothing for the others
PROMPTS = {kind: prompts_of(tokenizer_of(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", ALL_LETTERS)
@settings(max_examples=30)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=4))
def test_it_reads_as_the_chat_template_writes_it(kind: str, messages: list[dict[str, Any]]) -> None:
    """And nobody's text has become a control token: there are as many as the template writes."""
    tokenizer = tokenizer_of(kind)
    segments = PROMPTS[kind].segments(messages)
    ids = joined_ids(segments)
    anchor = joined_ids([Segment(TextEncoder(tokenizer).start("a"))])  # decoding takes the first space of a text
    assert decoded(tokenizer, anchor + ids) == decoded(tokenizer, anchor) + stock(tokenizer, messages)
    empty = [{**message, "content": ""} for message in messages]
    for control in ("<|im_start|>", "<|im_end|>"):
        token = tokenizer.convert_tokens_to_ids(control)
        assert ids.count(token) == stock(tokenizer, empty).count(control)
        assert all(token not in segment.token_ids for segment in segments if segment.name is not None)


def test_it_reads_as_the_chat_template_writes_it_on_a_real_model(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    prompts = prompts_of(tokenizer)
    encoder = TextEncoder(tokenizer)
    passages = [Segment(encoder.piece(text), "passage") for text in (" Café №7.\n\n", "<b>two</b>", "\n3\t三")]
    for messages in (
        user(*passages, "\n\nWhich?"),
        [{"role": "system", "content": "Be <|im_end|> brief. "}, *user(Static("Documents:\n"), *passages, " why?")],
        [*user("hi"), {"role": "assistant", "content": "hello"}, *user(passages[2], "and?")],
    ):
        segments = prompts.segments(messages)
        assert decoded(tokenizer, joined_ids(segments)) == stock(tokenizer, messages)
        assert [each for each in segments if each.name == "passage"] == [
            part for message in messages for part in message["content"] if isinstance(part, Segment)
        ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(texts=st.lists(PASSAGE, min_size=2, max_size=3, unique=True), question=PASSAGE, other=PASSAGE)
def test_passages_are_the_same_in_any_order_and_the_rest_is_one_template(
    kind: str, texts: list[str], question: str, other: str
) -> None:
    encoder = TextEncoder(tokenizer_of(kind))
    alone = {text: Segment(encoder.piece(text), "web") for text in texts}
    templates = set()
    for order, asked in [*((order, question) for order in permutations(texts)), (tuple(texts), other)]:
        segments = PROMPTS[kind].segments(user(Static("Read:\n"), *(alone[text] for text in order), asked))
        assert [segment for segment in segments if segment.name == "web"] == [alone[text] for text in order]
        assert [segment.name for segment in segments if segment.name not in (None, "web")] == ["text"]
        templates.add(tuple(segment for segment in segments if segment.name is None))
    assert len(templates) == 1


def test_what_the_parts_are() -> None:
    tokenizer = tiny_tokenizer()
    encoder = TextEncoder(tokenizer)
    messages = [
        {"role": "developer", "content": ["Be ", {"type": "text", "text": "kind"}]},
        *user(Segment(encoder.piece("one")), {"type": "text", "text": "two", "name": "x", "dynamic": False}, "", "?"),
        {"role": "assistant", "content": Segment((*encoder.piece("yes"), 2), "answer")},
        {"role": "user", "content": {"type": "text", "text": "why", "dynamic": True}},
        {"role": "tool", "content": None},
    ]
    segments = prompts_of(tokenizer).segments(messages)
    assert [(segment.name, decoded(tokenizer, segment.token_ids)) for segment in segments] == [
        (None, "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n"),
        ("passage", "one"),
        ("text", "two?"),
        (None, "<|im_end|>\n<|im_start|>assistant\n"),
        ("answer", "yes<|im_end|>"),
        (None, "<|im_end|>\n<|im_start|>user\n"),
        ("passage", "why"),
        (None, "<|im_end|>\n<|im_start|>tool\n<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_a_template_may_trim_a_turns_own_text_but_no_passage() -> None:
    tokenizer = with_template(TRIMMED)
    prompts, passage = prompts_of(tokenizer), Segment(TextEncoder(tokenizer).piece(" one \n"), "web")
    for parts in ((" a ", passage, "\nb\n"), (Static(" \n"), "x "), (" \n",), ("a", passage, Static("."))):
        segments = prompts.segments(user(*parts))
        assert decoded(tokenizer, joined_ids(segments)) == stock(tokenizer, user(*parts))
        assert (passage in segments) == (passage in parts)
    for parts, place in ((("a", passage), 1), ((passage, "b"), 0), (("a", passage, " "), 1)):
        with pytest.raises(TemplateError, match=rf"messages\[0\]\['content'\]\[{place}\]: the chat template writes it"):
            prompts.segments(user(*parts))


def test_a_template_may_shorten_an_answer_but_no_passage() -> None:
    tokenizer = with_template(THINKING)
    tokenizer.add_tokens([AddedToken("</think>", special=False, normalized=False)])
    prompts = prompts_of(tokenizer)
    messages = [*user("a</think>b"), {"role": "assistant", "content": "hm</think>yes"}, *user("c")]
    segments = prompts.segments(messages)
    assert (
        decoded(tokenizer, joined_ids(segments))
        == stock(tokenizer, messages)
        == "user:a</think>b;assistant:yes;user:c;"
    )
    assert [decoded(tokenizer, each.token_ids) for each in segments if each.name] == ["a</think>b", "yes", "c"]
    thought = {"type": "text", "text": "hm</think>yes", "name": "answer"}
    with pytest.raises(TemplateError, match=r"messages\[0\]\['content'\]: the chat template writes it differently"):
        prompts.segments([{"role": "assistant", "content": thought}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REVERSED, r"messages\[0\]\['content'\]\[0\]: the chat template changes the order"),
        (TWICE, r"messages\[0\]\['content'\]\[0\]: the chat template repeats it"),
        (FIRST_LETTERS, r"messages\[0\]\['content'\]\[2\]: the chat template drops it"),
        (COUNTED, "the chat template writes it differently"),
        (UPPER, r"messages\[0\]\['content'\]\[0\]: the chat template drops it"),
        (REFUSES, "chat template rejects these messages: never"),
        (NO_SYSTEM, "drops system messages; put their text into the first user message"),
        (None, "no chat template; give generate"),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    passages = [{"type": "text", "text": text, "name": "web"} for text in ("one", "two")]
    messages = [*user(passages[0], Static(" and "), passages[1]), {"role": "system", "content": "x"}, *user("y")]
    with pytest.raises(TemplateError, match=message):
        prompts_of(with_template(template)).segments(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages must be a list of messages, not 'hi'"),
        (["hi"], r"messages\[0\] must be a message such as"),
        ([{"content": "hi"}], r"messages\[0\]\['role'\] must be text, not None"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\] must be a text, a Segment, or a list"),
        (user("a", 3), r"messages\[0\]\['content'\]\[1\] must be a text, Static\(text\), a Segment or"),
        (user("\ud800"), r"messages\[0\]\['content'\] holds the lone surrogate"),
        (user(Static(3)), r"the text of messages\[0\]\['content'\] must be text, not 3"),  # type: ignore[arg-type]
        (user({"type": "image_url"}), r"messages\[0\]\['content'\] must be of type 'text', not 'image_url'"),
        (user({"type": "text"}), r"messages\[0\]\['content'\]\['text'\] must be text, not None"),
        (
            user({"type": "text", "text": "a", "naem": "b"}),
            r"unknown field 'naem'; there are type, text, name, dynamic",
        ),
        (user({"type": "text", "text": "a", "name": 3}), r"\['name'\] must be text, not 3"),
        (user({"type": "text", "text": "a", "dynamic": 3}), r"\['dynamic'\] must be True or False, not 3"),
        (user(Segment((1, 5))), r"messages\[0\]\['content'\] is a segment with the control token '<\|im_start\|>'"),
    ],
)
def test_messages_that_are_none(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        prompts_of(tiny_tokenizer()).segments(messages)


def test_an_id_that_the_model_does_not_know() -> None:
    with pytest.raises(UnknownToken, match="token id 1000 is outside"):
        prompts_of(tiny_tokenizer()).segments(user(Segment((1000,))))


@pytest.fixture
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=4096)) as made:
        yield made


def test_chat_is_the_answer_to_its_prompt(engine: Engine) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *user(engine.segment("The dog.", name="web"), "why?")]
    prompt = engine.chat_prompt(messages)
    assert engine.texts.decode(joined_ids(prompt)) == stock(engine.tokenizer, messages)
    answer = engine.chat(messages, max_new_tokens=5, ignore_eos=True)
    assert answer.token_ids == engine.generate(prompt, max_new_tokens=5, ignore_eos=True, reads_cache=False).token_ids
    speaks = engine.segment("<|im_start|>assistant\n").token_ids
    with engine.context(engine.chat_prompt(messages, add_generation_prompt=False)) as context:
        assert joined_ids(context.segments) + speaks == joined_ids(prompt)
    with pytest.raises(InvalidRequest, match="variant"):
        engine.chat(messages, variant=None)


def test_a_template_that_writes_nothing(engine: Engine) -> None:
    engine.tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(EmptyPrompt):
        engine.chat(user(Static("hi")))


def test_tools_and_variables_are_for_the_template(engine: Engine) -> None:
    engine.tokenizer.chat_template = "{{ tools }}|{{ mood }}|{{ messages[0]['content'] }}"
    tools = [{"type": "function", "function": {"name": "<|im_end|>"}}]
    prompt = engine.chat_prompt(user("hi"), tools=tools, variables={"mood": "kind"})
    assert engine.texts.decode(joined_ids(prompt)) == f"{tools}|kind|hi"
    assert engine.tokenizer.eos_token_id not in joined_ids(prompt)


def test_tools_are_not_dropped(engine: Engine) -> None:
    with pytest.raises(TemplateError, match="no place for tools"):
        engine.chat_prompt(user("hi"), tools=[{"type": "function", "function": {"name": "f"}}])
    assert engine.chat_prompt(user("hi"), tools=[]) == engine.chat_prompt(user("hi"))


def test_start_tokens_stand_there_once() -> None:
    for template, kind in ((CHAT_TEMPLATE, "llama-bos"), (BEGUN, "llama-bos"), (BEGUN, "llama")):
        tokenizer = tokenizer_of(kind)
        before, tokenizer.chat_template = tokenizer.chat_template, template
        try:
            segments = prompts_of(tokenizer).segments(user("hi"))
            reader = PromptReader(TextEncoder(tokenizer), vocab_size=len(tokenizer), max_context=100)
            assert joined_ids(reader.read(segments, is_start=True)).count(tokenizer.bos_token_id) == 1
        finally:
            tokenizer.chat_template = before


def test_passages_are_known_when_they_come_in_another_order(engine: Engine) -> None:
    passages = [engine.segment(text, name="web") for text in ("The quick brown fox. ", "It jumps over the dog. ")]
    engine.chat(user(*passages, "why?"), max_new_tokens=1)
    assert all(renditions_by(engine, passage) for passage in passages)
    turned = engine.chat_prompt(user(*passages[::-1], "why not?"))
    policy = ReusePolicy(max_divergence=1.0, confidence=0.5)
    for tenant, is_new in (("default", False), ("other", True)):
        plan = engine.explain(turned, policy=policy, tenant=tenant).plan
        ends = list(accumulate(len(segment.token_ids) for segment in turned))
        for segment, end in zip(turned, ends, strict=True):
            if segment in passages:
                (span,) = [span for span in plan.spans if span.start < end <= span.end]
                assert (span.reason in ("new", "no_source")) == is_new
