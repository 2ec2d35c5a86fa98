"""Whether KV events say what vLLM's would: names of blocks, bytes, and a mirror made of nothing but events.

    python -m eval.kv_events [--operations 10000] [--vllm-python PATH] [--json]

`hashes_equal` compares the names of blocks with a derivation of its own (`second_hash`), with answers that vLLM gave
once, and, where a Python with vLLM is given, with vLLM's functions; there its decoder reads the batches, too, and must
write them back byte for byte (`batches_equal`). `mirror_equal`: after each of many random operations on a radix tree,
a mirror that has only read the published batches holds exactly the whole blocks of the tree. Needs no model.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from eval.command import add_outputs, finish
from eval.figures import Figure, Report
from kvcomm.errors import InvalidRequest
from kvcomm.lab.cache import BareCache, EventKind
from kvcomm.server.kv_events import (
    DEFAULT_SEED,
    AllCleared,
    Announcer,
    BlocksRemoved,
    BlocksStored,
    Encoder,
    Form,
    KVEvent,
    Owner,
    as_int,
    block_hash,
    require_extra,
    root_hash,
)

SEED = 0
NAMESPACES = ("plain", "salted", "adapted", "unowned")
OWNERS = {"plain": Owner(), "salted": Owner(salt="team"), "adapted": Owner("", "tone", "/adapters/tone")}
BLOCK_SIZES = (1, 3, 16)
MAX_WAITING_EVENTS = 40


class Case(NamedTuple):
    """Tokens of a path and whose they are."""

    token_ids: list[int]
    owner: Owner
    block_size: int
    seed: str = DEFAULT_SEED


KNOWN_PATH = [(index * index * 7919) % 49_152 for index in range(40)]
KNOWN_ANSWERS: tuple[tuple[Case, list[int]], ...] = (
    (Case(KNOWN_PATH, Owner(), 16), [11785259379475572512, 8297573759175445249]),
    (Case(KNOWN_PATH, Owner(salt="team"), 16), [17215630592598968155, 12412246665224435597]),
    (Case(KNOWN_PATH, Owner("", "tone", "/adapters/tone"), 16), [8286030011122291749, 17755515977551519516]),
    (
        Case(KNOWN_PATH, Owner("team", "tone", "/adapters/tone"), 8, seed="0"),
        [18168796380763776330, 5676187098948315009, 4596884608199370934, 3742377640604250102, 8523360800300856973],
    ),
)
"""What vLLM 0.32.0 called the blocks of a few paths."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    parser = ArgumentParser(prog="python -m eval.kv_events", description="KV events against vLLM's, and a mirror.")
    parser.add_argument("--operations", type=int, default=10_000, metavar="N", help="on the tree [%(default)s]")
    parser.add_argument("--paths", type=int, default=200, metavar="N", help="whose blocks are named [%(default)s]")
    parser.add_argument("--seed", type=int, default=SEED, help="of everything random [%(default)s]")
    parser.add_argument("--vllm-python", type=Path, metavar="FILE", help="a Python that has vLLM")
    add_outputs(parser, "kv_events")
    options = parser.parse_args(arguments)

    def measured() -> Report:
        require_extra()
        return measure(options)

    return finish(measured, options)


