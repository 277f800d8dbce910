"""The flows under Prefect: the same work as without it, shown with artifacts, and quiet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flows import stages, updating
from flows.run import Run
from genstream.errors import DataError
from genstream.models import ModelStore

pytestmark = pytest.mark.flows

CONFIG = """\
name: by.prefect
data: {source: rows.npy}
model: {n_components: 2}
fit: {max_steps: 5, tolerance: 0, n_init: 1}
publish: {model: models/small}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("rows.npy", rng.standard_normal((1000, 2)) + 6.0 * rng.integers(0, 2, (1000, 1)))
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


def artifacts() -> dict[str, str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={}).json()
    return {artifact["key"]: artifact["type"] for artifact in found}


def test_the_pipeline_does_what_the_stages_do_and_shows_it(
    prefect_harness: None, folder: Path
) -> None:
    from flows.pipeline import pipeline

    plain = Run.create("config.yaml", ["orchestrate=none", "publish=null"])
    stages.run_stages(plain)
    run = Run.create("config.yaml")
    found = pipeline(str(run.path))
    assert run.status == "done"
    assert found["stages"]["fit"]["digest"] == plain.stage("fit")["digest"]
    assert found["stages"]["evaluate"]["held_out"] == plain.stage("evaluate")["held_out"]
    assert run.report.exists()
    shown = artifacts()
    assert shown["by-prefect-progress"] == "progress"
    assert shown["by-prefect-trace"] == "table"
    assert shown["by-prefect-trace-figure"] == "image"
    assert shown["by-prefect-check"] == "table"
    assert shown["by-prefect-summary"] == "markdown"


def test_a_flow_without_its_decorator_is_a_plain_call(folder: Path) -> None:
    from flows.evaluate import publish, report, score

    run = Run.create("config.yaml", ["orchestrate=none"])
    with run.working():
        stages.fit(run)
        path = str(run.path)
        assert score.fn(path) == run.stage("evaluate")
        assert publish.fn(path) == run.stage("publish")
        assert report.fn(path) == str(run.report)


def test_an_error_keeps_its_type_and_ends_the_run(prefect_harness: None, folder: Path) -> None:
    from flows.pipeline import pipeline

    Path("rows.npy").unlink()
    np.save("rows.npy", np.full((10, 2), np.inf))
    run = Run.create("config.yaml")
    with pytest.raises(DataError, match="infinite"):
        pipeline(str(run.path))
    assert run.status == "failed"
    assert "infinite" in run.info()["reason"]


def test_a_pipeline_resumes_where_it_was(prefect_harness: None, folder: Path) -> None:
    from flows.pipeline import pipeline

    run = Run.create("config.yaml")
    with run.working():
        fitted = stages.fit(run)
    found = pipeline(str(run.path))
    assert found["stages"]["fit"] == fitted
    assert stages.remaining(run) == []


def test_the_module_runs_on_an_embedded_server_and_says_nothing_else(folder: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment["PYTHONPATH"] = str(Path(stages.__file__).parent.parent)
    ran = subprocess.run(
        [sys.executable, "-m", "flows.pipeline", "config.yaml", "model.n_components=1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.stderr == ""
    assert ran.returncode == 0
    assert "held out  mean log-likelihood" in ran.stdout
    assert "genstream sample models/small" in ran.stdout
    assert (folder / ".genstream" / "prefect").is_dir()
    failed = subprocess.run(
        [sys.executable, "-m", "flows.pipeline", "config.yaml", "data.source=none.npy"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert failed.returncode in (3, 6)
    assert len(failed.stderr.splitlines()) == 1
    assert "none.npy" in failed.stderr


LIVES = """\
name: by.updates
data: {source: landing/*.npy}
model: {n_components: 2}
fit: {max_steps: 3, n_init: 1}
publish: {model: models/lives}
"""


@pytest.fixture
def living(folder: Path) -> Path:
    """A model, one good batch that it has not learned, and one that would harm it."""
    Path("landing").mkdir()
    rows = np.load("rows.npy")
    np.save("landing/day0.npy", rows)
    Path("lives.yaml").write_text(LIVES)
    stages.run_stages(stages.begin("lives.yaml", ["orchestrate=none", "report=false"]), quiet=True)
    np.save("landing/day1.npy", rows[:300] + 0.01)
    np.save("landing/day2.npy", 1000.0 * rows[:300])
    for path in Path("landing").iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


def test_an_update_with_a_refused_batch_fails_after_it_has_shown_all(
    prefect_harness: None, living: Path
) -> None:
    from flows.update import update

    state = update("lives.yaml", return_state=True)
    assert state.is_failed()
    assert "day2.npy was rejected" in state.message
    there = ModelStore("models/lives").snapshot()
    assert {e.name: e.status for e in there.batches.values()} == {
        "day0.npy": "learned",
        "day1.npy": "learned",
        "day2.npy": "rejected",
    }
    shown = artifacts()
    assert shown["by-updates-batches"] == "table"
    assert shown["by-updates-drift"] == "table"
    assert shown["by-updates-scores"] == "image"
    assert shown["by-updates-update"] == "markdown"
    run = Run.find("last")
    assert run.report.exists()
    # Nothing is new, and nothing is told twice.
    assert update("lives.yaml")["batches"] == []


def test_learning_without_its_decorator_is_a_plain_call(living: Path) -> None:
    from flows.update import learn_batches

    run = updating.begin("lives.yaml")
    found = learn_batches.fn(str(run.path))
    assert found == run.stage("update")
    assert [b["status"] for b in found["batches"]] == ["learned", "rejected"]


def test_the_module_tells_what_an_update_did_and_exits_with_1(living: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment["PYTHONPATH"] = str(Path(stages.__file__).parent.parent)
    ran = subprocess.run(
        [sys.executable, "-m", "flows.update", "lives.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 1
    assert "day1.npy" in ran.stdout
    assert "report    runs/" in ran.stdout
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: day2.npy was rejected")
