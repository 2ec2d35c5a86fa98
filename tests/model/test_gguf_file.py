"""Models in GGUF files: a tiny one written by the package gguf loads by its path, and what is none says so."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from kvcomm.engine.engine import Engine
from kvcomm.errors import KVCommError, MissingExtra, ModelLoadError, UnknownModel, UnsupportedModel
from kvcomm.model import gguf_file
from kvcomm.model.loading import load_model
from tests.model.tiny_wheel import write_gguf
from tests.tiny import TinyModel

TEXT = "three apples are left"


@pytest.fixture
def file(tiny: TinyModel, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny)
    return file


def test_loads_by_its_path(file: Path, tiny: TinyModel) -> None:
    loaded = load_model(file)
    ids = tiny.tokenizer.encode(TEXT)
    assert loaded.tokenizer.encode(TEXT) == ids
    assert loaded.tokenizer.chat_template == tiny.tokenizer.chat_template
    with torch.inference_mode():
        found, expected = (model(torch.tensor([ids])).logits for model in (loaded.model, tiny.model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (loaded.name, loaded.source, loaded.model.dtype) == (str(file), "gguf", torch.float32)
    assert load_model(str(file), dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_engine_answers_from_it(file: Path, tiny: TinyModel) -> None:
    with Engine.load(file) as engine, Engine(tiny.model, tiny.tokenizer) as expected:
        found, again = (engine.generate(TEXT * 4, max_new_tokens=5, temperature=0.0) for _ in range(2))
        assert found.token_ids == expected.generate(TEXT * 4, max_new_tokens=5, temperature=0.0).token_ids
        assert found.token_ids == again.token_ids
        assert again.usage.exact_tokens > 0


def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tiny.gguf: GGUF files are read by the package gguf.*: pip install gguf"):
        load_model(file)


def test_an_architecture_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(file, "grok")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"other.gguf: .*grok.* not supported") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_short(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelLoadError, match=r"tiny.gguf") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\3\4 a wheel")
    with pytest.raises(ModelLoadError, match=r"model.gguf is no GGUF file: it begins with b'PK"):
        load_model(file)


@pytest.mark.parametrize("name", ["nowhere.gguf", "models/nowhere.gguf"])
def test_a_file_that_is_not_there(name: str) -> None:
    """Nor is it taken for the id of a hub, whose form the second one has."""
    with pytest.raises(UnknownModel, match=rf"there is no file {name}"):
        load_model(name)


def test_parameters_that_are_missing(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    add = gguf.GGUFWriter.add_tensor

    def all_but_one(writer: gguf.GGUFWriter, name: str, *rest: object) -> None:
        if name != "blk.1.attn_k.weight":
            add(writer, name, *rest)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", all_but_one)
    write_gguf(file, tiny)
    with pytest.raises(KVCommError, match=r"tiny.gguf: it lacks 1 parameters, such as model.layers.1.self_attn.k_proj"):
        load_model(file)
