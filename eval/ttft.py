"""Time to first token of a team that reads the same texts behind different roles: moved KV against a dense prefill.

    python -m eval.ttft --data TEXTS [--setting paper] [--anchors FOLDER] [--calibration N] [--repeats N] [--json]

The setting of KVCOMM's Table 3 (arXiv 2510.12872v2): five agents, 512-token roles, a 1,000-token question, 512-token
outputs; each reads its role, the question and all outputs before its own. Deviations: real text where the publication
has synthetic one, and outputs are taken from the text instead of decoded, which a first token does not depend on. Roles
are cached and banks are warm, as in a team at work. Dense is transformers' own forward over the whole prompt. The
engine is timed as its callers see it, whole requests through its queue, in turns with dense and in one process. What is
served is bounded by the calibration that the run makes itself: for a caller who accepts everything (glue only), and for
(0.05, 0.05). That calibration takes by far the longest, and times do not depend on when it was made: with --anchors it
is kept in a folder, and taken from there by the next run of the same sizes and texts.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.figures import Figure, Report
from eval.stock import Stock
from eval.workload import add_sizes, make_parser, note, parse, run, settings
from kvcomm import Completion, Engine, ReusePolicy, SamplingParams
from kvcomm.agents.warming import publish
from kvcomm.engine.benchmark import Samples, TakeTokens
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.request import NUM_CONTINUATION
from kvcomm.engine.variant import Variant
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment

GLUE_ONLY = ReusePolicy(max_divergence=1e6, confidence=0.5, learn=False, audit=0.0)
BOUND = ReusePolicy(max_divergence=0.05, confidence=0.95, learn=False, audit=0.0)
ONE_TOKEN = SamplingParams(max_new_tokens=1, ignore_eos=True)
GOALS = {"agent5_speedup": ">= 12", "sum_speedup": ">= 5", "over_exact_hit": "<= 1.5"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser("ttft", "Time to first token of a team, moved KV against dense prefills.")
    parser.add_argument("--setting", choices=("paper",), default="paper", help="sizes and team [%(default)s]")
    parser.add_argument("--anchors", type=Path, metavar="FOLDER", help="keep calibration there, or take it")
    add_sizes(parser, agents=5, role_tokens=512, question_tokens=1000, output_tokens=512, warm=3, calibration=20)
    return run(parse(parser, arguments, repeats=5, quick_repeats=2), measure)


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """All figures of an engine."""
    team = Team(engine, take, options)
    _warm(team)
    stock = Stock(engine.model)
    samples: dict[str, list[float]] = {}
    for index in range(-1, options.repeats):
        note("one round to warm up" if index < 0 else f"round {index + 1} of {options.repeats}")
        found = dict(_round(team, stock))
        note("  " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        if index >= 0:
            for name, value in found.items():
                samples.setdefault(name, []).append(value)
    measured = {name: Samples(tuple(values)) for name, values in samples.items()}
    return Report("ttft", _figures(measured, options.agents), settings(engine, options, anchors=None), samples)


def _warm(team: Team) -> None:
    """Teach and calibrate, or take from the folder what an earlier run of the same sizes has kept; same texts after."""
    options, engine = team.options, team.engine
    num_calibrated = engine.config.contest_prompts + options.calibration
    if options.anchors is not None and options.anchors.exists():
        profile = engine.load_anchors(options.anchors)
        if len(profile.groups) != options.agents - 1:
            raise InvalidRequest(
                f"{options.anchors} holds {len(profile.groups)} edge groups, not one for each of agents 2 to "
                f"{options.agents}; name another folder"
            )
        note(f"anchors and calibration of {len(profile.groups)} edge groups taken from {options.anchors}")
        for _ in range(options.warm + num_calibrated):
            team.texts()
        return
    for index in range(options.warm):
        note(f"anchors: text {index + 1} of {options.warm}")
        team.learn()
    for index in range(num_calibrated):
        note(f"calibration: text {index + 1} of {num_calibrated}")
        team.calibrate()
    if options.anchors is not None:
        engine.save_anchors(options.anchors)


@dataclass
class Texts:
    """One question and what every agent answers to it."""

    question: Segment
    outputs: list[Segment]


@dataclass
class Team:
    """Agents with fixed roles on one engine."""

    engine: Engine
    take: TakeTokens
    options: Namespace

    def __post_init__(self) -> None:
        roles = [self.take(self.options.role_tokens) for _ in range(self.options.agents)]
        self._roles = [Segment(tuple(role)) for role in roles]

    def texts(self) -> Texts:
        """New ones."""
        question = Segment(tuple(self.take(self.options.question_tokens)), "question")
        outputs = [
            Segment(tuple(self.take(self.options.output_tokens)), f"agent{index + 1}")
            for index in range(self.options.agents)
        ]
        return Texts(question, outputs)

    def prompt(self, agent: int, texts: Texts) -> tuple[Segment, ...]:
        """What an agent reads: role, question, all outputs before its own."""
        parts = [self._roles[agent], self._glue("\n\nQuestion: "), texts.question]
        for index in range(agent):
            parts += [self._glue(f"\n\nAgent {index + 1}: "), texts.outputs[index]]
        return (*parts, self._glue("\n\nYour answer: "))

    def publish(self, agent: int, texts: Texts) -> None:
        """Compute an agent's prompt and output exactly: the next ones move it from here."""
        publish(self.engine, [(self.prompt(agent, texts), texts.outputs[agent].token_ids)])

    def learn(self) -> None:
        """Teach the banks one run."""
        texts = self.texts()
        self._publish_all(texts)
        for agent in range(1, self.options.agents):
            self.engine.learn(self.prompt(agent, texts)).result()
        self.restart()

    def calibrate(self) -> None:
        """Let one run take part in what the agents' groups are at."""
        texts = self.texts()
        self._publish_all(texts)
        prompts = [self.prompt(agent, texts) for agent in range(self.options.agents)]
        answers = [answer.result().token_ids for answer in [self._answer(prompt) for prompt in prompts[1:]]]
        for agent, answer in enumerate(answers, start=1):
            group = self.engine.calibrate(prompts[agent], answer, BOUND).result()
            if group is None:
                raise InvalidRequest(f"nothing of agent {agent + 1}'s prompt can be moved")
        self.restart()

    def continuation(self, prompt: Sequence[Segment]) -> tuple[int, ...]:
        """The exact greedy answer's first tokens."""
        return self._answer(prompt).result().token_ids

    def restart(self) -> None:
        """Forget everything but the roles."""
        self.engine.clear_cache()
        for role in self._roles:
            self.engine.context((role,), policy=ReusePolicy.exact()).release()

    def _answer(self, prompt: Sequence[Segment]) -> RequestHandle:
        sampling = SamplingParams(max_new_tokens=NUM_CONTINUATION, ignore_eos=True)
        return self.engine.submit(list(prompt), sampling, policy=ReusePolicy.exact())

    def _publish_all(self, texts: Texts) -> None:
        for agent in range(self.options.agents):
            self.publish(agent, texts)

    def _glue(self, text: str) -> Segment:
        return self.engine.segment(text)


