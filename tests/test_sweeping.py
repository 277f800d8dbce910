"""A sweep from configuration to report: the runs of its candidates, and what stops none of them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import cli, stages, sweeping
from flows.config import Config, json_schema, load, validate
from flows.plan import make_plan, planned_candidates
from flows.run import Interrupted, Run
from genstream.errors import ConfigError
from genstream.learn import FitState, StepInfo
from genstream.models import ModelStore
from genstream.schema import Schema
from genstream.sources import NpySource

CONFIG = """\
name: many
data: {source: rows.npy, holdout: 0.2}
model: {kind: mixture}
sweep:
  over:
    model.n_components: [1, 4]
    model.covariance: [full, diag]
fit: {tolerance: 1.0e-3, max_steps: 12, n_init: 1, seed: 1, sample_rows: 100}
compute: {workers: 2}
checkpoint: {every: 2 passes, keep: 2}
report: false
orchestrate: none
"""
FEW = "sweep.over={model.n_components: [3, 5]}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 3.0], [0.0, 3.0, 0.0]])
    rows = centres[rng.integers(0, 3, 3000)] + rng.standard_normal((3000, 3))
    rows[rng.random(rows.shape) < 0.02] = np.nan
    np.save("rows.npy", rows)
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


def start(*overrides: str) -> Run:
    return sweeping.begin("config.yaml", overrides)


def digests(run: Run) -> list[str]:
    return [each.stage("fit")["digest"] for each in run.candidates]


# --- configuration -------------------------------------------------------------------------------


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load("config.yaml", overrides)
    return str(caught.value).splitlines()


def test_a_grid_is_every_combination_in_order(folder: Path) -> None:
    config = load("config.yaml")
    assert list(config.candidates()) == [
        f"n_components={k}, covariance={shape}" for k in (1, 4) for shape in ("full", "diag")
    ]
    third = config.candidates()["n_components=4, covariance=full"]
    assert (third.model.n_components, third.model.covariance) == (4, "full")
    assert third.sweep is None
    assert third.fit == config.fit
    assert validate(config.dump()) == config
    allowed = json_schema()["$defs"]["Sweep"]["properties"]["over"]["propertyNames"]["enum"]
    assert "model.n_components" in allowed
    assert "fit.seed" not in allowed


def test_every_mistake_is_told_where_it_was_written(folder: Path) -> None:
    Path("config.yaml").write_text(
        CONFIG.replace("[1, 4]", "[1, two, 0, 1]")
        .replace("model.covariance: [full, diag]", "model.covarianse: [full]\n    fit.seed: [3]")
        .replace("fit: {", "guard: {windo: 3}\nfit: {")
    )
    found = problems()
    assert len(found) == 6
    at = {line.split(": ")[1]: line for line in found}
    assert at["sweep.over.model.n_components.1"].startswith("config.yaml:6:29: ")
    assert "valid integer, got 'two'" in at["sweep.over.model.n_components.1"]
    assert "greater than or equal to 1" in at["sweep.over.model.n_components.2"]
    assert at["sweep.over.model.n_components.3"].startswith("config.yaml:6:37: ")
    assert "1 is listed twice" in at["sweep.over.model.n_components.3"]
    assert at["sweep.over.model.covarianse"].startswith("config.yaml:7:5: ")
    assert "did you mean 'model.covariance'?" in at["sweep.over.model.covarianse"]
    assert "which rows are held out" in at["sweep.over.fit.seed"]
    assert "did you mean 'window'?" in at["guard.windo"]


def test_a_sweep_over_nothing_is_told_what_it_needs(folder: Path) -> None:
    (found,) = problems("sweep.over={model.n_components: []}")
    assert found.endswith(
        "sweep.over.model.n_components: each key needs at least one value, got []"
    )
    (found,) = problems("sweep.over={}")
    assert found.endswith(
        "sweep.over: expected a key such as model.n_components, with at least one value, got {}"
    )
    (found,) = problems("data.source=[]")
    assert found.endswith("data.source: expected at least 1 of them, got []")


def test_contradictions_name_the_combination(folder: Path) -> None:
    found, other = problems("sweep.over.model.kind=[mixture, kmeans]")
    assert "sweep.over.model.covariance.1: is of mixture" in other
    assert found.startswith("config.yaml:7:24: sweep.over.model.covariance.0: is of mixture")
    assert "(as n_components=1, covariance=full, kind=kmeans)" in found
    (found,) = problems("sweep.over={model.covariance: [diag]}")
    assert found.startswith("config.yaml:3:8: model.n_components: is required and missing (as ")
    (found,) = problems("sweep.by=bix")
    assert "expected one of held_out, bic, aic, icl" in found
    (found,) = problems("data.holdout=null")
    assert "no rows are held out" in found
    load("config.yaml", ["data.holdout=null", "sweep.by=bic"])
    (found,) = problems("sweep.over.fit.n_init=[" + ",".join(map(str, range(1, 76))) + "]")
    assert "these are 300 candidates, and a sweep has at most 256" in found


def test_a_sweep_is_no_fit_and_a_fit_no_sweep(folder: Path) -> None:
    with pytest.raises(ConfigError, match="describes a sweep: `genstream sweep"):
        Run.create("config.yaml")
    with pytest.raises(ConfigError, match="has no sweep"):
        start("sweep=null", "model.n_components=2")
    Run.create("config.yaml", ["sweep=null", "model.n_components=2"])


def test_candidates_share_passes_as_far_as_memory_allows(folder: Path) -> None:
    np.save("rows.npy", np.random.default_rng(0).standard_normal((3000, 40)))
    over = ["sweep.over={model.n_components: [200, 201, 202, 2]}", "fit.sample_rows=1000"]
    whole = make_plan(load("config.yaml", over))
    assert (whole.candidates, whole.groups) == (4, (4,))
    alone = [
        make_plan(load("config.yaml", ["sweep=null", f"model.n_components={k}", *over[1:]])).memory
        for k in (200, 201, 202, 2)
    ]
    assert max(alone) < whole.memory < sum(alone)
    assert whole.passes == 12 + 2
    # One pass more for each group, and none above the limit.
    limit = (max(alone) + whole.memory) // 2
    parted = make_plan(load("config.yaml", [*over, f"compute.memory_limit={limit}"]))
    assert sum(parted.groups) == 4
    assert len(parted.groups) > 1
    assert parted.memory <= limit
    assert parted.passes == len(parted.groups) * 14
    assert f"{parted.groups[0]} + " in parted.to_text()
    small = make_plan(load("config.yaml", [*over, f"compute.memory_limit={min(alone)}"]))
    with pytest.raises(ConfigError, match=r"compute\.memory_limit"):
        small.refuse_if_too_small()


def test_a_candidate_that_no_column_bears_is_refused_at_once(folder: Path) -> None:
    over = "sweep={over: {model.n_factors: [1, 7]}}"
    config = load("config.yaml", ["model={kind: factors}", over])
    with pytest.raises(ConfigError, match="sweep: the candidate n_factors=7: "):
        planned_candidates(config, Schema.real(3))


def test_a_candidate_with_more_components_than_rows_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("rows.npy", np.load("rows.npy")[:40])
    np.savetxt("rows.csv", np.load("rows.npy"), delimiter=",", header="a,b,c", comments="")
    over = "sweep={over: {model.n_components: [2, 50]}}"
    words = "error: sweep: the candidate n_components=50: model.n_components is 50, more than the"
    for data in ("data={source: rows.npy}", "data={source: rows.csv, dataset: data/rows}"):
        assert call(monkeypatch, "sweep", "config.yaml", over, data) == 2
        errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(errors) == 1
        assert errors[0].startswith(words)
    # No candidate was begun.
    assert not Run.find("last").candidates


# --- fits ----------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every chunk that is read."""
    found: list[int] = []
    plain = NpySource.read

    def read(self: Any, i: int) -> Any:
        rows = plain(self, i)
        found.append(rows.n_rows)
        return rows

    monkeypatch.setattr(NpySource, "read", read)
    return found


