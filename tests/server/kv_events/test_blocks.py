"""Names of blocks: those that vLLM gave once, and a second derivation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.kv_events import KNOWN_ANSWERS, Case, second_names
from kvcomm.server.kv_events.blocks import DEFAULT_SEED, Owner, as_int, block_hash, root_hash

texts = st.text(max_size=40)


def names(case: Case) -> list[int]:
    """The blocks of a path, one after the other."""
    found: list[int] = []
    name = root_hash(case.seed)
    for index, start in enumerate(range(0, len(case.token_ids) // case.block_size * case.block_size, case.block_size)):
        name = block_hash(name, case.token_ids[start : start + case.block_size], case.owner.keys(index))
        found.append(as_int(name))
    return found


@pytest.mark.parametrize(("case", "answer"), KNOWN_ANSWERS)
def test_what_vllm_called_them(case: Case, answer: list[int]) -> None:
    assert names(case) == answer


@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=40),
    st.builds(Owner, texts, texts, texts),
    st.integers(1, 40),
    st.just(DEFAULT_SEED) | texts,
)
def test_against_a_second_derivation(token_ids: list[int], owner: Owner, block_size: int, seed: str) -> None:
    case = Case(token_ids, owner, block_size, seed)
    assert names(case) == second_names(case)


def test_everything_that_tells_blocks_apart() -> None:
    path = list(range(32))
    plain = names(Case(path, Owner(), 16))
    for other in (
        Case([*path[:-1], 99], Owner(), 16),
        Case(path, Owner(), 16, seed="0"),
        Case(path, Owner(salt="team"), 16),
        Case(path, Owner(adapter="tone"), 16),
        Case(path, Owner("", "tone", "/elsewhere"), 16),
    ):
        assert names(other)[1] not in plain
    assert names(Case([*path[:-1], 99], Owner(), 16))[0] == plain[0]
