"""What new users ask: five workloads, each a team and the inputs of its requests, all of them real texts.

A request is what a user asks for: a question to a team, a prompt with retrieved documents, one round of agents with
tools. Rows are those that are asked, not those that others learn from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.data_files import rows_of
from eval.firstday import tools
from eval.firstday.cutting import CountTokens, cut
from eval.firstday.data_folder import files
from eval.firstday.retrieval import Passages, passages_of
from eval.tasks.gsm8k import Gsm8k
from eval.tasks.humaneval import HumanEval
from eval.tasks.mmlu import Mmlu
from eval.tasks.rows import chosen, load_rows
from eval.tasks.task import Task
from eval.tasks.topology import wire
from kvcomm import Agent, Engine, SamplingParams
from kvcomm.agents import Team, load_team
from kvcomm.errors import InvalidRequest
from kvcomm.lab.teams import limited

MAX_PROMPT = 1200
"""Tokens of a prompt that is put together here; half of what the model may see, if that is less."""
NUM_PASSAGES, NUM_RETRIEVED = 60, 4
PASSAGE = 0.16
"""Share of the longest prompt that a passage may take."""
DOCUMENTS = ("hotpotqa", "musique")
"""Question sets with passages, the one of natural text first."""
ANSWER = SamplingParams(max_new_tokens=48)

_DOCUMENTS = "\n\n".join(f"Passage {number}:\n{{passage_{number}}}" for number in range(1, NUM_RETRIEVED + 1))
READER = Team(
    name="rag",
    description="One agent that answers questions from retrieved passages.",
    agents=(
        Agent(
            "reader",
            system="You answer questions from the passages that you are given. Passages may have nothing to do with "
            "the question; leave those aside. Answer in one sentence, and name the passage that it rests on. If the "
            "passages do not answer the question, say so.",
            prompt=f"{_DOCUMENTS}\n\nQuestion: {{question}}",
        ),
    ),
)


@dataclass(frozen=True)
class Workload:
    """One workload.

    Attributes:
        inputs: of every request, in the order in which they are made.
    """

    name: str
    team: Team
    inputs: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Wanted:
    """What a workload is made of.

    Attributes:
        data: a folder of data; None: what there is on the hub.
        seed: of the choice of rows; 0: the first ones.
        max_new_tokens: of an answer; None: the team's.
    """

    engine: Engine
    data: Path | None
    num_requests: int
    seed: int = 0
    max_new_tokens: int | None = None

    @property
    def max_prompt(self) -> int:
        """Tokens of the longest prompt that is put together here."""
        return min(MAX_PROMPT, self.engine.max_context // 2)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.engine.segment(text).token_ids)

    def folder(self, name: str) -> Path:
        """A folder of the data.

        Raises:
            InvalidRequest: there are no such data.
        """
        if self.data is None:
            raise InvalidRequest(f"the hub has none of {name}/: give --data FOLDER")
        if not (self.data / name).is_dir():
            raise InvalidRequest(f"{self.data}: no folder {name}/")
        return self.data


def make_workload(name: str, wanted: Wanted) -> Workload:
    """One of `WORKLOADS`.

    Raises:
        InvalidRequest: what it needs is not there, cannot be read or is too little; begins with its name.
    """
    try:
        made = WORKLOADS[name](wanted)
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error}") from error
    if len(made.inputs) < wanted.num_requests:
        raise InvalidRequest(
            f"{name}: there are {len(made.inputs)} requests, not {wanted.num_requests}; --requests less"
        )
    if wanted.max_new_tokens is not None:
        made = replace(made, team=limited(made.team, wanted.max_new_tokens))
    return made


def _gsm8k(wanted: Wanted) -> Workload:
    return _of_task("gsm8k", Gsm8k(), load_team("gsm8k"), wanted)


def _mmlu(wanted: Wanted) -> Workload:
    examples = load_rows(Mmlu.source, Mmlu.shots, wanted.data)
    return _of_task("mmlu", Mmlu(examples), load_team("mmlu"), wanted)


def _humaneval(wanted: Wanted) -> Workload:
    return _of_task("humaneval", HumanEval(), wire(load_team("humaneval"), 3, "full"), wanted)


def _of_task(name: str, task: Task, team: Team, wanted: Wanted) -> Workload:
    rows = task.arrange(load_rows(task.source, task.source.test, wanted.data))
    return Workload(name, team, [task.inputs(row) for row in chosen(rows, wanted.num_requests, wanted.seed)])


def _rag(wanted: Wanted) -> Workload:
    folder = wanted.folder("rag") / "rag"
    sets = [file for stem in DOCUMENTS for file in files(folder, stem, (".jsonl",))]
    if not sets:
        raise InvalidRequest(f"{folder}: no {' or '.join(f'{stem}*.jsonl' for stem in DOCUMENTS)}, plain or .gz")
    rows = rows_of(sets[0], lambda row: {"question": str(row["question"]), "ctxs": list(row["ctxs"])}, "question, ctxs")
    try:
        found = passages_of(rows, NUM_PASSAGES)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{sets[0]}: a passage needs a text ({error!r})") from error
    longest = int(PASSAGE * wanted.max_prompt)
    passages = Passages([_sentences(text, longest, wanted.count) for text in found])
    inputs = []
    for row in chosen(rows, wanted.num_requests, wanted.seed):
        best = passages.best(row["question"], NUM_RETRIEVED)
        retrieved = {f"passage_{number}": text for number, text in enumerate(best, start=1)}
        inputs.append({"question": row["question"], **retrieved})
    if len(passages.texts) < NUM_RETRIEVED:
        raise InvalidRequest(f"{sets[0]}: {len(passages.texts)} passages are too few, {NUM_RETRIEVED} are needed")
    return Workload("rag", limited(READER, ANSWER.max_new_tokens), inputs)


def _sentences(text: str, max_tokens: int, count: CountTokens) -> str:
    return cut(text, max_tokens, count, breaks=(". ", " "))


def _tools(wanted: Wanted) -> Workload:
    folder = wanted.folder("agents")
    inputs = tools.inputs(folder, wanted.max_prompt, wanted.count, wanted.num_requests, wanted.seed)
    return Workload("tools", limited(tools.TEAM, ANSWER.max_new_tokens), inputs)


WORKLOADS: Mapping[str, Callable[[Wanted], Workload]] = {
    "gsm8k": _gsm8k,
    "mmlu": _mmlu,
    "humaneval": _humaneval,
    "rag": _rag,
    "tools": _tools,
}