def test_candidates_are_what_fits_alone_are(folder: Path, reads: list[int]) -> None:
    run = start("publish={model: models/best}", "report=true")
    sweeping.carry_out(run, quiet=True)
    fitted, scores = run.stage("fit"), run.stage("evaluate")
    assert run.status == "done"
    steps = []
    for each, config in zip(
        run.candidates, load("config.yaml", ["report=true"]).candidates().values(), strict=True
    ):
        assert each.config.dump() == config.dump()
        assert each.status == "done"
        alone = Run.create(
            "config.yaml",
            [
                "sweep=null",
                f"model.n_components={config.model.n_components}",
                f"model.covariance={config.model.covariance}",
            ],
        )
        reads.clear()
        stages.run_stages(alone, quiet=True)
        for stage in ("held_out", "criteria", "train"):
            assert each.stage("evaluate")[stage] == alone.stage("evaluate")[stage]
        assert each.stage("fit")["digest"] == alone.stage("fit")["digest"]
        kept = [(line["step"], line["mean_loglik"]) for line in each.metrics()]
        assert kept == [(line["step"], line["mean_loglik"]) for line in alone.metrics()]
        assert each.read_json("evaluation.json") == alone.read_json("evaluation.json")
        steps.append(alone.stage("fit")["steps"])
    assert len(set(steps)) > 1
    # One pass for the sample, and then as many as the slowest needs.
    assert fitted["passes"] == max(steps) + 1
    assert fitted["passes_alone"] == sum(steps) + 4
    assert fitted["bytes_read"] == fitted["passes"] * fitted["rows"] * 3 * 8
    # The best one is published, and has a report of its own.
    best = max(run.candidates, key=lambda each: each.stage("evaluate")["held_out"]["mean_loglik"])
    assert scores["best"] == best.id
    assert (
        ModelStore("models/best").snapshot().versions[-1].record["digest"]
        == best.stage("fit")["digest"]
    )
    assert best.report.exists()
    page = run.report.read_text()
    assert page.count("<svg") == 4
    for each in run.candidates:
        assert each.info()["label"] in page


