"""The setting of KVCOMM's Table 3 (arXiv 2510.12872v2): first tokens of five agents, moved KV against dense prefills.

512-token roles, a 1,000-token question, 512-token outputs; each agent reads its role, the question and all outputs
before its own. Deviations: real text where the publication has synthetic one, and outputs are taken from the text
instead of decoded, which a first token does not depend on. Roles are cached, banks are warm, and what was published is
sketched, as in a team at work, where answers are decoded in between. Dense is transformers' own forward over the whole
prompt. The engine is timed as its callers see it, whole requests through its queue, in turns with dense and in one
process. What is served rests on pairs that the run measures itself: for a caller who accepts everything, and so gets
the boldest corrected rung (glue only), and for one with (0.05, 0.05). Measuring takes by far the longest, and times do
not depend on when it was done: with --anchors it is kept in a folder, and taken from there by the next run of the same
sizes and texts. With --quick sizes are small and nothing is measured: glue only is served with no bound, and under
(0.05, 0.05) everything is computed exactly.

The third way moves nothing: agents read along (`eval.ttft.along`). How much of its prompt an agent is left with who has
read what there was and follows the newest output is measured once, while that is decoded; in the rounds outputs come
from the text again. The figures `team_left` say what all agents were left with who followed all outputs from the first
one on, as far as answers in progress left them time. The first agent, who waits for nobody, computes its question.
First tokens are held against transformers' own, and the last agent's against an exact prefix hit that computes the same
number of tokens. With --along-only nothing is moved, and so nothing taught.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from eval.command import note
from eval.figures import Figure, Report
from eval.stock import Stock
from eval.ttft.along import FIRST_TOKEN, compare, follow, follow_team, num_left, read_along
from eval.ttft.first_tokens import MOVED
from eval.ttft.team import ONE_TOKEN, Sizes, Team, Texts, num_slot_tokens, teach, tokens_of
from eval.workload import settings
from kvcomm import Completion, Engine, ReusePolicy, Rung, Segment
from kvcomm.errors import InvalidRequest
from kvcomm.lab.moving import CORRECTED
from kvcomm.lab.timings import Samples, TakeTokens

GLUE_ONLY = ReusePolicy(max_divergence=1e6, confidence=0.5, basis="pool", rungs=CORRECTED, learn=False, audit=0.0)
BOUND = ReusePolicy(max_divergence=0.05, confidence=0.95, basis="pool", learn=False, audit=0.0)


class Serving(NamedTuple):
    """How moved KV is asked for, and the ending of its figures' names."""

    policy: ReusePolicy
    rung: Rung | None
    kind: str


CALIBRATED = (Serving(GLUE_ONLY, None, ""), Serving(BOUND, None, "_bound"))
QUICK = (Serving(ReusePolicy.exact(), MOVED, ""), Serving(BOUND, None, "_bound"))
ALONG = "_along"
"""The ending of names of what is read along."""

