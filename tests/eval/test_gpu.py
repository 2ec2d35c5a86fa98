"""`python -m eval.gpu` without a GPU: all parts on tiny sizes, parts that fail, that are cut, and that are skipped."""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.gpu import __main__ as gpu
from eval.gpu import compiling, kernels, paper
from eval.gpu.parts import PARTS, Part, run_part
from eval.gpu.records import Clock, Found, Recorder
from kvcomm.lab.timings import Samples

A_LONG_TIME = 600.0


def options(folder: Path, *arguments: str) -> Namespace:
    return gpu._options(["--quick", "--device=cpu", f"--model={folder}", *arguments])


def done(name: str, given: Namespace, tmp_path: Path, seconds: float = A_LONG_TIME) -> Found:
    run_part(name, given, seconds, tmp_path / "part.jsonl")
    return Found.read(tmp_path / "part.jsonl")


def values(found: Found) -> dict[str, float]:
    return {figure.id: figure.value for figure in found.figures}


def test_passes(tiny_folder: Path, tmp_path: Path) -> None:
    found = done("passes", options(tiny_folder), tmp_path)
    assert (found.state, found.failed, found.cut) == ("done", [], [])
    figures = values(found)
    assert figures["decode_8_tokens_per_s"] == pytest.approx(8 / figures["decode_8_step_s"])
    assert figures["prefill_tokens_per_s"] == pytest.approx(64 / figures["prefill_s"])
    assert {f"decode_{rows}_step_s" for rows in (1, 8, 32)} | {"hit_s", "decode_1_stock_step_s"} <= figures.keys()
    assert found.settings == {"attention": "torch", "dtype": "float32"}


def test_paper(tiny_folder: Path, tmp_path: Path) -> None:
    found = done("paper", options(tiny_folder), tmp_path)
    assert found.state == "done"
    assert [row[:2] for row in found.rows] == [("2x24_64", "1"), ("2x24_64", "2"), ("2x24_64", "all")]
    figures = values(found)
    assert figures["aligned_2x24_64"] == 1.0
    dense, kvcomm = found.rows[1][3], found.rows[1][5]
    assert isinstance(dense, float)
    assert isinstance(kvcomm, float)
    assert figures["speedup_2x24_64"] == pytest.approx(dense / kvcomm)
    assert found.settings["num_left"] > 0


def test_the_papers_own_setting_comes_first() -> None:
    given = gpu._options(["--device=cpu"])
    own, *cells = paper.settings_of(given)
    assert own == (5, 512, 1024, 512)
    assert len(cells) == len(set(cells)) == 20
    assert cells[:3] == [(3, 512, 1024, 512), (3, 64, 1024, 128), (3, 1024, 1024, 1024)]


def test_a_team_that_is_too_long_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    given = options(tiny_folder)
    given.small = False
    given.question_tokens = 300
    given.role_tokens = given.output_tokens = 16
    found = done("paper", given, tmp_path)
    assert found.skipped[0] == "team 3x512_512: longer than the model's 512 tokens"
    assert "speedup_2x16_16" in values(found)


def test_graphs_need_cuda(tiny_folder: Path, tmp_path: Path) -> None:
    found = done("graphs", options(tiny_folder), tmp_path)
    assert (found.state, found.figures) == ("skipped", [])
    assert found.skipped == ["compiling and graphs are measured on a CUDA device, this is cpu"]


