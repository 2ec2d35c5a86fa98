"""Loading by packaged name, folder and hub id, and one clear error for every way in which it fails."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from transformers import T5Config
from transformers.utils import logging

from kvcomm.errors import (
    DownloadError,
    InvalidRequest,
    KVCommError,
    ModelLoadError,
    UnknownModel,
    UnsupportedModel,
)
from kvcomm.model import loading
from kvcomm.model.loading import LoadedModel, load_model
from kvcomm.model.registry import PackagedModel
from kvcomm.model.weights import weights_digest
from tests.tiny import TinyModel, tiny_model


@pytest.fixture
def folder(tiny: TinyModel, tmp_path: Path) -> Path:
    """A saved tiny model."""
    folder = tmp_path / "model"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def test_folder(folder: Path, tiny: TinyModel) -> None:
    loaded = load_model(folder)

    ids = torch.tensor([tiny.tokenizer.encode("three apples are left")])
    assert torch.equal(loaded.model(ids).logits, tiny.model(ids).logits)
    assert (loaded.name, loaded.source) == (str(folder), "folder")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_same_identity_whoever_loaded_it(folder: Path, tiny: TinyModel) -> None:
    assert load_model(folder).weights_digest == weights_digest(tiny.model)


def test_packaged_name(entry: PackagedModel) -> None:
    loaded, again = load_model(entry.name), load_model(entry.name)

    tiny = tiny_model()
    ids = tiny.tokenizer.encode("You are a helpful agent.")
    assert (loaded.name, loaded.source, loaded.weights_digest) == ("tiny", "packaged", again.weights_digest)
    assert loaded.tokenizer.encode("You are a helpful agent.") == ids
    assert loaded.tokenizer.chat_template == tiny.tokenizer.chat_template
    assert torch.equal(loaded.model(torch.tensor([ids])).logits, tiny.model(torch.tensor([ids])).logits)


def test_packaged_name_wins_over_a_folder_of_that_name(
    entry: PackagedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename(entry.name)

    assert load_model(entry.name).source == "packaged"
    assert load_model(f"./{entry.name}").source == "folder"
    assert load_model(Path(entry.name)).source == "folder"


def test_real_model_answers(smollm2: LoadedModel) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = smollm2.model.generate(**ids, max_new_tokens=8, do_sample=False)

    assert (smollm2.source, smollm2.model.dtype) == ("packaged", torch.float32)
    assert "Paris" in smollm2.tokenizer.decode(out[0][ids["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_dtype(dtype: torch.dtype | str | None, expected: torch.dtype, folder: Path) -> None:
    assert load_model(folder, dtype=dtype).model.dtype == expected


@pytest.mark.parametrize(
    ("features", "expected", "reason"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, "AMX"),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16, "AVX512-BF16"),
        ({"amx_bf16": False, "avx512_bf16": False}, torch.float32, "neither"),
        ({}, torch.float32, "neither"),
    ],
)
def test_auto_dtype_is_what_the_processor_multiplies(
    features: dict[str, bool],
    expected: torch.dtype,
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    with caplog.at_level("INFO", "kvcomm.model"):
        assert load_model(folder, dtype="auto", device="cpu").model.dtype == expected
    (said,) = [record.getMessage() for record in caplog.records if "dtype auto" in record.getMessage()]
    assert reason in said


@pytest.mark.parametrize("dtype", ["int8", "float33", torch.int64])
def test_unusable_dtype(dtype: torch.dtype | str, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"dtype .* choose among float32, bfloat16, float16 and auto"):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_unusable_device(device: str, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=f"device '{device}' cannot be used here"):
        load_model(folder, device=device)


def drop_a_parameter(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def spoil_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "nix"}}))


def become_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[KVCommError], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ModelLoadError, r"no config\.json"),
    "torn config": (lambda folder: os.truncate(folder / "config.json", 50), ModelLoadError, "config"),
    "pickle only": (become_pickle, ModelLoadError, r"no \*\.safetensors; weights are loaded from safetensors only"),
    "truncated": (
        lambda folder: os.truncate(folder / "model.safetensors", 999),
        ModelLoadError,
        "damaged or cut short",
    ),
    "parameter missing": (drop_a_parameter, ModelLoadError, "lacks 1 parameters, such as model.layers.1.mlp.up"),
    "other shape": (
        lambda folder: edit_config(folder, intermediate_size=96),
        ModelLoadError,
        r"mlp\.down_proj\.weight has shape \[32, 64\] in the checkpoint, \[32, 96\] by its config\.json",
    ),
    "config of wrong type": (lambda folder: edit_config(folder, hidden_size="x"), ModelLoadError, "hidden_size"),
    "unknown activation": (lambda folder: edit_config(folder, hidden_act="nix"), ModelLoadError, "nix"),
    "torn tokenizer": (lambda folder: os.truncate(folder / "tokenizer.json", 99), ModelLoadError, "tokenizer"),
    "other tokenizer": (spoil_tokenizer, ModelLoadError, "no usable tokenizer"),
    "no tokenizer": (drop_tokenizer, ModelLoadError, "tokenizer"),
    "unknown architecture": (lambda folder: edit_config(folder, model_type="nix"), UnsupportedModel, "nix"),
    "encoder-decoder": (
        lambda folder: (folder / "config.json").write_text(T5Config().to_json_string()),
        UnsupportedModel,
        "T5",
    ),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_bad_folder(what: str, folder: Path) -> None:
    spoil, error, message = BAD_FOLDERS[what]
    spoil(folder)

    with pytest.raises(error, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_file_instead_of_folder(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a file; give the folder"):
        load_model(folder / "config.json")


@pytest.mark.parametrize("name", ["smollm3-135m", "./nowhere", "a/b/c", Path("nowhere/model")])
def test_unknown_name(name: str | Path) -> None:
    with pytest.raises(UnknownModel, match=r"not a packaged name \(.*smollm2-135m.*\), not an existing folder"):
        load_model(name)


def test_hub_offline_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "urlopen", no_network)

    with pytest.raises(DownloadError, match=r"'someone/something' .*hf download someone/something") as caught:
        load_model("someone/something")
    assert "\n" not in str(caught.value)


def test_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(request: urllib.request.Request, timeout: float) -> None:
        asked.append(request.full_url)
        raise URLError("Name or service not known")

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "urlopen", unreachable)

    with pytest.raises(DownloadError, match="give the folder instead of the id"):
        load_model("someone/something")
    assert asked == [hub.ENDPOINT]


def no_network(*_arguments: object, **_options: object) -> None:
    raise AssertionError("asked the network although HF_HUB_OFFLINE is set")


def test_silent_and_settings_as_before(folder: Path, entry: PackagedModel, capfd: pytest.CaptureFixture[str]) -> None:
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load_model(entry.name)
        load_model(folder)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_progress_is_plain_lines_without_a_terminal(entry: PackagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(entry.name, progress=True)
    load_model(entry.name, progress=True)

    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["unpacking", "converting"]
