"""`python -m eval.engine_faults`: that it runs, and above all that it notices what it looks for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.engine_faults import patience
from eval.engine_faults.__main__ import main
from eval.engine_faults.asking import as_understood
from eval.engine_faults.episode import Episode, Runner, cut
from eval.engine_faults.faults import POINTS, InjectedFault
from eval.engine_faults.findings import Findings, Harm
from eval.engine_faults.operations import GROUPS, Operation, draw_operation, draw_operations
from eval.engine_faults.performing import ACTS
from eval.engine_faults.reference import Reference
from eval.engine_faults.subject import ADAPTERS, Subject, Weights, has_peft
from eval.engine_faults.values import REFUSED, SPECIAL, TAKEN, resolve
from kvcomm import Engine, SamplingParams
from kvcomm.engine.cache import Cache
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.loop import EngineLoop
from kvcomm.engine.open_prompt import OpenPrompts
from kvcomm.engine.reading import Followed as EngineFollowed
from kvcomm.engine.reading import Known
from kvcomm.engine.sampler import Sampler
from kvcomm.engine.scheduler import Scheduler
from kvcomm.model.live import LiveWeights

ENGINE = {"page_size": 8, "pool_tokens": 256, "idle_after_s": 0.0}
PROMPT = {"ids": list(range(60, 80))}
ENDS = frozenset({2})


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(0, with_adapters=False)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(1, with_adapters=True)


def ask(**sampling: Any) -> Operation:
    return Operation("ask", {"prompt": PROMPT, "tenant": "a", "sampling": {"max_new_tokens": 6, **sampling}})


def submit(number: int) -> Operation:
    prompt = {"ids": list(range(60, 80 + number))}
    return Operation("submit", {"prompt": prompt, "tenant": "a", "sampling": {"max_new_tokens": 8}})


CHECK = Operation("check", {"which": 0})
SOME = [ask(), ask(logprobs=2), ask(temperature=1.0, seed=3, top_p=0.9), ask(n=2), *map(submit, range(3)), CHECK]


def found(runner: Runner, operations: Sequence[Operation] = SOME) -> Findings:
    return runner.run(Episode(ENGINE, operations))


def kinds(findings: Findings) -> set[tuple[Harm, str]]:
    return set(findings.by_kind())


def test_nothing_is_found_where_nothing_is_wrong(runner: Runner) -> None:
    findings = found(runner)
    assert findings.all == []
    assert findings.counts["compared"] >= 8


def test_a_wrong_logit_is_noticed(runner: Runner) -> None:
    def favour(module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + torch.nn.functional.one_hot(torch.tensor(99), logits.shape[-1]) * 100

    hook = runner.subject.model.lm_head.register_forward_hook(favour)
    try:
        assert (Harm.WRONG, "an answer differs") in kinds(found(runner))
    finally:
        hook.remove()


def test_kv_of_other_weights_is_noticed() -> None:
    """Somebody changes a weight and nobody is told."""
    runner = Runner(0, with_adapters=False)
    with torch.no_grad():
        runner.subject.model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(3)
    assert (Harm.WRONG, "an answer differs") in kinds(found(runner))


def test_cached_kv_of_weights_before_an_edit_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that does not look at its model answers from what it has cached."""
    edit = Operation("edit", {"which": 0})
    assert found(runner, [ask(), edit, ask(), edit, ask()]).all == []
    monkeypatch.setattr(LiveWeights, "_look", lambda self, closely=False: None)
    monkeypatch.setattr(LiveWeights, "confirm", lambda self, this, weights, closely=False: True)
    assert (Harm.WRONG, "an answer differs after weights have changed") in kinds(found(runner, [ask(), edit, ask()]))


@pytest.mark.skipif(not has_peft(), reason="peft is not installed")
def test_another_adapter_than_the_one_named_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(0, with_adapters=True)
    named = [Operation("ask", {**ask().settings, "adapter": which}) for which in (1, 2, 0)]
    assert found(runner, named).all == []
    submit_request = Engine.submit

    def without_adapter(self: Engine, *arguments: Any, adapter: str | None = None, **keywords: Any) -> RequestHandle:
        return submit_request(self, *arguments, **keywords)

    monkeypatch.setattr(Engine, "submit", without_adapter)
    assert kinds(found(runner, named)) == {(Harm.WRONG, "an answer differs")}


