"""The growing tree of a search: its nodes, the contexts it holds, and what it gives back.

A search owns every context it opens: those that `expand` returns and its own fork of the root. `OpenContexts`
is the ledger; leaving it releases everything that was not kept, whatever the reason. Which node to expand
next is decided elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcomm.agents.thoughts import Expand, Score, Thought
from kvcomm.errors import InvalidRequest
from kvcomm.plain import Plain, plain, short

if TYPE_CHECKING:
    from kvcomm.engine.context import Context


@dataclass(frozen=True)
class SearchStats(Plain):
    """What a search did.

    Attributes:
        num_expanded: contexts that were expanded.
        num_thoughts: thoughts generated.
        num_scored: thoughts scored.
        num_pruned: contexts given back before the search ended.
        max_open: contexts open at the same time at most.
        max_depth: thoughts on the longest path.
        total_s: seconds.
    """

    num_expanded: int
    num_thoughts: int
    num_scored: int
    num_pruned: int
    max_open: int
    max_depth: int
    total_s: float


@dataclass(frozen=True)
class SearchResult:
    """The best path. The caller releases it: `release()`, or use it as a context manager.

    Attributes:
        texts, scores: the thoughts from the root's first child to the best one, and their scores.
        context: the root's text and every thought of the path; the only context that the search left open.
        is_complete: whether the path ends in a final thought or at the depth limit.
        stats: what it took.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    context: Context
    is_complete: bool
    stats: SearchStats

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "unfinished"
        return f"SearchResult({short(self.text)}, score {self.score}, {len(self.texts)} thoughts, {state})"

    def to_dict(self) -> dict[str, Any]:
        """Every field but the context, as JSON values."""
        names = ("texts", "scores", "is_complete", "stats")
        return {name: plain(getattr(self, name)) for name in names}

    @property
    def text(self) -> str:
        """All thoughts of the path in a row."""
        return "".join(self.texts)

    @property
    def score(self) -> float | None:
        """Score of the last thought; None if there was none."""
        return self.scores[-1] if self.scores else None

    def release(self) -> None:
        """Give the context's pages back."""
        self.context.release()

    def __enter__(self) -> SearchResult:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class OpenContexts:
    """The contexts a search holds. Leaving the `with` block releases all of them, except one that was kept.

    Law: every context adopted is released exactly once, by `release` or on leaving, unless it was kept.
    """

    def __init__(self) -> None:
        self._open: dict[int, Context] = {}
        self.num_pruned = 0
        self.max_open = 0

    def adopt(self, contexts: Sequence[Context]) -> None:
        """Own contexts from now on, all of them even if this raises.

        Raises:
            InvalidRequest: one is there twice or the search's own already, so two branches would change it.
        """
        expected = len(self._open) + len(contexts)
        self._open.update((id(context), context) for context in contexts)
        self.max_open = max(self.max_open, len(self._open))
        if len(self._open) != expected:
            raise InvalidRequest("expand returned a context that is in use; return a fork for every thought")

    def release(self, context: Context) -> None:
        """Give an owned context back."""
        del self._open[id(context)]
        self.num_pruned += 1
        context.release()

    def keep(self, context: Context) -> Context:
        """Hand an owned context over to the caller."""
        return self._open.pop(id(context))

    def __enter__(self) -> OpenContexts:
        return self

    def __exit__(self, *error: object) -> None:
        while self._open:
            self._open.popitem()[1].release()


@dataclass(eq=False)
class ThoughtNode:
    """A thought in the tree.

    Attributes:
        context: open while the node is wanted or the best; then None.
        score: None until scored.
        depth: thoughts on the path to it; 0 is the root.
        number: order of generation, which breaks ties.
        wanted: it may still be scored or expanded.
        children: None until expanded.
        visits, total: for mcts: simulations through the node, and the sum of their scores.
    """

    parent: ThoughtNode | None
    context: Context | None
    text: str
    depth: int
    number: int
    is_complete: bool
    score: float | None = None
    wanted: bool = True
    children: list[ThoughtNode] | None = None
    visits: int = 0
    total: float = 0.0

    @property
    def path(self) -> list[ThoughtNode]:
        """The nodes from the root's child to this one."""
        above = self.parent.path if self.parent else []
        return [*above, self] if self.depth else []


