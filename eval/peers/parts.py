"""What is measured, part by part; every function puts its values into the bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.command import note
from eval.peers.bench import Bench
from eval.peers.engines import ONE_TOKEN, Peer
from eval.peers.prompts import ROLES, Prompt
from kvcomm.errors import ServerError
from kvcomm.lab.load.client import Sample

BOUND = {"max_divergence": 0.05, "confidence": 0.9}
ANYTHING = {"max_divergence": 100.0, "confidence": 0.5}
"""A bound that every text keeps: the boldest rung is taken, which computes nothing of a moved text."""


def first_tokens(bench: Bench) -> None:
    """Unseen prompts of two lengths, then the same beginnings with other ends."""
    sizes = bench.sizes
    for turn in range(sizes.turns):
        unseen = {"prefill": bench.texts.tokens(sizes.short), "prefill4k": bench.texts.tokens(sizes.long)}
        for name, begin in unseen.items():
            _first_token(bench, name, turn, begin)
            _first_token(bench, name.replace("prefill", "hit"), turn, begin)


def _first_token(bench: Bench, name: str, turn: int, begin: list[int]) -> None:
    prompt = [*begin, *bench.texts.tokens(bench.sizes.tail)]
    bench.each(name, turn, lambda peer: [bench.ask(peer, prompt, ONE_TOKEN)])


def streams(bench: Bench) -> None:
    """One and several answers at once, drawn and copied, behind prompts that are cached; and behind unseen ones."""
    sizes, texts = bench.sizes, bench.texts
    for turn in range(sizes.turns):
        for num, num_new in ((1, sizes.new), (sizes.streams, sizes.stream_new)):
            drawn = [texts.tokens(sizes.prompt) for _ in range(num)]
            copied = [texts.copying(sizes.prompt) for _ in range(num)]
            _streams(bench, f"decode{num}", turn, drawn, num_new, is_drawn=True)
            _streams(bench, f"copy{num}", turn, copied, num_new, is_drawn=False)
        unseen = [texts.tokens(sizes.prompt) for _ in range(sizes.streams)]
        _streams(bench, f"unseen{sizes.streams}", turn, unseen, sizes.stream_new, is_drawn=True, is_cached=False)


def _streams(
    bench: Bench,
    name: str,
    turn: int,
    prompts: Sequence[list[int]],
    num_new: int,
    *,
    is_drawn: bool,
    is_cached: bool = True,
) -> None:
    if is_cached:
        bench.each("", turn, lambda peer: bench.stream(peer, prompts, ONE_TOKEN, is_drawn=False))
    bench.each(name, turn, lambda peer: bench.stream(peer, prompts, num_new, is_drawn=is_drawn))


def shifted(bench: Bench) -> None:
    """A document behind another prefix than the one that it was read behind; kvcomm has learned this before."""
    sizes, texts = bench.sizes, bench.texts
    own = [peer for peer in bench.peers if peer.plan.is_kvcomm]
    for index in range(sizes.learn):
        note(f"learning to move documents: {index + 1} of {sizes.learn}")
        document = texts.text(sizes.document)
        _read(bench, "", index, texts.about(0, document), among=own)
        _read(bench, "", index, texts.about(1, document), BOUND, among=own)
    for turn in range(sizes.turns):
        for name, reuse in (("shifted", BOUND), ("shifted_rung0", ANYTHING)):
            document = texts.text(sizes.document)
            _read(bench, "", turn, texts.about(0, document))
            _read(bench, name, turn, texts.about(1, document), reuse)


def _read(
    bench: Bench,
    name: str,
    turn: int,
    prompt: Prompt,
    reuse: Mapping[str, float] | None = None,
    *,
    among: Sequence[Peer] | None = None,
) -> None:
    costs = bench.each(name, turn, lambda peer: [_ask_parts(bench, peer, prompt, ONE_TOKEN, reuse)], among=among)
    for peer in bench.peers:
        if name and peer.plan.is_kvcomm:
            usage = costs[peer.name].samples[0].usage
            bench.keep(f"{name}_{peer.name}_moved", usage["aligned_tokens"] / usage["prompt_tokens"])
            note(f"{name}: {usage['aligned_tokens']} tokens moved, {usage['rung_name']}; {usage['miss_reasons']}")


def _ask_parts(
    bench: Bench, peer: Peer, prompt: Prompt, num_new: int, reuse: Mapping[str, float] | None = None
) -> Sample:
    """A prompt in parts, as each engine takes it; raises ServerError where kvcomm reads other tokens than the rest."""
    if not peer.plan.is_kvcomm:
        return bench.ask(peer, prompt.token_ids, num_new)
    fields: dict[str, Any] = {**prompt.fields, **({} if reuse is None else {"reuse": dict(reuse)})}
    sample = bench.ask(peer, prompt.tail, num_new, **fields)
    if sample.usage["prompt_tokens"] != len(prompt.token_ids):
        raise ServerError(
            f"{peer.name} read {sample.usage['prompt_tokens']} tokens where the others read {len(prompt.token_ids)}"
        )
    return sample


def team(bench: Bench, stock: Sequence[Peer]) -> None:
    """Five agents one after the other; each reads the question and what was said before it.

    Args:
        stock: engines that are only measured here.
    """
    sizes = bench.sizes
    own = [peer for peer in bench.peers if peer.plan.is_kvcomm]
    for index in range(sizes.rounds):
        note(f"teams that are not timed: {index + 1} of {sizes.rounds}")
        _team(bench, "", index, own)
    for turn in range(sizes.turns):
        _team(bench, "team", turn, [*bench.peers, *stock])


def _team(bench: Bench, name: str, turn: int, among: Sequence[Peer]) -> None:
    question = bench.texts.text(bench.sizes.question)
    bench.each(name, turn, lambda peer: _one_team(bench, peer, question), among=among)


def _one_team(bench: Bench, peer: Peer, question: str) -> list[Sample]:
    said: dict[str, str] = {}
    samples = []
    for agent in ROLES:
        prompt = bench.texts.agent(agent, question, said)
        samples.append(_ask_parts(bench, peer, prompt, bench.sizes.answer, BOUND))
        said[agent] = samples[-1].text
    return samples