GOALS = {
    "agent5_speedup": ">= 22",
    "sum_speedup": ">= 9",
    "over_exact_hit": "<= 1.6",
    "agent5_along": ">= 25",
    "sum_along": ">= 8",
    "along_over_exact_hit": "<= 1.15",
    "same_first_tokens": "1",
}


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """All figures of an engine.

    Raises:
        InvalidRequest: --anchors with --quick or --along-only, or anchors of a team of another size.
    """
    unfit = "--quick" if options.quick else "--along-only" if options.along_only else None
    if unfit is not None and options.anchors is not None:
        raise InvalidRequest(f"{unfit} calibrates nothing that --anchors could keep; leave one of them out")
    sizes = Sizes(options.agents, options.role_tokens, options.question_tokens, options.output_tokens)
    team = Team(engine, take, sizes)
    servings: Sequence[Serving] = ()
    if not options.along_only:
        servings = QUICK if options.quick else CALIBRATED
        _warm(team, options)
    followed = [follow(team, options.output_tokens), *follow_team(team, options.output_tokens)]
    left = num_left(followed[0].usage)
    stock = Stock(engine.model)
    samples: dict[str, list[float]] = {}
    for index in range(-1, options.repeats):
        note("one round to warm up" if index < 0 else f"round {index + 1} of {options.repeats}")
        found = dict(_round(team, stock, servings)) | dict(_along(team, stock, left))
        note("  " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        if index >= 0:
            for name, value in found.items():
                samples.setdefault(name, []).append(value)
    measured = {name: Samples(tuple(values)) for name, values in samples.items()}
    figures = [*_figures(measured, options.agents, servings), *_along_figures(measured, followed)]
    return Report("ttft", figures, settings(engine, options, anchors=None), samples)


def _warm(team: Team, options: Namespace) -> None:
    """Teach and calibrate, or take from the folder what an earlier run of the same sizes has kept; same texts after."""
    engine = team.engine
    num_calibrated = 0 if options.quick else options.calibration
    if options.anchors is not None and options.anchors.exists():
        profile = engine.reuse.load(options.anchors)
        num_readers = len(profile.knowledge.readers)
        if num_readers != options.agents - 1:
            raise InvalidRequest(
                f"{options.anchors} holds {num_readers} readers, not one for each of agents 2 to {options.agents}; "
                "name another folder"
            )
        note(f"anchors and pairs of {num_readers} readers taken from {options.anchors}")
        for _ in range(options.warm + num_calibrated):
            team.texts()
        return
    teach(team, options.warm)
    for index in range(num_calibrated):
        note(f"calibration: text {index + 1} of {num_calibrated}")
        team.calibrate(BOUND)
    if options.anchors is not None:
        engine.reuse.save(options.anchors)


def _round(team: Team, stock: Stock, servings: Sequence[Serving]) -> Iterator[tuple[str, float]]:
    """Every agent's first token, dense and on moved KV; one text for each way: a prompt is new but once."""
    for serving in servings:
        team.restart()
        texts = team.texts()
        for agent in team.agents:
            yield from _agent(team, stock, texts, agent, serving)
            team.publish(agent, texts)
        if not serving.kind:
            prompt = team.prompt(team.agents[-1], texts)
            yield from _exact_hit(team, prompt, sum(len(part.token_ids) for part in prompt[1:] if part.name is None))


def _along(team: Team, stock: Stock, left: int) -> Iterator[tuple[str, float]]:
    """Every agent's first token, dense and read along, on one text.

    Args:
        left: tokens of a prompt that are not read when it is complete.
    """
    team.restart()
    texts = team.texts()
    for agent in team.agents:
        prompt = team.prompt(agent, texts)
        tokens = tokens_of(prompt)
        if agent % 2:
            yield f"dense{ALONG}_{agent + 1}_s", stock.prefill_s(tokens, use_cache=True)
        if agent:
            served = read_along(team.engine, prompt, left)
        else:
            served = team.engine.generate(prompt, FIRST_TOKEN, policy=ReusePolicy.exact())
        if not agent % 2:
            yield f"dense{ALONG}_{agent + 1}_s", stock.prefill_s(tokens, use_cache=True)
        yield f"kvcomm{ALONG}_{agent + 1}_s", served.usage.ttft_s
        compared = compare(stock, tokens, served)
        yield f"same{ALONG}_{agent + 1}", float(compared.is_same)
        yield f"error{ALONG}_{agent + 1}", compared.error
    yield f"computed{ALONG}", num_left(served.usage)
    yield from _exact_hit(team, prompt, num_left(served.usage), ALONG)


def _agent(team: Team, stock: Stock, texts: Texts, agent: int, serving: Serving) -> Iterator[tuple[str, float]]:
    prompt, kind = team.prompt(agent, texts), serving.kind
    tokens = tokens_of(prompt)
    if agent % 2:
        yield f"dense{kind}_{agent + 1}_s", stock.prefill_s(tokens, use_cache=True)
    served = team.engine.generate(prompt, ONE_TOKEN, policy=serving.policy, rung=serving.rung)
    if not agent % 2:
        yield f"dense{kind}_{agent + 1}_s", stock.prefill_s(tokens, use_cache=True)
    yield f"kvcomm{kind}_{agent + 1}_s", served.usage.ttft_s
    if agent:
        yield f"aligned{kind}_{agent + 1}", served.usage.aligned_tokens / num_slot_tokens(prompt)
        yield f"divergence{kind}_{agent + 1}", _divergence(team, prompt, served, serving)
    if agent == team.agents[-1] and not kind:
        yield "computed", served.usage.computed_tokens


def _divergence(team: Team, prompt: Sequence[Segment], served: Completion, serving: Serving) -> float:
    """Nats, of what was served; what was computed exactly has none."""
    report = served.usage.approximation
    if report is None:
        return 0.0
    rungs = serving.policy.rungs if serving.rung is None else (serving.rung,)
    (rung,) = (rung for rung in rungs if str(rung) == report.rung)
    continuation = team.continuation(prompt)
    (outcome,) = team.engine.reuse.measure(prompt, continuation, [rung]).result()
    return outcome.divergence


def _exact_hit(team: Team, prompt: Sequence[Segment], num_computed: int, kind: str = "") -> Iterator[tuple[str, float]]:
    """A prompt that is cached but for so many new tokens at its end."""
    tail = team.take(num_computed)
    served = team.engine.generate(tokens_of(prompt)[:-num_computed] + tail, ONE_TOKEN, policy=ReusePolicy.exact())
    yield f"exact_hit{kind}_s", served.usage.ttft_s
    yield f"exact_hit{kind}_computed", served.usage.computed_tokens


def _figures(samples: dict[str, Samples], num_agents: int, servings: Sequence[Serving]) -> list[Figure]:
    last = num_agents
    figures = []
    for kind in (serving.kind for serving in servings):
        agents = range(1, num_agents + 1)
        dense = [samples[f"dense{kind}_{agent}_s"] for agent in agents]
        served = [samples[f"kvcomm{kind}_{agent}_s"] for agent in agents]
        figures += [
            _ratio(f"agent{last}_speedup{kind}", dense[-1].per(served[-1])),
            _ratio(f"sum_speedup{kind}", _sums(dense).per(_sums(served))),
            Figure(f"divergence{kind}", _mean(samples, f"divergence{kind}", num_agents), "nats"),
            Figure(f"aligned{kind}", _mean(samples, f"aligned{kind}", num_agents), "share"),
        ]
    if servings:
        figures.append(_ratio("over_exact_hit", samples[f"kvcomm_{last}_s"].per(samples["exact_hit_s"])))
    figures += [
        Figure(name, measured.median, "s", measured.quartiles)
        for name, measured in samples.items()
        if name.endswith("_s")
    ]
    counts = [name for name in samples if name.startswith("computed") or name.endswith("computed")]
    return [*figures, *(Figure(name, samples[name].median, "tokens") for name in counts)]


def _along_figures(samples: dict[str, Samples], followed: Sequence[Completion]) -> list[Figure]:
    """Of the last agent and of all; `followed`: what came of following one output, and of a team that follows all."""
    one, *team = followed
    last = len(team)
    agents = range(1, last + 1)
    dense = [samples[f"dense{ALONG}_{agent}_s"] for agent in agents]
    served = [samples[f"kvcomm{ALONG}_{agent}_s"] for agent in agents]
    same = np.mean([samples[f"same{ALONG}_{agent}"].values for agent in agents])
    error = np.max([samples[f"error{ALONG}_{agent}"].values for agent in agents])
    return [
        _ratio(f"agent{last}{ALONG}", dense[-1].per(served[-1])),
        _ratio(f"sum{ALONG}", _sums(dense).per(_sums(served))),
        _ratio("along_over_exact_hit", served[-1].per(samples[f"exact_hit{ALONG}_s"])),
        Figure("same_first_tokens", float(same), "share", goal=GOALS["same_first_tokens"]),
        Figure("logprob_error", float(error), "nats"),
        Figure("left", num_left(one.usage), "tokens"),
        Figure("followed_s", one.usage.ttft_s, "s"),
        *(Figure(f"team_left_{agent}", num_left(each.usage), "tokens") for agent, each in enumerate(team, start=1)),
        *(Figure(f"team_{agent}_s", each.usage.ttft_s, "s") for agent, each in enumerate(team, start=1)),
    ]


def _ratio(name: str, samples: Samples) -> Figure:
    return Figure(name, samples.median, "x", samples.quartiles, GOALS.get(name, ""))


def _sums(parts: Sequence[Samples]) -> Samples:
    return Samples(tuple(float(total) for total in np.sum([part.values for part in parts], axis=0)))


def _mean(samples: dict[str, Samples], name: str, num_agents: int) -> float:
    return float(np.mean([samples[f"{name}_{agent}"].values for agent in range(2, num_agents + 1)]))
