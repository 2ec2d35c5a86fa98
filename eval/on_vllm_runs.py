"""The runs behind `eval.on_vllm`: one vLLM in this process, with kvcomm, and kvcomm's own engine beside it."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from eval.command import note
from eval.on_vllm_witness import Witness
from kvcomm import Engine, ReusePolicy, SamplingParams, Segment
from kvcomm.config import EngineConfig
from kvcomm.errors import MissingExtra

BOUND = (0.05, 0.9)
POOL_TOKENS = 16384
DOCUMENT_TOKENS = 790
LAPS_TO_MOVE = 3
"""Of plain requests, text is moved between those of every so many."""
NUM_NEW = 32

SYSTEMS = {
    "reader": "You read documents and answer in one sentence.",
    "critic": "You are a careful critic. You weigh what is said against what is known, and you never repeat yourself. "
    "You name the place where you found something.",
    "planner": "You plan. You say in three short steps how a question is to be answered.",
    "solver": "You solve what is asked, step by step.",
    "checker": "You check calculations and say whether they are right.",
    "editor": "You write the final answer in one sentence.",
}
QUESTIONS = (
    "Anna has 12 apples and gives a third of them to Ben, who already has 5. How many apples does Ben have now?",
    "A train leaves at nine and travels 240 km at 80 km per hour. When does it arrive?",
    "A shirt costs 40 euros and is sold for a quarter less. What do two of them cost?",
    "Seven boxes hold 12 pencils each, and 9 pencils are lost. How many are left?",
)

Part = tuple[str | None, tuple[int, ...]]
"""The slot of a text, None for the template's own, and its tokens."""


class Cost(NamedTuple):
    """One first token."""

    cpu_s: float
    wall_s: float
    num_tokens: int = 0
    num_moved: int = 0


