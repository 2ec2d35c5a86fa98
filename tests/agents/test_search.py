"""Tree search on contexts that only count: best paths against brute force, and nothing left open, ever."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.agents import SampleThoughts, SearchResult, Thought, beam, best_first, mcts
from kvcomm.agents.branches import OpenContexts, ThoughtTree
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, RequestCancelled
from tests.agents.fakes import ContextCounter, FakeContext

Search = Callable[..., SearchResult]
SEARCHES: list[Search] = [
    best_first,
    lambda *a, **k: best_first(*a, width=3, max_frontier=2, **k),
    lambda *a, **k: beam(*a, width=2, **k),
    lambda *a, **k: mcts(*a, simulations=25, **k),
]
LETTERS = "abc"


def children_of(path: str, seed: int) -> list[str]:
    """A random tree, the same for the same seed: up to three children per node, sometimes none."""
    return list(LETTERS[: random.Random(f"{seed}{path}").choice([0, 1, 2, 3, 3])])


def score_of(path: str, seed: int) -> float:
    return random.Random(f"score{seed}{path}").random()


def expand_with(seed: int) -> Callable[[Sequence[FakeContext]], list[list[Thought]]]:
    def expand(contexts: Sequence[FakeContext]) -> list[list[Thought]]:
        return [
            [Thought(context.fork().extend(letter), letter) for letter in children_of("".join(context.path), seed)]  # type: ignore[arg-type]
            for context in contexts
        ]

    return expand


def scorer(seed: int) -> Callable[[Any, str], float]:
    return lambda context, text: score_of("".join(context.path), seed)


def every_path(seed: int, max_depth: int) -> list[str]:
    paths, level = [], [""]
    for _ in range(max_depth):
        level = [path + letter for path in level for letter in children_of(path, seed)]
        paths += level
    return paths


def run(search: Search, seed: int, **settings: Any) -> tuple[SearchResult, ContextCounter, FakeContext]:
    counter = ContextCounter()
    root = counter.root()
    return search(root, expand_with(seed), scorer(seed), **settings), counter, root


@pytest.mark.parametrize("search", SEARCHES)
@given(seed=st.integers(0, 10_000), max_depth=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_only_the_root_and_the_best_stay_open(search: Search, seed: int, max_depth: int) -> None:
    result, counter, root = run(search, seed, max_depth=max_depth)
    assert counter.open == {root, result.context}
    assert root.path == ()
    assert result.context.path == result.texts
    with result:
        pass
    assert counter.open == {root}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RequestCancelled, ZeroDivisionError])
@pytest.mark.parametrize("where", ["expand", "score", "is_final"])
@given(seed=st.integers(0, 1000), after=st.integers(0, 10))
@settings(max_examples=10, deadline=None)
def test_an_error_releases_everything(
    search: Search, error: type[BaseException], where: str, seed: int, after: int
) -> None:
    calls = itertools.count()

    def failing(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if part == where and next(calls) >= after:
                raise error
            return function(*args)

        return call

    counter = ContextCounter()
    root = counter.root()
    parts = {"expand": expand_with(seed), "score": scorer(seed), "is_final": lambda context, text: False}
    guarded = {part: failing(part, function) for part, function in parts.items()}
    try:
        result = search(root, guarded["expand"], guarded["score"], is_final=guarded["is_final"], max_depth=3)
    except error:
        assert counter.open == {root}
    else:
        assert counter.open == {root, result.context}


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_beam_never_holds_more_than_two_levels(seed: int) -> None:
    counter = ContextCounter()
    most = 0

    def score(context: FakeContext, text: str) -> float:
        nonlocal most
        most = max(most, len(counter.open))
        return score_of("".join(context.path), seed)

    result = beam(counter.root(), expand_with(seed), score, width=2, max_depth=6, max_nodes=10_000)
    # The caller's root, the search's fork of it or the best so far, two parents, three children of each.
    assert most <= 1 + 1 + 2 * 3
    assert result.stats.max_open <= 1 + 2 + 2 * 3
    assert result.stats.num_pruned + 1 == counter.num_made - 1


def test_open_contexts_are_released_once() -> None:
    counter = ContextCounter()
    contexts: Any = [counter.root() for _ in range(3)]
    with OpenContexts() as held:
        held.adopt(contexts)
        held.release(contexts[0])
        kept = held.keep(contexts[1])
        assert counter.open == set(contexts[1:])
    assert counter.open == {kept}
    assert (held.num_pruned, held.max_open) == (1, 3)


@given(seed=st.integers(0, 10_000), max_depth=st.integers(1, 4), width=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_search_without_limits_finds_the_best_complete_path(seed: int, max_depth: int, width: int) -> None:
    result, _, _ = run(best_first, seed, max_depth=max_depth, max_nodes=10_000, width=width)
    paths = every_path(seed, max_depth)
    complete = [path for path in paths if len(path) == max_depth]
    best = max(complete or paths, key=lambda path: score_of(path, seed), default="")
    assert result.text == best
    assert result.is_complete == bool(complete)
    assert result.scores == tuple(score_of(best[:end], seed) for end in range(1, len(best) + 1))
    assert result.stats.num_thoughts == result.stats.num_scored == len(paths)
    assert result.stats.max_depth == max(map(len, paths), default=0)


@given(seed=st.integers(0, 10_000), width=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_beam_equals_a_plain_beam(seed: int, width: int) -> None:
    max_depth = 4
    result, _, _ = run(beam, seed, max_depth=max_depth, width=width, max_nodes=10_000)
    level, seen = [""], []
    for _ in range(max_depth):
        level = [path + letter for path in level for letter in children_of(path, seed)]
        seen += level
        level = sorted(level, key=lambda path: -score_of(path, seed))[:width]
    complete = [path for path in seen if len(path) == max_depth]
    assert result.text == max(complete or seen, key=lambda path: score_of(path, seed), default="")


def test_best_first_expands_the_most_promising_thought_next() -> None:
    scores = {"a": 0.5, "b": 0.9, "c": 0.1, "ba": 0.3, "bb": 0.2, "bc": 0.1}
    expanded = []

    def expand(contexts: Sequence[FakeContext]) -> list[list[Thought]]:
        expanded.extend("".join(context.path) for context in contexts)
        return [[Thought(context.fork().extend(x), x) for x in LETTERS] for context in contexts]  # type: ignore[arg-type]

    def score(context: FakeContext, text: str) -> float:
        return scores.get("".join(context.path), 0.0)

    best_first(ContextCounter().root(), expand, score, max_nodes=9, max_depth=3).release()
    assert expanded == ["", "b", "a"]


@pytest.mark.parametrize("seed", range(10))
def test_mcts_with_many_simulations_finds_the_best_complete_path(seed: int) -> None:
    result, _, _ = run(mcts, seed, max_depth=3, simulations=2000)
    paths = every_path(seed, 3)
    complete = [path for path in paths if len(path) == 3]
    assert result.text == max(complete or paths, key=lambda path: score_of(path, seed), default="")
    assert result.stats.num_scored == len(paths)


def test_mcts_spends_most_simulations_where_scores_are_high() -> None:
    visited: list[str] = []

    def expand(contexts: Sequence[FakeContext]) -> list[list[Thought]]:
        return [[Thought(context.fork().extend(x), x) for x in LETTERS] for context in contexts]  # type: ignore[arg-type]

    def score(context: FakeContext, text: str) -> float:
        path = "".join(context.path)
        visited.append(path)
        return 1.0 if path.startswith("b") else 0.0

    mcts(ContextCounter().root(), expand, score, simulations=120, exploration=0.3, max_depth=6).release()
    assert sum(path.startswith("b") for path in visited) > 0.8 * len(visited)


def test_mcts_depends_on_its_seed_only() -> None:
    def order(seed: int) -> list[str]:
        seen: list[str] = []

        def score(context: FakeContext, text: str) -> float:
            seen.append("".join(context.path))
            return 0.5

        mcts(ContextCounter().root(), expand_with(3), score, simulations=30, seed=seed).release()
        return seen

    assert order(1) == order(1)
    assert any(order(1) != order(seed) for seed in range(2, 8))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_root_without_thoughts(search: Search) -> None:
    counter = ContextCounter()
    root = counter.root()
    result = search(root, lambda contexts: [[] for _ in contexts], scorer(0))
    assert (result.texts, result.scores, result.score, result.is_complete) == ((), (), None, False)
    assert counter.open == {root, result.context}


@pytest.mark.parametrize("search", SEARCHES)
def test_final_thoughts_are_not_expanded_and_come_first(search: Search) -> None:
    def expand(contexts: Sequence[FakeContext]) -> list[list[Thought]]:
        for context in contexts:
            assert "a" not in context.path
            assert "b" not in context.path
        return [
            [Thought(context.fork().extend(x), x, is_final=x == "a") for x in LETTERS]  # type: ignore[arg-type]
            for context in contexts
        ]

    def score(context: FakeContext, text: str) -> float:
        return {"a": 0.1, "b": 0.2, "c": 0.9}[text]

    result = search(ContextCounter().root(), expand, score, is_final=lambda context, text: text == "b", max_depth=99)
    assert result.is_complete
    assert result.texts[-1] == "b"


def test_target_stops_the_search() -> None:
    result, _, _ = run(best_first, 5, max_depth=2, max_nodes=10_000)
    assert result.score is not None
    stopped, counter, root = run(best_first, 5, max_depth=2, max_nodes=10_000, target=0.0)
    assert stopped.is_complete
    assert stopped.stats.num_thoughts < result.stats.num_thoughts
    assert counter.open == {root, stopped.context}
    unreachable, _, _ = run(best_first, 5, max_depth=2, max_nodes=10_000, target=2.0)
    assert unreachable.text == result.text


def test_max_nodes_is_checked_before_each_expansion() -> None:
    for max_nodes in range(1, 12):
        stats = run(best_first, 1, max_nodes=max_nodes)[0].stats
        assert stats.num_thoughts < max_nodes + 3


@pytest.mark.parametrize(
    ("search", "settings", "message"),
    [
        (best_first, {"width": 0}, "width must be at least 1, got 0"),
        (best_first, {"max_nodes": 0}, "max_nodes must be at least 1"),
        (best_first, {"max_depth": 0}, "max_depth must be at least 1"),
        (best_first, {"max_frontier": 0}, "max_frontier must be at least 1"),
        (beam, {"width": -1}, "width must be at least 1, got -1"),
        (mcts, {"simulations": 0}, "simulations must be at least 1"),
        (mcts, {"exploration": -0.1}, "exploration must be a finite number >= 0, got -0.1"),
        (mcts, {"exploration": float("nan")}, "exploration must be a finite number >= 0, got nan"),
    ],
)
def test_limits(search: Search, settings: dict[str, Any], message: str) -> None:
    counter = ContextCounter()
    root = counter.root()
    with pytest.raises(InvalidRequest, match=message):
        search(root, expand_with(0), scorer(0), **settings)
    assert counter.open == {root}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_must_be_finite(bad: float) -> None:
    counter = ContextCounter()
    root = counter.root()
    with pytest.raises(InvalidRequest, match=r"the scorer returned .* for the thought 'a'; scores must be finite"):
        best_first(root, expand_with(1), lambda context, text: bad)
    assert counter.open == {root}


@pytest.mark.parametrize(
    ("expand", "message"),
    [
        (lambda contexts: [], "expand was given 1 contexts and returned 0 lists"),
        (
            lambda contexts: [[Thought(context, "same")] for context in contexts],
            "expand returned a context that is in use",
        ),
        (
            lambda contexts: [[Thought(fork, "x"), Thought(fork, "y")] for fork in [contexts[0].fork()]],
            "in use",
        ),
        (
            lambda contexts: [[Thought(contexts[0].fork(), "x")]] * 2,
            "expand returned a context that is in use",
        ),
    ],
)
def test_expand_must_fork_every_context(expand: Any, message: str) -> None:
    counter = ContextCounter()
    root = counter.root()
    with pytest.raises(InvalidRequest, match=message):
        best_first(root, expand, scorer(0))
    assert counter.open == {root}


def test_sampled_thoughts_have_their_own_seeds() -> None:
    counter = ContextCounter()
    root = counter.root()
    other = root.fork().extend("other")
    sample = SampleThoughts(n=3, sampling=SamplingParams(temperature=1.0, seed=1), prompt="Step: ")
    thoughts = sample([root, other])  # type: ignore[list-item]
    texts = [[thought.text for thought in row] for row in thoughts]
    assert [len(row) for row in texts] == [3, 3]
    assert len({text for row in texts for text in row}) == 6
    again = sample([root, other])  # type: ignore[list-item]
    assert [[thought.text for thought in row] for row in again] == texts
    assert [thought.context.path for thought in thoughts[1]] == [("other", "Step: ", text) for text in texts[1]]  # type: ignore[attr-defined]
    assert len(counter.open) == 2 + 12


def test_thoughts_are_final_when_the_model_ended_its_turn() -> None:
    root: Any = ContextCounter().root()
    assert SampleThoughts(n=2)([root])[0][0].is_final
    ambiguous = SampleThoughts(n=2, sampling=SamplingParams(temperature=1.0, stop=("\n",)))
    assert not ambiguous([root])[0][0].is_final


def test_an_interrupted_expansion_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = ContextCounter()
    root: Any = counter.root()
    submit = FakeContext.submit

    def interrupted(self: FakeContext, sampling: SamplingParams) -> Any:
        if len(counter.open) > 3 and "x" in self.path:
            raise KeyboardInterrupt
        return submit(self, sampling)

    monkeypatch.setattr(FakeContext, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SampleThoughts(n=2)([root, root.extend("x")])
    assert counter.open == {root}


def test_the_default_expansion_is_used() -> None:
    result = best_first(ContextCounter().root(), None, lambda context, text: 1.0, max_depth=1)  # type: ignore[arg-type]
    assert result.stats.num_thoughts == SampleThoughts().n


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be at least 1 thought"),
        ({"sampling": SamplingParams(n=2, temperature=1.0)}, "sampling has n=2; use SampleThoughts.n"),
        ({"n": 2, "sampling": SamplingParams()}, "2 greedy thoughts would be the same"),
    ],
)
def test_thoughts_that_cannot_be_sampled(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SampleThoughts(**settings)
    assert SampleThoughts(n=1, sampling=SamplingParams()).n == 1


@given(seed=st.integers(0, 10_000), steps=st.lists(st.integers(0, 100), max_size=20))
@settings(max_examples=60, deadline=None)
def test_tree_holds_exactly_what_is_wanted_or_best(seed: int, steps: list[int]) -> None:
    """Random growth in any order, dropping at random: the tree's law after every step."""
    counter = ContextCounter()
    with OpenContexts() as held:
        tree = ThoughtTree(held, expand_with(seed), scorer(seed), 4, None)  # type: ignore[arg-type]
        nodes = [tree.plant(counter.root())]  # type: ignore[arg-type]
        for step in steps:
            wanted = [node for node in nodes if node.wanted]
            if not wanted:
                break
            node = wanted[step % len(wanted)]
            if step % 3 == 0 and node.depth:
                tree.drop(node)
            elif node.depth and node.score is None:
                tree.evaluate(node)
            else:
                nodes += tree.grow([node])
            for each in nodes:
                assert (each.context in counter.open) == (each.wanted or each is tree.best)
                assert (each.context is None) == (not each.wanted and each is not tree.best)
