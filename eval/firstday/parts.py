"""The parts of an evaluation: each on a fresh engine, kept request by request, and done once.

What an engine has learned by request 30 is what is measured, so a part that was interrupted begins anew; one that was
finished is read from its file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.command import note
from eval.firstday.methods import Laboratory
from eval.firstday.records import Part, Served
from eval.firstday.serving import Server
from eval.firstday.workloads import Workload
from eval.tasks.progress import Phases
from eval.tasks.rows import digest_of
from kvcomm import Engine, EngineConfig, ReusePolicy
from kvcomm.errors import InvalidRequest
from kvcomm.lab.bounds import Bound
from kvcomm.lab.moving import learning_s
from kvcomm.lab.priors import Prior

CONFIG = EngineConfig(pool_bytes=4 * 2**30)
"""Pools hold a day's prompts; untouched pages cost no memory on a CPU."""
NEVER_S = 1e6
"""Seconds without a request after which an engine would take itself for idle: no run takes so long."""
RAG = "rag"
"""The workload on which methods are compared."""

Advance = Callable[[int], None]


class Evaluation:
    """Serves parts, beside one twin for all of them."""

    def __init__(
        self,
        twin: Engine,
        workloads: Mapping[str, Workload],
        prior: Prior | None,
        methods: Sequence[str],
        folder: Path,
        *,
        fresh: bool,
    ) -> None:
        """Make one.

        Args:
            twin: of the model that is evaluated; used by nobody else.
            prior: of the model; parts that use it leave out what was measured in their workload.
            methods: to be compared with on `RAG`.
            folder: where requests are kept.
            fresh: keep nothing of an earlier run.
        """
        self._twin = twin
        self._workloads = workloads
        self._prior = prior
        self._methods = tuple(methods)
        self._folder = folder
        self._fresh = fresh

    def serve(self, part: Part, phases: Phases) -> list[Served]:
        """The requests of a part, from its file if it was finished."""
        workload = self._workloads[part.workload]
        methods = self._methods if part.workload == RAG else ()
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = _settings(self._twin, workload, methods)
        if part.uses_prior and self._prior is not None:
            settings["prior"] = hashlib.sha256(repr(self._prior.without(part.workload)).encode()).hexdigest()
        file = part.file(self._folder, settings)
        with phases.phase(part.label, len(workload.inputs)) as advance:
            found = [] if self._fresh else file.read()
            if len(found) == len(workload.inputs):
                advance(len(found))
                return found
            file.file.unlink(missing_ok=True)
            for served in self._served(part, workload, methods):
                file.add([served])
                advance(1)
        return file.read()

    def _served(self, part: Part, workload: Workload, methods: Sequence[str]) -> Iterator[Served]:
        policy = ReusePolicy(part.bound.max_divergence, part.bound.confidence)
        self._twin.cache.clear()
        with self._engine(part) as engine, self._laboratory(methods) as laboratory:
            yield from Server(engine, self._twin, workload, policy, learning_s, laboratory).serve()

    @contextmanager
    def _engine(self, part: Part) -> Iterator[Engine]:
        """A fresh one."""
        known = self._prior.without(part.workload) if part.uses_prior and self._prior is not None else None
        config = replace(CONFIG, idle_after_s=NEVER_S)
        with Engine(self._twin.model, self._twin.tokenizer, config=config, prior=known) as engine:
            yield engine

    @contextmanager
    def _laboratory(self, methods: Sequence[str]) -> Iterator[Laboratory | None]:
        if not methods:
            yield None
            return
        with Engine(self._twin.model, self._twin.tokenizer, config=CONFIG, prior=None) as engine:
            yield Laboratory(engine, methods)


def parts_of(
    workloads: Iterable[str], bounds: Sequence[Bound], uses_prior: bool | None, prior: Prior | None
) -> list[Part]:
    """Every part that is asked for.

    Args:
        uses_prior: with the prior or without; None: both, as far as there is one.
        prior: of the model; None: there is none.

    Raises:
        InvalidRequest: the prior is asked for, and there is none.
    """
    if uses_prior and prior is None:
        raise InvalidRequest("--prior: none ships for this model; --no-prior measures it without")
    if uses_prior is None and prior is None:
        note("no prior ships for this model: measured without one")
    ways = (False, True) if uses_prior is None and prior is not None else (bool(uses_prior),)
    return [Part(name, way, bound) for name in workloads for way in ways for bound in bounds]


def _settings(twin: Engine, workload: Workload, methods: Sequence[str]) -> dict[str, Any]:
    """What decides what is computed."""
    agents = [(agent.name, agent.system, agent.prompt, repr(agent.sampling)) for agent in workload.team.agents]
    return {
        "namespace": twin.namespace(),
        "inputs": digest_of([dict(each) for each in workload.inputs]),
        "agents": agents,
        "methods": list(methods),
    }
