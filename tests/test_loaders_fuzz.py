"""Every file that is read, damaged at random: it is read, or refused with an error of kvcomm's that names the file."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kvcomm.agents.example_runs import examples
from kvcomm.agents.team import load_team
from kvcomm.agents.tuning.answers import KeptRun
from kvcomm.agents.tuning.plan import KeptCosts
from kvcomm.agents.tuning.profile import PairsTable, read_pairs, read_profile
from kvcomm.agents.tuning.replays import KeptOutcomes
from kvcomm.agents.tuning.rows import read_rows
from kvcomm.agents.tuning.state import claim, read_kept
from kvcomm.align.archive import export_archive, import_archive
from kvcomm.align.bank_file import load_bank, read_bank_header, save_bank
from kvcomm.align.prior import read_prior, write_prior
from kvcomm.align.profile_file import READERS_FILE, load_profile, read_readers
from kvcomm.cli.options import read_text
from kvcomm.cli.store import Store, context_entry
from kvcomm.errors import KVCommError
from kvcomm.lab.load.trace_file import read_trace
from kvcomm.server.keys import KeyFile, add_key
from kvcomm.server.settings import load_settings
from tests.align.test_prior import prior
from tests.align.test_profile_file import EDGES, SHAPE, bank, saved
from tests.cli.test_store import stored_segment
from tests.files.special import SPECIAL, make_special
from tests.lab.load.test_trace_file import AGENTIC, MOONCAKE
from tests.memory.snapshot_files import read, write_file
from tests.profiles import save_profile

TEAM = """
name = "pair"
[defaults]
rounds = 1
sampling = { max_new_tokens = 8, temperature = 0.5, top_k = 3 }
[[agents]]
name = "first"
system = "You solve."
prompt = "Question: {question}"
[[agents]]
name = "second"
prompt = "{first} was said."
sampling = { seed = 3, stop = ["a", "b"] }
"""
SETTINGS = """
port = 9000
model = "tiny"
request_timeout_s = 12.5
snapshots = "somewhere"
[limits]
requests_per_minute = 30
held_tokens = 1000
[engine]
page_size = 8
alpha = [0.5, 1.0, 1]
cache_ttl_s = 4
idle_after_s = 0.5
"""


class Loader(NamedTuple):
    """A kind of file: its name, a whole one, and who reads it."""

    name: str
    make: Callable[[Path], object]
    load: Callable[[Path], object]


def _lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _zipped(*values: Any) -> bytes:
    return gzip.compress(_lines(*values))


def _segment(file: Path) -> None:
    Store(file.parent).write_segment(file.name.removesuffix(".segment.json"), stored_segment(), force=True)


def _archive(file: Path) -> None:
    with TemporaryDirectory() as folder:
        export_archive(saved(Path(folder)), file)


def _unpack(file: Path) -> object:
    with TemporaryDirectory() as folder:
        return import_archive(file, Path(folder) / "new")


def _pairs(file: Path) -> object:
    """Somebody who altered them has the profile name them."""
    beside = file.with_name("p.toml")
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() and not file.is_symlink() else ""
    return read_pairs(read_profile(beside).model_copy(update={"pairs": PairsTable(digest=digest)}), beside)


def _claim(file: Path) -> None:
    claim(file.parent, {"model": "m", "team": "t"})


def _readers(file: Path) -> None:
    with TemporaryDirectory() as folder:
        file.write_bytes((saved(Path(folder)) / READERS_FILE).read_bytes())


RUN = {"row": "r", "agents": {"a": [[[None, [1, 2]], ["slot", [3]]], [4, 5]]}}
OUTCOMES = {"row": "r", "key": "k", "agents": {"a": [3, [[0.5, 1.0, 0.25, None, 7], None, [0.5, 1, 0, 0.1, 0]]]}}
COSTS = {"answer": 1.0, "learn": 0.5, "publish": 1, "replay": 0.0, "sample": 3.0, "num_answered": 4}
ROWS = [{"question": "how many?", "style": "short"}, {"question": "why?"}]

LOADERS = {
    "snapshot": Loader("planner.safetensors", lambda file: write_file(file.parent), read),
    "snapshot entry": Loader("planner.safetensors", lambda file: write_file(file.parent), context_entry),
    "bank": Loader(
        "x.anchors.safetensors",
        lambda file: save_bank(bank(EDGES[0], 1), SHAPE, "n", file),
        lambda file: (read_bank_header(file), load_bank(file, namespace="n", shape=SHAPE)),
    ),
    "readers": Loader(READERS_FILE, _readers, lambda file: read_readers(file.parent)),
    "anchors": Loader(
        READERS_FILE,
        lambda file: saved(file.parent),
        lambda file: load_profile(file.parent, namespace="n", shape=SHAPE),
    ),
    "prior": Loader("prior.json", lambda file: write_prior(prior(), file, name="tiny"), read_prior),
    "archive": Loader("x.tar", _archive, _unpack),
    "keys": Loader("keys.json", lambda file: add_key(file, "ann"), KeyFile.read),
    "segment": Loader("x.segment.json", _segment, lambda file: Store(file.parent).segment("x")),
    "settings": Loader("server.toml", lambda file: file.write_text(SETTINGS), lambda file: load_settings({}, {}, file)),
    "team": Loader("team.toml", lambda file: file.write_text(TEAM), load_team),
    "profile": Loader("p.toml", save_profile, read_profile),
    "profile's pairs": Loader(
        "p.pairs.json", lambda file: save_profile(file.with_name("p.toml")), lambda file: _pairs(file)
    ),
    "mooncake": Loader("t.jsonl", lambda file: file.write_bytes(_lines(*MOONCAKE)), read_trace),
    "agentic": Loader("t.jsonl", lambda file: file.write_bytes(_lines(*AGENTIC)), read_trace),
    "packed trace": Loader("t.jsonl.gz", lambda file: file.write_bytes(_zipped(*AGENTIC)), read_trace),
    "rows": Loader(
        "r.jsonl", lambda file: file.write_bytes(_lines(*ROWS)), lambda file: read_rows(file, load_team("gsm8k"))
    ),
    "packed rows": Loader(
        "r.jsonl.gz", lambda file: file.write_bytes(_zipped(*ROWS)), lambda file: read_rows(file, load_team("gsm8k"))
    ),
    "examples": Loader(
        "e.jsonl", lambda file: file.write_bytes(_lines(*ROWS)), lambda file: examples(load_team("gsm8k"), file)
    ),
    "text": Loader("text.txt", lambda file: file.write_text("a prompt, wörd by wörd"), read_text),
    "run": Loader("run.json", _claim, _claim),
    "costs": Loader("k.jsonl", lambda file: file.write_bytes(_lines(COSTS)), lambda file: read_kept(file, KeptCosts)),
    "answers": Loader(
        "k.jsonl",
        lambda file: file.write_bytes(_lines(RUN, RUN)),
        lambda file: [kept.run for kept in read_kept(file, KeptRun)],
    ),
    "outcomes": Loader(
        "k.jsonl",
        lambda file: file.write_bytes(_lines(OUTCOMES)),
        lambda file: [kept.agents for kept in read_kept(file, KeptOutcomes)],
    ),
}


@cache
def whole(kind: str) -> dict[str, bytes]:
    """The files of a whole one, by name."""
    with TemporaryDirectory() as name:
        file = Path(name) / LOADERS[kind].name
        LOADERS[kind].make(file)
        return {each.name: each.read_bytes() for each in Path(name).iterdir() if not each.name.endswith(".lock")}


def lay(kind: str, folder: Path, content: bytes) -> Path:
    """The files in a folder, the one in question with another content."""
    loader = LOADERS[kind]
    for name, each in whole(kind).items():
        (folder / name).write_bytes(content if name == loader.name else each)
    return folder / loader.name


def require_sound(kind: str, file: Path) -> bool:
    """Whether it is read; anything but an error of kvcomm's, that names it or its folder, fails."""
    refusal: KVCommError | None = None
    try:
        LOADERS[kind].load(file)
    except KVCommError as error:
        refusal = error
    if refusal is None:
        return True
    assert file.name in str(refusal) or str(file.parent) in str(refusal), refusal
    assert len(str(refusal)) < 2000, "nobody reads that"
    return False


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind, written to again and again."""
    return tmp_path_factory.mktemp("loaders")


@pytest.mark.parametrize("kind", LOADERS)
def test_whole_files_are_read(kind: str, tmp_path: Path) -> None:
    assert require_sound(kind, lay(kind, tmp_path, whole(kind)[LOADERS[kind].name]))


ODD = [
    b"",
    b"\0" * 64,
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"\xff\xfe\x00",
    b"null\n",
    b"[]\n",
    b"3\n",
    b'"text"\n',
    b"NaN\n",
    b"{}\n",
    b"a = " + b"9" * 5000,
    b"a = " + b"[" * 3000 + b"]" * 3000,
    b"a = 0x" + b"f" * 5000,
    b"\x1f\x8b\x08\x00",
]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("content", ODD, ids=lambda content: repr(content[:8]))
def test_odd_files(kind: str, content: bytes, tmp_path: Path) -> None:
    require_sound(kind, lay(kind, tmp_path, content))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_no_file(kind: str, special: str, tmp_path: Path) -> None:
    file = lay(kind, tmp_path, b"")
    file.unlink()
    with make_special(file, special):
        assert not require_sound(kind, file) or kind == "snapshot entry"


NUMBERS = [
    "-1",
    "1e999",
    "-0",
    "9" * 400,
    "9" * 5000,
    "0.5",
    "true",
    "null",
    "2147483648",
    "18446744073709551616",
    '"x"',
    "[]",
    "{}",
    "nan",
    "inf",
    "0x" + "f" * 5000,
]


@pytest.mark.parametrize("kind", LOADERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_files(kind: str, scratch: Path, data: st.DataObject) -> None:
    folder = scratch / kind
    folder.mkdir(exist_ok=True)
    content = whole(kind)[LOADERS[kind].name]
    packed = kind.startswith("packed")
    damaged = bytearray(gzip.decompress(content) if packed else content)
    how = data.draw(st.sampled_from(["bytes", "cut", "number", "bit", "twice"]))
    start = data.draw(st.integers(0, max(0, len(damaged) - 1)))
    if how == "cut":
        del damaged[start:]
    elif how == "bit":
        damaged[start] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "twice":
        damaged[start:start] = damaged[start // 2 : start]
    elif how == "bytes":
        new = data.draw(st.binary(min_size=1, max_size=20))
        damaged[start : start + len(new)] = new
    else:
        places = [i for i, byte in enumerate(damaged) if 48 <= byte < 58] or [0]
        at = data.draw(st.sampled_from(places))
        end = next((i for i in range(at, len(damaged)) if not 46 <= damaged[i] < 58), at)
        damaged[at:end] = data.draw(st.sampled_from(NUMBERS)).encode()
    file = lay(kind, folder, gzip.compress(bytes(damaged)) if packed else bytes(damaged))
    require_sound(kind, file)


@pytest.mark.parametrize("kind", ["snapshot", "snapshot entry", "bank", "readers", "anchors"])
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_sealed_files_with_headers_of_other_values(kind: str, scratch: Path, data: st.DataObject) -> None:
    """Somebody wrote them so: their digests are right."""
    folder = scratch / f"sealed {kind}"
    folder.mkdir(exist_ok=True)
    file = lay(kind, folder, whole(kind)[LOADERS[kind].name])
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no mapping
    text = metadata["header"]
    places = [i for i, char in enumerate(text) if char.isdigit()]
    at = data.draw(st.sampled_from(places))
    end = next(i for i in range(at, len(text)) if text[i] not in "0123456789.e-")
    metadata["header"] = text[:at] + data.draw(st.sampled_from(NUMBERS)) + text[end:]
    metadata["header_blake3"] = blake3(metadata["header"].encode()).hexdigest()
    save_file(tensors, file, metadata)
    require_sound(kind, file)


def test_the_length_of_a_safetensors_header_is_not_believed(tmp_path: Path) -> None:
    for kind in ("snapshot", "bank", "readers"):
        content = whole(kind)[LOADERS[kind].name]
        for length in (2**63, 2**40, 0, len(content) * 2):
            assert not require_sound(kind, lay(kind, tmp_path, struct.pack("<Q", length) + content[8:]))
