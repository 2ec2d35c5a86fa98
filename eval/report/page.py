"""The page of a report: one file, no outside assets."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from eval.report import plots
from eval.report.contents import Contents, mode_rows
from eval.tasks.modes import KVCOMM


def page(contents: Contents) -> str:
    """The HTML."""
    results = contents.results
    drawn = [
        ("Right answers against what was computed.", plots.accuracy_plot(results)),
        ("Divergence against what was computed; the line joins what nothing beats.", plots.divergence_plot(results)),
        ("How long answers stay the dense one's.", plots.change_plot(results[1:])),
    ]
    if contents.ttft:
        drawn.append(("First tokens by length of the prompt.", plots.ttft_plot(contents.ttft)))
    drawn += [
        ("Reliability of the bound: predicted and measured.", plots.reliability_plot(each))
        for each in results
        if each.mode == KVCOMM and each.predictions
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((files("eval.report") / "page.html").read_text(encoding="utf-8"))
    agents = list(results[0].ttft_s)
    return template.render(
        contents=contents, settings=contents.settings, rows=mode_rows(results), plots=drawn, agents=agents
    )
