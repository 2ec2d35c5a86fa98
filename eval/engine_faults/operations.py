"""Operations as data: drawn from a seed, written to a file, cut into pieces.

An operation names what it works on by a number ("the third context there is"), so every part of a sequence can be
performed by itself. What exactly is drawn stands in the tables at the top.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.engine_faults.faults import POINTS
from eval.engine_faults.subject import VOCAB_SIZE
from eval.engine_faults.values import REFUSED, REFUSED_PROMPTS, TAKEN

WEIGHTS: Mapping[str, int] = {
    "ask": 10,
    "ask_drawn": 6,
    "ask_text": 3,
    "ask_logprobs": 4,
    "ask_moved": 9,
    "ask_unusual": 4,
    "ask_refused": 6,
    "ask_huge": 1,
    "submit": 16,
    "stream": 6,
    "async": 6,
    "cancel": 5,
    "collect": 4,
    "context": 6,
    "extend": 5,
    "fork": 5,
    "answer": 8,
    "answer_of_fork": 3,
    "submit_answer": 6,
    "answer_behind": 4,
    "release": 5,
    "forget": 3,
    "save": 3,
    "restore": 3,
    "restore_damaged": 1,
    "to_cache": 2,
    "from_cache": 2,
    "repair": 1,
    "pin": 2,
    "unpin": 2,
    "quota": 1,
    "clear": 2,
    "explain": 3,
    "segments": 2,
    "learn": 1,
    "look": 2,
    "open": 3,
    "append": 2,
    "follow": 4,
    "close_open": 4,
    "cancel_open": 2,
    "team": 9,
    "fault": 22,
    "threads": 3,
    "adapter": 3,
    "edit": 1,
    "close": 1,
    "check": 6,
}
"""Shares of operations. Those of a group that is left out are never drawn, see `GROUPS`."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "adapters": ("adapter", "edit"),
    "faults": ("fault",),
    "threads": ("threads",),
    "values": ("ask_refused", "ask_unusual"),
    "closing": ("close",),
    "following": ("open", "append", "follow", "close_open", "cancel_open", "team", "answer_behind"),
    "async": ("async",),
}

NOT_IN_THREADS = frozenset({"threads", "adapter", "edit", "close", "check", "collect", "quota"})
TENANTS = ("a", "b", "c")
BASES = (
    "A planner hands each agent one part of the work and collects what they say. ",
    "Count the apples: five were picked, two were eaten, one is green. ",
    "Ünïcødé 😀 and 漢字 stand in some prompts; tokens are bytes there. ",
)
NAMED = (
    ("document", "The north field was ploughed in March, the south field in April."),
    ("question", "Which field was ploughed first, and by whom?"),
    ("answer", "It was the north field; nobody wrote down by whom."),
)
STOPS = ("e", " ", "a", "th", "\n", "is", ". ", "é", "😀", "0")
MAX_TOGETHER = 4
NAMES_ADAPTER = 0.2
"""Share of requests that name an adapter, where there are any."""


@dataclass(frozen=True)
class Operation:
    """One operation; `settings` holds plain JSON values only."""

    name: str
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {"name": self.name, **self.settings}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Operation:
        """From a file."""
        return cls(str(value["name"]), {key: each for key, each in value.items() if key != "name"})


def draw_engine(draw: random.Random) -> dict[str, Any]:
    """Settings of an engine: mostly small pools, in which requests have to wait."""
    page_size = draw.choice((8, 8, 4, 16))
    return {
        "page_size": page_size,
        "pool_tokens": draw.choice((256, 256, 256, 512, 1024)),
        "max_running": draw.choice((1, 2, 4, 64, 64)),
        "max_batch_tokens": draw.choice((32, 128, 2048)),
        "prefill_chunk": draw.choice((8, 64, 256)),
        "draft_rows": draw.choice((0, 8)),
        "cache": draw.random() < 0.93,
        "cache_ttl_s": draw.choice((None, None, None, 0.05)),
        "idle_after_s": 0.0,
    }


def draw_operations(draw: random.Random, number: int, without: Sequence[str] = ()) -> list[Operation]:
    """A sequence of operations, `number` in all; those performed at once in threads count each."""
    left_out = {name for group in without for name in GROUPS[group]}
    shares = {name: share for name, share in WEIGHTS.items() if name not in left_out}
    operations: list[Operation] = []
    num_drawn = 0
    while num_drawn < number:
        for operation in _next(draw, shares):
            operations.append(operation)
            num_drawn += num_of(operation)
    return operations


def num_of(operation: Operation) -> int:
    """How many operations one stands for."""
    if operation.name != "threads":
        return 1
    return sum(len(each) for each in operation.settings["together"])