def _round(team: Team, stock: Stock) -> Iterator[tuple[str, float]]:
    """Every agent's first token, dense and on moved KV; one text for each policy: a prompt is new but once."""
    for policy, kind in ((GLUE_ONLY, ""), (BOUND, "_bound")):
        team.restart()
        texts = team.texts()
        for agent in range(team.options.agents):
            yield from _agent(team, stock, texts, agent, policy, kind)
            team.publish(agent, texts)
        if not kind:
            yield from _exact_hit(team, texts)


def _agent(
    team: Team, stock: Stock, texts: Texts, agent: int, policy: ReusePolicy, kind: str
) -> Iterator[tuple[str, float]]:
    prompt = team.prompt(agent, texts)
    tokens = [token for segment in prompt for token in segment.token_ids]
    if agent % 2:
        yield f"dense{kind}_{agent + 1}_s", stock.prefill_s(tokens, use_cache=True)
    served = team.engine.generate(prompt, ONE_TOKEN, policy=policy)
    if not agent % 2:
        yield f"dense{kind}_{agent + 1}_s", stock.prefill_s(tokens, use_cache=True)
    yield f"kvcomm{kind}_{agent + 1}_s", served.usage.ttft_s
    if agent:
        yield f"aligned{kind}_{agent + 1}", served.usage.aligned_tokens / _num_slots(prompt)
        yield f"divergence{kind}_{agent + 1}", _divergence(team, prompt, served)
    if agent == team.options.agents - 1 and not kind:
        yield "computed", served.usage.computed_tokens


