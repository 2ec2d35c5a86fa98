"""schemathesis on the OpenAPI document, with auth: what the document says is what the server does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.errors import InvalidSchema
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from schemathesis.specs.openapi.schemas import OpenApiSchema

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.app import make_app
from kvcomm.server.keys import KeyRing, Role, add_key
from kvcomm.server.schemas.structured import LARK, REGEX, SCHEMA
from kvcomm.server.settings import ServerSettings
from tests.engine.conftest import ROWS_ONLY
from tests.server.conftest import MODEL, require_nothing_left
from tests.tiny import tiny_model

schemathesis.openapi.format(REGEX, st.from_regex(r"[a-z]{1,4}(\([a-z]{0,3}\)[*+?]?)?", fullmatch=True))
schemathesis.openapi.format(LARK, st.from_regex(r'start: "[a-z]{1,5}"( "[0-9]{1,3}")?', fullmatch=True))
schemathesis.openapi.format(SCHEMA, st.sampled_from(['{"type": "integer"}', "true", '{"enum": [1, "a", null]}']))

KINDS = ("contexts", "segments", "snapshots")
OPERATIONS = (
    "GET /health",
    "GET /ready",
    "GET /version",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/stats",
    "GET /ui",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /tokenizer_info",
    "POST /tokenize",
    "POST /detokenize",
    "POST /v1/responses",
    "POST /v1/responses/input_tokens",
    "GET /v1/responses/{response_id}",
    "GET /v1/responses/{response_id}/input_items",
    "DELETE /v1/responses/{response_id}",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/contexts",
    "GET /v1/contexts",
    "GET /v1/contexts/{context_id}",
    "PATCH /v1/contexts/{context_id}",
    "DELETE /v1/contexts/{context_id}",
    "POST /v1/contexts/{context_id}/extend",
    "POST /v1/contexts/{context_id}/fork",
    "POST /v1/contexts/{context_id}/snapshot",
    "GET /v1/snapshots",
    "DELETE /v1/snapshots/{name}",
    "POST /v1/snapshots/{name}/restore",
    "GET /v1/segments",
    "PUT /v1/segments/{name}",
    "GET /v1/segments/{name}",
    "DELETE /v1/segments/{name}",
    "GET /v1/segments/{name}/versions",
    "POST /v1/cache/warm",
    "POST /v1/cache/explain",
    "GET /v1/cache/tree",
    "GET /v1/anchors",
    "GET /v1/anchors/status",
    "PUT /admin/tenants/{tenant}/anchors",
    "GET /metrics",
    "GET /admin/status",
    "DELETE /admin/tenants/{tenant}/cache",
    "GET /admin/tenants",
    "GET /admin/tenants/{tenant}",
    "DELETE /admin/tenants/{tenant}",
    *(f"{method} /admin/tenants/{{tenant}}/{kind}" for kind in KINDS for method in ("GET", "DELETE")),
    "DELETE /admin/tenants/{tenant}/contexts/{context_id}",
    "DELETE /admin/tenants/{tenant}/segments/{name}",
    "DELETE /admin/tenants/{tenant}/snapshots/{name}",
)
OPERATOR = ("/metrics", "/admin")
OPAQUE = ("PUT /admin/tenants/{tenant}/anchors",)
"""Operations whose bodies no schema describes: random bytes are refused, and rightly."""


class Api(NamedTuple):
    """A document of an app, and keys for it."""

    schema: OpenApiSchema
    keys: dict[Role, str]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An app that needs keys and answers in a few tokens."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {role: add_key(file, role.value, role=role) for role in Role}
    tiny = tiny_model()
    tiny.model.config.max_position_embeddings = 16_384  # no schema can say how many tokens a text has
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=65_536)) as engine:
        engine.reuse.parts.cost.model = (
            ROWS_ONLY  # measuring imports in a thread, while hypothesis looks at what is there
        )
        app = make_app(
            engine,
            ServerSettings(model=MODEL, max_answer_tokens=4, snapshots=file.parent / "snapshots"),
            keys=KeyRing(file),
        )
        yield Api(schemathesis.openapi.from_asgi("/openapi.json", app), keys)
        app.state.kvcomm.contexts.close()
        require_nothing_left(engine)


def test_no_operation_is_left_out(api: Api) -> None:
    documented = [result.ok() for result in api.schema.get_all_operations()]
    assert {f"{each.method.upper()} {each.path}" for each in documented} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, GenerationMode.POSITIVE) for name in OPERATIONS),
        *((name, GenerationMode.NEGATIVE) for name in OPERATIONS if name.startswith(("POST", "PATCH")) or "{" in name),
    ],
)
def test_the_document_is_true(api: Api, name: str, mode: GenerationMode) -> None:
    """Valid requests are answered as documented, invalid ones are refused, and none ends in a 500."""
    method, path = name.split()
    operation = api.schema[path][method]
    judge = DocumentJudge(api.schema.raw_schema, method, path)
    key = api.keys[Role.ADMIN if path.startswith(OPERATOR) else Role.TENANT]

    @settings(max_examples=40, suppress_health_check=list(HealthCheck), database=None)
    @given(case=made_cases(operation.as_strategy(generation_mode=mode)))
    def check(case: schemathesis.Case) -> None:
        is_told = name not in OPAQUE and not _names_tools(case.body) and not _is_constrained(case.body)
        excluded = [] if is_told else [positive_data_acceptance]
        if mode == GenerationMode.NEGATIVE and not _is_spoilt(case, judge):
            excluded.append(negative_data_rejection)
        case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, excluded_checks=excluded)

    check()


class DocumentJudge:
    """Says of bodies and queries whether the whole document allows them, by a validator that knows not how they were
    made."""

    def __init__(self, document: dict[str, Any], method: str, path: str) -> None:
        operation = document["paths"][path][method.lower()]
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        self._validator = None
        if content is not None:
            schema = {**content["schema"], "components": document["components"]}
            self._validator = jsonschema_rs.Draft202012Validator(schema)
        queries = [each for each in operation.get("parameters", []) if each["in"] == "query"]
        self._required = {each["name"] for each in queries if each["required"]}
        self._queries = {
            each["name"]: jsonschema_rs.Draft202012Validator({**each["schema"], "components": document["components"]})
            for each in queries
        }

    def allows_query(self, query: Mapping[str, object]) -> bool:
        """Whether all parameters of the operation are valid; what it does not know may stand beside them, unread."""
        known = {name: value for name, value in query.items() if name in self._queries}
        return self._required <= set(known) and all(
            _is_json(value) and self._queries[name].is_valid(value) for name, value in known.items()
        )

    def allows(self, body: object) -> bool:
        """Whether a JSON body is valid; where the document describes none, nothing is."""
        return self._validator is not None and self._validator.is_valid(body)


@pytest.mark.parametrize(
    ("query", "allows"),
    [
        ({"name": "x"}, True),
        ({"name": "x", "": None, "beta": object()}, True),
        ({"name": "x", "version": 3}, True),
        ({"name": "x", "version": 0}, False),
        ({"version": 3, "more": 1}, False),
    ],
)
def test_what_a_query_says_beside_its_parameters_is_left_unread(query: dict[str, object], allows: bool) -> None:
    version = {"name": "version", "in": "query", "required": False, "schema": {"type": "integer", "minimum": 1}}
    name = {"name": "name", "in": "query", "required": True, "schema": {"type": "string"}}
    document = {"paths": {"/a": {"get": {"parameters": [version, name]}}}, "components": {}}
    assert DocumentJudge(document, "GET", "/a").allows_query(query) is allows


def _is_spoilt(case: schemathesis.Case, judge: DocumentJudge) -> bool:
    """Whether a case that was made to be invalid is: one of its changes is neither to headers, which keys replace, nor
    such that the body fits another branch of its schema, nor a query's parameter that nobody knows."""
    assert case.meta is not None
    spoilt = {place for place, made in case.meta.components.items() if made.mode.is_negative}
    if ParameterLocation.BODY in spoilt and _is_json(case.body) and judge.allows(case.body):
        spoilt.discard(ParameterLocation.BODY)
    if ParameterLocation.QUERY in spoilt and judge.allows_query(case.query or {}):
        spoilt.discard(ParameterLocation.QUERY)
    return bool(spoilt - {ParameterLocation.HEADER})


