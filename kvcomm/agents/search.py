"""Tree search over contexts: every thought is a fork, and a branch that is given up returns its pages.

The root stays the caller's; of the contexts a search opens, only the best survives it, in the result. However
a search ends (result, error, Ctrl-C), all others have been released. Scores come from the caller; a search
knows no task.

`best_first` and `beam` follow Tree of Thoughts (arXiv:2305.10601v2, Sec. 3); `mcts` is UCT (Kocsis and
Szepesvari, ECML 2006) with the caller's score in place of a random playout.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcomm.agents.branches import OpenContexts, SearchResult, ThoughtNode, ThoughtTree
from kvcomm.agents.thoughts import Expand, SampleThoughts, Score
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from kvcomm.engine.context import Context


def best_first(
    root: Context,
    expand: Expand | None,
    score: Score,
    *,
    width: int = 1,
    max_nodes: int = 64,
    max_depth: int = 8,
    max_frontier: int | None = None,
    target: float | None = None,
    is_final: Callable[[Context, str], bool] | None = None,
) -> SearchResult:
    """Always expand the most promising thoughts anywhere in the tree.

    Args:
        root: where every path begins; stays open and unchanged.
        expand: how thoughts are made; None: `SampleThoughts()`.
        score: how good a path is.
        width: thoughts expanded together, in one batch.
        max_nodes: no expansion begins once so many thoughts exist.
        max_depth: thoughts on a path at most.
        max_frontier: unexpanded thoughts kept; the worst beyond that are pruned. None: all.
        target: stop when a complete path scores at least this.
        is_final: whether a path is complete, besides what `expand` says.

    Returns:
        The complete path with the best last score; if none is complete, the best unfinished one.

    Raises:
        InvalidRequest: a limit below 1, a score that is not finite, or `expand` not returning forks for each
            context.
    """
    _check_limits(width=width, max_nodes=max_nodes, max_depth=max_depth, max_frontier=max_frontier)
    with OpenContexts() as held:
        tree = ThoughtTree(held, expand or SampleThoughts(), score, max_depth, is_final)
        frontier = [tree.plant(root)]
        while frontier and tree.num_thoughts < max_nodes and not _reached(tree, target):
            batch, frontier = frontier[:width], frontier[width:]
            frontier += _scored_open(tree, tree.grow(batch))
            frontier.sort(key=_promise)
            for node in frontier[max_frontier:] if max_frontier else ():
                tree.drop(node)
            frontier = frontier[:max_frontier]
        return tree.result()


def beam(
    root: Context,
    expand: Expand | None,
    score: Score,
    *,
    width: int = 3,
    max_nodes: int = 256,
    max_depth: int = 8,
    target: float | None = None,
    is_final: Callable[[Context, str], bool] | None = None,
) -> SearchResult:
    """Level by level, going on only from the `width` best thoughts of each level, expanded in one batch.

    Arguments, result and errors are those of `best_first`.
    """
    return best_first(
        root,
        expand,
        score,
        width=width,
        max_nodes=max_nodes,
        max_depth=max_depth,
        max_frontier=width,
        target=target,
        is_final=is_final,
    )


def mcts(
    root: Context,
    expand: Expand | None,
    score: Score,
    *,
    simulations: int = 32,
    exploration: float = math.sqrt(2),
    max_depth: int = 8,
    seed: int = 0,
    is_final: Callable[[Context, str], bool] | None = None,
) -> SearchResult:
    """Monte Carlo tree search: balance thoughts that scored well against thoughts that were tried rarely.

    A simulation descends by the UCT rule to a thought not yet scored (expanding a scored one when it gets
    there), scores it and adds the score to every node on the way.

    Args:
        root: as for `best_first`.
        expand: as for `best_first`.
        score: as for `best_first`.
        simulations: descents; at most one expansion and one score each.
        exploration: weight of rarely tried thoughts, in units of the score; sqrt(2) suits scores in [0, 1].
        max_depth: as for `best_first`.
        seed: order in which the thoughts of one expansion are tried. What they say depends on `expand`.
        is_final: as for `best_first`.

    Returns:
        As `best_first`: the path to the best score seen, complete paths first.

    Raises:
        InvalidRequest: as `best_first`, or a negative or non-finite exploration.
    """
    _check_limits(simulations=simulations, max_depth=max_depth)
    if not (math.isfinite(exploration) and exploration >= 0):
        raise InvalidRequest(f"exploration must be a finite number >= 0, got {exploration}")
    order = random.Random(seed)
    with OpenContexts() as held:
        tree = ThoughtTree(held, expand or SampleThoughts(), score, max_depth, is_final)
        top = tree.plant(root)
        for _ in range(simulations):
            leaf = _descend(tree, top, exploration, order)
            if leaf is top:  # no thoughts at all
                break
            _credit(leaf, tree.evaluate(leaf))
        return tree.result()


def _scored_open(tree: ThoughtTree, nodes: list[ThoughtNode]) -> list[ThoughtNode]:
    """Score new nodes; those that can be expanded."""
    for node in nodes:
        tree.evaluate(node)
    return [node for node in nodes if node.wanted]


def _promise(node: ThoughtNode) -> tuple[float, int]:
    assert node.score is not None
    return -node.score, node.number


def _reached(tree: ThoughtTree, target: float | None) -> bool:
    best = tree.best
    if target is None or best is None or best.score is None:
        return False
    return best.is_complete and best.score >= target


def _descend(tree: ThoughtTree, top: ThoughtNode, exploration: float, order: random.Random) -> ThoughtNode:
    """The node that this simulation scores."""
    node = top
    while True:
        if node.children is None and not node.is_complete and (node is top or node.visits):
            _expand_in_random_order(tree, node, order)
        if not node.children:
            return node
        node = max(node.children, key=lambda child: _uct(child, exploration))
        if not node.visits:
            return node


def _expand_in_random_order(tree: ThoughtTree, node: ThoughtNode, order: random.Random) -> None:
    children = tree.grow([node])
    order.shuffle(children)
    node.children = children


def _uct(node: ThoughtNode, exploration: float) -> float:
    """Upper confidence bound; thoughts never tried come first."""
    if not node.visits:
        return math.inf
    assert node.parent is not None
    return node.total / node.visits + exploration * math.sqrt(math.log(node.parent.visits) / node.visits)


def _credit(leaf: ThoughtNode, value: float) -> None:
    node: ThoughtNode | None = leaf
    while node is not None:
        node.visits += 1
        node.total += value
        node = node.parent


def _check_limits(**limits: int | None) -> None:
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise InvalidRequest(f"{name} must be at least 1, got {limit}")
