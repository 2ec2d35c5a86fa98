"""Turns: every engine gets the same prompt, one after the other, while the rest have nothing to do.

Who comes first changes from turn to turn. An engine's turn begins when it is at rest and ends when it is at rest again,
so what one does behind its answers, such as learning, meets no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from eval.command import note
from eval.peers.engines import ONE_TOKEN, Peer, asked
from eval.peers.prompts import Texts
from kvcomm.errors import ServerError
from kvcomm.lab.load.client import Sample

TAIL_S = 0.05
"""After an answer, that still belong to it: what a server does once the last piece is out."""
REST_LIMIT_S = 120.0
IDLE_LOOK_S = 2.0
BUSY_IDLE_SHARE = 0.02
"""Of one core: who takes more without being asked is stopped while others have their turn."""
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Sizes:
    """How much is asked; lengths in tokens.

    Attributes:
        short, long: of prompts whose first token is timed, without `tail`, which is what a hit has to compute.
        prompt, new, streams, stream_new: of streams; one has `new` tokens, `streams` at once have `stream_new` each.
            Prompts are a little longer than whole blocks of 128 tokens, the largest that any engine caches.
        document: of the text that is moved; learn: documents that kvcomm reads before.
        question, answer: of the team; rounds: teams that kvcomm sees before.
        checked, checked_new: prompts and answers whose tokens are compared.
    """

    turns: int = 3
    short: int = 1024
    long: int = 3968
    tail: int = 32
    prompt: int = 272
    new: int = 64
    streams: int = 8
    stream_new: int = 32
    document: int = 1000
    learn: int = 16
    question: int = 600
    answer: int = 64
    rounds: int = 4
    checked: int = 60
    checked_new: int = 16


QUICK = Sizes(
    turns=1, short=256, long=1024, prompt=144, new=16, stream_new=8, document=300, learn=4, question=100, answer=16,
    rounds=1, checked=6, checked_new=8,
)  # fmt: skip


class Cost(NamedTuple):
    """What one turn took: by the clock, of the processor, to the first token; and what came."""

    wall_s: float
    cpu_s: float
    ttft_s: float
    samples: tuple[Sample, ...]


@dataclass
class Bench:
    """Engines that run, and what was measured of them.

    Attributes:
        values: by name, one value a turn.
        left: why engines have left, by name.
    """

    peers: list[Peer]
    texts: Texts
    sizes: Sizes
    values: dict[str, list[float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def warm_up(self) -> None:
        """Let each engine do once what is done once, and find out who does not rest."""
        prompts = [self.texts.tokens(self.sizes.prompt) for _ in range(self.sizes.streams)]
        first = self.texts.tokens(self.sizes.short)
        for peer in list(self.peers):
            self.turn(
                peer, lambda peer: [self.ask(peer, first, ONE_TOKEN), *self.stream(peer, prompts, 8, is_drawn=True)]
            )
            peer.idle_share = peer.tree.idle_share(IDLE_LOOK_S)
            peer.is_paused_when_idle = peer.idle_share > BUSY_IDLE_SHARE
            if peer.is_paused_when_idle:
                note(f"{peer.name} takes {peer.idle_share:.0%} of a core when idle: it is stopped between its turns")
                peer.tree.pause()

    def each(
        self, name: str, turn: int, ask: Callable[[Peer], list[Sample]], *, among: Sequence[Peer] | None = None
    ) -> dict[str, Cost]:
        """One turn of every engine, or of some; what it took goes to `values` where it has a name."""
        peers = list(self.peers if among is None else among)
        costs = {}
        for peer in [*peers[turn % len(peers) :], *peers[: turn % len(peers)]] if peers else []:
            cost = self.turn(peer, ask)
            if cost is None:
                continue
            costs[peer.name] = cost
            if name:
                self.keep(f"{name}_{peer.name}_s", cost.wall_s)
                self.keep(f"{name}_{peer.name}_cpu_s", cost.cpu_s)
                self.keep(f"{name}_{peer.name}_ttft_s", cost.ttft_s)
        if name:
            note(
                f"{name}: "
                + ", ".join(f"{each} {cost.wall_s:.2f} s ({cost.cpu_s:.2f})" for each, cost in costs.items())
            )
        return costs

    def turn(self, peer: Peer, ask: Callable[[Peer], list[Sample]]) -> Cost | None:
        """One engine's turn; None where it failed and has left. Raises ServerError where kvcomm fails."""
        if peer.is_paused_when_idle:
            peer.tree.resume()
        try:
            peer.tree.settle(REST_LIMIT_S)
            cpu_s, start = peer.tree.cpu_s(), time.perf_counter()
            samples = ask(peer)
            wall_s = time.perf_counter() - start
            time.sleep(TAIL_S)
            cpu_s = peer.tree.cpu_s() - cpu_s
            peer.tree.settle(REST_LIMIT_S)
        except ServerError as error:
            self._leave(peer, error)
            return None
        if peer.is_paused_when_idle:
            peer.tree.pause()
        return Cost(wall_s, cpu_s, samples[0].events_s[0], tuple(samples))

    def keep(self, name: str, value: float) -> None:
        """One more value of a name."""
        self.values.setdefault(name, []).append(value)

    def ask(self, peer: Peer, prompt: str | Sequence[int], num_new: int, **fields: Any) -> Sample:
        """One answer of exactly so many tokens. Raises ServerError where there is none."""
        return asked(peer.client.complete(prompt, num_new, ignore_eos=True, **fields), peer.name)

    def stream(self, peer: Peer, prompts: Sequence[list[int]], num_new: int, *, is_drawn: bool) -> list[Sample]:
        """All prompts at once; drawn, without a seed, which would cost some engines more than others; or greedy."""
        drawn = {"temperature": TEMPERATURE} if is_drawn else {}
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(lambda prompt: self.ask(peer, prompt, num_new, **drawn), prompts))

    def _leave(self, peer: Peer, error: ServerError) -> None:
        if peer.plan.is_kvcomm:
            raise error
        note(f"{peer.name} leaves: {error}")
        self.left[peer.name] = str(error)
        if peer in self.peers:
            self.peers.remove(peer)
