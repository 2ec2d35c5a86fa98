"""`python -m eval.firstday`: what is counted as movable, figures from records, audits, workloads, and going on."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.firstday import __main__ as command
from eval.firstday.auditing import divergence
from eval.firstday.cutting import cut, pieces
from eval.firstday.figures import figures_of, first_moved, moved_share
from eval.firstday.movable import Movable, movable_of
from eval.firstday.records import Call, Part, Served, ServedFile
from eval.firstday.retrieval import Passages, passages_of
from eval.firstday.serving import Kept, Server, Twin, waves_of
from eval.firstday.workloads import Wanted, make_workload
from kvcomm import Agent, Engine, EngineConfig, KVCommAgentGroup, ReusePolicy, Usage
from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair, Sources
from kvcomm.align.ladder import TURNED
from kvcomm.align.prior import Prior, write_prior
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.reuse.plan import Reason, Span, SpanKind
from tests.tiny import TinyModel, save_tiny_model

BOUND = Bound(0.05, 0.1)


# ---- what is movable ----


def prompt_of(*sizes: tuple[str | None, int]) -> list[Segment]:
    """Segments of different tokens, so that no two texts are the same."""
    found, token = [], 10
    for name, size in sizes:
        found.append(Segment(tuple(range(token, token + size)), name))
        token += size
    return found


def test_movable_tokens_are_counted_by_hand() -> None:
    """Role 10, question 8 (exact up to 14), template 2, old text 20 (rung takes 5), template 3, new text 7, tail 4.

    Of the question 4 known tokens are computed, of the old text 15 are moved and 5 are not, the new text is new.
    """
    prompt = prompt_of((None, 10), ("question", 8), (None, 2), ("old", 20), (None, 3), ("new", 7), (None, 4))
    spans = [
        Span(SpanKind.EXACT, 0, 14),
        Span(SpanKind.COMPUTE, 14, 20, Reason.GLUE),
        Span(SpanKind.ALIGNED, 20, 32),
        Span(SpanKind.COMPUTE, 32, 37, Reason.RUNG),
        Span(SpanKind.ALIGNED, 37, 40),
        Span(SpanKind.COMPUTE, 40, 43, Reason.GLUE),
        Span(SpanKind.COMPUTE, 43, 50, Reason.NO_SOURCE),
        Span(SpanKind.COMPUTE, 50, 54, Reason.GLUE),
    ]
    known = frozenset({prompt[1].token_ids, prompt[3].token_ids})
    assert movable_of(prompt, spans, known) == Movable(num_movable=24, num_moved=15)


@pytest.mark.parametrize(
    "reason",
    [
        Reason.UNCALIBRATED,
        Reason.BOUND,
        Reason.BREAKER,
        Reason.OUT_OF_DISTRIBUTION,
        Reason.SOURCE_RISK,
        Reason.COST,
        Reason.ESCALATED,
    ],
)
def test_a_whole_prompt_that_is_refused_counts_as_far_as_its_texts_were_known(reason: Reason) -> None:
    """One reason for all of it, template text and new text included: only the 9 known tokens could have been moved."""
    prompt = prompt_of((None, 5), ("old", 9), (None, 2), ("new", 6), (None, 3))
    spans = [Span(SpanKind.EXACT, 0, 5), Span(SpanKind.COMPUTE, 5, 25, reason)]
    assert movable_of(prompt, spans, frozenset({prompt[1].token_ids})) == Movable(9, 0)
    assert movable_of(prompt, spans, frozenset()) == Movable(0, 0)


def test_the_rest_of_a_known_text_that_the_exact_prefix_reaches_into_is_movable() -> None:
    """Two tools begin alike: 4 of 9 tokens are exact, the other 5 could be moved, whatever reason stands there."""
    prompt = prompt_of((None, 5), ("old", 9), (None, 2))
    spans = [Span(SpanKind.EXACT, 0, 9), Span(SpanKind.COMPUTE, 9, 16, Reason.NEW)]
    assert movable_of(prompt, spans, frozenset({prompt[1].token_ids})) == Movable(5, 0)
    assert movable_of(prompt, spans, frozenset()) == Movable(0, 0)


def test_text_in_the_exact_prefix_is_not_movable() -> None:
    prompt = prompt_of((None, 5), ("old", 9), (None, 2))
    spans = [Span(SpanKind.EXACT, 0, 15), Span(SpanKind.COMPUTE, 15, 16, Reason.LAST_TOKEN)]
    assert movable_of(prompt, spans, frozenset({prompt[1].token_ids})) == Movable(0, 0)


def test_known_text_of_which_no_rendition_is_left_is_not_movable() -> None:
    prompt = prompt_of((None, 5), ("old", 9), (None, 2))
    spans = [Span(SpanKind.EXACT, 0, 5), Span(SpanKind.COMPUTE, 5, 16, Reason.NO_SOURCE)]
    assert movable_of(prompt, spans, frozenset({prompt[1].token_ids})) == Movable(0, 0)


def test_text_that_became_known_while_the_request_waited_counts_where_it_was_moved() -> None:
    prompt = prompt_of((None, 5), ("old", 9), (None, 2))
    spans = [
        Span(SpanKind.EXACT, 0, 5),
        Span(SpanKind.ALIGNED, 5, 12),
        Span(SpanKind.COMPUTE, 12, 14, Reason.RUNG),
        Span(SpanKind.COMPUTE, 14, 16, Reason.GLUE),
    ]
    assert movable_of(prompt, spans, frozenset()) == Movable(9, 7)


# ---- figures ----


def call(**values: object) -> Call:
    plain = Call("a", 100, 20, 0, 80, 0, 0, {}, ttft_s=1.0, exact_ttft_s=1.0)
    return replace(plain, **values)  # type: ignore[arg-type]


def moving(movable: int, moved: int, level: str, nats: float, **values: object) -> Call:
    return call(aligned=moved, movable=movable, moved=moved, level=level, divergence=nats, **values)


def values_of(requests: list[Served], *, uses_prior: bool = False) -> dict[str, float]:
    return {figure.id: figure.value for figure in figures_of({Part("gsm8k", uses_prior, BOUND): requests})}


def test_first_request_that_moves() -> None:
    still = Served(1, 1.0, 0.0, (call(movable=50),))
    second = Served(2, 1.0, 0.0, (call(), moving(50, 30, "prior", 0.0)))
    assert first_moved([still, second]) == 2
    assert first_moved([still]) == 2  # never: one more than there are


def test_shares_are_taken_over_tokens_of_the_requests_in_question() -> None:
    requests = [Served(number, 1.0, 0.0, (moving(100, number, "own", 0.0),)) for number in range(1, 41)]
    early = moved_share(requests, (3, 12))
    assert early is not None
    assert early.value == pytest.approx(sum(range(3, 13)) / 1000)
    assert early.spread == (pytest.approx(0.0525), pytest.approx(0.0975))
    assert values_of(requests)["moved_21_40"] == pytest.approx(sum(range(21, 41)) / 2000)
    assert moved_share(requests[:2], (3, 12)) is None
    assert moved_share([Served(5, 1.0, 0.0, (call(),))], (3, 12)) is None  # nothing could have been moved


def test_violations_by_level() -> None:
    """Of 4 calls at the prior 1 is over 0.05 nats, exactly 0.05 is not; one exact answer was empty and is left out."""
    calls = [moving(10, 5, "prior", nats) for nats in (0.0, 0.05, 0.0501, 0.01)] + [moving(10, 5, "own", 0.0)] * 9
    empty = replace(moving(10, 5, "own", 0.0), divergence=None)
    figures = {f.id: f for f in figures_of({Part("rag", True, BOUND): [Served(1, 1.0, 0.0, (*calls, empty, call()))]})}
    assert figures["violations_prior"].value == 0.25
    assert figures["approximate_prior"].value == 4
    assert figures["violations_prior"].goal == f"<= {0.1 + 2 * math.sqrt(0.1 * 0.9 / 4):.3g}"
    assert figures["violations_own"].value == 0
    assert figures["approximate_own"].value == 9
    assert "violations_pool" not in figures


def test_bounds_of_unlike_confidence_are_not_mixed() -> None:
    one = [Served(1, 1.0, 0.0, (moving(10, 5, "own", 0.07),))]
    parts = {Part("rag", False, BOUND): one, Part("rag", False, Bound(0.1, 0.05)): one}
    values = {figure.id: figure.value for figure in figures_of(parts)}
    assert values["violations_own at 0.9"] == 1
    assert values["violations_own at 0.95"] == 0
    same = {Part("rag", False, BOUND): one, Part("rag", False, Bound(0.1, 0.1)): one}
    assert {figure.id: figure.value for figure in figures_of(same)}["violations_own"] == 0.5
    assert values["rag no-prior 0.05,0.9 first_moved"] == 1


def test_first_tokens_and_learning() -> None:
    slow = [Served(number, 10.0, 1.0, (call(ttft_s=5.0),)) for number in range(1, 21)]
    quick = [
        Served(number, 10.0, 0.5, (call(ttft_s=1.0, exact_ttft_s=2.0), call(ttft_s=1.0, exact_ttft_s=4.0)))
        for number in range(21, 41)
    ]
    values = values_of([*slow, *quick])
    assert values["ttft_gain"] == pytest.approx(3.0)
    assert values["learning_share"] == pytest.approx(30 / 400)
    assert values["calls"] == 60
    assert values["requests"] == 40


def test_methods_are_held_against_what_was_served_in_their_place() -> None:
    both = moving(10, 5, "own", 0.01, methods={"epic": 0.05, "paper": 0.5})
    one = moving(10, 5, "own", 0.03, methods={"epic": 0.07})
    values = values_of([Served(1, 1.0, 0.0, (both, one, call()))])
    assert values["nats_epic"] == pytest.approx(0.06)
    assert values["nats_ours_beside_epic"] == pytest.approx(0.02)
    assert values["nats_paper"] == pytest.approx(0.5)
    assert values["nats_ours_beside_paper"] == pytest.approx(0.01)
    assert values["compared_epic"] == 2


def test_methods_compute_as_much_of_what_is_moved_as_was_computed_here() -> None:
    """Of 20 moved tokens 5: what was not moved at all is in the prompts of the methods no moved text either."""
    made = call(aligned=15, reasons={"rung": 3, "escalated": 2, "displaced": 40, "new": 7})
    assert made.recomputed_share == 0.25
    assert call(reasons={"new": 7}).recomputed_share == 0


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    file = ServedFile(tmp_path / "part.jsonl")
    served = Served(1, 2.5, 0.25, (call(reasons={"new": 80}), moving(10, 5, "own", 0.01, methods={"epic": 0.5})))
    file.add([served])
    assert file.read() == [served]


def test_a_part_with_other_settings_is_kept_elsewhere(tmp_path: Path) -> None:
    part = Part("rag", True, BOUND)
    one, same, other = (part.file(tmp_path, {"inputs": text}).file for text in ("x", "x", "y"))
    assert one == same
    assert one != other


# ---- audits ----


def test_divergence_is_that_of_the_stock_forward(tiny: TinyModel) -> None:
    """Context KV with noise in it, against two stock forwards without the engine: one on exact, one on noisy KV."""
    prompt, answer = [20, 31, 42, 53, 64, 75], [86, 97, 108]
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=256)) as engine:
        exact = engine.context([Segment(tuple(prompt))])
        cache = exact.to_hf_cache(whole=True)
        generator = torch.Generator().manual_seed(1)
        for layer in cache.layers:
            layer.keys += 0.3 * torch.randn(layer.keys.shape, generator=generator)
        served = engine.context_from_hf_cache(cache, [Segment(tuple(prompt))])
        got = divergence(engine.model, served, exact, len(prompt), answer)
        assert divergence(engine.model, exact, exact, len(prompt), answer) == pytest.approx(0.0, abs=1e-9)
        noisy = served.to_hf_cache(whole=True)
        served.release()
        exact.release()
    noisy.crop(-1)
    with torch.no_grad():
        whole = tiny.model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
        behind = tiny.model(torch.tensor([[prompt[-1], *answer[:-1]]]), past_key_values=noisy).logits[0]
    p, q = whole.double().softmax(-1), behind.double().softmax(-1)
    wanted = float((p * (p.log() - q.log())).sum(-1).mean())
    assert wanted > 1e-3
    assert got == pytest.approx(wanted, rel=1e-3)


def test_agents_that_are_ready_together_are_one_wave(tiny: TinyModel) -> None:
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=256)) as engine:
        group = KVCommAgentGroup(engine)
        for name, prompt in (("d", "{b} {c}"), ("a", "{q}"), ("b", "{a}"), ("c", "{q}")):
            group.add(Agent(name, prompt=prompt))
        assert waves_of(group) == [["a", "c"], ["b"], ["d"]]


# ---- texts ----


def words(text: str) -> int:
    return len(text.split())


def test_texts_are_cut_at_paragraphs_then_lines_then_words() -> None:
    assert cut("a b\n\nc d\n\ne", 4, words) == "a b\n\nc d"
    assert cut("a b c\nd e\n\nf", 4, words) == "a b c"
    assert cut("a b c d e", 2, words) == "a b"
    assert list(pieces("a b\n\nc\n\nd e f g h\n\ni", 3, words)) == ["a b\n\nc", "d e f\n\ni"[:5], "i"]


def test_passages_are_ranked_by_rare_words() -> None:
    passages = Passages(["the cat sat", "the dog and the bone", "the cat and the dog"])
    assert passages.best("Which dog has the bone?", 2) == ["the dog and the bone", "the cat and the dog"]
    assert passages.best("nothing known", 3) == passages.texts


def test_passages_that_a_question_needs_come_first_where_that_is_known() -> None:
    rows = [
        {
            "ctxs": [
                {"title": "A", "text": "one", "supporting": False},
                {"title": "B", "text": "two", "supporting": True},
            ]
        },
        {"ctxs": [{"title": "", "text": "three"}, {"title": "B", "text": "two"}]},
    ]
    assert passages_of(rows, 9) == ["B: two", "three"]


# ---- workloads ----


def some_text(stem: str, num_words: int) -> str:
    return " ".join(hashlib.sha256(f"{stem} {index}".encode()).hexdigest()[:4] for index in range(num_words))


def lines(file: Path, rows: list[object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(content.encode()))
    else:
        file.write_text(content)


@pytest.fixture(scope="session")
def roomy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sees 8,192 tokens."""
    return save_tiny_model(tmp_path_factory.mktemp("roomy"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five workloads' data, of a few rows each, some of the files gzipped."""
    folder = tmp_path_factory.mktemp("data")
    lines(
        folder / "gsm8k" / "test_some.jsonl",
        [{"question": some_text(f"gsm {row}", 12), "answer": "#### 1"} for row in range(6)],
    )
    questions = [
        {"subject": f"s{row % 2}", "question": some_text(f"mmlu {row}", 5), "choices": list("wxyz"), "answer": 0}
        for row in range(6)
    ]
    lines(folder / "mmlu" / "test_some.jsonl.gz", questions)
    lines(folder / "mmlu" / "dev_some.jsonl.gz", questions[:4])
    lines(
        folder / "humaneval" / "humaneval_some.jsonl.gz",
        [{"prompt": f"def f{row}(x):\n", "entry_point": f"f{row}", "test": "pass"} for row in range(6)],
    )
    passages = [{"title": f"T{row}", "text": some_text(f"passage {row}", 20), "supporting": True} for row in range(6)]
    lines(
        folder / "rag" / "hotpotqa_some.jsonl.gz",
        [{"question": passages[row]["text"][:9], "ctxs": passages[: row + 1]} for row in range(6)],
    )
    agents = folder / "agents"
    tool = {"name": "call", "description": some_text("tool", 6), "parameters": {}}
    (agents / "prompts").mkdir(parents=True)
    (agents / "bfcl_tool_schemas.json").write_text(json.dumps({"math_api": [tool], "ticket_api": [tool, tool]}))
    (agents / "prompts" / "house_policy.md").write_text(some_text("policy", 300))
    (agents / "prompts" / "other.j2").write_text("\n\n".join(some_text(f"other {index}", 60) for index in range(8)))
    lines(
        agents / "bfcl_multi_turn_base.jsonl.gz",
        [
            {"question": [[{"role": "user", "content": some_text(f"task {row}", 6)}]], "involved_classes": ["MathAPI"]}
            for row in range(6)
        ],
    )
    return folder


@pytest.fixture
def engine(roomy_folder: Path) -> Engine:
    return Engine.load(roomy_folder, config=EngineConfig(pool_tokens=256))


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "humaneval", "rag", "tools"])
def test_every_workload_brings_what_its_team_asks_for(name: str, data: Path, engine: Engine) -> None:
    with engine:
        made = make_workload(name, Wanted(engine, data, 5))
        again = make_workload(name, Wanted(engine, data, 5))
    assert len(made.inputs) == 5
    for inputs in made.inputs:
        assert set(made.team.required_inputs) == set(inputs)
        assert all(inputs.values())
    assert [dict(each) for each in made.inputs] == [dict(each) for each in again.inputs]