def team(**settings: Any) -> Operation:
    """One that is asked, two that follow it, and one that follows those."""
    roles, behind = ([{"ids": list(range(start, start + 12))} for start in starts] for starts in ((60, 90), (120, 150)))
    told = {"keep": "all", "leaves": "nobody", "is_hurried": False, "roles": roles, "behind": behind}
    sampling = {"max_new_tokens": 12, "ignore_eos": True}
    return Operation("team", {"which": 0, "prompt": PROMPT, "tenant": "a", "sampling": sampling, **told, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"keep": "but last"},
        {"keep": "nothing"},
        {"keep": "fails"},
        {"leaves": "producer"},
        {"leaves": "reader"},
        {"is_hurried": True},
        {"sampling": {"max_new_tokens": 12, "stop": ["e", "a", "0", " "]}},
    ],
)
def test_teams_answer_as_cold_runs_do(runner: Runner, settings: dict[str, Any]) -> None:
    findings = found(runner, [team(**settings), team(**settings), CHECK])
    assert findings.all == []
    assert findings.counts["compared"] >= 2
    if not settings:
        assert findings.counts["followers"] == 6


def test_a_follower_that_reads_something_else_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    look = EngineFollowed.look

    def shorter(self: EngineFollowed) -> Known:
        known = look(self)
        return known._replace(token_ids=known.token_ids[:-1]) if known.is_final else known

    monkeypatch.setattr(EngineFollowed, "look", shorter)
    assert (Harm.WRONG, "usage does not add up") in kinds(found(runner, [team(), CHECK]))


def test_a_source_of_another_tenant_that_is_taken_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Operation("open", {**team().settings, "tenant": "b"})
    follow = Operation("follow", {"which": 0, "other": 0, "keep": "all"})
    asked = Operation("submit", {"prompt": PROMPT, "tenant": "a", "sampling": {"max_new_tokens": 4}})
    findings = found(runner, [asked, opened, follow, CHECK])
    assert findings.all == []
    assert findings.counts["sources refused"] == 1
    monkeypatch.setattr(OpenPrompts, "follow", lambda self, reading, source, part: self.put(reading, part))
    seen = kinds(found(runner, [asked, opened, follow, CHECK]))
    assert seen == {(Harm.WRONG, "a source was taken that must be refused")}


def unowned(pin: Callable[..., int]) -> Callable[..., int]:
    """A pin that takes a page besides, which nobody has then."""

    def pinned(self: Cache, *arguments: Any, **keywords: Any) -> int:
        self._memory.pool.allocate(1)
        return pin(self, *arguments, **keywords)

    return pinned


def test_leaked_pages_are_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Cache.pin

    def leaking_pin(self: Cache, *arguments: Any, **keywords: Any) -> int:
        self._memory.pool.allocate(2)
        return pin(self, *arguments, **keywords)

    monkeypatch.setattr(Cache, "pin", leaking_pin)
    monkeypatch.setattr(Engine, "check_integrity", lambda self: None)
    findings = found(runner, [Operation("pin", {"which": 0, "prompt": PROMPT, "tenant": "a"}), CHECK, ask()])
    assert kinds(findings) == {(Harm.LEAKED, "pages leaked")}
    assert findings.total(Harm.LEAKED) == 2


def test_pages_without_an_owner_are_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Cache.pin
    monkeypatch.setattr(Cache, "pin", unowned(pin))
    findings = found(runner, [Operation("pin", {"which": 0, "prompt": PROMPT, "tenant": "a"}), CHECK])
    assert kinds(findings) == {(Harm.LEAKED, "the books do not balance")}


