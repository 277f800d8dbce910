"""A run from stage to stage: what it records, and that an interruption changes no bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed
import numpy as np
import pytest

from flows import stages
from flows.config import Compute, load
from flows.data import ingest_data, open_data
from flows.plan import make_plan, products_nbytes
from flows.run import Interrupted, Run
from genstream import compiled
from genstream.errors import ComputeError, ConfigError, DataError
from genstream.learn import FitState, StepInfo
from genstream.schema import Column, Schema
from genstream.stories import mixture
from genstream.story import Story

CONFIG = """\
name: small
data: {source: rows.npy, holdout: 0.2}
model: {n_components: 3}
fit: {tolerance: 0, max_steps: 12, n_init: 2, seed: 1, sample_rows: 100}
compute: {workers: 2}
checkpoint: {every: 1 pass, keep: 2}
orchestrate: none
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 3)) + 5.0 * rng.integers(0, 3, 3000)[:, None]
    rows[rng.random(rows.shape) < 0.05] = np.nan
    np.save("rows.npy", rows)
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


def start(*overrides: str) -> Run:
    return Run.create("config.yaml", overrides)


def test_a_run_walks_all_its_stages(folder: Path) -> None:
    run = stages.run_stages(start("publish={model: models/small}"))
    assert run.status == "done"
    assert stages.remaining(run) == []
    fitted = run.stage("fit")
    assert fitted["outcome"] == "max_steps"
    assert fitted["steps"] == 12
    assert fitted["rows"] + run.stage("evaluate")["held_out"]["n_rows"] == 3000
    metrics = run.metrics()
    assert [line["step"] for line in metrics] == list(range(1, 13))
    objective = [line["mean_objective"] for line in metrics]
    assert np.all(np.diff(objective) > -1e-9)
    assert run.report.read_text().startswith("<!")
    assert "small" in run.report.read_text()
    assert run.stage("publish")["version"] == 1
    record = run.read_json("repro.json")
    assert record["seed"] == 1
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"]["numba"] == compiled.version()
    assert (run.path / "log.txt").read_text().count("mean log-likelihood") == 12


