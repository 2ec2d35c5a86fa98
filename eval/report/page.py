"""The page of a report: one file, no outside assets."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from eval.report.contents import Contents, figure_cells
from eval.report.plots import all_plots
from eval.report.verdict import agent_views, subject
from eval.report.words import MODES, TOPOLOGIES


def page(contents: Contents) -> str:
    """The HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("eval.report") / "page.html").read_text(encoding="utf-8"))
    own = subject(contents.results)
    return template.render(
        name=contents.task.name,
        verdict=contents.verdict,
        agents=agent_views(contents.results),
        own=None if own is None else own.mode,
        modes=[(each.mode, MODES[each.mode]) for each in contents.results],
        topology=TOPOLOGIES[contents.settings["topology"]],
        settings=contents.settings,
        facts=contents.facts,
        num_questions=contents.results[0].num_questions,
        held=[figure_cells(figure) for figure in contents.figures if figure.goal],
        figures=[figure_cells(figure) for figure in contents.figures],
        tables=contents.tables,
        plots=all_plots(contents.results, contents.times),
    )