def test_chunks_are_read_once_for_all(folder: Path, reads: list[int]) -> None:
    run = start(FEW)
    reads.clear()
    sweeping.fit(run)
    assert sum(reads) == run.stage("fit")["passes"] * 3000


def test_the_best_by_bic_is_another(folder: Path) -> None:
    run = start("sweep.by=bic")
    sweeping.carry_out(run, quiet=True)
    least = min(run.candidates, key=lambda each: each.stage("evaluate")["criteria"]["bic"])
    assert run.stage("evaluate")["best"] == least.id
    assert "covariance=diag" in least.info()["label"]


@pytest.mark.parametrize("every", ["3 passes"])
def test_an_interrupted_sweep_resumes_to_the_same_bits(folder: Path, every: str) -> None:
    endless = [FEW, "fit.tolerance=0", "fit.max_steps=7"]
    whole = start(*endless)
    sweeping.fit(whole)
    run = start(*endless, f"checkpoint.every={every}")
    seen: list[int] = []

    def interrupt(candidate: Run, state: FitState, info: StepInfo) -> None:
        seen.append(info.step)
        if seen.count(info.step) == 2 and info.step in (2, 5):
            raise Interrupted(signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(Interrupted), run.working():
            sweeping.fit(run, on_step=(interrupt,))
        assert run.status == "interrupted"
        assert "interrupted" in {each.status for each in run.candidates}
    sweeping.carry_out(run, quiet=True)
    assert digests(run) == digests(whole)
    for each in run.candidates:
        lines = [line["step"] for line in each.metrics()]
        assert lines == list(range(1, each.stage("fit")["steps"] + 1))
        assert each.status == "done"


@pytest.mark.parametrize("method", ["online", "auto", "incremental"])
def test_other_methods_sweep_too(folder: Path, method: str) -> None:
    options = {
        "online": "fit={method: online, batch_rows: 99, sample_rows: 99, n_init: 1}",
        "auto": "fit={batch_rows: 9, t0: 2, max_steps: 3, sample_rows: 99, n_init: 1}",
        "incremental": "fit={method: incremental, max_steps: 3, sample_rows: 99, n_init: 1}",
    }
    run = start(FEW, options[method])
    sweeping.fit(run, quiet=True)
    for k, digest in zip((3, 5), digests(run), strict=True):
        alone = Run.create(
            "config.yaml", ["sweep=null", f"model.n_components={k}", options[method]]
        )
        assert stages.fit(alone, quiet=True)["digest"] == digest
    saved = run.stage("fit")["passes_alone"] / run.stage("fit")["passes"]
    assert saved > 1.5 if method != "incremental" else saved > 1.0


def test_a_failed_candidate_stops_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = stages.begin_fit

    def faulty(config: Config, *arguments: Any, **options: Any) -> Any:
        if config.model.n_components == 1:
            raise ArithmeticError("one is too few")
        return begin(config, *arguments, **options)

    monkeypatch.setattr(stages, "begin_fit", faulty)
    assert call(monkeypatch, "sweep", "config.yaml") == 1
    run = Run.find("last")
    assert run.status == "done"
    assert [each.status for each in run.candidates] == ["failed"] * 2 + ["done"] * 2
    told = capsys.readouterr()
    assert "failed    n_components=1, covariance=diag: ArithmeticError: one is" in told.out
    assert "covariance=full failed (and 1 more): ArithmeticError: one is too few" in told.err
    assert "Traceback" in (run.path / "log.txt").read_text()
    # It stays failed, and is not tried again.
    monkeypatch.setattr(stages, "begin_fit", begin)
    assert call(monkeypatch, "resume", run.id) == 1


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["genstream", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_verbs_take_a_sweep_and_its_candidates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "sweep", "config.yaml", FEW) == 0
    run = Run.find("last")
    told = capsys.readouterr().out
    assert "2 candidates in" in told
    assert f"best      {run.stage('evaluate')['best']} (*), by held_out" in told
    assert call(monkeypatch, "compare", "last", run.candidates[0].id) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 + 1
    assert lines[0].split()[:4] == ["run", "kind", "n_components", "held_out"]
    assert lines[1] == lines[3]
    assert call(monkeypatch, "show", run.id) == 0
    assert call(monkeypatch, "show", run.candidates[0].id) == 0
    assert call(monkeypatch, "sample", run.candidates[1].id, "-n", "2") == 0
    assert call(monkeypatch, "report", run.id) == 0
    assert run.report.exists()
    assert call(monkeypatch, "plan", "config.yaml") == 0
    assert "4 candidates, 4 in shared passes" in capsys.readouterr().out
    assert call(monkeypatch, "fit", "config.yaml") == 2
    assert call(monkeypatch, "compare", "nothing") == 2


@pytest.mark.flows
def test_the_flow_does_what_the_stages_do(
    prefect_harness: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.experiment import experiment

    plain = start()
    sweeping.carry_out(plain, quiet=True)
    run = start("report=true", "publish={model: models/best}")
    found = experiment(str(run.path))
    assert digests(run) == digests(plain)
    assert [row["bic"] for row in found["candidates"]] == [
        each.stage("evaluate")["criteria"]["bic"] for each in plain.candidates
    ]
    assert run.status == "done"
    assert run.report.exists()
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        shown = client.request("POST", "/artifacts/filter", json={}).json()
    kinds = {artifact["key"]: artifact["type"] for artifact in shown}
    assert kinds["many-candidates"] == "table"
    assert kinds["many-criterion"] == "image"


@pytest.mark.flows
def test_a_flow_of_a_sweep_without_its_decorator_is_a_plain_call(folder: Path) -> None:
    from flows.experiment import compare, fit_candidates

    run = start(FEW)
    work: list[Callable[[str], Any]] = [fit_candidates.fn, compare.fn]
    with run.working():
        assert [step(str(run.path)) for step in work] == [run.stage("fit"), run.stage("evaluate")]