def test_an_engine_that_closes_by_itself_is_noticed_and_replaced(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, number = Scheduler.step, iter(range(10**9))

    def breaking_step(self: Scheduler) -> None:
        if next(number) == 5:
            raise ZeroDivisionError
        step(self)

    monkeypatch.setattr(Scheduler, "step", breaking_step)
    findings = found(runner, [*map(submit, range(6)), CHECK, *SOME])
    assert kinds(findings) == {(Harm.LOST, "an engine closed by ZeroDivisionError")}
    assert findings.total(Harm.LOST) == 1
    assert findings.counts["compared"] >= 8


def test_an_engine_that_hangs_is_noticed_and_replaced(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    submit_request, number = EngineLoop.submit, iter(range(10**9))

    def losing_submit(self: EngineLoop, request: Any) -> None:
        if next(number) != 2:
            submit_request(self, request)

    monkeypatch.setattr(EngineLoop, "submit", losing_submit)
    findings = found(runner, [ask(), ask(), ask(), *SOME])
    assert (Harm.LOST, "an engine hangs") in kinds(findings)
    assert findings.counts["compared"] >= 2


def test_an_error_that_is_nobodys_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = RequestHandle.settle
    monkeypatch.setattr(RequestHandle, "settle", lambda self, outcome: settle(self, ValueError("odd")))
    assert kinds(found(runner, [ask()])) == {(Harm.WRONG, "an error without a reason: ValueError")}


def test_a_fault_that_becomes_another_error_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = RequestHandle.settle

    def odd(self: RequestHandle, outcome: Any) -> None:
        if isinstance(outcome, InjectedFault):
            error = KeyError("odd")
            error.__cause__ = outcome
            outcome = error
        settle(self, outcome)

    monkeypatch.setattr(RequestHandle, "settle", odd)
    fault = Operation("fault", {"point": "model.forward", "passes": 1, "kind": "InjectedFault"})
    assert kinds(found(runner, [fault, ask()])) == {(Harm.WRONG, "an error without a reason: KeyError")}


def test_a_choice_whose_fault_fails_its_neighbours_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, errors = RequestHandle.settle, list[BaseException]()

    def spread(self: RequestHandle, outcome: Any) -> None:
        errors.extend([outcome] if isinstance(outcome, InjectedFault) else [])
        settle(self, errors[0] if errors else outcome)

    monkeypatch.setattr(RequestHandle, "settle", spread)
    fault = Operation("fault", {"point": "request.completion", "passes": 0, "kind": "InjectedFault"})
    findings = found(runner, [fault, *map(submit, range(4)), Operation("check", {"which": 1})])
    assert (Harm.WRONG, "one choice's fault failed several requests") in kinds(findings)


def test_other_text_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = RequestHandle.settle

    def shouting(self: RequestHandle, outcome: Any) -> None:
        choices = tuple(replace(choice, text=choice.text + "!") for choice in outcome.choices)
        settle(self, replace(outcome, choices=choices))

    monkeypatch.setattr(RequestHandle, "settle", shouting)
    seen = kinds(found(runner, [ask()]))
    assert seen == {(Harm.WRONG, "the text differs"), (Harm.WRONG, "chunks and completion disagree on text")}


def test_other_log_probabilities_are_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = RequestHandle.settle

    def surer(self: RequestHandle, outcome: Any) -> None:
        (choice,) = outcome.choices
        logprobs = choice.logprobs and tuple(each._replace(logprob=each.logprob / 2) for each in choice.logprobs)
        settle(self, replace(outcome, choices=(replace(choice, logprobs=logprobs),)))

    monkeypatch.setattr(RequestHandle, "settle", surer)
    assert kinds(found(runner, [ask(logprobs=3)])) == {(Harm.WRONG, "log-probabilities differ")}


def test_other_chunks_are_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = RequestHandle.publish

    def halved(self: RequestHandle, chunk: Any) -> None:
        publish(self, chunk._replace(token_ids=chunk.token_ids[:-1]))

    monkeypatch.setattr(RequestHandle, "publish", halved)
    assert kinds(found(runner, [ask()])) == {(Harm.WRONG, "chunks and completion disagree on token ids")}


def test_a_bad_value_that_is_taken_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingParams, "__post_init__", lambda self: None)
    refused = {
        "prompt": PROMPT,
        "tenant": "a",
        "which": 1,
        "sampling": {"max_new_tokens": 0, "min_p": {"special": "2"}},
    }
    assert kinds(found(runner, [Operation("ask_refused", refused)])) == {
        (Harm.WRONG, "a value of the wrong kind was taken")
    }


def test_a_small_run_finds_nothing_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    assert main(["--operations=200", "--seed=7", "--without=faults", "--json", f"--out={out}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    values = {figure["id"]: figure["value"] for figure in printed["figures"]}
    assert values["operations"] >= 200
    assert (values["wrong"], values["leaked"], values["engines_lost"]) == (0, 0, 0)
    assert values["answers_compared"] > 60
    saved = json.loads(out.read_text())
    assert saved["figures"] == printed["figures"]
    assert saved["config"]["seed"] == 7
    assert "commit" in saved["environment"]


def test_faults_hurt_nobody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So few operations do not reach every point, which the exit code says."""
    code = main(["--operations=300", "--seed=3", "--json", f"--out={tmp_path / 'run.json'}"])
    captured = capsys.readouterr()
    values = {figure["id"]: figure["value"] for figure in json.loads(captured.out)["figures"]}
    assert (values["wrong"], values["leaked"], values["engines_lost"]) == (0, 0, 0)
    assert values["faults_fired"] > 10
    missed = [point for point in POINTS if not values[f"fired_{point}"]]
    assert code == (1 if missed else 0)
    assert all(f"error: {point} met 0 faults" in captured.err for point in missed)


def test_findings_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operations that matter are left of those in a file, and find the same again."""
    pin = Cache.pin
    monkeypatch.setattr(Cache, "pin", unowned(pin))
    whole = Episode(ENGINE, [*SOME, Operation("pin", {"which": 0, "prompt": PROMPT, "tenant": "a"}), *SOME])
    file, out = tmp_path / "whole.json", tmp_path / "run.json"
    file.write_text(json.dumps(whole.to_json()))
    assert main([f"--replay={file}", f"--out={out}", "--json"]) == 0
    (cut_down,) = (tmp_path / "run").iterdir()
    assert [each["name"] for each in json.loads(cut_down.read_text())["operations"]] == ["pin"]
    capsys.readouterr()
    assert main([f"--replay={cut_down}", f"--out={out}", "--json", "--shrink=0"]) == 0
    figures = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert (figures["wrong"], figures["leaked"], figures["engines_lost"]) == (0, 1, 0)


def test_cutting_leaves_what_matters() -> None:
    operations = [Operation("ask", {"which": number}) for number in range(40)]

    def needs_three(some: Sequence[Operation]) -> bool:
        return {3, 17, 38} <= {operation.settings["which"] for operation in some}

    assert [each.settings["which"] for each in cut(operations, needs_three, 1000)] == [3, 17, 38]
    assert len(cut(operations, needs_three, 0)) == 40


def test_operations_are_drawn_from_the_seed_alone() -> None:
    first, second = (Episode.draw(5, 2, 100) for _ in range(2))
    assert first == second
    assert first != Episode.draw(5, 3, 100)
    assert Episode.from_json(json.loads(json.dumps(first.to_json()))) == first


@pytest.mark.parametrize("group", GROUPS)
def test_groups_can_be_left_out(group: str) -> None:
    names = {operation.name for operation in draw_operations(random.Random(1), 3000, [group])}
    assert not names & set(GROUPS[group])
    assert names <= set(ACTS)


def test_every_point_is_where_its_operations_pass(runner: Runner) -> None:
    draw = random.Random(5)
    makers = ["ask_moved", "context", "submit_answer", "save"]
    for name, point in POINTS.items():
        before = runner.faults.fired[name]
        for _ in range(20):
            fault = Operation("fault", {"point": name, "passes": 0, "kind": point.kinds[0]})
            first = [draw_operation(draw, each, {}) for each in makers]
            behind = [draw_operation(draw, draw.choice(point.in_reach), {}) for _ in range(4)]
            found(runner, [*first, fault, *behind])
            if runner.faults.fired[name] > before:
                break
        assert runner.faults.fired[name] > before, name


def test_a_point_that_is_never_reached_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--operations=2", f"--out={tmp_path / 'run.json'}", "--shrink=0"]) == 1
    assert "error: snapshot.write met 0 faults, wanted at least 1" in capsys.readouterr().err


def test_no_such_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--without=threads,weather"])
    assert "weather is none of adapters, faults" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--replay={tmp_path / 'none.json'}"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@torch.no_grad()
def test_cold_answers_are_those_of_transformers(subject: Subject) -> None:
    """Greedy: what stock `generate` gives. Drawn: what its logits processors leave has the drawn token in it."""
    reference = Reference(subject, ENDS)
    prompt = tuple(range(70, 90))
    stock = subject.stock(Weights())
    greedy = stock.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    greedy = greedy[:-1] if greedy[-1] == 2 else greedy
    guessed = tuple(greedy[:4])
    for guess in ((), guessed, (5, 6, 7)):
        answer = reference.answer(Weights(), prompt, SamplingParams(max_new_tokens=12), 0, guess)
        assert (answer.drawn, answer.num_ties) == (greedy, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.7, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
    ],
)
def test_cold_answers_are_drawn_as_samplers_draw(subject: Subject, settings: dict[str, Any]) -> None:
    reference, prompt = Reference(subject, ENDS), tuple(range(70, 90))
    params = SamplingParams(max_new_tokens=10, seed=11, ignore_eos=True, **settings)
    answer = reference.answer(Weights(), prompt, params, 2, ())
    sampler, tokens = Sampler(params, 2, entropy=0), list(prompt)
    for token, scores in zip(answer.drawn, answer.scores, strict=True):
        assert sampler.sample(torch.from_numpy(scores).float(), np.array(tokens, np.int32)) == token
        tokens.append(token)


@pytest.mark.skipif(not has_peft(), reason="peft is not installed")
@torch.no_grad()
def test_stock_models_have_the_weights_of_adapters_and_edits(subject: Subject) -> None:
    tokens = torch.arange(60, 80)[None]
    seen = []
    for adapter in (None, *ADAPTERS):
        for _ in range(2):
            subject.activate(adapter)
            subject.edit()
            logits = subject.model(tokens).logits
            seen.append(logits)
            torch.testing.assert_close(subject.stock(subject.weights)(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    subject.reset()
    assert subject.weights == Weights()
    assert all((first - second).abs().max() > 0.1 for first, second in combinations(seen, 2))


def test_values_are_what_they_are_called() -> None:
    for names in (*REFUSED.values(), *TAKEN.values()):
        assert all(name in SPECIAL for name in names)
    understood = as_understood(resolve({"top_k": {"special": "-1"}, "seed": {"special": "np.int64(5)"}, "stop": ["a"]}))
    assert (understood.top_k, understood.seed, understood.stop) == (0, 5, ("a",))
    assert type(understood.seed) is int
