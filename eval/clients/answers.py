"""What the engine's grammars are worth over HTTP: answers that validate; and what they cost, step by step."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any, NamedTuple

from eval.clients.schemas import SCHEMAS, error_of
from eval.command import note
from kvcomm import Engine, SamplingParams

TOPICS = ("a city", "a book", "an animal", "a recipe", "a train journey")
NUM_AT_ONCE = 4
MAX_TOKENS = 400
MAX_TRIES = 5
"""A schema may allow endless answers, and a model that draws at a temperature of 1 may write one: it is cut at
MAX_TOKENS, says so (`finish_reason: length`), and is asked for again with another seed."""

NUM_STEPS = 48
ENDLESS = {"type": "string", "minLength": 4000}
"""Every token of it is drawn: nothing is forced."""


class Answer(NamedTuple):
    """One answer to a schema; `error`: why it does not validate; `num_cut`: how many before it were cut off."""

    schema: str
    text: str
    error: str | None
    num_cut: int


def ask_all(port: int, model: str, num_answers: int, seed: int) -> list[Answer]:
    """Answers to all schemas in turn, drawn at a temperature of 1, each with a topic and a seed of its own.

    The last try counts as it is, also where it is cut off.
    """
    asked = [(list(SCHEMAS)[at % len(SCHEMAS)], at // len(SCHEMAS)) for at in range(num_answers)]

    def ask(each: tuple[str, int]) -> Answer:
        name, turn = each
        format_ = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMAS[name], "strict": True}}
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"Describe {TOPICS[turn % len(TOPICS)]} in JSON."}],
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "response_format": format_,
        }
        for num_cut in range(MAX_TRIES):
            text, is_cut = _answer(port, {**body, "seed": seed + turn + num_cut * len(asked)})
            if not is_cut:
                break
        return Answer(name, text, error_of(SCHEMAS[name], text), num_cut)

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        return list(_noted(pool.map(ask, asked), len(asked)))


def _noted(answers: Iterator[Answer], num_answers: int) -> Iterator[Answer]:
    for at, answer in enumerate(answers, 1):
        if answer.error is not None:
            note(f"{answer.schema}: {answer.error}; the answer: {answer.text[:200]!r}")
        if at % 40 == 0:
            note(f"schema answer {at} of {num_answers}")
        yield answer


def _answer(port: int, body: dict[str, Any]) -> tuple[str, bool]:
    """The text of an answer, or of the error in its place; whether it was cut off."""
    connection = HTTPConnection("127.0.0.1", port)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        return f"{response.status}: {answer['error']['message']}", False
    choice = answer["choices"][0]
    return str(choice["message"]["content"]), choice["finish_reason"] == "length"


def overheads(engine: Engine, prompt: Sequence[int], options: Namespace) -> list[float]:
    """For each repeat, the time of masked steps over that of plain ones, each pair in turns; the engine guesses not."""
    from kvcomm import Grammar

    plain = SamplingParams(max_new_tokens=NUM_STEPS, ignore_eos=True)
    masked = SamplingParams(max_new_tokens=NUM_STEPS, grammar=Grammar.json_schema(ENDLESS))

    def step_s(sampling: SamplingParams) -> float:
        usage = engine.submit(prompt, sampling).result().usage
        return (usage.total_s - usage.ttft_s) / (usage.generated_tokens - 1)

    for sampling in (plain, masked):
        step_s(sampling)
    orders: list[Callable[[Any], Any]] = [list, reversed]
    ratios = []
    for at in range(options.repeats):
        times = {each is masked: step_s(each) for each in orders[at % 2]([plain, masked])}
        ratios.append(times[True] / times[False])
    return ratios
