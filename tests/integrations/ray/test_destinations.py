"""Where requests go, by method, path and body."""

from __future__ import annotations

import re

import pytest

from kvcomm.integrations.ray.destinations import Destination, Reach, destination_of
from kvcomm.server.app import SURFACES

CONTEXT, RESPONSE = "ctx_" + "a1" * 12, "resp_" + "b2" * 12


@pytest.mark.parametrize(
    ("method", "path", "body", "wanted"),
    [
        ("POST", "/v1/chat/completions", {}, Destination(Reach.ONE)),
        ("POST", "/v1/chat/completions", {"context_id": CONTEXT}, Destination(Reach.ONE, CONTEXT)),
        ("POST", "/v1/chat/completions", {"context_id": 7}, Destination(Reach.ONE)),
        ("POST", "/v1/responses", {"previous_response_id": RESPONSE}, Destination(Reach.ONE, RESPONSE)),
        ("GET", f"/v1/responses/{RESPONSE}", {}, Destination(Reach.ONE, RESPONSE)),
        ("GET", f"/v1/responses/{RESPONSE}/input_items", {}, Destination(Reach.ONE, RESPONSE)),
        ("POST", "/v1/responses/input_tokens", {}, Destination(Reach.ONE)),
        ("POST", "/v1/contexts", {}, Destination(Reach.ONE)),
        ("GET", "/v1/contexts", {}, Destination(Reach.LISTED)),
        ("GET", f"/v1/contexts/{CONTEXT}", {}, Destination(Reach.ONE, CONTEXT)),
        ("POST", f"/v1/contexts/{CONTEXT}/extend", {}, Destination(Reach.ONE, CONTEXT, changes=True)),
        ("POST", f"/v1/contexts/{CONTEXT}/fork", {}, Destination(Reach.ONE, CONTEXT)),
        ("POST", "/v1/completions", {"context_id": CONTEXT, "store": True}, Destination(Reach.ONE, CONTEXT, True)),
        ("POST", "/v1/responses", {"previous_response_id": RESPONSE, "store": True}, Destination(Reach.ONE, RESPONSE)),
        ("DELETE", f"/v1/contexts/{CONTEXT}", {}, Destination(Reach.ONE, CONTEXT)),
        ("DELETE", f"/admin/tenants/ann/contexts/{CONTEXT}", {}, Destination(Reach.ONE, CONTEXT)),
        ("PUT", "/v1/segments/doc", {}, Destination(Reach.EVERY)),
        ("DELETE", "/v1/segments/doc", {}, Destination(Reach.EVERY)),
        ("GET", "/v1/segments/doc", {}, Destination(Reach.ONE)),
        ("DELETE", "/admin/tenants/ann", {}, Destination(Reach.EVERY)),
        ("GET", "/metrics", {}, Destination(Reach.METRICS)),
        ("GET", "/health", {}, Destination(Reach.ONE)),
    ],
)
def test_where_a_request_goes(method: str, path: str, body: dict[str, object], wanted: Destination) -> None:
    assert destination_of(method, path, body) == wanted


def test_every_operation_on_a_context_or_response_is_pinned() -> None:
    """A path that the server gets one day, and that names a context, is not forgotten here."""
    values = {"context_id": CONTEXT, "response_id": RESPONSE}
    for surface in SURFACES:
        for route in surface.routes:
            path = re.sub(r"\{(\w+)(:\w+)?\}", lambda found: values.get(found[1], "x"), route.path)
            named = next((each for each in values.values() if each in path), None)
            for method in route.methods:
                assert destination_of(method, path, {}).context_id == named, path
