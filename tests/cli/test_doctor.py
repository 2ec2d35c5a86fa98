"""`kvcomm doctor`: its JSON against what can be asked elsewhere, and both answers about a model."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from kvcomm.align.ops.choice import available_ops
from kvcomm.cli.app import run
from kvcomm.model.attention import available_backends
from kvcomm.model.loading import auto_dtype, dtype_name
from kvcomm.model.self_test import SelfTest, Verdict
from tests.tiny import TinyModel, tiny_tokenizer


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run(["doctor", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)

    assert found["versions"]["torch"] == version("torch")
    assert found["machine"]["torch_threads"] == torch.get_num_threads()
    assert found["machine"]["omp_wait_policy"] == os.environ["OMP_WAIT_POLICY"]
    assert [tuple(info.values()) for info in found["attention"]] == [tuple(info) for info in available_backends()]
    assert [tuple(info.values()) for info in found["moving"]] == [tuple(info) for info in available_ops()]
    assert found["moving"][0]["runs"]
    assert found["machine"]["dtype_auto"].startswith(dtype_name(auto_dtype().dtype))
    assert found["extras"].keys() == {"faiss", "triton", "server", "tiers", "redis", "eval"}
    assert "model" not in found


def test_kernels_that_fail_their_self_test(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`auto` takes the others, and the report says why."""
    pytest.importorskip("triton", reason="triton is not installed")

    def failed(test: SelfTest, device: torch.device) -> Verdict:
        return Verdict(False, f"its self-test on {device} failed: decode differs")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr("kvcomm.model.self_test.verdict", failed)
    monkeypatch.setattr("kvcomm.align.ops.choice.verdict", failed)
    found = report(capsys)
    assert found["attention"] == [
        {"name": "torch", "runs": True, "reason": "runs on cuda; auto takes it"},
        {"name": "triton", "runs": False, "reason": "its self-test on cuda failed: decode differs"},
        {
            "name": "flashinfer",
            "runs": False,
            "reason": "flashinfer is not installed: pip install flashinfer-python",
        },
    ]
    default, *others = found["moving"]
    assert default == {"name": "reference", "runs": True, "reason": "default"}
    (triton,) = (each for each in others if each["name"] == "triton")
    assert not triton["runs"]
    assert "its self-test on cuda failed: decode differs" in triton["reason"]


def test_tier(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = report(capsys, "--tier", str(tmp_path))["tier"]
    assert found == {"works": True, "kind": "folder", "url": str(tmp_path), "holds_anything": False}
    found = report(capsys, "--tier", "ftp://user:word@host/kv")["tier"]
    assert not found["works"]
    assert "ftp" in found["reason"]
    assert "word" not in found["reason"]


def test_extra_is_there_when_all_or_one_of_its_packages_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = {"faiss-gpu": "1.9", "fastapi": "1.0"}
    monkeypatch.setattr("kvcomm.cli.doctor._version", installed.get)

    extras = report(capsys)["extras"]
    assert extras["faiss"] == {"installed": True, "packages": {"faiss-gpu": "1.9"}}
    assert extras["server"] == {"installed": False, "packages": {"fastapi": "1.0"}}


def test_cache_folder_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVCOMM_CACHE", str(tmp_path / "a" / "b"))

    cache = report(capsys)["cache"]
    assert (cache["folder"], cache["writable"]) == (str(tmp_path / "a" / "b"), True)
    assert cache["models"] == {"smollm2-135m": "absent"}
    assert not (tmp_path / "a").exists()


def test_supported_model(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)

    found = report(capsys, str(tmp_path))["model"]
    assert (found["supported"], found["movable"], found["architecture"]) == (True, True, "LlamaForCausalLM")
    # Keys and values of 2 layers, 2 heads, 8 channels, 4 bytes each.
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4


def test_refused_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    found = report(capsys, str(tmp_path))["model"]
    assert found["supported"] is False
    assert "Mamba" in found["reason"]


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    for title in ("Installed", "Extras", "Machine", "Attention back ends", "Cache folder"):
        assert f"\n{title}" in f"\n{out}"


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "nix"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown model 'nix'")
