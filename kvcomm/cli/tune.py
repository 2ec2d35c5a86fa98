"""`kvcomm tune`: a profile of approximate reuse for one model and one team, and whether it still holds."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcomm.cli.options import DEFAULT_MODEL, ModelFlag
from kvcomm.cli.output import JsonFlag, emit, table
from kvcomm.errors import AnchorFileError, InvalidRequest, MissingExtra

if TYPE_CHECKING:
    from rich.table import Table

    from kvcomm.agents.tuning import LadderCheck, TuningProfile, TuningTask
    from kvcomm.agents.tuning.plan import TuningPlan
    from kvcomm.agents.tuning.profile import PointTable, VerificationTable
    from kvcomm.agents.tuning.replays import EngineMaker

EPILOG = (
    "Examples: kvcomm tune --workload gsm8k --data train.jsonl --max-divergence 0.02 --budget 20m "
    "--out anchors/smollm2-135m/gsm8k.toml; kvcomm tune --check anchors/smollm2-135m/gsm8k.toml --data test.jsonl"
)
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def tune(
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="The team's inputs, one a line, as .jsonl or .jsonl.gz.")
    ],
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload", metavar="TEAM", help="The team to tune for: a packaged one, such as gsm8k, or a TOML file."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="PROFILE", help="The profile to write, .toml.")] = None,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="PROFILE", help="Say whether a profile still holds on --data.")
    ] = None,
    max_divergence: Annotated[
        float,
        typer.Option(
            "--max-divergence",
            metavar="NATS",
            help="The bound: how far answers on moved text may be off (mean KL divergence over 32 tokens).",
        ),
    ] = 0.02,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="P", help="The share of cases in which the bound has to hold.")
    ] = 0.95,
    basis: Annotated[
        str,
        typer.Option(
            "--basis",
            metavar="LEVEL",
            help="What the bound may rest on: own (prompts of the same kind), pool (any of these inputs) or prior "
            "(pairs that ship with the model).",
        ),
    ] = "pool",
    budget: Annotated[
        str, typer.Option("--budget", metavar="TIME", help="How long it may take, such as 90s, 20m or 1h.")
    ] = "20m",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="How many inputs are used at most.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Measure a sample, print what would be done and how long it would take, and end."
        ),
    ] = False,
    model: ModelFlag = DEFAULT_MODEL,
    as_json: JsonFlag = False,
) -> None:
    """Find out by measurement how text may be moved between the prompts of a team, and write it into a profile.

    The profile and the pairs beside it are all that it takes to move text; banks of anchors are used if they are there.

    A run that was interrupted goes on where it was; its state is in the folder beside the profile.
    A check keeps nothing and takes as many rows as the budget has room for.
    """
    if (out is None) == (check is None):
        raise InvalidRequest("give either --out, to tune, or --check; `kvcomm tune --help` has examples")
    if check is None and workload is None:
        raise InvalidRequest("give the team to tune for: --workload gsm8k, or a TOML file")
    if check is not None and not check.is_file():
        raise InvalidRequest(f"--check {check} is no file; `kvcomm tune --out` writes one")
    if not data.is_file():
        raise InvalidRequest(f"--data {data} is no file")
    from kvcomm.agents.team import load_team
    from kvcomm.reuse.policy import ReusePolicy

    budget_s = seconds(budget)
    policy = ReusePolicy(max_divergence=max_divergence, confidence=confidence, basis=basis)
    team = load_team(workload) if workload is not None else None
    from kvcomm.agents.tuning import TuningTask, check_profile, plan_tuning, read_profile
    from kvcomm.agents.tuning import tune as run_task
    from kvcomm.agents.tuning.rows import read_rows

    if check is not None:
        team = team or load_team(read_profile(check).team.name)
        rows = read_rows(data, team)[:limit]
        with tempfile.TemporaryDirectory() as folder:
            found = check_profile(_maker(model), check, team, rows, Path(folder), _note, budget_s=budget_s)
        _emit_check(found, check, model, data, as_json=as_json)
        return
    assert out is not None
    assert workload is not None
    assert team is not None
    rows = read_rows(data, team)[:limit]
    task = TuningTask(_maker(model), model, team, workload, rows, data.name, policy, budget_s, out, _note)
    try:
        plan = plan_tuning(task)
        if dry_run:
            emit(_plan_values(plan, task), _plan_table(plan, task), as_json=as_json)
            return
        if not as_json:
            emit(None, _plan_table(plan, task), as_json=False)
        _emit_profile(run_task(task, plan), task, as_json=as_json)
    except OSError as error:
        where = error.filename or task.folder
        raise AnchorFileError(f"{where} cannot be written or read: {error.strerror or error}") from error


def seconds(text: str) -> float:
    """A time such as 90s, 20m or 1.5h. Raises InvalidRequest for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise InvalidRequest(f"--budget {text!r} is not a time such as 90s, 20m or 1h")
    return float(found[1]) * UNITS[found[2]]