def _is_json(body: object) -> bool:
    try:
        json.dumps(body, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


@st.composite
def made_cases(draw: st.DrawFn, strategy: st.SearchStrategy[schemathesis.Case]) -> schemathesis.Case:
    """The cases of a strategy; schemas that it has changed into ones that it cannot follow itself are left out."""
    try:
        return draw(strategy)
    except InvalidSchema:
        reject()


def _names_tools(body: object) -> bool:
    """Whether a request names tools, or wants calls that follow its schemas: no schema can say which there are."""
    if not isinstance(body, dict):
        return False
    tools, choice = body.get("tools"), body.get("tool_choice")
    functions = (
        [each.get("function", each) for each in tools if isinstance(each, dict)] if isinstance(tools, list) else []
    )
    is_strict = any(isinstance(each, dict) and each.get("strict") for each in functions)
    return is_strict or choice not in (None, "auto", "none") or body.get("parallel_tool_calls") is False


def _is_constrained(body: object) -> bool:
    """Whether an answer is to follow a schema or a grammar: which ones can be followed, no schema can say.

    Nor does the document say that only one of these fields may stand in a request: its rules are many enough for tools
    that make examples of them.
    """
    if not isinstance(body, dict) or body.get("continue_final_message") is True:
        return isinstance(body, dict)
    forms = (body.get(name) for name in ("text", "output_config"))
    if any(isinstance(form, dict) and form.get("format") is not None for form in forms):
        return True
    return any(body.get(name) is not None for name in ("response_format", "structured_outputs", "regex"))
