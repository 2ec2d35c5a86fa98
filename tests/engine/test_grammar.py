"""Grammars as values, and what compiling them costs at most."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from llguidance.hf import from_tokenizer

from kvcomm import Grammar
from kvcomm.engine.grammar_compiler import MAX_COMPILED, GrammarCompiler
from kvcomm.engine.grammar_schema import MAX_LEVELS, MAX_PROPERTIES, MAX_REFERENCES, MAX_SCHEMA
from kvcomm.engine.token_texts import TokenTexts
from kvcomm.errors import InvalidRequest
from tests.tiny import tiny_tokenizer
from tests.tokenizer_kinds import KINDS, tokenizer_of

REFUSED = ("joined", "slow-bytes", "slow-sentencepiece", "slow-words", "suffixed", "wordpiece", "wordpiece-cleaned")
"""Kinds of tokenizers whose tokens have no bytes of their own."""


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return make_compiler("byte-level")


def make_compiler(kind: str) -> GrammarCompiler:
    tokenizer = tokenizer_of(kind)
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return GrammarCompiler(tokenizer, TokenTexts(tokenizer), vocab_size=len(tokenizer), end_token_ids=ends)


def accepts(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Whether a text is a whole answer."""
    state = compiler.compile(grammar)
    ids = tiny_tokenizer().encode(text)
    if state.num_allowed(ids) < len(ids):
        return False
    for token_id in ids:
        state.take(token_id)
    return state.is_complete


def test_equal_grammars_are_equal() -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}}
    assert Grammar.json_schema(schema) == Grammar.json_schema(json.dumps(schema))
    assert len({Grammar.regex("a"), Grammar.regex("a"), Grammar.lark("a")}) == 2
    assert Grammar.json_schema(True) == Grammar.json_schema({})


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Grammar.json_schema(False), "False"),
        (lambda: Grammar.json_schema(None), "None"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema("[1]"), "1"),
        (lambda: Grammar.json_schema("{'a': 1}"), "no JSON"),
        (lambda: Grammar.json_schema({"const": float("nan")}), "no JSON"),
        (lambda: Grammar.json_schema('{"const": NaN}'), "NaN"),
        (lambda: Grammar.json_schema({"const": object()}), "no JSON"),
        (lambda: Grammar.json_schema({}, strict="yes"), "strict"),  # type: ignore[arg-type]
        (lambda: Grammar.regex(""), "empty"),
        (lambda: Grammar.regex(b"a"), "text"),  # type: ignore[arg-type]
        (lambda: Grammar.regex("\ud800"), "surrogate"),
        (lambda: Grammar.regex("a" * 20_000), "20000"),
        (lambda: Grammar.choice([]), "at least one"),
        (lambda: Grammar.choice(["a", ""]), "empty"),
        (lambda: Grammar.choice("ab"), "texts"),  # type: ignore[arg-type]
        (lambda: Grammar.choice([f"{i}" for i in range(6000)]), "6000"),
        (lambda: Grammar.lark("start: a\n" + "\n" * 1000), "lines"),
        (lambda: Grammar.regex("a").json_rule, "embedded"),
    ],
)
def test_what_is_none_is_refused(make: Any, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        make()


def endless() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"self": schema}
    return schema


def nested(num: int) -> str:
    return '{"items": ' * num + "{}" + "}" * num


def chained(num: int) -> dict[str, Any]:
    links = {f"a{at}": {"type": "array", "items": {"$ref": f"#/$defs/a{at + 1}"}} for at in range(num - 1)}
    return {"$defs": links | {f"a{num - 1}": {}}, "$ref": "#/$defs/a0"}


def wide(num: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"k{at}": {"type": "null"} for at in range(num)}}


