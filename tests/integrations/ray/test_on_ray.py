"""The app on a Ray of its own: what only Ray can show. `scripts/setup-env --integration ray` makes its environment."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from eval.on_ray import APP, RAY_SETTINGS, REPLICA, deployed
from kvcomm.errors import InvalidRequest, TierError
from kvcomm.integrations.ray import app
from tests.limits import PATIENCE_S, wait_for
from tests.tiny import tiny_model

pytest.importorskip("ray", reason="Ray is not installed here: bash scripts/setup-env --integration ray")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own warnings are not ours to answer for

TEXT = "You are a helpful agent. Question: how many apples are left?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny = tiny_model()
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas that share a tier, and may become three."""
    arguments = {
        "model": str(model),
        "replicas": "2",
        "max_replicas": "3",
        "target_requests": "64",
        "tier": tmp_path_factory.mktemp("tier").as_uri(),
        "engine.pool_tokens": "4096",
        "log_level": "warning",
    }
    with mock.patch.dict(os.environ, RAY_SETTINGS), deployed(arguments, num_cpus=5) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def client(base_url: str) -> Iterator[Any]:
    """Of the app."""
    import httpx

    with httpx.Client(base_url=base_url, timeout=PATIENCE_S) as made:
        yield made


def processes() -> dict[str, int]:
    """Of the replicas that live."""
    from ray import serve

    results = serve.get_deployment_handle("engines", APP).broadcast("process").results(return_exceptions=True)
    return dict(each for each in results if isinstance(each, tuple))


def behind(client: Any, context_id: str) -> tuple[str, str]:
    """What is said behind a context, and by whom."""
    body = {"model": "tiny", "prompt": " so", "context_id": context_id, "max_tokens": 6, "temperature": 0}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.headers[REPLICA]


def test_openais_client_is_answered_whole_and_streamed(base_url: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=PATIENCE_S) as made:
        messages: Any = [{"role": "user", "content": "how many apples are left?"}]
        whole = made.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
        stream = made.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0, stream=True)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens


def test_prompts_stay_with_their_replica(client: Any) -> None:
    where: dict[int, set[str]] = {}
    for _ in range(3):
        for key in range(6):
            messages = [{"role": "system", "content": f"agent {key}. {TEXT}"}, {"role": "user", "content": "so?"}]
            answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 1})
            where.setdefault(key, set()).add(answer.headers[REPLICA])
    assert {len(each) for each in where.values()} == {1}


def test_all_replicas_are_told_and_counted(client: Any) -> None:
    assert client.put("/v1/segments/doc", json={"content": "The fox."}).status_code == 200
    metrics = client.get("/metrics").text
    assert all(f'replica="{name}"' in metrics for name in processes())


def test_a_killed_replica_takes_no_answer_and_no_context_along(client: Any) -> None:
    made = [client.post("/v1/contexts", json={"text": f"{number} {TEXT}"}).json()["id"] for number in range(4)]
    for context_id in made:
        assert client.post(f"/v1/contexts/{context_id}/extend", json={"text": " three."}).status_code == 200
    before = {context_id: behind(client, context_id) for context_id in made}
    victim = before[made[0]][1]
    os.kill(processes()[victim], signal.SIGKILL)
    after = {context_id: behind(client, context_id) for context_id in made}
    assert {name: text for name, (text, _) in after.items()} == {name: text for name, (text, _) in before.items()}
    assert victim not in {replica for _, replica in after.values()}
    assert {each["id"] for each in client.get("/v1/contexts").json()["data"]} >= set(made)
    wait_for(lambda: len(processes()) == 2)  # Ray has put another in its place
    assert {context_id: behind(client, context_id) for context_id in made} == after, "nothing moved to the new one"


@pytest.mark.parametrize("given", [{"modle": "x"}, {"replicas": "none"}, {"port": "1"}, {"max_replicas": "0"}])
def test_wrong_arguments_are_refused_before_anything_is_deployed(given: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(given))):
        app(given)


def test_a_tier_that_cannot_be_is_refused_before_anything_is_deployed() -> None:
    with pytest.raises(TierError, match="nosuch"):
        app({"tier": "nosuch://bucket"})
