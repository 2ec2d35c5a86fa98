"""Which part of what another engine has learned is better than one's own: a folder of anchors, cut down to it.

Pairs hold for the banks that they were measured with, so nothing is mixed: readers whose prompts begin alike lead to
the same banks, and belong together. Such a group is taken over whole, with its banks, or not at all: when the other
engine has more pairs of it, and has every reader of it that is known here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from kvcomm.align.bank_file import read_bank_header
from kvcomm.align.levels import Knowledge
from kvcomm.align.profile_file import bank_files, header_of, looking, read_readers, save_readers
from kvcomm.align.readers import Reader


class CountedReader(NamedTuple):
    """A reader, and how many pairs there are of it."""

    reader: Reader
    num_pairs: int


def cut_to_better(folder: Path, own: Iterable[CountedReader], target: Path) -> list[Reader]:
    """Write into a new folder what another one holds of readers that are known better there.

    Args:
        own: everybody who is known here.
        target: that is made; none where there is nothing to take over.

    Returns:
        The readers whose knowledge it holds.

    Raises:
        AnchorFileError and its subclasses: a folder cannot be read or written.
    """
    with looking(folder):
        header = read_readers(folder)
        knowledge = header.knowledge()
        theirs = [CountedReader(reader, len(pairs)) for reader, pairs in knowledge.readers]
        better = {reader.digest for group in groups(theirs, own) for reader in group}
        if not better:
            return []
        files = {file: read_bank_header(file) for file in bank_files(folder)}
        if header.banks.keys() - {each.edge.digest for each in files.values()}:
            knowledge = knowledge.without_anchors()  # of a bank that is missing nobody knows whose it was
        readers = tuple(each for each in knowledge.readers if each[0].digest in better)
        targets = {each for reader, _ in readers for each in reader.targets}
        banks = {file: each for file, each in files.items() if each.target in targets}
        target.mkdir(parents=True)
        for file in banks:
            shutil.copyfile(file, target / file.name)
    named = {each.edge.digest: header.banks.get(each.edge.digest, each.payload_blake3) for each in banks.values()}
    watches = tuple(each for each in knowledge.watches if each.reader in better)
    save_readers(target, header_of(header.namespace, Knowledge(readers, watches), named))
    return [reader for reader, _ in readers]


def groups(theirs: Iterable[CountedReader], own: Iterable[CountedReader]) -> Iterator[list[Reader]]:
    """Groups of readers that share banks, of which the others know more than oneself."""
    there = {each.reader.digest: each for each in theirs}
    here = {each.reader.digest: each for each in own}
    for group in _connected([each.reader for each in (*there.values(), *here.values())]):
        own_here = {digest for digest in group if digest in here and here[digest].num_pairs}
        if own_here <= there.keys() and _num_pairs(group, there) > _num_pairs(group, here):
            yield [there[digest].reader for digest in sorted(group & there.keys())]


def _num_pairs(group: Set[str], known: Mapping[str, CountedReader]) -> int:
    return sum(known[digest].num_pairs for digest in group if digest in known)


def _connected(readers: Iterable[Reader]) -> list[set[str]]:
    """Digests of readers, by whether a path of shared targets joins them."""
    found: list[tuple[set[str], set[str]]] = []  # digests and targets
    for reader in readers:
        digests, targets = {reader.digest}, set(reader.targets)
        apart = []
        for each in found:
            if each[1] & targets or each[0] & digests:
                digests |= each[0]
                targets |= each[1]
            else:
                apart.append(each)
        found = [*apart, (digests, targets)]
    return [digests for digests, _ in found]
