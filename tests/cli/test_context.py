"""`kvcomm context`: what is kept equals what an engine computes, errors name the way out, nothing leaks."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli.app import run
from kvcomm.engine.engine import Engine
from tests.cli.test_store import write_context

pytestmark = pytest.mark.usefixtures("home", "engines")

Call = Callable[..., Any]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that works and return its JSON."""

    def called(*arguments: str) -> Any:
        code = run([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return called


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that does not work and return its one line on stderr."""

    def failed(*arguments: str, code: int = 2) -> str:
        assert run(list(arguments)) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return failed


@pytest.fixture
def judge(model_folder: Path) -> Iterator[Engine]:
    """An engine of the test's own."""
    with Engine.load(model_folder) as engine:
        yield engine


@pytest.mark.parametrize(
    "arguments",
    [
        ["context", "create", "x", "--text", "Hello"],
        ["segment", "add", "x", "--text", "Hello"],
        ["snapshot", "restore", "{snapshot}", "x"],
    ],
)
def test_a_folder_that_cannot_be_written_is_found_out_before_anything_is_computed(
    arguments: list[str], fails: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a long prompt was computed first and then thrown away."""
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    snapshot = write_context(tmp_path / "x.safetensors")
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "contexts"
    err = fails(*(word.format(snapshot=snapshot) for word in arguments), "--dir", str(folder), code=1)
    assert f"cannot write {folder}: Not a directory" in err
    assert "--dir" in err


def restored_tokens(judge: Engine, file: str) -> tuple[int, ...]:
    with judge.restore(file) as context:
        return context.tokens


def test_life_of_a_context(call: Call, judge: Engine, home: Path, tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text("The dog does not mind. ")
    call("segment", "add", "tools", "--text", "You are a helpful agent. ")
    texts = ("You are a helpful agent. ", "The dog does not mind. ", "Question: why?")
    expected = [judge.segment(text).token_ids for text in texts]

    created = call(
        "context", "create", "base", "--segment", "tools", "--file", str(tmp_path / "doc.txt"), "--text", texts[2]
    )
    assert created["file"] == str(home / "base.safetensors")
    assert (created["num_tokens"], created["num_steps"]) == (sum(map(len, expected)), 3)
    assert created["num_bytes"] == (home / "base.safetensors").stat().st_size
    tokens = tuple(token for ids in expected for token in ids)
    assert restored_tokens(judge, created["file"]) == tokens

    forked = call("context", "fork", "base", "left")
    assert (forked["copied_bytes"], forked["forked_from"]) == (0, "base")

    extended = call("context", "extend", "left", "--text", " Answer:")
    more = judge.segment(" Answer:").token_ids
    assert restored_tokens(judge, extended["file"]) == tokens + more
    assert restored_tokens(judge, created["file"]) == tokens  # a fork never changes what it was forked from

    answer = call("context", "generate", "left", "--max-new-tokens", "9", "--save-as", "answered")
    cold = judge.generate([*tokens, *more], max_new_tokens=9)
    assert (answer["text"], tuple(answer["token_ids"])) == (cold.text, cold.token_ids)
    assert answer["usage"]["computed_tokens"] == 0
    assert answer["usage"]["exact_tokens"] == len(tokens) + len(more)
    assert restored_tokens(judge, answer["saved"]["file"]) == tokens + more + cold.token_ids
    assert restored_tokens(judge, extended["file"]) == tokens + more  # as it was

    listed = {entry["name"]: entry for entry in call("context", "ls")["contexts"]}
    assert list(listed) == ["answered", "base", "left"]
    assert [step["name"] for step in listed["answered"]["path"]] == ["tools", "doc", None, None, "answer"]
    assert listed["base"]["namespace"] == judge.namespace()

    removed = call("context", "rm", "base", "left")["removed"]
    assert [item["name"] for item in removed] == ["base", "left"]
    assert removed[0]["freed_bytes"] == created["num_bytes"]
    assert [entry["name"] for entry in call("context", "ls")["contexts"]] == ["answered"]


def test_extend_from_a_parent(call: Call, judge: Engine) -> None:
    call("context", "create", "base", "--text", "The quick brown")
    child = call("context", "create", "child", "--extend-from", "base", "--text", " fox")
    assert child["num_steps"] == 2
    tokens = judge.segment("The quick brown").token_ids + judge.segment(" fox").token_ids
    assert restored_tokens(judge, child["file"]) == tokens
    answer = call("context", "generate", "child", "--max-new-tokens", "6")
    assert tuple(answer["token_ids"]) == judge.generate(list(tokens), max_new_tokens=6).token_ids


def test_sampling(call: Call, judge: Engine) -> None:
    call("context", "create", "base", "--text", "The quick brown")
    answer = call(
        "context", "generate", "base", "--max-new-tokens", "30", "--temperature", "1", "--seed", "5", "--stop", "e"
    )
    wanted = judge.generate("The quick brown", max_new_tokens=30, temperature=1.0, seed=5, stop=("e",))
    assert (answer["text"], answer["finish_reason"]) == (wanted.text, wanted.finish_reason)


def test_standard_input(call: Call, judge: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The fox")))
    created = call("context", "create", "base", "--file", "-")
    assert restored_tokens(judge, created["file"]) == judge.segment("The fox").token_ids


def test_start_tokens_come_first_once(call: Call, judge: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers that begin every text with a start token: the context has it once, whatever it is made of."""
    call("segment", "add", "tools", "--text", "Tools.")
    monkeypatch.setattr("kvcomm.engine.encoding.TextEncoder.start_ids", (1,))
    call("context", "create", "base", "--segment", "tools", "--text", "Go.")
    child = call("context", "create", "child", "--extend-from", "base", "--text", "On.")
    begun = call("context", "create", "begun", "--text", "<|im_start|>Go.")
    parts = [judge.segment(text).token_ids for text in ("Tools.", "Go.", "On.")]
    assert restored_tokens(judge, child["file"]) == (1, *parts[0], *parts[1], *parts[2])
    assert restored_tokens(judge, begun["file"]) == (1, *parts[1])


def test_for_people(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    def shown(*arguments: str) -> str:
        assert run(["context", *arguments]) == 0
        return capsys.readouterr().out

    assert shown("ls") == f"no contexts in {home}\n"
    assert shown("show") == f"no contexts in {home}\n"
    assert shown("create", "base", "--text", "a").startswith("created base: 1 token, 1 step, ")
    assert shown("fork", "base", "left") == "forked base as left, 0 B copied\n"
    assert shown("extend", "left", "--text", "b").startswith("extended left: 2 tokens, 2 steps, ")
    header, *rows = shown("ls").splitlines()
    assert header.split() == ["name", "tokens", "steps", "fidelity", "model", "size", "age"]
    assert [row.split()[:4] for row in rows] == [["base", "1", "1", "exact"], ["left", "2", "2", "exact"]]
    tree = shown("show").splitlines()
    assert tree[0].startswith("LlamaForCausalLM, float32, ")
    assert [line.split("●")[-1].split()[0] for line in tree if "●" in line] == ["base", "left"]
    assert "left" in shown("show", "base")
    assert shown("rm", "left").startswith("removed left, ")


def test_generate_prints_the_answer_on_stdout_and_counts_on_stderr(
    capsys: pytest.CaptureFixture[str], judge: Engine
) -> None:
    run(["context", "create", "base", "--text", "The dog"])
    capsys.readouterr()
    assert run(["context", "generate", "base", "--max-new-tokens", "4", "--save-as", "more"]) == 0
    out, err = capsys.readouterr()
    wanted = judge.generate("The dog", max_new_tokens=4).text
    assert out == "".join(char if char.isprintable() else "\ufffd" for char in wanted) + "\n"
    assert "0 computed; 4 generated" in err
    assert "kept as more: " in err


def test_a_damaged_file_hinders_no_other(
    call: Call, fails: Call, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    created = call("context", "create", "good", "--text", "The dog")
    content = Path(created["file"]).read_bytes()
    (home / "cut.safetensors").write_bytes(content[:-1])
    flipped = bytearray(content)
    flipped[-1] ^= 1
    (home / "flipped.safetensors").write_bytes(flipped)

    assert [(entry["name"], entry["refusal"] is None) for entry in call("context", "ls")["contexts"]] == [
        ("cut", False),
        ("flipped", True),  # only its tensors are wrong, and a listing does not read those
        ("good", True),
    ]
    tree = call("context", "show")
    assert [entry["name"] for entry in tree["refused"]] == ["cut"]
    assert run(["context", "show"]) == 0
    assert "A refused file is never used. Remove it with `kvcomm context rm NAME`." in capsys.readouterr().out

    for name, why in {"cut": "not a whole safetensors file", "flipped": "was altered"}.items():
        for command in (["generate", name], ["extend", name, "--text", "x"]):
            error = fails("context", *command, code=1)
            assert f"{home / name}.safetensors" in error
            assert why in error
            assert f"remove it with `kvcomm context rm {name}`" in error
    assert fails("context", "show", "cut", code=1)
    assert fails("context", "create", "x", "--extend-from", "flipped", "--text", "x", code=1)
    assert call("context", "generate", "good", "--max-new-tokens", "2")["text"]
    call("context", "rm", "cut", "flipped")
    assert [entry["name"] for entry in call("context", "ls")["contexts"]] == ["good"]


def test_another_model(call: Call, fails: Call, other_model_folder: Path) -> None:
    call("context", "create", "base", "--text", "The dog")
    error = fails("context", "generate", "base", "--model", str(other_model_folder), code=1)
    assert "belongs to another namespace" in error
    assert "give the model it was made with as --model" in error


def test_segment_of_another_model(call: Call, fails: Call, other_model_folder: Path) -> None:
    call("segment", "add", "tools", "--text", "Tools.", "--model", str(other_model_folder))
    error = fails("context", "create", "base", "--segment", "tools")
    assert f"segment 'tools' was tokenized for another model ({other_model_folder})" in error


def test_segment_whose_text_was_altered(call: Call, fails: Call, home: Path) -> None:
    call("segment", "add", "tools", "--text", "Tools.")
    file = home / "tools.segment.json"
    file.write_text(file.read_text().replace("Tools.", "Fools."))
    assert "segment 'tools'" in fails("context", "create", "base", "--segment", "tools")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "base"), "give what the context shall hold: --text, --file or --segment"),
        (("create", "base", "--text", ""), "the texts given have no tokens"),
        (("create", "../base", "--text", "x"), "bad name '../base'"),
        (("create", "taken", "--text", "x"), "context 'taken' exists"),
        (("create", "base", "--segment", "nix"), "no segment 'nix'"),
        (("create", "base", "--extend-from", "nix", "--text", "x"), "no context 'nix'"),
        (("create", "base", "--file", "nix.txt"), "nix.txt cannot be read: No such file"),
        (("create", "base", "--text", "x " * 9000), "exceed the model's limit of 8192"),
        (("extend", "taken"), "give what the context shall hold"),
        (("extend", "taken", "--text", "x", "--save-as", "taken"), "context 'taken' exists"),
        (("generate", "nix"), "no context 'nix'"),
        (("generate", "taken", "--max-new-tokens", "9999"), "exceed the model's limit of 8192"),
        (("fork", "taken", "taken"), "context 'taken' exists"),
        (("rm", "taken", "nix"), "no context 'nix'"),
        (("show", "nix"), "no context 'nix'"),
        (("generate", "taken", "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
    ],
)
def test_wrong_input(
    arguments: tuple[str, ...], message: str, call: Call, fails: Call, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("context", "create", "taken", "--text", "The dog")
    before = {file.name: file.read_bytes() for file in home.iterdir()}
    assert message in fails("context", *arguments)
    assert run(["context", *arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in json.loads(err)["error"]["message"]
    assert {file.name: file.read_bytes() for file in home.iterdir()} == before


def test_file_that_is_not_text(fails: Call, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in fails("context", "create", "base", "--file", str(tmp_path / "x"))


def test_force_replaces(call: Call, judge: Engine) -> None:
    call("context", "create", "base", "--text", "The dog")
    again = call("context", "create", "base", "--text", "The fox", "--force")
    assert restored_tokens(judge, again["file"]) == judge.segment("The fox").token_ids


def test_dir_wins_over_the_environment(call: Call, tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "elsewhere"
    call("context", "create", "base", "--text", "x", "--dir", str(folder))
    assert (folder / "base.safetensors").exists()
    assert not home.exists()


def test_listing_loads_no_model(call: Call, home: Path, engines: list[Engine]) -> None:
    write_context(home / "base.safetensors")
    call("context", "ls")
    call("context", "show", "base")
    call("context", "fork", "base", "left")
    call("context", "rm", "base")
    assert engines == []


def test_interrupt_in_the_middle_of_an_answer(
    call: Call, home: Path, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    call("context", "create", "base", "--text", "The dog")
    before = {file.name: file.read_bytes() for file in home.iterdir()}

    def interrupt(text: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvcomm.cli.context.printable", interrupt)
    assert run(["context", "generate", "base", "--max-new-tokens", "4000", "--save-as", "more"]) == 130
    assert {file.name: file.read_bytes() for file in home.iterdir()} == before
    assert len(engines) == 2
