"""The README's picture: how long each agent of a team waits for its first token, in three ways, as an SVG.

    bash scripts/demo --json demo.json
    python -m eval.picture --from demo.json --out docs/first_tokens.svg

    python -m eval.gsm8k --data FOLDER --modes stock,exact,kvcomm --limit 3 --timed 3 --out out/team
    python -m eval.picture --from out/team --out docs/first_tokens.svg

It is drawn from the result of a run, and from nothing else: what `scripts/demo --json` wrote, or the folder of a task
evaluation (`eval.gsm8k`, `eval.mmlu`, `eval.humaneval`). The first bar is transformers alone where the evaluation ran
it (mode stock), else kvcomm without a cache; the other two are exact prefixes and moved text. The demo is the quick
way, about three minutes with its set-up, but it does not run transformers alone.
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from kvcomm.errors import InvalidRequest
from kvcomm.lab.files import BadContent, parse_json, read_bytes

OUT = Path("docs/first_tokens.svg")

STOCK, WITHOUT, EXACT, MOVED = "transformers alone", "no cache", "exact prefix", "moved text"
MEANINGS = {
    STOCK: "the whole prompt is computed",
    WITHOUT: "the whole prompt is computed",
    EXACT: "a beginning that was seen before is reused",
    MOVED: "text known from other agents' prompts is reused as well",
}
IN_DEMO = {WITHOUT: "no cache", EXACT: "exact prefixes", MOVED: "moved KV"}
"""What the demo calls the ways."""
IN_REPORT = {STOCK: "stock", WITHOUT: "dense", EXACT: "exact", MOVED: "kvcomm"}
"""What a task evaluation calls them."""

WIDTH, MARGIN, LINE, BAR, GAP = 760, 24, 20, 14, 12
"""Pixels: of the picture, around it, of a line of text, of a bar's height, between agents."""
LETTER = 9.4
"""Pixels of a letter of a name, in the widest of the usual fonts."""
VALUE_WIDTH = 210
"""Pixels that are left free for what stands behind a bar."""
MAX_NAME = 20
"""Characters of an agent's name that are shown."""

STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1d1f21 }
  .title { font-size: 17px; font-weight: 600 }
  .quiet { font-size: 12px; fill: #5c6166 }
  .card { fill: #ffffff; stroke: #d9dcdf }
  .first { fill: #8d97a5 } .second { fill: #2f9e6e } .third { fill: #e0a526 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e6e8 }
    .quiet { fill: #9aa0a6 }
    .card { fill: #16181a; stroke: #3a3f44 }
  }
"""
"""The card brings its own background: a page may be dark where the browser asks for light."""
CLASSES = ("first", "second", "third")


class FirstTokens(NamedTuple):
    """What is drawn.

    Attributes:
        agents: names, in the team's order.
        ways: way -> seconds to the first token, agent by agent; what the others are held against comes first.
        about: what was run, in sentences.
    """

    agents: tuple[str, ...]
    ways: Mapping[str, tuple[float, ...]]
    about: tuple[str, ...]

    @property
    def longest_s(self) -> float:
        """Seconds of the longest bar."""
        return max(max(seconds) for seconds in self.ways.values())

    @property
    def sums(self) -> dict[str, str]:
        """Way -> all agents added up, as it is told."""
        sums = {way: sum(seconds) for way, seconds in self.ways.items()}
        reference_s = next(iter(sums.values()))
        return {way: self.told(way, seconds, reference_s) for way, seconds in sums.items()}

    def told(self, way: str, seconds: float, reference_s: float) -> str:
        """Seconds, and how many times as fast as the first way that is, as they stand behind a bar."""
        text = f"{seconds:.{2 if self.longest_s >= 1 else 3}f} s"
        return text if way == next(iter(self.ways)) else f"{text}, {reference_s / seconds:.1f} times as fast"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code."""
    parser = ArgumentParser(prog="python -m eval.picture", description="First tokens of a team as an SVG.")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="RESULT",
        help="what `scripts/demo --json` wrote, or the folder of a task evaluation",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE.svg", help="[%(default)s]")
    options = parser.parse_args(arguments)
    try:
        drawn = draw(read(options.source))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(drawn, encoding="utf-8")
    except (InvalidRequest, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{options.out}\n")
    return 0


# -- reading ----------------------------------------------------------------------------------------------------------


def read(source: Path) -> FirstTokens:
    """First tokens out of a result.

    Raises:
        InvalidRequest: it cannot be read, is no such result, or lacks an agent's time in one of the ways.
    """
    file = source / "report.json" if source.is_dir() else source
    try:
        value = parse_json(read_bytes(file))
        found = _of_demo(value) if "rows" in value else _of_report(value)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except _Missing as error:
        raise InvalidRequest(f"{file} {error}") from error
    except (BadContent, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(
            f"{file} is no result of `scripts/demo --json` or of a task evaluation ({type(error).__name__}: {error})"
        ) from error
    return found


class _Missing(Exception):
    """What a result lacks; the message goes on behind the file's name."""


def _of_demo(value: Any) -> FirstTokens:
    """Means over the questions, from the raw rows."""
    config, rows = value["config"], value["rows"]
    times: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        times.setdefault(row["way"], {}).setdefault(row["agent"], []).append(row["ttft_s"])
    means = {
        way: {agent: fmean(map(_seconds, each)) for agent, each in times.get(name, {}).items()}
        for way, name in IN_DEMO.items()
    }
    bound = config["bound"]
    model = f"{config['model']}, {config['dtype']}, on {config['device']}"
    over = f"Means over {_questions(config['num_questions'])}"
    return _found(means, (f"{model}. {over}.", _bound_in_words(bound["max_divergence"], bound["confidence"])))


def _of_report(value: Any) -> FirstTokens:
    """Medians over the questions that were timed alone."""
    times = {mode["mode"]: mode["times"] for mode in value["modes"]}
    ways = [STOCK if IN_REPORT[STOCK] in times else WITHOUT, EXACT, MOVED]
    medians = {
        way: {agent: _seconds(each) for agent, each in times[IN_REPORT[way]]["ttft_s"].items()}
        for way in ways
        if IN_REPORT[way] in times
    }
    if missing := [IN_REPORT[way] for way in ways if not medians.get(way)]:
        raise _Missing(f"has no times of mode {missing[0]}; run with --modes stock,exact,kvcomm and --timed")
    settings, facts = value["settings"], value["facts"]["model"]
    model = f"{facts['name']}, {facts['dtype'].removeprefix('torch.')}, on {facts['device']}"
    over = f"Medians over {_questions(times[IN_REPORT[ways[0]]]['num_questions'])}"
    return _found(medians, (f"{model}. {over}.", _bound_in_words(settings["max_divergence"], settings["confidence"])))


def _found(times: Mapping[str, Mapping[str, float]], about: tuple[str, ...]) -> FirstTokens:
    first, *_ = times
    agents = tuple(times[first])
    if not agents:
        raise _Missing("holds no agent's first token")
    for way, seconds in times.items():
        if missing := [agent for agent in agents if agent not in seconds]:
            raise _Missing(f"has no time of agent {missing[0]!r} in the way {way!r}")
    ways = {way: tuple(seconds[agent] for agent in agents) for way, seconds in times.items()}
    return FirstTokens(tuple(map(_printable, agents)), ways, tuple(map(_printable, about)))


def _printable(text: str) -> str:
    """XML has no control characters."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _Missing(f"holds {value!r} where the seconds to a first token should be")
    return float(value)


def _questions(count: int) -> str:
    return "1 question" if count == 1 else f"{count} questions"


def _bound_in_words(max_divergence: float, confidence: float) -> str:
    return (
        f"Text is moved only where the answer is expected to stay within {max_divergence:g} nats of the exact one in "
        f"{confidence:.0%} of cases."
    )


# -- drawing ----------------------------------------------------------------------------------------------------------


def draw(found: FirstTokens) -> str:
    """The SVG: a card with a bar for each agent and way, seconds and ratios beside it."""
    title = f"Time to the first token of {len(found.agents)} agents"
    left = MARGIN + LETTER * max(len(_name(agent)) for agent in found.agents) + 10
    lines = [_text(MARGIN, MARGIN + 14, title, "title")]
    top = MARGIN + 28
    for style, way in zip(CLASSES, found.ways, strict=True):
        lines.append(_rect(MARGIN, top + 4, 12, 12, style))
        lines.append(_text(MARGIN + 20, top + 15, f"{way}: {MEANINGS[way]}"))
        top += LINE
    top += GAP
    for index, agent in enumerate(found.agents):
        middle = top + len(found.ways) * (BAR + 3) / 2 + 4
        lines.append(_text(MARGIN, middle, _name(agent)))
        lines += _bars(found, index, left, top)
        top += len(found.ways) * (BAR + 3) + GAP
    lines.append(_text(MARGIN, top + len(found.ways) * (BAR + 3) / 2 + 4, "together"))
    lines += _together(found, left, top)
    top += len(found.ways) * (BAR + 3)
    for text in found.about:
        top += LINE
        lines.append(_text(MARGIN, top, text, "quiet"))
    height = top + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
            'aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(_in_words(found))}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="6"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _bars(found: FirstTokens, index: int, left: float, top: float) -> list[str]:
    """One agent's."""
    lines = []
    scale = (WIDTH - MARGIN - VALUE_WIDTH - left) / found.longest_s
    reference_s = next(iter(found.ways.values()))[index]
    for row, (style, (way, seconds)) in enumerate(zip(CLASSES, found.ways.items(), strict=True)):
        y, width = top + row * (BAR + 3), seconds[index] * scale
        lines.append(_rect(left, y, width, BAR, style))
        lines.append(_text(left + width + 6, y + BAR - 2, found.told(way, seconds[index], reference_s)))
    return lines


def _together(found: FirstTokens, left: float, top: float) -> list[str]:
    """All agents added up: in numbers, as their bars would be out of scale."""
    lines = []
    for row, (style, told) in enumerate(zip(CLASSES, found.sums.values(), strict=True)):
        y = top + row * (BAR + 3)
        lines.append(_rect(left, y + 1, 12, 12, style))
        lines.append(_text(left + 18, y + BAR - 2, told))
    return lines


def _in_words(found: FirstTokens) -> str:
    """All that the picture shows, for who cannot see it."""
    agents = []
    for index, agent in enumerate(found.agents):
        reference_s = next(iter(found.ways.values()))[index]
        parts = [f"{way} {found.told(way, seconds[index], reference_s)}" for way, seconds in found.ways.items()]
        agents.append(f"{agent}: {'; '.join(parts)}.")
    together = "; ".join(f"{way} {told}" for way, told in found.sums.items())
    return " ".join([*agents, f"Together: {together}.", *found.about])


def _name(agent: str) -> str:
    return agent if len(agent) <= MAX_NAME else agent[: MAX_NAME - 1] + "…"


def _rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:g}" rx="2"/>'


def _text(x: float, y: float, text: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


if __name__ == "__main__":
    sys.exit(main())