def _num_slots(prompt: Sequence[Segment]) -> int:
    return sum(len(segment.token_ids) for segment in prompt if segment.name is not None)


def _divergence(team: Team, prompt: Sequence[Segment], served: Completion) -> float:
    """Nats, of what was served; what was computed exactly has none."""
    report = served.usage.approximation
    if report is None:
        return 0.0
    (strength,) = (group.strength for group in team.engine.edge_groups() if group.key.digest == report.group)
    variant = Variant("token", report.rung, strength=strength)
    continuation = team.continuation(prompt)
    (outcome,) = team.engine.measure(prompt, continuation, [variant]).result()
    return outcome.divergence


def _exact_hit(team: Team, texts: Texts) -> Iterator[tuple[str, float]]:
    """The last agent's prompt, all but as many new tokens at its end as moving had to compute."""
    prompt = team.prompt(team.options.agents - 1, texts)
    tokens = [token for segment in prompt for token in segment.token_ids]
    moved = [segment for segment in prompt if segment.name is not None]
    num_computed = len(tokens) - len(prompt[0].token_ids) - sum(len(segment.token_ids) for segment in moved)
    tail = team.take(num_computed)
    served = team.engine.generate(tokens[:-num_computed] + tail, ONE_TOKEN, policy=ReusePolicy.exact())
    yield "exact_hit_s", served.usage.ttft_s
    yield "exact_hit_computed", served.usage.computed_tokens


def _figures(samples: dict[str, Samples], num_agents: int) -> list[Figure]:
    last = num_agents
    figures = []
    for kind in ("", "_bound"):
        agents = range(1, num_agents + 1)
        dense = [samples[f"dense{kind}_{agent}_s"] for agent in agents]
        served = [samples[f"kvcomm{kind}_{agent}_s"] for agent in agents]
        figures += [
            _ratio(f"agent{last}_speedup{kind}", dense[-1].per(served[-1])),
            _ratio(f"sum_speedup{kind}", _sums(dense).per(_sums(served))),
            Figure(f"divergence{kind}", _mean(samples, f"divergence{kind}", num_agents), "nats"),
            Figure(f"aligned{kind}", _mean(samples, f"aligned{kind}", num_agents), "share"),
        ]
    figures.append(_ratio("over_exact_hit", samples[f"kvcomm_{last}_s"].per(samples["exact_hit_s"])))
    figures += [
        Figure(name, measured.median, "s", measured.quartiles)
        for name, measured in samples.items()
        if name.endswith("_s")
    ]
    figures += [Figure(name, samples[name].median, "tokens") for name in ("computed", "exact_hit_computed")]
    return figures


def _ratio(name: str, samples: Samples) -> Figure:
    return Figure(name, samples.median, "x", samples.quartiles, GOALS.get(name, ""))


def _sums(parts: Sequence[Samples]) -> Samples:
    return Samples(tuple(float(total) for total in np.sum([part.values for part in parts], axis=0)))


def _mean(samples: dict[str, Samples], name: str, num_agents: int) -> float:
    return float(np.mean([samples[f"{name}_{agent}"].values for agent in range(2, num_agents + 1)]))


if __name__ == "__main__":
    sys.exit(main())