def test_agents_with_tools_share_texts_pairwise(data: Path, engine: Engine) -> None:
    with engine:
        made = make_workload("tools", Wanted(engine, data, 5))
    planner, operator, controller = ({slot.name for slot in agent.slots} for agent in made.team.agents)
    assert planner & controller == {"rules", "tools_1", "request"}  # A+B+D and A+B+E
    assert operator & controller == {"rules", "notes_2", "request"}  # A+C+E and A+B+E
    assert planner & operator == {"rules", "request"}
    assert len({inputs["rules"] for inputs in made.inputs}) == 1


def test_documents_come_in_retrieval_order_out_of_one_collection(data: Path, engine: Engine) -> None:
    with engine:
        made = make_workload("rag", Wanted(engine, data, 5))
    orders = [[inputs[f"passage_{number}"] for number in range(1, 5)] for inputs in made.inputs]
    assert all(len(set(order)) == 4 for order in orders)
    assert [order[0].split()[1][:4] for order in orders] == [inputs["question"][:4] for inputs in made.inputs]
    assert len({text for order in orders for text in order}) <= 6


def test_other_rows_by_another_seed(data: Path, engine: Engine) -> None:
    with engine:
        first, other = (make_workload("gsm8k", Wanted(engine, data, 5, seed)) for seed in (0, 1))
    assert list(first.inputs) != list(other.inputs)