def _maker(model: str) -> EngineMaker:
    """Engines on one model, which is loaded once, when the first of them is made."""
    from functools import cache

    from kvcomm.config import EngineConfig
    from kvcomm.engine.engine import Engine
    from kvcomm.model.loading import load_model

    loaded = cache(lambda: load_model(model, progress=True))

    def make(config: EngineConfig) -> Engine:
        known = loaded()
        return Engine(known.model, known.tokenizer, config=config, weights_id=known.weights_digest)

    return make


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _plan_values(plan: TuningPlan, task: TuningTask) -> dict[str, Any]:
    steps = [{"step": name, "rows": rows, "seconds": took} for name, rows, took in plan.steps()]
    return {"steps": steps, "total_s": plan.total_s, "budget_s": task.budget_s}


def _plan_table(plan: TuningPlan, task: TuningTask) -> Table:
    rows = [[name, rows, f"{took:.0f} s"] for name, rows, took in plan.steps()]
    rows.append([f"all, of {task.budget_s:.0f} s", plan.sizes.total, f"{plan.total_s:.0f} s"])
    return table(["step", "rows", "predicted"], rows, title="plan", numeric={"rows", "predicted"})


def _emit_profile(profile: TuningProfile, task: TuningTask, *, as_json: bool) -> None:
    from kvcomm.agents.tuning.plot import save_plot

    try:
        save_plot(profile.pareto, Path(task.out).with_suffix(".svg"))
    except MissingExtra as error:
        _note(str(error))
    value = {"profile": str(task.out), **profile.model_dump(mode="json")}
    points = [_cells(each) for each in profile.pareto]
    columns = ["", "setting", "computed", "nats", "same first token"]
    front = table(columns, points, title="Pareto table", numeric=set(columns[2:]))
    rungs = [[f"{name} rungs", ", ".join(f"{share:.0%}" for share in each)] for name, each in profile.ladders.items()]
    settings = table(None, [*([name, each] for name, each in profile.settings), *rungs], title=str(task.out))
    judged = [_judged(found, ladder) for ladder, found in profile.verification.items()]
    emit(value, front, settings, *judged, as_json=as_json)


def _cells(point: PointTable) -> list[object]:
    mark = "*" if point.on_front else ""
    return [mark, point.setting, f"{point.computed:.1%}", f"{point.divergence:.4g}", f"{point.agreement:.1%}"]


def _emit_check(found: LadderCheck, file: Path, model: str, data: Path, *, as_json: bool) -> None:
    judged = found.found
    figures = [
        ("violations", judged.share, "share", [judged.low, judged.high]),
        ("accepted", judged.accepted, "requests", None),
        ("aligned", judged.aligned, "share", None),
        ("limit", judged.limit, "share", None),
        ("holds", int(judged.holds), "0 or 1", None),
    ]
    value = {
        "figures": [
            {"id": name, "value": number, "unit": unit, "spread": spread} for name, number, unit, spread in figures
        ],
        "config": {
            "model": model,
            "profile": str(file),
            "ladder": found.ladder,
            "data": data.name,
            "rows": found.num_rows,
            "rows_left_out": found.num_known,
            "rows_unread": found.num_unread,
        },
    }
    emit(value, _judged(judged, found.ladder), as_json=as_json)


def _judged(found: VerificationTable, ladder: str) -> Table:
    holds = "holds" if found.holds else "does not hold: tune anew, with rows like these"
    if not found.accepted:
        holds = "nothing is accepted: every request is computed exactly"
    rows: list[tuple[str, object]] = [
        ("requests", found.requests),
        ("accepted", found.accepted),
        ("violations", f"{found.violations}: {found.share:.1%} ({found.low:.1%} to {found.high:.1%})"),
        ("allowed", f"{found.limit:.1%}"),
        ("moved tokens not computed", f"{found.aligned:.1%}"),
        ("the bound", holds),
    ]
    return table(None, rows, title=f"{ladder}, on rows by which nothing was chosen")
