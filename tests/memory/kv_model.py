"""A pool whose slots say whose KV they hold, and sequences that write it the way a runner would.

KV depends on the whole prefix, so the value of a slot is a number given to (namespace, prefix up to this
token). Any mix-up of pages, offsets, branches or namespaces is then visible in the slot itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kvcomm.memory.pool import LayerShape, PageIds, PagePool

Path = tuple[int, ...]


class MarkedPool:
    """A one-layer pool with head size 1, and the number of every prefix ever written to it."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool([LayerShape(1, 1, 1)], num_pages=num_pages, page_size=page_size)
        for tensor in (*self.pool.keys, *self.pool.values):
            tensor.fill_(float("nan"))
        self._marks: dict[tuple[str, Path], int] = {}

    def mark(self, namespace: str, prefix: Path) -> float:
        return float(self._marks.setdefault((namespace, prefix), len(self._marks) + 1))

    def marks(self, namespace: str, path: Path) -> list[float]:
        return [self.mark(namespace, path[: i + 1]) for i in range(len(path))]

    def slots(self, pages: PageIds, start: int, end: int) -> npt.NDArray[np.int64]:
        positions = np.arange(start, end)
        return pages[positions // self.pool.page_size].astype(np.int64) * self.pool.page_size + (
            positions % self.pool.page_size
        )

    def write(self, namespace: str, path: Path, pages: PageIds, start: int) -> None:
        """Compute tokens [start, len(path)): every page written must be held by the writer alone."""
        slots = self.slots(pages, start, len(path))
        written = pages[start // self.pool.page_size : -(-len(path) // self.pool.page_size)]
        assert (self.pool.refcounts(written) == 1).all(), f"writing shared pages among {written}"
        marks = torch.tensor(self.marks(namespace, path)[start:], dtype=torch.float32)
        self.pool.keys[0][slots, 0, 0] = marks
        self.pool.values[0][slots, 0, 0] = -marks

    def check(self, namespace: str, path: Path, pages: PageIds) -> None:
        """`pages` hold exactly the KV of `path`, at the right offsets."""
        assert pages.size == -(-len(path) // self.pool.page_size)
        slots = self.slots(pages, 0, len(path))
        expected = self.marks(namespace, path)
        assert self.pool.keys[0][slots, 0, 0].tolist() == expected
        assert self.pool.values[0][slots, 0, 0].tolist() == [-m for m in expected]


class MarkedSequence:
    """Tokens of one namespace with own references to the pages of their KV."""

    def __init__(self, marked: MarkedPool, namespace: str, path: Path = ()) -> None:
        self.marked = marked
        self.namespace = namespace
        self.path: Path = ()
        self.pages: PageIds = np.empty(0, dtype=np.int32)
        self.extend(path)

    def adopt(self, path: Path, pages: PageIds) -> None:
        """Begin with someone else's KV, shared."""
        assert not self.path
        self.marked.pool.retain(pages)
        self.path, self.pages = path, pages

    def extend(self, tail: Path) -> None:
        """Compute more tokens, copying a shared last page before writing to it."""
        pool, start = self.marked.pool, len(self.path)
        if not tail:
            return
        if start % pool.page_size and pool.refcounts(self.pages[-1:])[0] > 1:
            copy = pool.copy_page(int(self.pages[-1]), start % pool.page_size)
            pool.release(self.pages[-1:])
            self.pages = np.append(self.pages[:-1], np.int32(copy))
        missing = -(-(start + len(tail)) // pool.page_size) - self.pages.size
        self.pages = np.concatenate([self.pages, pool.allocate(missing)])
        self.path += tail
        self.marked.write(self.namespace, self.path, self.pages, start)

    def pages_for(self, num_tokens: int) -> PageIds:
        return self.pages[: -(-num_tokens // self.marked.pool.page_size)]

    def fork(self) -> MarkedSequence:
        child = MarkedSequence(self.marked, self.namespace)
        child.adopt(self.path, self.pages)
        return child

    def release(self) -> None:
        self.marked.pool.release(self.pages)
        self.path, self.pages = (), self.pages[:0]