def test_the_same_run_twice_gives_the_same_bits(folder: Path) -> None:
    digests = {
        stages.run_stages(start("report=false", f"compute.scheduler={scheduler}")).stage("fit")[
            "digest"
        ]
        for scheduler in ("threads", "synchronous", "threads")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("every", ["1 pass", "5 passes", "1h"])
def test_an_interrupted_fit_resumes_to_the_same_bits(folder: Path, every: str) -> None:
    whole = stages.run_stages(start("report=false")).stage("fit")["digest"]
    run = start("report=false", f"checkpoint.every={every}")
    seen: list[int] = []

    def interrupt(state: FitState, info: StepInfo) -> None:
        seen.append(info.step)
        if info.step in (4, 7):
            raise Interrupted(signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(Interrupted), run.working():
            stages.fit(run, on_step=(interrupt,))
        assert run.status == "interrupted"
        assert stages.remaining(run) == ["fit", "evaluate"]
    stages.run_stages(run)
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    assert run.stage("fit")["digest"] == whole
    assert [line["step"] for line in run.metrics()] == list(range(1, 13))


METHODS = {
    "auto": ["fit.batch_rows=9", "fit.t0=2", "fit.max_steps=6"],
    "online": ["fit={method: online, batch_rows: 99, forgetting: 0.2, passes: 6, sample_rows: 99}"],
    "incremental": ["fit.method=incremental", "fit.max_steps=6"],
    "batch": ["fit.method=batch", "fit.max_steps=6"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_to_the_same_bits(folder: Path, method: str) -> None:
    options = ["report=false", *METHODS[method]]
    whole = stages.run_stages(start(*options))
    steps = [line["step"] for line in whole.metrics()]
    assert steps == list(range(1, (7 if method == "auto" else 6) + 1))
    run = start(*options)

    def interrupt(state: FitState, info: StepInfo) -> None:
        if info.step in (1, 4):
            raise Interrupted(signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(Interrupted), run.working():
            stages.fit(run, on_step=(interrupt,))
    stages.run_stages(run)
    assert run.stage("fit")["digest"] == whole.stage("fit")["digest"]
    assert [line["step"] for line in run.metrics()] == steps


def test_what_is_planned_and_told_of_a_relay(folder: Path) -> None:
    overrides = ["report=false", *METHODS["auto"]]
    assert make_plan(load("config.yaml", overrides)).passes == 1 + 6 + 2
    few = ["fit.max_steps=6"]
    assert make_plan(load("config.yaml", few)).passes == 6 + 2
    assert make_plan(load("config.yaml", METHODS["online"])).passes == 6 + 2
    with_memo = make_plan(load("config.yaml", METHODS["incremental"])).memory
    assert with_memo > make_plan(load("config.yaml", METHODS["batch"])).memory
    run = stages.run_stages(start(*overrides))
    fitted = run.stage("fit")
    assert (fitted["outcome"], fitted["steps"]) == ("max_steps", 7)
    # The sample, the online pass and six of batch EM.
    assert fitted["bytes_read"] == fitted["rows"] * 3 * 8 * 8


def test_one_component_of_complete_rows_is_read_for_its_sample_and_once_more(folder: Path) -> None:
    np.save("rows.npy", np.random.default_rng(0).standard_normal((3000, 3)))
    overrides = ["report=false", "model.n_components=1", *METHODS["auto"]]
    fitted = stages.run_stages(start(*overrides)).stage("fit")
    assert fitted["bytes_read"] == fitted["rows"] * 3 * 8 * 2
    # No more is planned than what batch EM would take.
    planned = make_plan(load("config.yaml", overrides))
    batch = make_plan(load("config.yaml", [*overrides, "fit.method=batch"]))
    assert (planned.passes, planned.memory) == (batch.passes, batch.memory)


@pytest.mark.crash
def test_a_killed_fit_resumes_to_the_same_bits(folder: Path) -> None:
    whole = stages.run_stages(start("report=false")).stage("fit")["digest"]
    code = (
        "import os, signal\n"
        "from flows import stages\n"
        "from flows.run import Run\n"
        "run = Run.find('last')\n"
        "def kill(state, info):\n"
        "    if info.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with run.working(): stages.fit(run, on_step=(kill,))\n"
    )
    run = start("report=false", "checkpoint.every=2 passes")
    run = Run(run.path.rename("runs/99991231T000000Z-small-000000"))  # surely the last
    run.update(process={**run.info()["process"], "started": 1.0})  # whoever made it is gone
    environment = os.environ | {"PYTHONPATH": str(Path(stages.__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert run.status == "interrupted"
    stages.run_stages(run)
    assert run.stage("fit")["digest"] == whole


def test_a_finished_run_does_nothing_again(folder: Path) -> None:
    run = stages.run_stages(start("publish={model: models/small}"))
    before = run.info()["stages"]
    stages.run_stages(run)
    assert run.info()["stages"] == before


def test_publishing_twice_publishes_once(folder: Path) -> None:
    run = stages.run_stages(start("publish={model: models/small}"))
    # As after a kill between the commit of the model and the record of it.
    run.update(stages={k: v for k, v in run.info()["stages"].items() if k != "publish"})
    assert stages.publish(run)["version"] == 1
    other = stages.run_stages(start("publish={model: models/small}"))
    assert other.stage("publish")["version"] == 2


def test_more_components_than_rows_are_refused_before_the_fit(folder: Path) -> None:
    np.save("rows.npy", np.random.default_rng(0).standard_normal((40, 3)))
    more = ["model.n_components=50"]
    words = r"^model\.n_components is 50, more than the rows that are fitted: there are \d\d$"
    with pytest.raises(ConfigError, match=words):
        stages.begin("config.yaml", more)
    assert not Path("runs").exists()
    # A dataset is counted once it is up to date.
    np.savetxt("rows.csv", np.load("rows.npy"), delimiter=",", header="a,b,c", comments="")
    run = stages.begin("config.yaml", ["data={source: rows.csv, dataset: data/rows}", *more])
    with pytest.raises(ConfigError, match=words):
        stages.run_stages(run)
    assert run.status == "failed"
    assert not run.metrics()
    # As many rows as components are enough.
    stages.begin("config.yaml", ["model.n_components=40", "data.holdout=null"])


def test_a_resume_on_other_data_is_refused(folder: Path) -> None:
    run = start()

    def stop(state: FitState, info: StepInfo) -> None:
        raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted), run.working():
        stages.fit(run, on_step=(stop,))
    np.save("rows.npy", np.ones((500, 3)))
    with pytest.raises(DataError, match="no longer those the run began with"):
        stages.run_stages(run)


def test_rows_held_out_in_a_file_of_their_own(folder: Path) -> None:
    np.save("test.npy", np.load("rows.npy")[:100])
    Path("config.yaml").write_text(CONFIG.replace("holdout: 0.2", "test: test.npy"))
    run = stages.run_stages(start("report=false"))
    assert run.stage("fit")["rows"] == 3000
    assert run.stage("evaluate")["held_out"]["n_rows"] == 100


def test_no_rows_held_out(folder: Path) -> None:
    run = stages.run_stages(start("data.holdout=null"))
    assert run.stage("evaluate")["held_out"] is None
    assert run.report.exists()


def test_ingest_of_data_in_place_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dataset"):
        ingest_data(start().config)


def test_evaluation_before_a_fit_is_refused(folder: Path) -> None:
    run = start()
    with pytest.raises(ConfigError, match="no fitted model"):
        stages.evaluate(run)
    with pytest.raises(ConfigError, match="not evaluated"):
        stages.report(run)


def test_drawn_data_are_ingested_once_and_recovered(folder: Path) -> None:
    Path("config.yaml").write_text(
        "data: {source: {gigabytes: 0.0005, n_components: 2, n_features: 3, separation: 6.0}}\n"
        "model: {n_components: 2}\n"
        "fit: {seed: 1}\n"
        "orchestrate: none\n"
        "report: false\n"
    )
    run = stages.run_stages(start())
    assert run.stage("evaluate")["recovery"]["matched"] == 2
    again = stages.run_stages(start())
    assert again.stage("fit")["digest"] == run.stage("fit")["digest"]
    assert again.stage("ingest")["batches"][0]["status"] == "duplicate"
    assert again.stage("ingest")["rows"] == run.stage("ingest")["rows"]


@pytest.mark.slow
def test_a_cluster_of_processes_gives_the_same_bits(folder: Path) -> None:
    here = stages.run_stages(start("report=false")).stage("fit")["digest"]
    there = stages.run_stages(start("report=false", "compute.scheduler=distributed"))
    assert there.stage("fit")["digest"] == here


def test_workers_in_another_folder_find_what_is_fitted_in_place(folder: Path) -> None:
    np.save("test.npy", np.zeros((4, 3)))
    data = open_data(
        load(
            "config.yaml",
            ["compute.scheduler=tcp://a:1", "data.holdout=null", "data.test=test.npy"],
        )
    )
    assert data.held_out is not None
    for source, name in ((data.train, "rows.npy"), (data.held_out, "test.npy")):
        assert source.identity()["name"] == str(folder / name)
    assert open_data(load("config.yaml", ["data.holdout=null"])).train.identity()["name"] == (
        "rows.npy"
    )


def test_a_cluster_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "CONNECT_SECONDS", 1)
    with pytest.raises(ComputeError, match="no Dask cluster at tcp"):
        stages.run_stages(start("compute.scheduler=tcp://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("components", "columns", "rows"),
    [(2, 8, 300_000), (64, 8, 40_000), (2, 400, 6_000), (8, 16, 3_000_000)],
)
def test_memory_stays_below_what_was_planned(
    folder: Path, components: int, columns: int, rows: int
) -> None:
    """Also of a fit that begins with online EM and has chunks as large as they get."""
    rng = np.random.default_rng(0)
    np.save("rows.npy", rng.standard_normal((rows, columns), dtype=np.float32))
    overrides = [f"model.n_components={components}", "fit.max_steps=2", "report=true"]
    if rows > 10**6:
        overrides += ["data.dataset=data/rows", "data.dtype=float32", "fit.sample_rows=100000"]
    plan = make_plan(load("config.yaml", overrides))
    code = "import sys; from flows.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(Path(stages.__file__).parent.parent)}
    arguments = ["fit", "config.yaml", *overrides, "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        check=True,
        timeout=120,
    )
    peak = json.loads(ran.stdout)["stages"]["evaluate"]["peak_rss"]
    assert plan.memory / 4 < peak < plan.memory


@pytest.mark.parametrize(
    ("story", "complete", "gaps"),
    [
        (mixture(Schema.real(40), 40), 861, 861),
        (mixture(Schema.real(40), 40, covariance="tied", dtype="float32"), 0, 861),
        (mixture(Schema.real(40), 40, covariance="diag"), 0, 0),
        (mixture(Schema((*Schema.real(30).columns, Column("n", "count"))), 31), 0, 0),
        (
            mixture(Schema((*Schema.real(30).columns, Column("n", "count"))), 3, covariance="full"),
            496,
            496,
        ),
        # Under few components only rows with at most 33 of these columns need products: 595.
        (mixture(Schema.real(40), 4), 5 * 40 + 1, 595),
        (mixture(Schema.real(400), 2, dtype="float32"), 3 * 400 + 1, 3 * 400 + 1),
    ],
)
def test_only_covariances_need_products_of_columns(story: Story, complete: int, gaps: int) -> None:
    itemsize = 8 if story.dtype == "float64" else 12
    assert products_nbytes(story) == 256 * gaps * itemsize
    assert products_nbytes(story, complete=True) == 256 * complete * itemsize


def test_data_in_place_that_changed_are_noticed(folder: Path) -> None:
    run = start("fit.max_steps=4", "report=false")
    stages.fit(run)
    rows = np.load("rows.npy")
    rows[:100] += 5.0
    np.save("rows.npy", rows)
    info = run.info()
    info["stages"].pop("fit")
    (run.path / "run.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="no longer those the run began with"):
        stages.run_stages(run)


def test_workers_of_our_own_cluster_keep_the_memory_of_a_chunk() -> None:
    with stages.cluster(Compute(scheduler="distributed", workers=1)):
        kept = distributed.get_client().run(os.environ.get, "MALLOC_MMAP_THRESHOLD_")
    assert list(kept.values()) == [str(32 << 20)]
