"""Times: some of the questions once more, alone on the machine, one request at a time, answers in full.

Every mode gives as many tokens as the dense answer has, so that times compare. What is timed is what a caller waits
for: from asking to the first token and to the last. Roles are cached and sources are there, as in a team at work; a
round that is not kept comes first, and modes take turns question by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.baselines.stock import StockServer
from eval.tasks.along import ask_along
from eval.tasks.answering import publish_answer
from eval.tasks.modes import DENSE, Mode
from eval.tasks.records import RecordFile
from eval.tasks.samples import Answer, Sample
from eval.tasks.serving import Advance, Samples, read_roles
from eval.tasks.work import Work
from kvcomm import Engine, SamplingParams

WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Timed:
    """One request.

    Attributes:
        index, mode, agent: what was asked.
        prompt, generated: tokens.
        ttft_s, total_s: seconds from asking to the first token, to the last one.
        kv_bytes: of KV in use while it ran, cached and shared KV included.
    """

    index: int
    mode: str
    agent: str
    prompt: int
    generated: int
    ttft_s: float
    total_s: float
    kv_bytes: int


class TimesFile(RecordFile[Timed]):
    """All timed requests."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, lambda value: Timed(**value))


@dataclass(frozen=True)
class Servers:
    """Who serves: an engine without a cache, one with, and transformers by mode."""

    cold: Engine
    engine: Engine
    stock: Mapping[str, StockServer]


def time_modes(
    servers: Servers, work: Work, modes: Sequence[Mode], questions: Samples, file: TimesFile, advance: Advance
) -> None:
    """Time questions in every mode; continues where the file ends. Advances by one for a question in one mode."""
    done = {(each.index, each.mode) for each in file.read()}
    warm: set[str] = set()
    for index, truth in questions.items():
        for mode in modes:
            if (index, mode.name) not in done:
                if mode.name not in warm:
                    _time_team(servers, work, mode, truth, limit=WARM_UP_TOKENS)
                    warm.add(mode.name)
                file.add(_time_team(servers, work, mode, truth))
            advance(1)


def _time_team(servers: Servers, work: Work, mode: Mode, truth: Sample, limit: int | None = None) -> list[Timed]:
    servers.engine.cache.clear()
    if not mode.is_stock and mode.name != DENSE:
        read_roles(servers.engine, (answer.segments[0] for answer in truth.answers.values()))
    found = []
    for name, whole in truth.answers.items():
        num_tokens = max(1, len(whole.token_ids) if limit is None else min(limit, len(whole.token_ids)))
        if mode.is_stock:
            timed = _ask_stock(servers.stock[mode.name], whole, num_tokens)
        else:
            engine = servers.cold if mode.name == DENSE else servers.engine
            timed = _ask(engine, mode, whole, num_tokens, list(truth.answers))
        found.append(Timed(truth.index, mode.name, name, **timed))
        if mode.moves and name != work.referee:
            publish_answer(servers.engine, whole)
    servers.engine.cache.clear()
    return found


def _ask(engine: Engine, mode: Mode, whole: Answer, num_tokens: int, agents: Sequence[str]) -> dict[str, Any]:
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    if mode.reads_along:
        handle = ask_along(engine, whole.segments, sampling, agents)
    else:
        handle = engine.submit(whole.segments, sampling, policy=mode.policy, rung=mode.rung)
    held = 0
    for _ in handle:
        if not held:  # at the first token; the pages of the whole answer are taken by then
            stats = engine.cache.stats()
            held = (stats.num_pages - stats.num_free) * stats.page_bytes
    usage = handle.result().usage
    return {
        "prompt": usage.prompt_tokens,
        "generated": usage.generated_tokens,
        "ttft_s": usage.ttft_s,
        "total_s": usage.total_s,
        "kv_bytes": held,
    }


def _ask_stock(server: StockServer, whole: Answer, num_tokens: int) -> dict[str, Any]:
    served = server.answer(whole.segments, num_tokens, ignore_eos=True)
    return {
        "prompt": sum(len(token_ids) for token_ids, _ in whole.prompt),
        "generated": len(served.token_ids),
        "ttft_s": served.ttft_s,
        "total_s": served.total_s,
        "kv_bytes": served.kv_bytes,
    }