def measure(options: Namespace) -> Report:
    """All figures."""
    numbers = random.Random(options.seed)
    cases = [_random_case(numbers) for _ in range(options.paths)]
    names = [_names(case) for case in cases]
    wanted = [second_names(case) for case in cases]
    known = [(_names(case), answer) for case, answer in KNOWN_ANSWERS]
    batches = [*_sample_batches(cases)]
    vllm = None if options.vllm_python is None else _ask_vllm(options.vllm_python, cases, batches)
    if vllm is not None:
        wanted += vllm.names
        names += names
    outcomes = [each == other for given, wished in [*zip(names, wanted, strict=True), *known]
                for each, other in zip(given, wished, strict=True)]  # fmt: skip
    run = mirrored(options.operations, options.seed)
    figures = [
        Figure("hashes_equal", sum(outcomes) / len(outcomes), "share", goal="1"),
        Figure("hashes", len(outcomes), "blocks"),
        Figure("mirror_equal", run.num_equal / run.num_operations, "share", goal="1"),
        Figure("mirror_operations", run.num_operations, "operations"),
        Figure("mirror_blocks", run.num_blocks, "blocks"),
        Figure("mirror_begun_again", run.num_begun_again, "times"),
    ]
    if vllm is not None:
        equal = [each == other for each, other in zip(batches, vllm.batches, strict=True)]
        figures.append(Figure("batches_equal", sum(equal) / len(equal), "share", goal="1"))
    config = {"operations": options.operations, "paths": options.paths, "seed": options.seed}
    return Report("kv_events", figures, {**config, "vllm": None if vllm is None else vllm.version})


# Names of blocks, derived a second time.