def test_what_is_missing_is_named(data: Path, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "rag").mkdir()
    with engine:
        for name, match in (
            ("gsm8k", "gsm8k: .*no gsm8k/test"),
            ("rag", r"rag: .*no hotpotqa\*.jsonl or musique\*.jsonl"),
            ("tools", "tools: .*no bfcl_tool_schemas"),
        ):
            with pytest.raises(InvalidRequest, match=match):
                make_workload(name, Wanted(engine, tmp_path, 2))
        with pytest.raises(InvalidRequest, match="gsm8k: there are 6 requests, not 7"):
            make_workload("gsm8k", Wanted(engine, data, 7))
        with pytest.raises(InvalidRequest, match=r"rag: .*--data FOLDER"):
            make_workload("rag", Wanted(engine, None, 7))


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests=0"], "--requests must be at least 1, not 0"),
        (["--max-new-tokens=-1"], "--max-new-tokens must be at least 1, not -1"),
        (["--workload=chess"], "unknown workload 'chess'; there are gsm8k"),
        (["--data=/nowhere"], "--data /nowhere: no such folder"),
        (["--bound=0.05"], "--bound is NATS,CONFIDENCE"),
        (["--bound=0,0.9"], "--bound needs nats above 0"),
        (["--methods=magic"], "unknown method 'magic'; there are"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.fixture
def arguments(roomy_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        f"--model={roomy_folder}",
        f"--data={data}",
        f"--out={tmp_path / 'run'}",
        "--workload=gsm8k",
        "--no-prior",
        "--requests=3",
        "--max-new-tokens=4",
        "--json",
    ]


def test_an_interrupted_part_begins_anew_and_a_finished_one_is_kept(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Server.serve

    def until_the_third(self: Server) -> Iterator[Served]:
        for served in whole(self):
            if served.number == 3:
                raise KeyboardInterrupt
            yield served

    monkeypatch.setattr(Server, "serve", until_the_third)
    assert command.main(arguments) == 130
    (kept,) = (tmp_path / "run").glob("gsm8k_*.jsonl")
    assert [served.number for served in ServedFile(kept).read()] == [1, 2]
    monkeypatch.setattr(Server, "serve", whole)
    capsys.readouterr()
    assert command.main(arguments) == 0
    first = capsys.readouterr().out
    assert [served.number for served in ServedFile(kept).read()] == [1, 2, 3]

    def nothing(self: Server) -> Iterator[Served]:
        raise AssertionError("served again")

    monkeypatch.setattr(Server, "serve", nothing)
    assert command.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == json.loads(first)["figures"]
    with pytest.raises(AssertionError, match="served again"):
        command.main([*arguments, "--fresh"])


def test_a_part_of_other_answers_is_not_taken_for_this_one(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--max-new-tokens=5"]) == 0
    assert len(list((tmp_path / "run").glob("gsm8k_*.jsonl"))) == 2
    values = {
        figure["id"]: figure["value"]
        for figure in json.loads((tmp_path / "run" / "report.json").read_text())["figures"]
    }
    assert values["requests"] == 3
    assert values["calls"] == 15


def test_of_all_workloads_those_are_taken_whose_data_are_there(
    arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "rag").symlink_to(data / "rag")
    assert command.main([*arguments, f"--data={part}", "--workload=all"]) == 0
    captured = capsys.readouterr()
    assert "left out: gsm8k: " in captured.err
    assert json.loads(captured.out)["config"]["parts"] == ["rag no-prior 0.05,0.9"]
    (part / "rag").unlink()
    assert command.main([*arguments, f"--data={part}", "--workload=all"]) == 1
    assert "no workload has its data" in capsys.readouterr().err.splitlines()[-1]


def test_the_served_engine_stands_still_between_requests(data: Path, engine: Engine) -> None:
    """What is asked of it while the caller works on what was yielded is answered afterwards only."""
    made_like = {"model": engine.model, "tokenizer": engine.tokenizer, "config": EngineConfig(pool_tokens=8192)}
    with engine, Engine(**made_like) as served, Engine(**made_like) as twin:
        workload = make_workload("tools", Wanted(engine, data, 2, max_new_tokens=3))
        numbers, asked = [], []
        for request in Server(served, twin, workload, ReusePolicy(0.05, 0.9), lambda engine: 0.0).serve():
            numbers.append(request.number)
            assert served.contexts == ()
            assert twin.contexts == ()
            assert all(handle.done for handle in asked)
            asked.append(served.submit("something else", max_new_tokens=1))
            assert not asked[-1].wait(0.2)
        assert numbers == [1, 2]
        assert asked[-1].wait(30)
        served.check_integrity()
        twin.check_integrity()


def test_the_twin_gets_the_prompts_of_the_served_engine(data: Path, engine: Engine) -> None:
    """Answers included: of every call it reports the same prompt, all of which it has read then."""
    made_like = {"model": engine.model, "tokenizer": engine.tokenizer, "config": EngineConfig(pool_tokens=8192)}
    with engine, Engine(**made_like) as served, Engine(**made_like) as twin:
        workload = make_workload("gsm8k", Wanted(engine, data, 1, max_new_tokens=6))
        prompts: list[tuple[Segment, ...]] = []
        keeper = Server(served, twin, workload, ReusePolicy(0.05, 0.9), lambda engine: 0.0)
        original = keeper._call

        def noting(agent: str, own: Kept, usage: Usage, twin_answer: Twin) -> Call:
            assert own.prompt is twin_answer.kept.prompt
            assert own.context.tokens[: own.num_prompt] == twin_answer.kept.context.tokens[: own.num_prompt]
            prompts.append(own.prompt)
            return original(agent, own, usage, twin_answer)

        keeper._call = noting  # type: ignore[method-assign]
        (request,) = keeper.serve()
        assert [made.agent for made in request.calls] == [agent.name for agent in workload.team.agents]
        assert [made.prompt for made in request.calls] == [sum(len(s.token_ids) for s in p) for p in prompts]
        page = twin.config.page_size
        assert all(
            twin.cache.num_cached(prompt) // page >= made.prompt // page - 1
            for prompt, made in zip(prompts, request.calls, strict=True)
        )


# ---- text that is really moved ----


@pytest.fixture
def easy_prior(engine: Engine, tmp_path: Path) -> Path:
    """A prior by which nothing ever costs anything, so that text is moved from the first request on."""
    measured = {rung: Measured(0.0, 1e6) for rung in TURNED}
    pairs = [Pair(measured, {}, Sources(2, 0, num_unread, 10)) for num_unread in (0, 1, 2)] * 40
    file = tmp_path / "prior.json"
    with engine:
        write_prior(Prior(engine.prior_model, {"gsm8k": pairs, "rag": pairs}), file, name="tiny")
    return file


def test_moved_text_is_held_against_exact_computation_and_other_methods(
    arguments: list[str], easy_prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*arguments, "--workload=rag", "--prior", f"--prior-file={easy_prior}", "--requests=5"]
    options.remove("--workload=gsm8k")
    assert command.main([*options, "--methods=cacheblend,epic,paper", "--bound=0.00001,0.9"]) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    (kept,) = (tmp_path / "run").glob("rag_*.jsonl")
    calls = [made for served in ServedFile(kept).read() for made in served.calls]
    moved = [made for made in calls if made.aligned]
    assert moved
    assert moved[0].level == "prior"
    assert moved[0].num_pairs == 40  # those of gsm8k: rag's own are left out
    assert all(0 < made.moved == made.aligned <= made.movable for made in moved)
    assert all(made.divergence is not None and made.divergence >= 0 for made in moved)
    assert any(made.divergence for made in moved), "a random model notices moved text"
    assert all(made.divergence is None and not made.methods for made in calls if not made.aligned)
    at_prior = [made for made in moved if made.level == "prior"]
    assert values["approximate_prior"] == len(at_prior)
    assert values["violations_prior"] == sum((made.divergence or 0) > 1e-5 for made in at_prior) / len(at_prior)
    assert values["first_moved"] == 1 + next(index for index, made in enumerate(calls) if made.aligned)
    compared = [made for made in moved if "epic" in made.methods]
    assert values["compared_epic"] == len(compared) > 0
    assert values["nats_epic"] == pytest.approx(sum(made.methods["epic"] for made in compared) / len(compared))


def test_without_the_prior_nothing_is_moved_that_early(
    arguments: list[str], easy_prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*arguments, f"--prior-file={easy_prior}"]) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert values["first_moved"] == 4  # never
    assert "violations_prior" not in values


def test_a_prior_that_is_not_there_or_of_another_model_is_refused(
    arguments: list[str], easy_prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*arguments, "--prior"]
    assert command.main(asked) == 1
    assert "none ships for this model" in capsys.readouterr().err.splitlines()[-1]
    assert command.main([*asked, f"--prior-file={tmp_path / 'none.json'}"]) == 1
    assert "none.json cannot be read" in capsys.readouterr().err.splitlines()[-1]
    value = json.loads(easy_prior.read_text())
    easy_prior.write_text(json.dumps({**value, "model": "f" * 64}))
    assert command.main([*asked, f"--prior-file={easy_prior}"]) == 1
    assert "measured on another model" in capsys.readouterr().err.splitlines()[-1]


def test_both_ways_are_parts_of_one_run(
    arguments: list[str], easy_prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.remove("--no-prior")
    assert command.main([*arguments, f"--prior-file={easy_prior}"]) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert values["gsm8k no-prior 0.05,0.9 first_moved"] == 4
    assert values["gsm8k prior 0.05,0.9 first_moved"] == 1
