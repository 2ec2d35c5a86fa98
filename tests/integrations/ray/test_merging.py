"""Taking over what other engines have learned: whole groups, and only where they know more."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.profile_file import bank_files, load_profile, save_profile
from kvcomm.align.readers import Reader
from kvcomm.integrations.ray.merging import CountedReader, cut_to_better, groups
from tests.align.test_profile_file import CHECKER, EDGES, SHAPE, SOLVER, bank, knowledge

TARGETS = {"a": ("t1",), "b": ("t1", "t2"), "c": ("t2",), "d": ("t3",), "e": ("t4", "t5"), "f": ("t5",)}
COUNTS = st.dictionaries(st.sampled_from(sorted(TARGETS)), st.integers(0, 5))
CONNECTED = ({"a", "b", "c"}, {"d"}, {"e", "f"})


def known(counts: dict[str, int]) -> list[CountedReader]:
    return [CountedReader(Reader(digest, ("slot",), TARGETS[digest]), count) for digest, count in counts.items()]


def taken(theirs: dict[str, int], own: dict[str, int]) -> set[str]:
    return {reader.digest for group in groups(known(theirs), known(own)) for reader in group}


def test_whoever_knows_more_of_a_reader_is_followed() -> None:
    assert taken({"d": 3}, {"d": 2}) == {"d"}
    assert taken({"d": 2}, {"d": 2}) == set()
    assert taken({"d": 1}, {}) == {"d"}
    assert taken({"d": 0}, {}) == set()


def test_readers_that_share_a_bank_go_together_or_not_at_all() -> None:
    assert taken({"a": 1, "b": 5}, {"a": 2, "b": 3}) == {"a", "b"}
    assert taken({"a": 9}, {"b": 1}) == set(), "b's pairs were measured with the bank that would be replaced"
    assert taken({"a": 9}, {"b": 0}) == {"a"}
    assert taken({"e": 4}, {"f": 1, "d": 7}) == set()


@given(COUNTS, COUNTS)
def test_groups_are_taken_whole_and_for_more(theirs: dict[str, int], own: dict[str, int]) -> None:
    found = taken(theirs, own)
    for group in CONNECTED:
        # Readers that nobody has in between may leave a group in parts.
        part = found & group
        if part:
            assert sum(theirs.get(each, 0) for each in part) > sum(own.get(each, 0) for each in part)
    assert found <= theirs.keys()


@given(COUNTS, COUNTS)
def test_two_never_take_the_same_from_one_another(one: dict[str, int], two: dict[str, int]) -> None:
    assert not taken(one, two) & taken(two, one)


def test_a_folder_is_cut_down_to_what_is_known_better(tmp_path: Path) -> None:
    save_profile(
        tmp_path / "theirs", "space", SHAPE, [bank(edge, seed) for seed, edge in enumerate(EDGES)], knowledge()
    )
    own = [CountedReader(SOLVER, 3), CountedReader(CHECKER, 100)]
    assert cut_to_better(tmp_path / "theirs", own, tmp_path / "better") == [SOLVER]
    found = load_profile(tmp_path / "better", namespace="space", shape=SHAPE)
    whole = load_profile(tmp_path / "theirs", namespace="space", shape=SHAPE)
    assert found.num_missing == 0
    assert [each.edge for each in found.banks] == [edge for edge in EDGES if edge.target in SOLVER.targets]
    assert found.knowledge.readers == tuple(each for each in whole.knowledge.readers if each[0] == SOLVER)
    assert {each.reader for each in found.knowledge.watches} == {SOLVER.digest}
    assert (
        cut_to_better(tmp_path / "theirs", [CountedReader(SOLVER, 9), CountedReader(CHECKER, 2)], tmp_path / "none")
        == []
    )
    assert not (tmp_path / "none").exists()


def test_without_a_bank_what_was_measured_with_anchors_is_left_out(tmp_path: Path) -> None:
    save_profile(
        tmp_path / "theirs", "space", SHAPE, [bank(edge, seed) for seed, edge in enumerate(EDGES)], knowledge()
    )
    for file in bank_files(tmp_path / "theirs"):
        file.unlink()
    assert cut_to_better(tmp_path / "theirs", [], tmp_path / "better") == [CHECKER, SOLVER][::-1]
    found = load_profile(tmp_path / "better", namespace="space", shape=SHAPE)
    assert {rung.estimator for _, pairs in found.knowledge.readers for each in pairs for rung in each.measured} == {
        "rotate"
    }
