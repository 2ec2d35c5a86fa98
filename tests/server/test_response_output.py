"""Items and events of responses: the official client's types read every event; streams say what the whole does."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from kvcomm.server.responses.output import Output
from kvcomm.server.schemas.chat import ChatTokenLogprob
from kvcomm.toolcalls.events import CallStart, Event, Finish, ReasoningDelta, TextDelta
from tests.server.answer_events import answers, runs

OFFICIAL: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def fed(output: Output, events: list[Event], cuts: list[int] | None = None) -> list[dict[str, Any]]:
    """All that is told of events that come in pieces of these lengths."""
    told = []
    left = list(events)
    for cut in [*(cuts or []), len(events)]:
        told += list(output.feed(left[:cut]))
        left = left[cut:]
    return told


def said(items: Any) -> list[tuple[str, str]]:
    """What items say, as `runs` does."""
    texts = []
    for item in items:
        values = item if isinstance(item, dict) else item.model_dump()
        if values["type"] == "function_call":
            texts.append((f"call {values['name']}", values["arguments"]))
        else:
            (part,) = values["content"]
            texts.append(("text" if values["type"] == "message" else "thought", part["text"]))
    return texts


@given(
    events=answers(arguments=st.lists(st.text(min_size=1, max_size=5), max_size=3)), cuts=st.lists(st.integers(0, 4))
)
def test_items_and_stream_say_what_the_answer_does(events: list[Event], cuts: list[int]) -> None:
    output = Output()
    told = fed(output, events, cuts)
    expected = runs(events) or [("text", "")]
    assert said(output.items) == expected
    for number, each in enumerate(told):
        OFFICIAL.validate_python({**each, "sequence_number": number}, strict=True)
    done = [each["item"] for each in told if each["type"] == "response.output_item.done"]
    assert done == [item.model_dump() for item in output.items]
    for index, item in enumerate(done):
        mine = [each for each in told if each["output_index"] == index]
        deltas = "".join(each["delta"] for each in mine if each["type"].endswith(".delta"))
        assert deltas == expected[index][1]
        assert [each["type"] for each in (mine[0], mine[-1])] == [
            "response.output_item.added",
            "response.output_item.done",
        ]
        assert mine[0]["item"]["status"] == "in_progress"
        assert {each["item_id"] for each in mine[1:-1]} == {item["id"]}
    assert [each["output_index"] for each in told] == sorted(each["output_index"] for each in told)
    is_cut = events[-1] == Finish("length")
    assert [item["status"] for item in done] == ["completed"] * (len(done) - 1) + [
        "incomplete" if is_cut else "completed"
    ]


def logprob(token: str) -> ChatTokenLogprob:
    """One of a token."""
    return ChatTokenLogprob(token=token, logprob=-1.0, bytes=list(token.encode()), top_logprobs=[])


def test_every_token_of_a_text_has_its_log_probability() -> None:
    """Tokens whose text was held back until another came had none."""
    output = Output()
    told = list(output.feed([ReasoningDelta("hm")], [logprob("hm")]))
    told += list(output.feed([], [logprob("a")]))
    told += list(output.feed([TextDelta("ab")], [logprob("b")]))
    told += list(output.feed([TextDelta("c")], [logprob("c")]))
    told += list(output.feed([Finish("stop")], [logprob("d")]))
    message = output.items[1].model_dump()
    assert [each["token"] for each in message["content"][0]["logprobs"]] == ["hm", "a", "b", "c", "d"][1:]
    deltas = [each["logprobs"] for each in told if each["type"] == "response.output_text.delta"]
    assert [[each["token"] for each in delta] for delta in deltas] == [["a", "b"], ["c"]]


def test_a_call_has_no_log_probabilities() -> None:
    output = Output()
    told = list(output.feed([CallStart(0, "c", "f")], [logprob("x")]))
    told += list(output.feed([Finish("tool_calls")]))
    assert not any("logprobs" in each for each in told)
    assert output.finish_reason == "tool_calls"