class Answer(NamedTuple):
    """What vLLM gave, and what kvcomm told about the prompt."""

    token_ids: tuple[int, ...]
    cost: Cost
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A prompt in parts."""

    parts: tuple[Part, ...]

    @property
    def token_ids(self) -> list[int]:
        return [token for _, tokens in self.parts for token in tokens]

    @property
    def segments(self) -> list[Segment]:
        return [Segment(tokens, slot) for slot, tokens in self.parts]

    def params(
        self, *, audit: float = 0.0, answer: str | None = None, learn: bool = True, tenant: str | None = None
    ) -> dict[str, Any]:
        """As `kv_transfer_params` have it.

        Args:
            tenant: for whom nothing was moved before; what was is computed when it comes back.
        """
        spans, at = [], 0
        for slot, tokens in self.parts:
            more = {} if slot is None else {"slot": slot, "kind": "dynamic"}
            spans.append({"start": at, "end": at + len(tokens), **more})
            at += len(tokens)
        reuse = {"max_divergence": BOUND[0], "confidence": BOUND[1], "audit": audit, "learn": learn}
        named = {"answer": answer, "tenant": tenant}
        return {"segments": spans, "reuse": reuse} | {key: name for key, name in named.items() if name is not None}


class Bench:
    """vLLM with kvcomm over a tier in a folder.

    Attributes:
        version: of vLLM.
        difference: largest, of kvcomm's KV and vLLM's, as measured at start.
    """

    def __init__(self, model: str, folder: Path) -> None:
        """Starts vLLM; takes a minute or more.

        Raises:
            MissingExtra: there is no vLLM here.
        """
        try:
            import vllm
            from vllm.config import KVTransferConfig
        except ImportError as error:
            raise MissingExtra(
                f"vLLM cannot be imported here ({error}): scripts/setup-env --integration vllm makes an environment "
                "that has it, and --python names its interpreter"
            ) from error
        from kvcomm.integrations.vllm import inside, version
        from kvcomm.lab.models import fetch_model

        self._sampling = vllm.SamplingParams
        self.version = version()
        self._model = model
        path = model if Path(model).exists() else str(fetch_model(model))
        note("starting vLLM")
        self._llm = vllm.LLM(
            model=path,
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            worker_cls="kvcomm.integrations.vllm.worker.KVCommWorker",
            kv_transfer_config=KVTransferConfig(
                kv_connector="KVCommConnector",
                kv_role="kv_both",
                kv_connector_module_path="kvcomm.integrations.vllm.connector",
                kv_connector_extra_config={"tier": str(folder), "pool_tokens": POOL_TOKENS},
            ),
        )
        self._inside = inside(self._llm)
        preparations = self._inside.worker.preparations
        if preparations is None or preparations.engine is None:
            raise MissingExtra(f"kvcomm moves nothing in vLLM {self.version}; its log says why")
        self._preparations = preparations
        self._engine: Engine = preparations.engine
        self.difference = self._inside.worker.difference
        tokenizer = self._llm.get_tokenizer()
        self._encode = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        self._text = _own_documents(self._encode)

    # What is asked.

    def _document(self, num_tokens: int = DOCUMENT_TOKENS) -> tuple[int, ...]:
        """The next tokens of the documents; each is given once until there are no more."""
        return tuple(next(self._text) for _ in range(num_tokens))

    def _about(self, system: str, parts: Sequence[Part], question: str) -> Asked:
        begin = self._encode(f"<|im_start|>system\n{SYSTEMS[system]}<|im_end|>\n<|im_start|>user\nRead this: ")
        end = self._encode(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
        return Asked(((None, begin), *parts, (None, end)))

    def _ask(
        self, asked: Asked, params: Mapping[str, Any] | None = None, num_new: int = 1, salt: str | None = None
    ) -> Answer:
        extra = None if params is None else {"kv_transfer_params": {"kvcomm": dict(params)}}
        sampling = self._sampling(temperature=0, max_tokens=num_new, ignore_eos=True, extra_args=extra)
        prompt: dict[str, Any] = {"prompt_token_ids": asked.token_ids}
        if salt is not None:
            prompt["cache_salt"] = salt
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        (output,) = self._llm.generate([prompt], sampling, use_tqdm=False)
        cost = Cost(time.process_time() - cpu_s, time.perf_counter() - wall_s, len(asked.token_ids))
        told = (output.kv_transfer_params or {}).get("kvcomm", {})
        return Answer(tuple(output.outputs[0].token_ids), cost._replace(num_moved=told.get("aligned_tokens", 0)), told)

    def _settle(self) -> None:
        """Nothing is saved or learned any more."""
        self._inside.drain()
        self._engine.wait_idle()
        self._preparations.shelf.tier.queue.flush()

    # What is measured.

    def first_tokens(self, repeats: int) -> list[dict[str, Cost]]:
        """Costs of the first token by kind, `repeats` times, each about a document of its own."""
        costs: list[dict[str, Cost]] = []
        for index in range(repeats + 1):  # the first one warms up
            note(f"first tokens: {index} of {repeats}")
            document = self._document()
            plain = self._about("reader", [("document", document)], "What is it about?")
            moved = self._about("critic", [("document", document)], "Say in one sentence what is wrong with it.")
            cold = self._ask(plain, salt=uuid.uuid4().hex)
            self._ask(plain)
            self._settle()
            hit = self._ask(plain)
            self._settle()
            self._llm.reset_prefix_cache()
            tier = self._ask(plain)
            self._ask(plain, plain.params(learn=False))
            self._settle()
            reused = self._ask(moved, moved.params(learn=False))
            self._settle()
            kinds = {"cold": cold.cost, "hit": hit.cost, "tier": tier.cost, "moved": reused.cost}
            note(", ".join(f"{name} {cost.cpu_s:.2f} s" for name, cost in kinds.items()))
            if index:
                costs.append(kinds)
        return costs

    def isolation(self, num_plain: int) -> tuple[int, int, int]:
        """Plain requests between approximate ones to the same prompts: how many, how many changed, of the others."""
        asked: list[Asked] = []
        for _ in range(10):
            document = self._document(300)
            parts: list[Part] = [("document", document)]
            asked += [
                self._about(each, parts, "Which place is the most important one?") for each in ("reader", "critic")
            ]
        truth = [self._ask(each, num_new=4, salt=uuid.uuid4().hex).token_ids for each in asked]
        self._llm.reset_prefix_cache()
        num_asked = num_tainted = num_approximate = 0
        for lap in range(-(-num_plain // len(asked))):
            for each, expected in zip(asked, truth, strict=True):
                if lap % LAPS_TO_MOVE == 0:
                    params = each.params(learn=False, tenant=f"lap-{lap}")
                    num_approximate += self._ask(each, params, num_new=4).cost.num_moved > 0
                num_tainted += self._ask(each, num_new=4).token_ids != expected
                num_asked += 1
            note(f"plain requests: {num_asked} of {num_plain}")
        self._settle()
        return num_asked, num_tainted, num_approximate

    def storms(self, num_storms: int) -> tuple[int, int, int, int]:
        """Batches that are preempted, aborted and robbed.

        Returns:
            Answers that came, those for which text was moved, wrong ones, blocks that were kept.
        """
        documents = [self._document(200) for _ in range(4)]
        truth = {
            name: self._ask(each, params, num_new=12)
            for name, (each, params) in self._storm_of(documents, "truth").items()
        }
        self._settle()
        num_free, num_answers, num_moved, num_wrong = self._inside.num_free_blocks(), 0, 0, 0
        for seed in range(num_storms):
            note(f"storm {seed + 1} of {num_storms}")
            asked = self._storm_of(documents, f"storm-{seed}")
            self._settle()
            answers = self._storm(asked, random.Random(seed), robs=seed % 2 == 1)
            num_answers += len(answers)
            for name, (token_ids, is_moved) in answers.items():
                num_moved += is_moved
                moved, exact = truth[name], truth[name.replace("moved", "plain")]
                if token_ids in (moved.token_ids, exact.token_ids):
                    continue
                document = documents[int(name.split("-")[1])]
                if name.startswith("plain") or not self._may_switch(document, token_ids, moved, exact):
                    num_wrong += 1
                    note(f"storm {seed + 1}: {name} answered {token_ids}, not {moved.token_ids}, {exact.token_ids}")
            self._settle()
        held = self._inside.connector.ledger.num_requests + self._preparations.num_held
        self._engine.check_integrity()
        return num_answers, num_moved, num_wrong, num_free - self._inside.num_free_blocks() + held

    def _may_switch(self, document: tuple[int, ...], disturbed: tuple[int, ...], moved: Answer, exact: Answer) -> bool:
        """Whether each token of a disturbed answer follows on moved or on exact KV, says kvcomm's own engine.

        It is believed only if it moves as vLLM was told and gives both undisturbed answers itself.
        """
        read, asked = self._storm_prompts(document)
        config = EngineConfig(pool_tokens=POOL_TOKENS)
        policy = ReusePolicy(*BOUND, learn=False, audit=0.0)
        with (
            Engine.load(self._model, dtype="float32", device="cpu", config=config) as own,
            closing(Witness(own, read.segments, asked.segments, policy)) as witness,
        ):
            same_plan = witness.plan == (moved.told.get("aligned_tokens"), moved.told.get("rung"))
            found = [witness.on_moved(moved.token_ids), witness.on_exact(exact.token_ids), witness.on_any(disturbed)]
            note(f"a switched answer: same plan: {same_plan}; first wrong tokens of moved, exact, switched: {found}")
            return same_plan and found == [None, None, None]

    def _storm_of(
        self, documents: Sequence[tuple[int, ...]], tenant: str
    ) -> dict[str, tuple[Asked, dict[str, Any] | None]]:
        """Prompts that move what a reader of this tenant has just read, and the same ones without."""
        asked: dict[str, tuple[Asked, dict[str, Any] | None]] = {}
        for index, document in enumerate(documents):
            read, each = self._storm_prompts(document)
            self._ask(read, read.params(learn=False, tenant=tenant))
            asked[f"plain-{index}"] = (each, None)
            asked[f"moved-{index}"] = (each, each.params(learn=False, tenant=tenant))
        return asked

    def _storm_prompts(self, document: tuple[int, ...]) -> tuple[Asked, Asked]:
        """What is read first, and what its text is moved into."""
        parts: list[Part] = [("document", document)]
        return (
            self._about("reader", parts, "What is it about?"),
            self._about("critic", parts, "What is wrong with it?"),
        )

    def _storm(
        self, asked: Mapping[str, tuple[Asked, dict[str, Any] | None]], dice: random.Random, *, robs: bool
    ) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Each answer that came, and whether text was moved for it."""
        engine, answers, aborted = self._llm.llm_engine, {}, set()
        self._llm.reset_prefix_cache()
        for name, (each, params) in asked.items():
            extra = None if params is None else {"kv_transfer_params": {"kvcomm": params}}
            sampling = self._sampling(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)
            engine.add_request(name, {"prompt_token_ids": each.token_ids}, sampling)
        load = self._preparations.load
        if robs:
            self._preparations.load = lambda job: dice.random() < 0.5 and load(job)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished and output.request_id not in aborted:
                        told = (output.kv_transfer_params or {}).get("kvcomm", {})
                        is_moved = told.get("aligned_tokens", 0) > 0
                        answers[output.request_id] = tuple(output.outputs[0].token_ids), is_moved
                if dice.random() < 0.15:
                    with suppress(RuntimeError):  # all are preempted, but blocks that are being saved stay
                        engine.reset_prefix_cache(reset_running_requests=True)
                living = sorted(asked.keys() - answers.keys() - aborted)
                if living and dice.random() < 0.05:
                    aborted.add(chosen := dice.choice(living))
                    engine.abort_request([chosen])
        finally:
            self._preparations.load = load
        return answers

    def same(self, num_rag: int, num_teams: int, *, learns: bool) -> tuple[float, float, int, int, int, float]:
        """Shares of equal answers (of those with equal plans) and equal plans; moved requests; audits, violations."""
        config = EngineConfig(pool_tokens=POOL_TOKENS)
        note("loading kvcomm's own engine")
        with Engine.load(self._model, dtype="float32", device="cpu", config=config) as own:
            pairs = [
                *self._rag(own, num_rag, learns=learns),
                *self._teams(own, num_teams, learns=learns),
            ]
        equal = [first == second for first, second, is_same_plan, _ in pairs if is_same_plan]
        statuses = self._engine.reuse.status(policy=ReusePolicy(*BOUND))
        return (
            sum(equal) / len(equal) if equal else 0.0,
            len(equal) / len(pairs),
            sum(moved for *_, moved in pairs),
            sum(status.num_audits for status in statuses),
            sum(status.num_violations for status in statuses),
            1 - BOUND[1],
        )

    def _rag(self, own: Engine, num: int, *, learns: bool) -> list[tuple[tuple[int, ...], tuple[int, ...], bool, bool]]:
        pairs = []
        for index in range(num):
            note(f"documents: {index + 1} of {num}")
            documents = [self._document(250) for _ in range(2)]
            for document in documents:
                read = self._about("reader", [("document", document)], "What is it about?")
                pairs.append(self._both(own, read, learns=learns)[0])
            parts: list[Part] = [("document", documents[1]), (None, self._encode("\nAnd this: "))]
            asked = self._about("critic", [*parts, ("document", documents[0])], "What do both have in common?")
            pairs.append(self._both(own, asked, learns=learns)[0])
        return pairs

    def _teams(
        self, own: Engine, num: int, *, learns: bool
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], bool, bool]]:
        pairs = []
        for index in range(num):
            note(f"teams: {index + 1} of {num}")
            question = self._encode(QUESTIONS[index % len(QUESTIONS)])
            said: list[Part] = [("question", question)]
            for agent in ("planner", "solver", "checker", "critic", "editor"):
                asked = self._about(agent, said, "What do you say?")
                pair, answer = self._both(own, asked, learns=learns)
                pairs.append(pair)
                said += [(None, self._encode(f"\nThe {agent} said: ")), (agent, answer)]
        return pairs

    def _both(
        self, own: Engine, asked: Asked, *, learns: bool
    ) -> tuple[tuple[tuple[int, ...], tuple[int, ...], bool, bool], tuple[int, ...]]:
        """Both answers, whether their plans were the same and moved anything; and the answer that is passed on."""
        params = asked.params(audit=1.0 if learns else 0.0, answer="answer", learn=learns)
        theirs = self._ask(asked, params, num_new=NUM_NEW)
        self._settle()
        policy = ReusePolicy(*BOUND, audit=1.0 if learns else 0.0)
        policy = replace(policy, learn=learns)
        with own.empty_context(policy=policy) as context:
            usage = context.submit(SamplingParams(max_new_tokens=0), prompt=asked.segments).result().usage
            with context.fork() as fork:
                answer = fork.generate(max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
            context.extend([Segment(answer, "answer")])
        own.wait_idle()
        rung = None if usage.approximation is None else usage.approximation.rung
        is_same = (usage.aligned_tokens, rung) == (theirs.told.get("aligned_tokens"), theirs.told.get("rung"))
        return (answer, theirs.token_ids, is_same, usage.aligned_tokens > 0), answer


def _own_documents(encode: Any) -> Any:
    """Tokens of this project's documentation, over and over."""
    files = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    assert files, "there is no documentation beside this file"
    while True:
        for file in files:
            yield from encode(file.read_text(encoding="utf-8"))
