"""Contexts while replicas come and go: in whatever order that happens, none is lost, none changes, none comes back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from tests.integrations.ray.local import MODEL, cluster
from tests.tiny import tiny_model

TEXTS = st.sampled_from(["You are.", " three apples", " the fox and the dog do not mind"])


class Contexts(RuleBasedStateMachine):
    """A model of what clients were told: the text of every context that lives."""

    made = Bundle("made")

    @initialize()
    def start(self) -> None:
        """Two replicas and a tier."""
        self.folder = tempfile.TemporaryDirectory()
        self.tiny = tiny_model()
        self.opened = cluster(self.tiny, "r0", "r1", tier=Path(self.folder.name))
        self.cluster = self.opened.__enter__()
        self.client = self.cluster.client()
        self.texts: dict[str, str] = {}
        self.gone: list[str] = []
        self.num_replicas = 2

    def _post(self, path: str, body: dict[str, Any], status: int) -> dict[str, Any]:
        answer = self.client.post(path, json=body)
        assert answer.status_code == status, answer.text
        return dict(answer.json())

    @rule(target=made, text=TEXTS)
    def make(self, text: str) -> str:
        """A context."""
        context_id = str(self._post("/v1/contexts", {"text": text}, 201)["id"])
        self.texts[context_id] = text
        return context_id

    @rule(context_id=made, text=TEXTS)
    def extend(self, context_id: str, text: str) -> None:
        """More behind it."""
        self._post(f"/v1/contexts/{context_id}/extend", {"text": text}, 200)
        self.texts[context_id] += text

    @rule(target=made, context_id=made)
    def fork(self, context_id: str) -> str:
        """A second one."""
        child = str(self._post(f"/v1/contexts/{context_id}/fork", {}, 201)["id"])
        self.texts[child] = self.texts[context_id]
        return child

    @rule(context_id=consumes(made))
    def delete(self, context_id: str) -> None:
        """It is no more."""
        assert self.client.delete(f"/v1/contexts/{context_id}").json()["deleted"] == [context_id]
        del self.texts[context_id]
        self.gone.append(context_id)

    @rule(context_id=made)
    def look(self, context_id: str) -> None:
        """It holds what it was told."""
        found = self.client.get(f"/v1/contexts/{context_id}")
        assert found.status_code == 200, found.text
        (holder,) = self.cluster.replicas.holder_of(context_id)
        registry = self.cluster.replicas.living[holder].serving.state.contexts.find("default")
        assert registry is not None
        (node,) = [each for each in registry.nodes if each.id == context_id]
        assert node.context.text == self.texts[context_id]

    @rule(context_id=made)
    def answer(self, context_id: str) -> None:
        """Something is said behind it."""
        body = {"model": MODEL, "prompt": " so", "context_id": context_id, "max_tokens": 2, "temperature": 0}
        self._post("/v1/completions", body, 200)

    @precondition(lambda self: len(self.cluster.replicas.living) > 1)
    @rule(number=st.integers(0, 9))
    def kill(self, number: int) -> None:
        """A replica is gone."""
        names = sorted(self.cluster.replicas.living)
        self.cluster.replicas.kill(names[number % len(names)])

    @precondition(lambda self: len(self.cluster.replicas.living) < 3)
    @rule()
    def add(self) -> None:
        """Another one comes."""
        self.cluster.add(f"r{self.num_replicas}")
        self.num_replicas += 1

    @rule()
    def forget(self) -> None:
        """The ingress begins anew."""
        self.client = self.cluster.client()

    @invariant()
    def what_is_gone_stays_gone(self) -> None:
        """As far as anybody looks."""
        for context_id in getattr(self, "gone", [])[-1:]:
            assert self.client.get(f"/v1/contexts/{context_id}").status_code == 404

    @invariant()
    def nobody_has_what_another_has(self) -> None:
        """One replica has a context at most."""
        for context_id in getattr(self, "texts", {}):
            assert len(self.cluster.replicas.holder_of(context_id)) <= 1

    def teardown(self) -> None:
        """Every page comes back."""
        if hasattr(self, "opened"):
            self.opened.__exit__(None, None, None)
            self.folder.cleanup()


TestContexts = Contexts.TestCase
TestContexts.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
