"""The log: JSON lines, request ids, and a last resort that tells clients nothing."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.server.logs import JsonFormatter, logging_config
from tests.server.conftest import MakeClient, chat

CHAT = "/v1/chat/completions"


def lines_of(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    """Records of a message as the log writes them."""
    formatter = JsonFormatter()
    return [json.loads(formatter.format(record)) for record in caplog.records if record.getMessage() == message]


@pytest.fixture(autouse=True)
def _at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kvcomm.server")


def test_every_response_has_an_id(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    given = client.get("/health", headers={"x-request-id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    made = [client.get(path).headers["x-request-id"] for path in ("/health", "/nothing")]
    made.append(client.post(CHAT, json=chat(stream=True)).headers["x-request-id"])
    assert len(set(made)) == 3
    assert [line["request_id"] for line in lines_of(caplog, "request")] == ["my-id.1", *made]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\x7f", 'a"b', "\u00e9"])
def test_ids_that_are_not_plain_are_replaced(client: TestClient, given: str) -> None:
    response = client.get("/health", headers={"x-request-id": given.encode("latin-1")})
    assert response.headers["x-request-id"].startswith("req-")


def test_a_line_per_request(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.post(CHAT, json=chat())
    (line,) = lines_of(caplog, "request")
    assert line["level"] == "info"
    assert (line["method"], line["path"], line["status"]) == ("POST", CHAT, 200)
    assert line["completion_tokens"] == 6
    assert line["duration_s"] >= line["ttft_s"] > 0


@pytest.mark.parametrize("log_prompts", [False, True])
def test_texts_only_if_asked_for(make_client: MakeClient, caplog: pytest.LogCaptureFixture, log_prompts: bool) -> None:
    client = make_client(log_prompts=log_prompts)
    answer = client.post(CHAT, json=chat()).json()["choices"][0]["message"]["content"]
    client.post(CHAT, json=chat(temperature="hot apples"))  # refused, and not quoted
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines_of(caplog, "request"))
    assert ("how many apples are left?" in text) == log_prompts
    assert (json.dumps(answer, ensure_ascii=False)[1:-1] in text) == log_prompts
    assert "hot apples" not in text


def test_an_unexpected_error_is_told_to_the_log_alone(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(client.app.state.kvcomm.prompts, "chat", broken)  # type: ignore[attr-defined]
    response = client.post(CHAT, json=chat())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    (line,) = lines_of(caplog, "unexpected error")
    assert "ZeroDivisionError: secret detail" in line["traceback"]
    assert line["request_id"] == response.headers["x-request-id"]
    (request,) = lines_of(caplog, "request")
    assert (request["status"], request["error"]) == (500, "ZeroDivisionError")


def test_the_configuration_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    config = logging_config("warning")
    assert config["loggers"]["kvcomm"]["level"] == "WARNING"
    record = logging.LogRecord("kvcomm.server", logging.WARNING, "f", 1, "say %r", ("two\nlines",), None)
    (line,) = JsonFormatter().format(record).splitlines()
    assert json.loads(line)["message"] == "say 'two\\nlines'"
