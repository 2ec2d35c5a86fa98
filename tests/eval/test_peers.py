"""`eval.peers` on servers that only pretend to be engines, its figures by hand, and a run with kvcomm itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM

from eval.peers import __main__ as peers
from eval.peers import parts
from eval.peers.bench import Bench, Sizes
from eval.peers.engines import Peer, Plan, llama_plan, started, vllm_plan
from eval.peers.figures import engine_table, figures_of
from eval.peers.gguf_file import widen
from eval.peers.prompts import ROLES, Part, Texts
from eval.peers.same_tokens import same_token_figures
from eval.peers.stock_server import StockServer
from kvcomm.errors import InvalidRequest, ServerError
from kvcomm.lab.load.client import Sample
from tests.eval.test_peers_tree import is_gone
from tests.limits import PATIENCE_S, wait_for
from tests.tiny import save_tiny_model

FAKE = Path(__file__).with_name("fake_engine.py")
TINY = Sizes(
    turns=2, short=20, long=40, tail=4, prompt=24, new=6, streams=3, stream_new=2, document=10, learn=1, question=8,
    answer=2, rounds=1, checked=5, checked_new=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for long prompts."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def texts(folder: Path) -> Texts:
    return Texts(folder / "tokenizer.json")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rest is what real engines need."""
    monkeypatch.setattr("eval.peers.bench.TAIL_S", 0.0)
    monkeypatch.setattr("eval.peers.bench.IDLE_LOOK_S", 0.3)
    monkeypatch.setattr("eval.peers.tree.LOOK_S", 0.02)


def fake(name: str, way: str = "") -> Plan:
    return Plan(name, (sys.executable, str(FAKE), "{port}", *([way] if way else [])))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def run(stack: ExitStack, tmp_path: Path, plan: Plan) -> Peer:
    return stack.enter_context(started(plan, tmp_path / plan.name, [1, 2]))


# Prompts.


def test_no_token_of_a_text_comes_twice(texts: Texts, folder: Path) -> None:
    taken = [*texts.tokens(100), *texts.tokens(50)]
    assert taken == Texts(folder / "tokenizer.json").tokens(150)


def test_a_prompt_in_parts_is_the_same_for_all(texts: Texts) -> None:
    prompt = texts.prompt([Part("a", "some apples"), Part("none", ""), Part("b", " left", True), Part("end", "?")])
    assert prompt.token_ids == [*texts.encode("some apples"), *texts.encode(" left"), *texts.encode("?")]
    assert prompt.tail == "?"
    assert prompt.fields["segments"] == [
        {"id": "a", "content": "some apples", "kind": "static"},
        {"id": "b", "content": " left", "kind": "dynamic"},
    ]


def test_every_agent_reads_those_before_it(texts: Texts) -> None:
    prompt = texts.agent("critic", "how many?", {"planner": "first", "solver": "second"})
    read = "".join(part.text for part in prompt.parts)
    assert read == (
        ROLES["critic"] + "\nQuestion: how many?\nThe planner said: first\nThe solver said: second\nThe critic says:"
    )
    assert [part.name for part in prompt.parts if part.is_dynamic] == ["asked", "planner", "solver"]


def test_a_prompt_to_copy_shows_its_text_twice(texts: Texts) -> None:
    prompt = texts.copying(64)
    half = (len(prompt) - 8) // 2
    assert len(prompt) == 64
    assert prompt[:half] == prompt[half : 2 * half]
    assert prompt[2 * half :] == prompt[:8]


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json is not there"):
        Texts(tmp_path / "tokenizer.json")


# Engines and turns.


def test_an_engine_answers_and_its_costs_are_known(stack: ExitStack, tmp_path: Path) -> None:
    peer = run(stack, tmp_path, fake("child", "child"))
    assert 0 < peer.start_cpu_s < 60
    assert peer.start_s > 0
    assert len(peer.tree.pids()) == 2
    sample = peer.client.complete([5, 6, 7], 2)
    assert (sample.text, sample.output_tokens) == ("3 3 ", 2)


def test_an_engine_has_a_folder_for_temporary_files_while_it_runs(tmp_path: Path) -> None:
    with started(fake("one"), tmp_path / "log", [1]) as peer:
        environment = Path(f"/proc/{peer.tree.pid}/environ").read_bytes().decode().split("\0")
        folder = Path(next(each for each in environment if each.startswith("TMPDIR=")).partition("=")[2])
        assert folder.is_dir()
        (folder / "socket").touch()
    assert not folder.exists()