@pytest.mark.parametrize(
    "schema",
    [
        endless(),
        nested(MAX_LEVELS),
        nested(100_000),
        chained(MAX_REFERENCES + 1),
        wide(MAX_PROPERTIES + 1),
        {"enum": ["x" * MAX_SCHEMA]},
    ],
    ids=["endless", "deep", "deeper", "chained", "wide", "long"],
)
def test_schemas_have_limits(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"JSON schema (is|has)"):
        Grammar.json_schema(schema)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.json_schema(nested(MAX_LEVELS - 1)),
        Grammar.json_schema(chained(MAX_REFERENCES)),
        Grammar.json_schema({"enum": [f"value {at}" for at in range(8000)]}),
        Grammar.json_schema(wide(MAX_PROPERTIES)),
        Grammar.json_schema(wide(MAX_PROPERTIES) | {"required": list(wide(MAX_PROPERTIES)["properties"])}),
        Grammar.choice([f"value {at}" for at in range(5000)]),
    ],
    ids=["deep", "chained", "enum", "optional", "wide", "choice"],
)
def test_at_the_limits_it_compiles(compiler: GrammarCompiler, grammar: Grammar) -> None:
    state = compiler.compile(grammar)
    assert not state.forbidden().all()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.json_schema({"allOf": [{"anyOf": [wide(3), wide(2), wide(1)]}] * 12}),
        Grammar.lark("start: A0\n" + "\n".join(f"A{at}: A{at + 1} A{at + 1}" for at in range(40)) + '\nA40: "a"'),
        Grammar.lark("start: " + "(" * 10_000 + '"a"' + ")" * 10_000),
        Grammar.lark("start: %json " + nested(2000)),
        Grammar.lark("start: start"),
        Grammar.json_schema({"$ref": "#"}),
    ],
    ids=["combined", "doubling", "brackets", "json", "itself", "ref"],
)
def test_what_costs_too_much_is_refused(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(grammar)
    assert len(str(caught.value)) < 500


def test_a_chain_of_rules_at_the_limit(compiler: GrammarCompiler) -> None:
    """Followed on the stack: twice as many would end the process."""
    rules = "\n".join(f"r{at}: r{at + 1}" for at in range(997))
    assert accepts(compiler, Grammar.lark(f'start: r0\n{rules}\nr997: "a"'), "a")


def test_what_answers_look_like(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
    grammar = Grammar.json_schema(schema)
    assert accepts(compiler, grammar, '{"a": 1, "b": "x"}')
    assert accepts(compiler, grammar, '{"a": 1}')
    for text in ('{"a": 1', '{"a":1}', '{"a": 1, "c": 2}', '{"b": "x"}', '{ "a": 1}', '{"a": 1} ', '{"a": "1"}'):
        assert not accepts(compiler, grammar, text)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "additionalProperties": True},
        {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        {"properties": {"a": {}}, "required": ["z"]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"z": {}}}]},
        {"$defs": {"x": {"properties": {"a": {}}}}, "allOf": [{"$ref": "#/$defs/x"}, {"required": ["z"]}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"z": {"const": 1}}, "required": ["z"]}]},
    ],
)
def test_objects_stay_open_where_the_schema_needs_it(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    assert accepts(compiler, Grammar.json_schema({"type": "object", **schema}), '{"a": 1, "z": 1}')


def test_a_property_may_be_called_anything(compiler: GrammarCompiler) -> None:
    """Names of keywords are names here."""
    schema = {"type": "object", "properties": {"allOf": {"type": "object", "properties": {"properties": {"const": 1}}}}}
    grammar = Grammar.json_schema(schema)
    assert accepts(compiler, grammar, '{"allOf": {"properties": 1}}')
    assert not accepts(compiler, grammar, '{"allOf": {"properties": 1, "more": 1}}')


def test_a_schema_that_is_not_strict(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"const": 1}, "uniqueItems": True}
    with pytest.raises(InvalidRequest, match="'uniqueItems'"):
        compiler.compile(Grammar.json_schema(schema))
    assert accepts(compiler, Grammar.json_schema(schema, strict=False), "[1, 1]")
    sly = schema | {"x-guidance": {"lenient": True}}
    with pytest.raises(InvalidRequest, match="'uniqueItems'"):
        compiler.compile(Grammar.json_schema(sly))


def test_a_schema_inside_a_grammar(compiler: GrammarCompiler) -> None:
    rule = Grammar.json_schema({"type": "array", "items": {"type": "integer"}}).json_rule
    assert accepts(compiler, Grammar.lark(f'start: "<call>" {rule} "</call>"'), "<call>[1, 2]</call>")


def test_what_is_compiled_is_kept_by_owner_and_bounded(compiler: GrammarCompiler) -> None:
    made = make_compiler("byte-level")
    made.compile(Grammar.regex("mine"), owner="ann")
    for at in range(2 * MAX_COMPILED):
        made.compile(Grammar.regex(f"x{at}"), owner="bob")
    kept = [owner for owner, _ in made._compiled]
    assert (len(kept), kept.count("ann")) == (MAX_COMPILED, 1)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_tokenizer_follows_or_refuses(kind: str) -> None:
    """Whatever may come next is a beginning of the text that the tokenizer shows."""
    compiler, tokenizer = make_compiler(kind), tokenizer_of(kind)
    grammar = Grammar.regex("hello( world)?")
    if kind in REFUSED:
        with pytest.raises(InvalidRequest, match="cannot be constrained"):
            compiler.compile(grammar)
        return
    state = compiler.compile(grammar)
    ids: list[int] = []
    while not state.is_over and len(ids) < 30:
        allowed = (~state.forbidden(with_ends=False)).nonzero()[:, 0].tolist()
        if not allowed:
            break
        ids.append(allowed[-1])
        state.take(ids[-1])
        shown = tokenizer.decode(ids)
        assert "hello world".startswith(shown.lstrip())
    assert state.is_complete


def test_what_is_prepared_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first grammar once waited for a look at the whole vocabulary, seconds for a large one."""
    looks: list[int] = []

    def looking(tokenizer: Any, n_vocab: int, eos_token: list[int]) -> Any:
        looks.append(n_vocab)
        return from_tokenizer(tokenizer, n_vocab=n_vocab, eos_token=eos_token)

    monkeypatch.setattr("kvcomm.engine.grammar_compiler.from_tokenizer", looking)
    compiler = make_compiler("byte-level")
    compiler.prepare()
    assert len(looks) == 1
    compiler.compile(Grammar.regex("a"))
    compiler.prepare()
    assert len(looks) == 1


def test_where_no_grammar_can_be_followed_nothing_is_prepared() -> None:
    make_compiler(REFUSED[0]).prepare()


def test_the_first_tokens_are_known_when_it_is_compiled(compiler: GrammarCompiler) -> None:
    """Many prompts may be done in one step, so looking at it again then would take the time of all their grammars."""
    states = [compiler.compile(Grammar.regex("[ab]c[de]")) for _ in range(3)]
    assert not any(state.must_look for state in states)
    allowed = [torch.nonzero(~state.forbidden()).flatten().tolist() for state in states]
    assert [len(each) for each in allowed] == [2, 2, 2]
    states[0].take(allowed[0][0])
    assert states[0].must_look
    states[0].forbidden()
    assert not states[0].must_look