def _next(draw: random.Random, shares: Mapping[str, int]) -> list[Operation]:
    name = draw.choices(list(shares), weights=list(shares.values()))[0]
    operation = draw_operation(draw, name, shares)
    if name == "ask_moved":
        return [_told_before(draw, operation), operation]
    if name != "fault" or draw.random() < 0.15:
        return [operation]
    # Behind most faults comes something that meets them.
    followers = [each for each in POINTS[operation.settings["point"]].in_reach if each in shares]
    if not followers:
        return [operation]
    behind = [draw_operation(draw, draw.choice(followers), shares) for _ in range(draw.choice((1, 1, 2, 3)))]
    before = [_told_before(draw, each) for each in behind[:1] if each.name == "ask_moved"]
    return [*before, operation, *behind]


def _told_before(draw: random.Random, operation: Operation) -> Operation:
    """The same text behind another head: what the operation moves."""
    head = [None, draw.choice(BASES)[: draw.randint(5, 30)]]
    settings = {name: value for name, value in operation.settings.items() if name != "way"}
    prompt = {"segments": [head, *operation.settings["prompt"]["segments"][1:]]}
    return Operation("ask", {**settings, **_which(draw), "prompt": prompt, "reads_cache": True})


def _which(draw: random.Random) -> dict[str, Any]:
    return {"which": draw.randrange(1000)}


def draw_operation(draw: random.Random, name: str, shares: Mapping[str, int]) -> Operation:
    """One operation of a given name."""
    which = _which(draw)
    prompt = {"prompt": _prompt(draw), "tenant": _tenant(draw)}
    if draw.random() < NAMES_ADAPTER:
        prompt["adapter"] = draw.randrange(1000)
    greedy = {"sampling": _greedy(draw)}
    settings: dict[str, Any]
    match name:
        case "ask" | "answer_of_fork":
            settings = {**which, **prompt, **greedy, "reads_cache": draw.random() < 0.9}
        case "ask_drawn":
            settings = {**prompt, "sampling": _drawn(draw)}
        case "ask_text":
            settings = {**prompt, **greedy, "prompt": _text(draw)}
        case "ask_logprobs":
            drawn = _drawn(draw) if draw.random() < 0.5 else _greedy(draw)
            settings = {**prompt, "sampling": {**drawn, "logprobs": draw.choice((0, 1, 3, 100))}}
        case "ask_moved":
            way = draw.choice(("policy", "rung", "rung", "none"))
            settings = {**prompt, **greedy, "prompt": _segments(draw), "tenant": draw.choice(TENANTS[:2]), "way": way}
        case "ask_unusual":
            settings = {**prompt, "sampling": _unusual(draw)}
        case "ask_refused":
            settings = _refused(draw, prompt)
        case "ask_huge":
            settings = {**prompt, "prompt": {"ids": _ids(draw, draw.randint(150, 700))}, **greedy}
        case "submit" | "stream" | "async":
            sampling = draw.choice((_greedy, _greedy, _drawn))(draw)
            leaves = draw.choice(("reads all", "leaves", "throws"))
            settings = {**prompt, "sampling": sampling, "after": draw.randrange(6), "leaves": leaves}
            settings["way"] = draw.choice(("result", "stream", "cancelled", "closed loop", "closed loop"))
        case "context":
            settings = {**prompt, "way": draw.choice(("policy", "none", "none"))}
        case "answer" | "submit_answer":
            sampling = draw.choice((_greedy, _greedy, _drawn))(draw)
            settings = {**which, "sampling": sampling, "prompt": _prompt(draw) if draw.random() < 0.6 else None}
            settings |= {"way": draw.choice(("result", "stream", "async")), "after": draw.randrange(6)}
            settings["leaves"] = draw.choice(("reads all", "reads all", "leaves"))
        case "fault":
            settings = _fault(draw)
        case "threads":
            inner = {each: share for each, share in shares.items() if each not in NOT_IN_THREADS}
            together = [
                [operation.to_json() for _ in range(draw.randint(1, 3)) for operation in _next(draw, inner)]
                for _ in range(draw.randint(2, MAX_TOGETHER))
            ]
            settings = {"together": together}
        case "open" | "append" | "follow" | "close_open" | "cancel_open":
            settings = {**which, **prompt, **greedy, "other": draw.randrange(1000), "keep": _keep(draw)}
            settings["is_hurried"] = draw.random() < 0.1
        case "answer_behind":
            settings = {**which, **prompt, "sampling": draw.choice((_greedy, _greedy, _drawn))(draw)}
        case "team":
            number = draw.randint(1, 3)
            settings = {**which, **prompt, "sampling": draw.choice((_greedy, _greedy, _drawn))(draw)}
            settings |= {"roles": [_prompt(draw) for _ in range(number)], "keep": _keep(draw)}
            settings |= {"behind": [_prompt(draw) for _ in range(number)], "is_hurried": draw.random() < 0.05}
            settings["leaves"] = draw.choice(("nobody", "nobody", "nobody", "producer", "reader"))
        case "adapter":
            settings = {"adapter": draw.randrange(1000)}
        case "quota":
            held, cached = draw.choice((None, 64, 160)), draw.choice((None, 32, 128))
            settings = {"tenant": draw.choice(TENANTS), "held_tokens": held, "cached_tokens": cached}
        case "clear":
            settings = {"tenant": draw.choice((None, *TENANTS))}
        case _:
            settings = {**which, **prompt}
    return Operation(name, settings)