def test_an_engine_that_ends_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"dead: the server ended with code 3: this is a fake, dead"):
        started(fake("dead", "dead"), tmp_path / "log", [1]).__enter__()
    with pytest.raises(ServerError, match="none cannot be run: /nowhere/engine: No such file"):
        started(Plan("none", ("/nowhere/engine",)), tmp_path / "log", [1]).__enter__()


def test_what_is_not_installed_is_said_with_the_way_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="setup-env --integration vllm"):
        vllm_plan(tmp_path / "python", tmp_path, 1)
    with pytest.raises(InvalidRequest, match="setup-env --integration llama"):
        llama_plan(tmp_path / "llama-server", tmp_path, 1, 8)


def test_a_llama_server_of_ones_own(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\necho 'version: 7' >&2\n")
    server.chmod(0o755)
    plan = llama_plan(server, tmp_path / "weights.gguf", 2, 8)
    assert plan.version == "version: 7"
    assert plan.command[:3] == (str(server), "-m", str(tmp_path / "weights.gguf"))
    assert plan.environment["OMP_NUM_THREADS"] == "2"


def test_who_comes_first_changes_from_turn_to_turn(stack: ExitStack, tmp_path: Path, texts: Texts) -> None:
    bench = Bench([run(stack, tmp_path, fake(name)) for name in "abc"], texts, TINY)
    order: list[str] = []

    def ask(peer: Peer) -> list[Sample]:
        order.append(peer.name)
        return [bench.ask(peer, [1, 2, 3], 1)]

    for turn in range(3):
        bench.each("asked", turn, ask)
    assert "".join(order) == "abcbcacab"
    assert {name: len(values) for name, values in bench.values.items()} == {
        f"asked_{name}_{unit}": 3 for name in "abc" for unit in ("s", "cpu_s", "ttft_s")
    }
    assert all(bench.values["asked_a_s"][at] >= bench.values["asked_a_ttft_s"][at] > 0 for at in range(3))


def test_who_fails_leaves_and_kvcomm_must_not(stack: ExitStack, tmp_path: Path, texts: Texts) -> None:
    own = Plan("kvcomm", fake("", "broken").command, is_kvcomm=True)
    bench = Bench([run(stack, tmp_path, fake("good")), run(stack, tmp_path, fake("bad", "broken"))], texts, TINY)
    costs = bench.each("asked", 0, lambda peer: [bench.ask(peer, [1], 1)])
    assert list(costs) == ["good"]
    assert [peer.name for peer in bench.peers] == ["good"]
    assert "500: it broke" in bench.left["bad"]
    bench.peers.append(run(stack, tmp_path, own))
    with pytest.raises(ServerError, match="kvcomm did not answer: 500: it broke"):
        bench.each("asked", 0, lambda peer: [bench.ask(peer, [1], 1)])


def test_who_does_not_rest_is_stopped_between_turns(
    stack: ExitStack, tmp_path: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.peers.bench.REST_LIMIT_S", 0.1)
    bench = Bench([run(stack, tmp_path, fake("calm")), run(stack, tmp_path, fake("busy", "busy"))], texts, TINY)
    calm, busy = bench.peers
    with monkeypatch.context() as told:  # on a machine that others use, who is busy may get no time to show it
        told.setattr(calm.tree, "idle_share", lambda _: 0.0)
        told.setattr(busy.tree, "idle_share", lambda _: 1.0)
        bench.warm_up()
    assert (calm.is_paused_when_idle, busy.is_paused_when_idle) == (False, True)
    wait_for(lambda: busy.tree.idle_share(0.2) == 0)
    assert bench.each("asked", 0, lambda peer: [bench.ask(peer, [1], 1)])["busy"].samples[0].text == "1 "
    wait_for(lambda: busy.tree.idle_share(0.2) == 0)


def test_all_parts_ask_everybody_the_same(stack: ExitStack, tmp_path: Path, texts: Texts) -> None:
    bench = Bench([run(stack, tmp_path, fake(name)) for name in ("vllm", "llama")], texts, TINY)
    stock = [run(stack, tmp_path, fake("stock"))]
    parts.first_tokens(bench)
    parts.streams(bench)
    parts.shifted(bench)
    parts.team(bench, stock)
    timed = (
        "prefill",
        "hit",
        "prefill4k",
        "hit4k",
        "decode1",
        "copy1",
        "decode3",
        "copy3",
        "unseen3",
        "shifted",
        "team",
    )
    for name in timed:
        assert len(bench.values[f"{name}_vllm_cpu_s"]) == len(bench.values[f"{name}_llama_s"]) == 2
    assert len(bench.values["team_stock_s"]) == 2
    assert not any(name.startswith("team_exact") or "prefill_stock" in name for name in bench.values)


# Figures.


def test_figures() -> None:
    values = {
        "prefill_kvcomm_cpu_s": [1.0, 2.0, 3.0],
        "prefill_vllm_cpu_s": [2.0, 2.0, 2.0],
        "prefill_kvcomm_fp32_cpu_s": [4.0, 4.0, 4.0],
        "prefill_llama_cpu_s": [1.0, 1.0],  # it left
        "decode1_kvcomm_s": [2.0],
        "team_kvcomm_s": [2.0],
        "team_vllm_s": [3.0],
        "team_stock_s": [8.0],
        "shifted_kvcomm_ttft_s": [0.5],
        "shifted_vllm_ttft_s": [1.25],
        "memory_kvcomm_mb": [1000.0],
        "memory_vllm_mb": [4500.0],
        "start_kvcomm_cpu_s": [9.0, 7.0, 5.0],
        "start_kvcomm_fp32_cpu_s": [5.0],
    }
    found = {
        figure.id: figure for figure in figures_of(values, streams={"decode1": 64}, others=["vllm", "llama", "stock"])
    }
    assert (found["prefill_vs_vllm"].value, found["prefill_vs_vllm"].spread) == (1.0, (0.75, 1.25))
    assert found["prefill_vs_vllm"].goal == "<= 1.0"
    assert (found["prefill_fp32_vs_vllm"].value, found["prefill_fp32_vs_vllm"].goal) == (2.0, "")
    assert "prefill_vs_llama" not in found
    assert (found["team_vs_vllm"].value, found["team_vs_stock"].value) == (1.5, 4.0)
    assert (found["team_vs_vllm"].goal, found["team_vs_stock"].goal) == (">= 1.5", ">= 4")
    assert (found["shifted_vs_vllm"].value, found["memory_vs_vllm"].value) == (2.5, 4.5)
    assert (found["start_cpu_s"].value, found["start_cpu_s"].goal) == (7.0, "<= 8")
    assert found["decode1_kvcomm_tokens_per_s"].value == 32
    assert (found["memory_vllm_mb"].unit, found["team_stock_s"].unit) == ("MB", "s")


def test_engines_side_by_side() -> None:
    values = {
        "start_kvcomm_s": [12.0, 10.0, 11.0],
        "start_kvcomm_cpu_s": [7.0],
        "decode1_kvcomm_s": [2.0, 4.0],
        "decode1_kvcomm_cpu_s": [1.0, 2.0],
        "decode1_vllm_s": [8.0],
        "decode1_vllm_cpu_s": [4.0],
        "memory_kvcomm_mb": [1234.5],
    }
    table = engine_table(values, streams={"decode1": 64}, engines=["kvcomm", "vllm"])
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("start", "11 (7)", ""),
        ("decode1", "3 (1.5), 24", "8 (4), 8"),
        ("memory, MB", "1,234", ""),
    ]


def test_same_tokens_of_an_exact_model(folder: Path, texts: Texts) -> None:
    figures = same_token_figures(str(folder), "float32", texts, TINY)
    assert {figure.id: (figure.value, figure.goal) for figure in figures} == {
        f"same_tokens_{way}": (5, "5") for way in ("cache", "batch", "guesses")
    }


def test_other_tokens_are_found(folder: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    from eval.peers import same_tokens

    whole = same_tokens._together
    monkeypatch.setattr(same_tokens, "_together", lambda *given: [*whole(*given)[:-1], (0,)])
    figures = {each.id: each.value for each in same_token_figures(str(folder), "float32", texts, TINY)}
    assert figures == {"same_tokens_cache": 5, "same_tokens_batch": 4, "same_tokens_guesses": 5}


# Transformers alone, and llama.cpp's file.


def test_the_stock_server_answers_greedily(folder: Path) -> None:
    server = StockServer(str(folder), 0)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        token_ids = [5, 6, 7, 8]
        with torch.no_grad():
            for _ in range(6):
                token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
        expected = server.tokenizer.decode(token_ids[4:], skip_special_tokens=True)
        assert server.answer([5, 6, 7, 8], 6) == expected
    finally:
        server.server_close()


def test_a_widened_file_has_the_same_weights_and_fields(tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    matrix = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = quantize(matrix, GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(source, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_file_type(7)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3])
    writer.add_key_value("own.flags", [True, False], GGUFValueType.ARRAY, GGUFValueType.BOOL)
    writer.add_tensor("matrix", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", np.arange(4, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    widen(source, target)
    made = GGUFReader(target)
    fields = {name: field.contents() for name, field in made.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "general.file_type": 1,
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.token_type": [1, 3],
        "own.flags": [True, False],
    }
    tensors = {tensor.name: tensor for tensor in made.tensors}
    assert np.array_equal(tensors["matrix"].data, dequantize(packed, GGMLQuantizationType.Q8_0).astype(np.float16))
    assert np.array_equal(tensors["vector"].data, np.arange(4, dtype=np.float32))


# The command.


def test_unknown_names_are_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    for given, told in (
        (["--only", "first,last"], "--only 'last': there are first, streams"),
        (["--engines", "kvcomm,sglang"], "--engines 'sglang': there are kvcomm, vllm, llama"),
        (["--engines", "vllm"], "--engines needs kvcomm"),
        (["--kvcomm-dtypes", "int8"], "--kvcomm-dtypes 'int8'"),
        (["--turns", "0"], "--turns must be at least 1, not 0"),
    ):
        with pytest.raises(SystemExit):
            peers.main(given)
        assert told in capsys.readouterr().err


def test_a_run_that_is_ended_ends_its_servers(folder: Path, tmp_path: Path) -> None:
    command = (sys.executable, str(FAKE), "{port}", "child")
    program = (
        "import sys\nfrom eval.peers import __main__ as peers\nfrom eval.peers.engines import Plan\n"
        f"peers.find_engines = lambda *_: ([Plan('kvcomm', {command!r}, is_kvcomm=True)], {{}})\n"
        "keep = peers._keep_start\n"
        "peers._keep_start = lambda bench, peer: (keep(bench, peer), print(*peer.tree.pids(), flush=True))\n"
        f"sys.exit(peers.main(['--model', {str(folder)!r}, '--only', 'streams', '--quick', '--out', "
        f"{str(tmp_path / 'run.json')!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        pids = [int(pid) for pid in running.stdout.readline().split()]
        assert len(pids) == 2
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE_S) == 1
    assert all(is_gone(pid) for pid in pids)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.slow
def test_kvcomm_alone_end_to_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "QUICK", Sizes(**{**vars(TINY), "turns": 1}))
    given = ["--model", str(folder), "--quick", "--json", "--out", str(tmp_path / "run.json"), "--threads", "1"]
    llama, vllm = ["--llama-server", "/nowhere/llama"], ["--vllm-python", "/nowhere/python"]
    assert peers.main([*given, "--only", "first,streams,shifted,tokens", *llama, *vllm]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    again = peers.Report("peers", [], report["config"], json.loads((tmp_path / "run.json").read_text())["samples"])
    peers.emit(again, peers._parse([*given[:3], "--out", given[5]]))
    shown = capsys.readouterr().out
    assert "decode3" in shown
    assert "vllm is left out" in shown
    values = {figure["id"]: figure["value"] for figure in report["figures"]}
    assert values["hit_kvcomm_cpu_s"] > 0
    assert values["start_cpu_s"] == values["start_kvcomm_cpu_s"] > 0.5
    assert values["memory_kvcomm_mb"] > 50
    assert 0 <= values["shifted_rung0_kvcomm_moved"] <= 1
    assert report["config"]["idle_share"].keys() == {"kvcomm"}
    assert "setup-env --integration vllm" in report["config"]["skipped"]["vllm"]
    assert "--gguf" in report["config"]["skipped"]["llama"]
    assert "vllm is left out" in told.err
    assert not any("_vs_" in name for name in values)
    assert json.loads((tmp_path / "run.json").read_text())["samples"]["prefill_kvcomm_s"]
