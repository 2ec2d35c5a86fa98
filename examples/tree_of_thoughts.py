"""Tree of Thoughts over HTTP: every thought is a fork of the context that it goes on from.

    kvcomm serve --model smollm2-135m
    pip install httpx
    python examples/tree_of_thoughts.py [ADDRESS] [MODEL]

A fork copies nothing, and whoever rates a thought reads it from the cache. Within one process the library does the same
without HTTP: `beam`, `best_first` and `mcts` in `kvcomm.agents`.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import httpx

TASK = "Use the numbers 4, 6, 8 and 3, each once, and + - * / to reach 24. Work step by step."
STEP = "Write the next step, in one short line."
RATE = "How promising is this, from 1 (hopeless) to 9 (solved)? Answer with the digit."
DEPTH, WIDTH, NUM_CHILDREN = 2, 2, 3


class Thought(NamedTuple):
    """A context that ends with a step, and how it was rated."""

    context: str
    text: str
    rating: int


class Tree:
    """Thoughts of one server."""

    def __init__(self, address: str, model: str) -> None:
        self._http = httpx.Client(base_url=f"{address}/v1", timeout=60)
        self._model = model
        self.num_tokens = self.num_computed = 0
        messages = [
            {"role": "user", "content": TASK},
            {"role": "assistant", "content": "I will think step by step."},
        ]
        root = self._post("/contexts", {"model": model, "messages": messages, "name": "root"})
        self.root = Thought(root["id"], TASK, 0)

    def close(self) -> None:
        """Drop the whole tree."""
        self._http.delete(f"/contexts/{self.root.context}", params={"descendants": True}).raise_for_status()
        self._http.close()

    def children(self, parent: Thought) -> list[Thought]:
        """Several ways to go on from a thought."""
        return [self._child(parent, seed) for seed in range(NUM_CHILDREN)]

    def drop(self, thought: Thought) -> None:
        """Give a branch back that nobody goes on with."""
        self._http.delete(f"/contexts/{thought.context}", params={"descendants": True}).raise_for_status()

    def _child(self, parent: Thought, seed: int) -> Thought:
        fork = self._post(f"/contexts/{parent.context}/fork", {})["id"]
        text = self._say(fork, STEP, max_tokens=30, temperature=0.9, seed=seed, store=True)
        rating = self._say(fork, RATE, structured_outputs={"choice": list("123456789")}, temperature=0, max_tokens=4)
        return Thought(fork, text, int(rating))

    def _say(self, context: str, text: str, **settings: Any) -> str:
        """The answer to a message behind a context; only `store` changes that."""
        message = {"role": "user", "content": text}
        body = {"model": self._model, "context_id": context, "messages": [message], **settings}
        answer = self._post("/chat/completions", body)
        self.num_tokens += answer["usage"]["prompt_tokens"]
        self.num_computed += answer["usage"]["computed_tokens"]
        return str(answer["choices"][0]["message"]["content"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self._http.post(path, json=body)
        response.raise_for_status()
        return dict(response.json())


def main(address: str = "http://127.0.0.1:8000", model: str = "smollm2-135m") -> None:
    """A beam search: the best thoughts of each level go on, the others are dropped."""
    tree = Tree(address, model)
    try:
        level = [tree.root]
        for depth in range(1, DEPTH + 1):
            found = sorted((child for each in level for child in tree.children(each)), key=lambda each: -each.rating)
            level, others = found[:WIDTH], found[WIDTH:]
            for thought in others:
                tree.drop(thought)
            for thought in level:
                print(f"level {depth}, rated {thought.rating}: {thought.text.strip()}")
        print(f"{tree.num_computed} of {tree.num_tokens} prompt tokens were computed, the others shared")
    finally:
        tree.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