def second_names(case: Case) -> list[int]:
    """What the blocks of a path are called, by `second_hash`."""
    names: list[int] = []
    name = _digest(_cbor(case.seed))
    for index in range(len(case.token_ids) // case.block_size):
        tokens = case.token_ids[index * case.block_size : (index + 1) * case.block_size]
        name = second_hash(name, tuple(tokens), case.owner, is_first=index == 0)
        names.append(int(name.hex()[-16:], 16))
    return names


@lru_cache(maxsize=2**16)
def second_hash(parent: bytes, token_ids: tuple[int, ...], owner: Owner, *, is_first: bool) -> bytes:
    """The name of a block, by RFC 8949 (CBOR) and vLLM's documentation, with no code of either."""
    keys: list[object] = []
    if owner.adapter:
        keys.append(["lora", owner.adapter, owner.adapter_path])
    if owner.salt and is_first:
        keys.append(["cache_salt", owner.salt])
    return _digest(_cbor([parent, list(token_ids), keys or None]))


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _cbor(value: object) -> bytes:
    """RFC 8949, core deterministic encoding, of what a name is made of."""
    if value is None:
        return b"\xf6"
    if isinstance(value, int):
        return _cbor_head(0, value)
    if isinstance(value, bytes):
        return _cbor_head(2, len(value)) + value
    if isinstance(value, str):
        return _cbor_head(3, len(value.encode())) + value.encode()
    assert isinstance(value, list), f"{value!r} is in no name"
    return _cbor_head(4, len(value)) + b"".join(map(_cbor, value))


def _cbor_head(kind: int, number: int) -> bytes:
    if number < 24:
        return bytes([kind << 5 | number])
    extra = next(extra for extra in range(4) if number < 1 << (8 << extra))
    return bytes([kind << 5 | 24 + extra]) + number.to_bytes(1 << extra, "big")


def _names(case: Case) -> list[int]:
    """What `kvcomm` calls them."""
    names: list[int] = []
    name = root_hash(case.seed)
    for index in range(len(case.token_ids) // case.block_size):
        tokens = case.token_ids[index * case.block_size : (index + 1) * case.block_size]
        name = block_hash(name, tokens, case.owner.keys(index))
        names.append(as_int(name))
    return names


def _random_case(numbers: random.Random) -> Case:
    num_tokens = numbers.choice([0, 1, 15, 16, 17, 64, 300])
    tokens = [numbers.choice([numbers.randrange(24), numbers.randrange(300), numbers.randrange(2**18)])
              for _ in range(num_tokens)]  # fmt: skip
    owner = Owner(
        numbers.choice(["", "team", "é" * 20, "x" * 300]), *numbers.choice([("", ""), ("tone", "/adapters/tone")])
    )
    return Case(tokens, owner, numbers.choice(BLOCK_SIZES), numbers.choice([DEFAULT_SEED, "0", "42"]))


def _sample_batches(cases: Iterable[Case]) -> Iterator[bytes]:
    """Batches of all kinds of events, in the form that current vLLM reads."""
    encoder = Encoder("map", block_size=16, medium="CPU")
    yield encoder.batch([AllCleared()], 1.5)
    for case in cases:
        names = _names(case._replace(block_size=16))
        if names:
            tokens = case.token_ids[: 16 * len(names)]
            stored = BlocksStored(names, None, tokens, 0, case.owner)
            yield encoder.batch([stored, BlocksRemoved(names[-1:])], 2.0)
            yield encoder.batch([BlocksStored(names[1:], names[0], tokens[16:], 1, case.owner)], 2.0)


# What vLLM says.


class VllmAnswers(NamedTuple):
    """Names of blocks by vLLM's functions, and batches read and written again by its types."""

    version: str
    names: list[list[int]]
    batches: list[bytes]


ASKING = """
import json, os, sys
from types import SimpleNamespace
question = json.load(sys.stdin)
out, sys.stdout = sys.stdout, sys.stderr
import msgspec, vllm
from vllm.distributed.kv_events import KVEventBatch
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import kv_cache_utils as utils
names = []
for token_ids, (salt, adapter, path), size, seed in question["cases"]:
    os.environ["PYTHONHASHSEED"] = seed
    utils.init_none_hash(sha256_cbor)
    lora = SimpleNamespace(lora_name=adapter, lora_path=path) if adapter else None
    request = SimpleNamespace(mm_features=[], lora_request=lora, cache_salt=salt or None, prompt_embeds=None)
    parent, found = None, []
    for start in range(0, len(token_ids) // size * size, size):
        keys, _ = utils.generate_block_hash_extra_keys(request, start, start + size, 0)
        parent = utils.hash_block_tokens(sha256_cbor, parent, token_ids[start:start + size], keys)
        found.append(int.from_bytes(parent, "big") & ((1 << 64) - 1))
    names.append(found)
decoder, encoder = msgspec.msgpack.Decoder(KVEventBatch), msgspec.msgpack.Encoder()
batches = [encoder.encode(decoder.decode(bytes.fromhex(batch))).hex() for batch in question["batches"]]
json.dump({"version": vllm.__version__, "names": names, "batches": batches}, out)
"""
"""Asks vLLM, in a process of its own. PYTHONHASHSEED is read there when the seed is set, not when Python starts."""


def _ask_vllm(python: Path, cases: Sequence[Case], batches: Sequence[bytes]) -> VllmAnswers:
    question = {"cases": cases, "batches": [batch.hex() for batch in batches]}
    done = subprocess.run([python, "-c", ASKING], input=json.dumps(question), capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise InvalidRequest(f"{python} cannot ask vLLM: {last[0]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return VllmAnswers(answer["version"], answer["names"], [bytes.fromhex(batch) for batch in answer["batches"]])


# A mirror.


class Mirror:
    """What a reader of the batches believes to be cached; knows of the tree only by them."""

    def __init__(self) -> None:
        self.names: set[int] = set()

    def read(self, batch: bytes) -> None:
        """Follow a batch, in either form."""
        import msgspec

        _, events, _ = msgspec.msgpack.decode(batch)
        for event in events:
            kind, *rest = (event["type"], event.get("block_hashes")) if isinstance(event, dict) else event
            if kind == "AllBlocksCleared":
                self.names.clear()
            elif kind == "BlockStored":
                self.names |= set(rest[0])
            else:
                assert kind == "BlockRemoved", f"unknown event {kind!r}"
                self.names -= set(rest[0])


Walk = Callable[[str], Iterable[Any]]
"""The nodes of a namespace in a tree, parents before children; see `RadixTree.walk`."""


def whole_blocks(walk: Walk, owners: dict[str, Owner], block_size: int) -> set[int]:
    """The names of the whole blocks in a tree, read off the tree itself and derived a second time."""
    return {
        name
        for namespace, owner in owners.items()
        for path in _paths(walk, namespace)
        for name in second_names(Case(path, owner, block_size))
    }


def _paths(walk: Walk, namespace: str) -> Iterator[list[int]]:
    path: list[int] = []
    for node in walk(namespace):
        path = path[: node.start] + node.tokens.tolist()
        if not node.num_children:
            yield path


class Mirrored(NamedTuple):
    """How a run of random operations went."""

    num_operations: int
    num_equal: int  # after so many of them mirror and tree were equal
    num_blocks: int  # in the mirror, over all operations
    num_begun_again: int  # events had been lost, or the owners changed


class Operations:
    """Random operations on a small tree: whatever makes tokens come and go, split and cut."""

    def __init__(self, numbers: random.Random) -> None:
        self._numbers = numbers
        self.cache = BareCache(num_pages=96, page_size=4, ttl_s=60.0, max_events=MAX_WAITING_EVENTS)

    def step(self) -> None:
        """One of them."""
        kinds = (self._serve, self._evict, self._wait, self._pin, self._unpin, self._quota, self._reset)
        self._numbers.choices(kinds, weights=(60, 10, 8, 6, 6, 4, 1))[0]()

    def _path(self) -> list[int]:
        """Some tokens, which often begin as others do."""
        length = self._numbers.choice([1, 3, 4, 7, 16, 17, 33, 60])
        return [self._numbers.choice([0, 0, 0, 0, 0, 0, 0, 1]) for _ in range(length)]

    def _namespace(self) -> str:
        return self._numbers.choice(NAMESPACES)

    def _serve(self) -> None:
        self.cache.serve(self._namespace(), self._path(), ttl_s=self._numbers.choice([None, 5.0, float("inf")]))

    def _evict(self) -> None:
        self.cache.tree.evict(self._numbers.randrange(12))

    def _wait(self) -> None:
        self.cache.now_s += self._numbers.choice([0.5, 5.0, 30.0])
        self.cache.tree.expire()

    def _pin(self) -> None:
        self.cache.tree.pin(self._namespace(), self._path())

    def _unpin(self) -> None:
        self.cache.tree.unpin(self._namespace(), self._path())

    def _quota(self) -> None:
        self.cache.tree.set_quota(self._namespace(), self._numbers.choice([None, None, 4, 20]))

    def _reset(self) -> None:
        self.cache.tree.reset(self._numbers.choice([None, *NAMESPACES]))


def mirrored(num_operations: int, seed: int) -> Mirrored:
    """Random operations, with a mirror that reads what is published about them."""
    numbers = random.Random(seed)
    operations, mirror = Operations(numbers), Mirror()
    block_size = numbers.choice(BLOCK_SIZES)
    forms: tuple[Form, Form] = ("map", "array")
    encoders = [Encoder(form, block_size=block_size, medium="CPU") for form in forms]
    cache, announcer, owners = operations.cache, Announcer(block_size), dict(OWNERS)
    cache.tree.take_events()
    num_equal = num_blocks = num_begun_again = 0
    for _ in range(num_operations):
        for _ in range(numbers.choice([1, 1, 1, 1, 1, 1, 1, 1, 1, 100])):
            operations.step()
        events = cache.tree.take_events()
        is_changed = numbers.randrange(100) == 0
        if is_changed:
            owners = {name: owner for name, owner in OWNERS.items() if numbers.randrange(4)}
        said: list[KVEvent]
        if is_changed or any(event.kind is EventKind.LOST for event in events):
            said = announcer.begin_again(cache.tree.all_stored(), owners)
            num_begun_again += 1
        else:
            said = announcer.announce(events, owners)
        mirror.read(numbers.choice(encoders).batch(said, 0.0))
        num_equal += mirror.names == whole_blocks(cache.tree.walk, owners, block_size)
        num_blocks += len(mirror.names)
    cache.check_integrity()
    return Mirrored(num_operations, num_equal, num_blocks, num_begun_again)


if __name__ == "__main__":
    sys.exit(main())