def test_mlps_are_measured_one_way_after_the_other(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; a way that fails leaves the others."""

    class Device:
        type = "cuda"

    class Model(torch.nn.Module):
        device, dtype = Device(), torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 4)})
            self.config = self

        def get_text_config(self) -> Namespace:
            return Namespace(hidden_size=4)

    monkeypatch.setattr(compiling.torch, "randn", lambda *sizes, dtype, device: torch.ones(sizes, dtype=dtype))
    monkeypatch.setattr(compiling, "_compiled", compiling._eager)
    record = Recorder(tmp_path / "graphs.jsonl", Clock(A_LONG_TIME))
    engine: Any = Namespace(model=Model())
    compiling.measure(engine, lambda count: [0] * count, options(tiny_folder), record)
    found = Found.read(tmp_path / "graphs.jsonl")
    assert {"mlps_1_eager_s", "mlps_8_compiled_s", "mlps_32_compiled_first_s"} <= values(found).keys()
    assert [each.split(":")[0] for each in found.failed] == ["mlps_1_graph", "mlps_8_graph", "mlps_32_graph"]
    assert found.state == "failed"


def test_kernels_of_torch_against_the_equation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the Triton kernels fail each for itself, as on a device that they do not run on."""
    monkeypatch.setattr(kernels, "DTYPES", {"fp32": torch.float32})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = done("kernels", options(tmp_path), tmp_path)
    figures = values(found)
    for name in ("decode_1", "decode_8", "decode_32", "hit", "prefill"):
        assert figures[f"{name}_fp32_torch_error"] < 1e-5
    read = 8 * 96 * 2 * 2 * 64 * 4 + 2 * 8 * 4 * 64 * 4  # 8 rows over 96 keys and values of 2 heads; query and result
    seconds, rate = figures["decode_8_fp32_torch_s"], figures["copy_bytes_per_s"]
    assert figures["decode_8_fp32_torch_bandwidth"] == pytest.approx(read / seconds / rate)
    assert figures["align_fp32_reference_bandwidth"] > 0
    assert [each.split(":")[0] for each in found.skipped] == [
        f"{name}_fp32_triton" for name in ("decode_1", "decode_8", "decode_32", "hit", "prefill")
    ]
    assert "needs a CUDA or ROCm device" in found.skipped[0]
    assert [each.split(":")[0] for each in found.failed] == ["rotate_fp32_triton", "align_fp32_triton"]
    assert found.state == "failed"


def test_work_that_can_be_counted() -> None:
    assert kernels.Case("x", ((0, 3), (4, 5))).num_pairs == 1 + 2 + 3 + 5
    assert kernels.Case("x", ((0, 3), (4, 5))).num_tokens == 4


@pytest.mark.parametrize("name", ["kernels", "passes", "paper"])
def test_nothing_is_begun_when_the_time_is_over(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    found = done(name, options(tiny_folder), tmp_path, seconds=0.0)
    assert found.state == "cut"
    assert found.cut[0].startswith("its time was over before ")
    assert values(found).keys() <= {"copy_bytes_per_s"}


def test_what_a_part_raises_is_recorded(tmp_path: Path) -> None:
    found = done("passes", options(tmp_path / "nothing"), tmp_path)
    assert found.state == "failed"
    (why,) = found.failed
    assert "nothing" in why


def found_before(given: Namespace, record: Recorder) -> None:
    record.samples("fast_s", [1.0, 3.0], "s", goal="<= 2")
    record.row(("team", 1.0))


def dies(given: Namespace, record: Recorder) -> None:
    found_before(given, record)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(given: Namespace, record: Recorder) -> None:
    signal.pause()


FAKES = {"good": (0.5, found_before), "dies": (0.5, dies), "hangs": (0.001, hangs)}
CHILD = (
    "import sys; from tests.eval import test_gpu as t; from eval.gpu import __main__ as g, parts as p; "
    "p.PARTS.clear(); p.PARTS.update({n: p.Part(s, measure=m) for n, (s, m) in t.FAKES.items()}); g.main(sys.argv[1:])"
)


@pytest.fixture
def fake_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that do nothing of their own; their processes find them as this one does."""
    monkeypatch.setattr(gpu, "PARTS", {name: Part(share, measure=work) for name, (share, work) in FAKES.items()})
    real = gpu.subprocess.Popen

    def popen(command: list[str], **keywords: Any) -> Any:
        is_part = command[:3] == [sys.executable, "-m", "eval.gpu"]  # others ask git for the commit
        return real([sys.executable, "-c", CHILD, *command[3:]] if is_part else command, **keywords)

    monkeypatch.setattr(gpu.subprocess, "Popen", popen)


@pytest.mark.usefixtures("fake_parts")
def test_a_part_that_dies_or_hangs_loses_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    arguments = ["--device=cpu", "--quick", "--parts=dies,hangs,good", "--minutes=20", f"--out={out}", "--json"]
    assert gpu.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    states = report["config"]["parts"]
    assert {name: part["state"] for name, part in states.items()} == {
        "dies": "failed",
        "hangs": "cut",
        "good": "done",
    }
    assert states["dies"]["failed"] == ["its process ended with signal 11"]
    assert states["hangs"]["cut"][0].startswith("it was stopped after ")
    figures = [(figure["id"], figure["value"]) for figure in report["figures"]]
    assert figures.count(("fast_s", 2.0)) == 2
    assert ("parts_failed", 1) in figures
    assert len(report["grid"]["rows"]) == 2
    assert json.loads(out.read_text())["samples"] == {"fast_s": [1.0, 3.0]}


def test_without_a_gpu_it_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([f"--out={tmp_path / 'run.json'}"]) == 1
    assert "error: no CUDA device here; --device cpu --quick shows" in capsys.readouterr().err


def test_a_part_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device=cpu", "--parts=kernels,speed"])
    assert "there is no part 'speed'; there are self_test, kernels" in capsys.readouterr().err


def test_shares_are_of_the_whole() -> None:
    assert sum(part.share for part in PARTS.values()) == pytest.approx(1.0)
    assert all((part.measure is None) != (part.on_engine is None) for part in PARTS.values())


def test_only_parts_that_ask_for_kernels_interpret_them() -> None:
    assert gpu._environment("kernels", "cpu")["TRITON_INTERPRET"] == "1"
    assert gpu._environment("kernels", "cuda:0") is os.environ
    assert gpu._environment("passes", "cpu") is os.environ


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "part.jsonl"
    record = Recorder(file, Clock(A_LONG_TIME))
    record.figure("one", 1.0, "x")
    record.cut("two")
    with file.open("a") as stream:
        stream.write('{"figure": {"id": "tw')
    found = Found.read(file)
    assert (values(found), found.cut, found.state) == ({"one": 1.0}, ["its time was over before two"], "cut")
    assert Found.read(tmp_path / "none") == Found()


def test_timing_leaves_out_the_first_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    found = kernels.timed(lambda: calls.append(1), Namespace(device="cpu", repeats=3))
    assert isinstance(found, Samples)
    assert (len(calls), len(found.values)) == (4, 3)
