"""Templates: what they parse to, what they refuse, and that writing and parsing are inverse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.agents.templates import Slot, Static, escape, parse_template, slots_of
from kvcomm.errors import TemplateError

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,6}", fullmatch=True)
slots = st.builds(Slot, names, st.booleans())
texts = st.text(alphabet=st.sampled_from("ab {}@\n\\%$é"), min_size=1, max_size=8).map(Static)


def written(parts: tuple[Static | Slot, ...]) -> str:
    """The text that parses to these parts."""
    return "".join(part.placeholder if isinstance(part, Slot) else escape(part.text) for part in parts)


@st.composite
def templates(draw: st.DrawFn) -> tuple[Static | Slot, ...]:
    """Parts in canonical form: no two static parts touch."""
    parts = draw(st.lists(slots | texts, max_size=8))
    kept: list[Static | Slot] = []
    for part in parts:
        if not (kept and isinstance(part, Static) and isinstance(kept[-1], Static)):
            kept.append(part)
    return tuple(kept)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ()),
        ("plain", (Static("plain"),)),
        ("{question}", (Slot("question"),)),
        (
            "Q: {question}\nA: {solver}.",
            (Static("Q: "), Slot("question"), Static("\nA: "), Slot("solver"), Static(".")),
        ),
        ("{critic@previous}", (Slot("critic", previous=True),)),
        ("{a}{a}", (Slot("a"), Slot("a"))),
        ('{{"key": 1}}', (Static('{"key": 1}'),)),
        ("{{{a}}}", (Static("{"), Slot("a"), Static("}"))),
        ("{{a}}", (Static("{a}"),)),
        ("100% $x \\{{", (Static("100% $x \\{"),)),
    ],
)
def test_parses(text: str, parts: tuple[Static | Slot, ...]) -> None:
    assert parse_template(text, agent="a") == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "empty placeholder"),
        ("{ }", "empty placeholder"),
        ("{", "unbalanced '{'"),
        ("a } b", "unbalanced '}' at '} b'"),
        ("{a", "unbalanced '{'"),
        ("{a}}", "unbalanced '}'"),
        ("{{a}", "unbalanced '}'"),
        ("{a{b}}", "unbalanced '{'"),
        ("{ a }", "bad name ' a '"),
        ("{a.b}", "bad name 'a.b'"),
        ("{a[0]}", r"bad name 'a\[0\]'"),
        ("{a!r}", "bad name"),
        ("{a:>3}", "bad name"),
        ("{1a}", "bad name '1a'"),
        ("{é}", "bad name 'é'"),
        ("{@previous}", "bad name ''"),
        ("{a@}", "ends in @;"),
        ("{a@next}", "ends in @next; only @previous"),
        ("{a@previous@previous}", "only @previous"),
        ('{"key": 1}', "for literal braces write {{ and }}"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        parse_template(f"one\ntwo {text}", agent="critic", field="system")
    assert "agent 'critic', system, line 2" in str(caught.value)


def test_long_text_is_cut_in_messages() -> None:
    with pytest.raises(TemplateError) as caught:
        parse_template("{" + "x y" * 1000 + "}", agent="a")
    assert len(str(caught.value)) < 300


@settings(deadline=None)
@given(templates())
def test_writing_and_parsing_are_inverse(parts: tuple[Static | Slot, ...]) -> None:
    assert parse_template(written(parts), agent="a") == parts


@settings(deadline=None)
@given(st.text())
def test_escaped_text_is_static(text: str) -> None:
    parts = parse_template(escape(text), agent="a")
    assert slots_of(parts) == ()
    assert "".join(part.text for part in parts if isinstance(part, Static)) == text


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("ab{}@previous \n"), max_size=20))
def test_any_text_parses_or_is_refused_by_name(text: str) -> None:
    refusal = ""
    try:
        parts = parse_template(text, agent="somebody")
    except TemplateError as error:
        refusal = str(error)
    if refusal:
        assert "'somebody'" in refusal
    else:
        assert parse_template(written(parts), agent="a") == parts
