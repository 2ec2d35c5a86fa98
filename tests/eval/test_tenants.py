"""`python -m eval.tenants` on a tiny model: which figures there are, and that they would see a shared cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import tenants
from kvcomm.server.tenants import Tenants
from kvcomm.tiers.space import DEFAULT_TENANT


def run(folder: Path, out: Path) -> dict[str, float]:
    """Figures by id."""
    arguments = ["--model", str(folder), "--out", str(out), "--json", "--repeats=8", "--prompt-tokens=400"]
    assert tenants.main(arguments) == 0
    return {figure["id"]: figure["value"] for figure in json.loads(out.read_text())["figures"]}


def test_figures(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    figures = run(tiny_folder, out)
    assert list(figures) == [
        "sent_ms",
        "other_ms",
        "again_ms",
        "difference_ms",
        "p_value",
        "control_difference_ms",
        "control_p_value",
    ]
    assert json.loads(capsys.readouterr().out)["config"]["repeats"] == 8
    samples = json.loads(out.read_text())["samples"]
    assert {len(values) for values in samples.values()} == {8}


def test_a_shared_cache_is_measured_as_a_hit(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one namespace for both, what the victim sent is what the attacker hits: the figures are about that."""
    hits: list[int] = []
    metrics = tenants.Engine.submit

    def submit(engine: tenants.Engine, prompt: object, *arguments: object, **settings: object) -> object:
        hits.append(engine.cache.num_cached(prompt, tenant=str(settings.get("tenant", DEFAULT_TENANT))))  # type: ignore[arg-type]
        return metrics(engine, prompt, *arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(tenants.Engine, "submit", submit)
    run(tiny_folder, tmp_path / "apart.json")
    apart = sum(hit > 0 for hit in hits)
    hits.clear()
    monkeypatch.setattr(Tenants, "open_namespace", lambda self, tenant, salt: "everybody")
    run(tiny_folder, tmp_path / "shared.json")
    assert apart == 8  # the control alone
    assert sum(hit > 0 for hit in hits) == 8 + 8


def test_statistics() -> None:
    fast, slow = [0.010, 0.011, 0.012, 0.013] * 5, [0.020, 0.021, 0.022, 0.023] * 5
    leaking = {figure.id: figure.value for figure in tenants.figures(fast, slow, fast)}
    assert leaking["p_value"] < 1e-6
    assert leaking["difference_ms"] == pytest.approx(-10)
    tight = {figure.id: figure.value for figure in tenants.figures(slow, slow, fast)}
    assert tight["p_value"] > 0.9
    assert tight["control_p_value"] < 1e-6