@dataclass
class ThoughtTree:
    """The growing tree of one search: expands, scores, remembers the best node and drops what nobody needs.

    Law: a node's context is open if and only if the node is wanted or the best.
    """

    held: OpenContexts
    expand: Expand
    score: Score
    max_depth: int
    is_final: Callable[[Context, str], bool] | None
    num_expanded: int = 0
    num_thoughts: int = 0
    num_scored: int = 0
    deepest: int = 0
    best: ThoughtNode | None = None
    began_s: float = field(default_factory=time.monotonic)

    def plant(self, root: Context) -> ThoughtNode:
        """The root node, with a fork of the caller's context."""
        context = root.fork()
        self.held.adopt([context])
        self.best = ThoughtNode(None, context, "", depth=0, number=0, is_complete=False)
        return self.best

    def grow(self, nodes: Sequence[ThoughtNode]) -> list[ThoughtNode]:
        """Expand nodes in one batch; returns the new nodes, unscored, in order."""
        found = self.expand([_opened(node) for node in nodes])
        self.held.adopt([thought.context for thoughts in found for thought in thoughts])
        if len(found) != len(nodes):
            raise InvalidRequest(f"expand was given {len(nodes)} contexts and returned {len(found)} lists of thoughts")
        for node, thoughts in zip(nodes, found, strict=True):
            node.children = [self._child(node, thought) for thought in thoughts]
            self.drop(node)
        self.num_expanded += len(nodes)
        return [child for node in nodes for child in node.children or ()]

    def evaluate(self, node: ThoughtNode) -> float:
        """Score a node once; it may become the best. A complete node that is not the best is dropped."""
        if node.score is None:
            node.score = self._scored(_opened(node), node.text)
            self._offer(node)
            if node.is_complete:
                self.drop(node)
        return node.score

    def drop(self, node: ThoughtNode) -> None:
        """The node is not wanted any more: give its context back unless it is the best."""
        node.wanted = False
        if node is not self.best and node.context is not None:
            self.held.release(node.context)
            node.context = None

    def result(self) -> SearchResult:
        """Hand the best path to the caller."""
        assert self.best is not None
        path = self.best.path
        return SearchResult(
            texts=tuple(node.text for node in path),
            scores=tuple(node.score for node in path if node.score is not None),
            context=self.held.keep(_opened(self.best)),
            is_complete=self.best.is_complete,
            stats=SearchStats(
                num_expanded=self.num_expanded,
                num_thoughts=self.num_thoughts,
                num_scored=self.num_scored,
                num_pruned=self.held.num_pruned,
                max_open=self.held.max_open,
                max_depth=self.deepest,
                total_s=time.monotonic() - self.began_s,
            ),
        )

    def _child(self, parent: ThoughtNode, thought: Thought) -> ThoughtNode:
        self.num_thoughts += 1
        depth = parent.depth + 1
        self.deepest = max(self.deepest, depth)
        final = thought.is_final or (self.is_final is not None and self.is_final(thought.context, thought.text))
        return ThoughtNode(
            parent, thought.context, thought.text, depth, self.num_thoughts, final or depth >= self.max_depth
        )

    def _scored(self, context: Context, text: str) -> float:
        score = float(self.score(context, text))
        self.num_scored += 1
        if not math.isfinite(score):
            raise InvalidRequest(f"the scorer returned {score} for the thought {text[:60]!r}; scores must be finite")
        return score

    def _offer(self, node: ThoughtNode) -> None:
        """Make the node the best if it is: complete paths first, then the higher score, then the earlier."""
        assert self.best is not None
        if _rank(node) <= _rank(self.best):
            return
        former, self.best = self.best, node
        if not former.wanted:
            self.drop(former)


def _rank(node: ThoughtNode) -> tuple[bool, float]:
    return node.is_complete, -math.inf if node.score is None else node.score


def _opened(node: ThoughtNode) -> Context:
    assert node.context is not None, f"the context of thought {node.number} was given back already"
    return node.context
