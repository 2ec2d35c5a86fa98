"""Earning approximation: anchors and pairs from questions of their own, answered exactly beforehand.

Every reader of such a question is measured with what is known then, and the first questions teach after that, as in
traffic; what it reads comes from what ran before it. What was learned is kept in the run's folder, so that an
interrupted run does not learn anew. Only the texts of the published estimator are not among it; they are read once more
where they are needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.tasks.answering import AnsweringTeam, publish_answer
from eval.tasks.at_once import at_once
from eval.tasks.modes import Mode
from eval.tasks.samples import Answer, Sample, SampleFile
from eval.tasks.serving import WIDTH, Advance
from eval.tasks.work import Work
from kvcomm import Engine, ReusePolicy
from kvcomm.lab.moving import anchor_bytes
from kvcomm.lab.paper import PaperEstimator

PAPER, TOKEN, ROTATE = PaperEstimator.name, "token", "rotate"
FLOAT32_BYTES = 4


@dataclass
class Lesson:
    """What an engine has to learn, and what it has learned.

    Attributes:
        estimators: that learn from questions.
        policies: at whose rungs readers are measured.
        paper_tokens: of every question, those of which the published estimator keeps KV and offsets, all edges.
    """

    estimators: set[str]
    policies: list[ReusePolicy]
    paper_tokens: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, modes: Sequence[Mode], *, is_known: bool) -> Lesson:
        """What modes need; all but the published estimator's texts may be known already."""
        estimators = {name for mode in modes for name in mode.estimators} - {ROTATE}
        policies = [mode.policy for mode in modes if mode.moves and mode.rung is None]
        policies = policies[:1]  # one that heals besides has the same rungs
        return cls(estimators & {PAPER}, []) if is_known else cls(estimators, policies)

    def read(self, engine: Engine, answer: Answer, *, teaches: bool) -> int:
        """Measure one prompt, and then let an engine learn from it; returns tokens kept by the published estimator."""
        for policy in self.policies if answer.token_ids else ():
            engine.reuse.calibrate(answer.segments, answer.token_ids, policy).result()
        kept = 0
        for name in sorted(self.estimators) if teaches else ():
            found = engine.reuse.learn(answer.segments, estimators=[name]).result()
            kept += found if name == PAPER else 0
        return kept


def teach(
    engine: Engine, work: Work, modes: Sequence[Mode], file: SampleFile, folder: Path, advance: Advance
) -> dict[str, int]:
    """Let an engine learn what modes that move text need to know. Advances by one for a question.

    Args:
        file: the exact runs to learn from; what is missing in it is answered now.
        folder: what was learned.

    Returns:
        Bytes that each estimator holds then.
    """
    is_known = folder.exists()
    if is_known:
        engine.reuse.load(folder)
    lesson = Lesson.of(modes, is_known=is_known)
    num_questions = len(work.train) if lesson.policies else work.num_anchors if lesson.estimators else 0
    advance(len(work.train) - num_questions)
    for sample in _answered(engine, work, file, num_questions):
        teaches, kept = sample.index < work.num_anchors, 0
        for place, answer in enumerate(sample.answers.values()):
            if place:  # the first agent reads nobody
                kept += lesson.read(engine, answer, teaches=teaches)
            publish_answer(engine, answer)
        if teaches:
            lesson.paper_tokens.append(kept)
        engine.cache.clear()
        advance(1)
    if lesson.policies:
        _keep(engine, folder)
    return _held_bytes(engine, lesson)


def _answered(engine: Engine, work: Work, file: SampleFile, num_questions: int) -> Iterator[Sample]:
    """The exact runs of the first questions to learn from, each on an empty cache."""
    known, team = file.by_index(), AnsweringTeam(engine, work)
    for first in range(0, num_questions, WIDTH):
        indices = range(first, min(first + WIDTH, num_questions))
        missing = [index for index in indices if index not in known]
        for sample in at_once(engine, lambda index: team.answer(index, work.train[index]), missing, WIDTH):
            file.add([sample])
            known[sample.index] = sample
        engine.cache.clear()
        for index in indices:
            yield known[index]


def _keep(engine: Engine, folder: Path) -> None:
    """Save what was learned; the folder appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        partial = Path(name) / folder.name
        engine.reuse.save(partial)
        partial.rename(folder)


def _held_bytes(engine: Engine, lesson: Lesson) -> dict[str, int]:
    """The published estimator keeps source KV and offsets in float32, of a number of texts for every edge."""
    token_bytes = engine.cache.page_bytes // engine.cache.page_size
    kv_bytes = FLOAT32_BYTES * token_bytes // engine.dtype.itemsize
    kept = sum(lesson.paper_tokens[-PaperEstimator.max_texts :])
    return {TOKEN: anchor_bytes(engine), PAPER: 2 * kv_bytes * kept, ROTATE: 0}
