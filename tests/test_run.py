"""Run folders: found again, never worked on twice, and truthful about how they ended."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest

from flows.run import Interrupted, Run, interruptible
from genstream.errors import ConfigError, ConflictError, CorruptError, DataError

CONFIG = "name: night.ly\ndata: {source: a.npy}\nmodel: {n_components: 2}  # as given\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_a_run_keeps_its_configuration_as_given_and_as_resolved(config: Path) -> None:
    run = Run.create(config, ["model.n_components=3"])
    assert run.path.parent == Path("runs")
    assert "-night.ly-" in run.id
    assert (run.path / "config.yaml").read_text() == CONFIG
    config.unlink()
    assert run.config.model.n_components == 3
    assert run.info()["overrides"] == ["model.n_components=3"]


def test_a_wrong_configuration_makes_no_run(config: Path) -> None:
    with pytest.raises(ConfigError):
        Run.create(config, ["model.n_components=0"])
    assert not Path("runs").exists()


def test_a_run_is_found_by_what_is_known_of_it(config: Path) -> None:
    first = Run.create(config)
    first.path.rename("runs/20200101T000000Z-night.ly-000001")
    first = Run(Path("runs/20200101T000000Z-night.ly-000001"))
    second = Run.create(config)
    assert Run.find("last") == second
    assert Run.find(second.id) == second
    assert Run.find(second.id[-6:]) == second
    assert Run.find("20200101") == first
    assert Run.find(str(first.path)).id == first.id
    with pytest.raises(ConfigError, match="could be any of"):
        Run.find("20")
    with pytest.raises(ConfigError, match="did you mean '20200101T000000Z-night"):
        Run.find("20200101T000000Z-night.ly-000002")
    with pytest.raises(ConfigError, match="genstream runs"):
        Run.find("zzz")


def test_no_runs_at_all(config: Path) -> None:
    assert Run.all() == []
    with pytest.raises(ConfigError, match="no run 'last'"):
        Run.find("last")


def test_stages_are_recorded(config: Path) -> None:
    run = Run.create(config)
    assert run.stage("fit") == {}
    run.record("fit", {"steps": 3})
    run.record("evaluate", {"x": 1})
    assert run.stage("fit") == {"steps": 3}
    assert sorted(run.info()["stages"]) == ["evaluate", "fit"]


def test_metrics_survive_a_torn_line_and_a_redone_step(config: Path) -> None:
    run = Run.create(config)
    for step, value in [(1, 0.1), (2, 0.2)]:
        run.append_metrics({"step": step, "value": value})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "val\n')
    run.append_metrics({"step": 2, "value": 0.2})
    run.append_metrics({"step": 3, "value": 0.3})
    assert [line["value"] for line in run.metrics()] == [0.1, 0.2, 0.3]


def test_the_end_of_a_run_is_recorded(config: Path) -> None:
    run = Run.create(config)
    with run.working():
        assert run.status == "running"
        logging.getLogger("genstream").warning("something to note")
    assert run.status == "done"
    assert "something to note" in (run.path / "log.txt").read_text()
    with pytest.raises(DataError), run.working():
        raise DataError("row 3 is odd")
    assert run.status == "failed"
    assert run.info()["reason"] == "row 3 is odd"


def test_an_unexpected_error_leaves_its_traceback_in_the_log(config: Path) -> None:
    run = Run.create(config)
    with pytest.raises(ZeroDivisionError), run.working():
        _ = 1 / 0
    assert "ZeroDivisionError" in (run.path / "log.txt").read_text()


def test_two_processes_never_work_on_one_run(config: Path) -> None:
    run = Run.create(config)
    parent = os.getppid()
    import psutil

    run.update(
        process={
            **run.info()["process"],
            "pid": parent,
            "started": psutil.Process(parent).create_time(),
        }
    )
    with pytest.raises(ConflictError, match=f"process {parent}"), run.working():
        pass


def test_a_run_begun_on_another_machine_can_be_taken_over(config: Path) -> None:
    run = Run.create(config)
    with run.working():
        with pytest.raises(ConflictError, match=r"process \d+: wait for it, or stop"):
            run.take_over()
        run.update(process={**run.info()["process"], "host": "elsewhere"})
        told = f"of the machine elsewhere.* {run.id} --take-over"
        with pytest.raises(ConflictError, match=told), run.working():
            pass
        run.take_over()
        assert run.status == "interrupted"
    # One that is done stays so.
    run.take_over()
    assert run.status == "done"


def test_a_run_whose_process_is_gone_was_interrupted(config: Path) -> None:
    run = Run.create(config)
    run.update(process={**run.info()["process"], "started": 1.0})
    assert run.status == "interrupted"
    with run.working():
        pass
    assert run.status == "done"


def test_a_torn_run_file_is_said_to_be_corrupt(config: Path) -> None:
    run = Run.create(config)
    (run.path / "run.json").write_text(json.dumps(run.info())[:20])
    with pytest.raises(CorruptError, match=r"run\.json"):
        run.info()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_interrupts_and_is_recorded(config: Path, signum: int, code: int) -> None:
    run = Run.create(config)

    def work() -> None:
        with run.working():
            os.kill(os.getpid(), signum)
            time.sleep(5)

    with pytest.raises(Interrupted) as caught:
        work()
    assert caught.value.exit_code == code
    assert run.status == "interrupted"
    assert run.info()["reason"] == f"interrupted by {signal.Signals(signum).name}"


def test_signal_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