def _fault(draw: random.Random) -> dict[str, Any]:
    name = draw.choices(list(POINTS), weights=[point.share for point in POINTS.values()])[0]
    point = POINTS[name]
    return {"point": name, "passes": draw.randrange(point.every), "kind": draw.choice(point.kinds)}


def _refused(draw: random.Random, prompt: Mapping[str, Any]) -> dict[str, Any]:
    if draw.random() < 0.2:
        return {**prompt, "prompt": {"special": draw.choice(REFUSED_PROMPTS)}, "sampling": _greedy(draw), "which": 0}
    name = draw.choice(list(REFUSED))
    bad = {"special": draw.choice(REFUSED[name])}
    return {**prompt, "which": draw.randrange(1000), "sampling": {**_greedy(draw), name: bad}}


def _unusual(draw: random.Random) -> dict[str, Any]:
    sampling = _drawn(draw)
    for name in draw.sample(list(TAKEN), draw.randint(1, 3)):
        sampling[name] = {"special": draw.choice(TAKEN[name])}
    return sampling


def _greedy(draw: random.Random) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_new_tokens": draw.choice((0, 1, 2, 4, 6, 8, 8, 12))}
    if draw.random() < 0.25:
        sampling["n"] = draw.choice((2, 3, 4))
    if draw.random() < 0.3:
        sampling["stop"] = draw.sample(STOPS, draw.randint(1, 3))
    if draw.random() < 0.2:
        sampling["stop_token_ids"] = _ids(draw, 20)
    if draw.random() < 0.2:
        sampling["ignore_eos"] = True
    if draw.random() < 0.1:
        sampling["logprobs"] = draw.choice((0, 2))
    return sampling


def _drawn(draw: random.Random) -> dict[str, Any]:
    sampling = _greedy(draw)
    sampling["temperature"] = draw.choice((0.0, 0.3, 1.0, 1.0, 2.5))
    sampling["seed"] = draw.randrange(2**62) if draw.random() < 0.9 else None
    for name, values in (
        ("top_k", (1, 5, 50)),
        ("top_p", (0.2, 0.9)),
        ("min_p", (0.05, 0.5)),
        ("repetition_penalty", (0.8, 1.3, 5.0)),
    ):
        if draw.random() < 0.35:
            sampling[name] = draw.choice(values)
    return sampling


def _keep(draw: random.Random) -> str:
    return draw.choice(("all", "all", "all", "all", "but last", "nothing", "fails"))


def _tenant(draw: random.Random) -> str:
    """Some tenants ask again and again, others once."""
    return f"once {draw.randrange(10**9)}" if draw.random() < 0.1 else draw.choice(TENANTS)


def _prompt(draw: random.Random) -> dict[str, Any]:
    return draw.choice((_text, _text, _prefixed_ids, _prefixed_ids, _segments))(draw)


def _text(draw: random.Random) -> dict[str, Any]:
    base = draw.choice(BASES)
    return {"text": base[: draw.randint(1, len(base))] + str(draw.choice(("", draw.randrange(20))))}


def _prefixed_ids(draw: random.Random) -> dict[str, Any]:
    """Ids that begin like others, so that prefixes are shared and split within pages."""
    start = random.Random(draw.randrange(4))
    return {"ids": _ids(start, 60)[: draw.randint(0, 60)] + _ids(draw, draw.choice((1, 1, 3, 9)))}


def _segments(draw: random.Random) -> dict[str, Any]:
    head = [None, draw.choice(BASES)[: draw.randint(5, 30)]]
    middle = [list(each) for each in draw.sample(NAMED, draw.randint(1, 2))]
    return {"segments": [head, *middle, [None, draw.choice(("Go on.", "Say why.", f"{draw.randrange(9)}"))]]}


def _ids(draw: random.Random, number: int) -> list[int]:
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(number)]
