"""Profiles: every second of every worker has a name, and nothing is noted where nobody asked."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genstream.errors import ConfigError
from genstream.learn import BatchEM, FitState, Relay, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.profile import PARTS, Profile, current, mark, profile_text
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource, Split
from genstream.start import warm_start
from genstream.store import append_batch
from genstream.stories import mixture
from genstream.sweeps import Candidate, fit_many
from genstream.threads import beside

ROWS = 60_000


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, 4)) * [1, 2, 3, 4]


def checked(found: Profile) -> dict[str, float]:
    """The seconds of a profile, known to be those of all its workers."""
    assert set(found.seconds) <= set(PARTS)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert sum(found.seconds.values()) == pytest.approx(found.wall * found.workers, rel=0.05)
    return found.seconds


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_of_a_fit_sum_to_the_time_of_all_workers(workers: int, values: np.ndarray) -> None:
    passes = Passes(NumpySource(values, chunk_rows=7000), workers=workers)
    learner = Relay((OnlineEM(batch_rows=20_000), BatchEM(3, 0.0)))
    with Profile() as found:
        story, state = warm_start(mixture(Schema.real(4), 6), passes, sample_rows=5000)
        fit(story, learner, passes, state)
    assert found.workers == workers
    seconds = checked(found)
    for part in ("read", "decode", "prepare", "features", "score", "softmax", "gather", "m_step"):
        assert seconds[part] > 0
    assert current() is None


@pytest.mark.parametrize("chunk_rows", [3000, 20_000])
@pytest.mark.parametrize(("covariance", "k"), [("full", 3), ("diag", 3), ("spherical", 6)])
def test_a_profile_changes_no_bit(
    chunk_rows: int, covariance: str, k: int, values: np.ndarray
) -> None:
    """Whether chunks are walked block by block or in one go, which a profile interrupts."""
    passes = Passes(NumpySource(values, chunk_rows=chunk_rows), workers=2)
    model = mixture(Schema.real(4), k, covariance=covariance)
    story, state = warm_start(model, passes, sample_rows=5000)
    plain = fit(story, BatchEM(3, 0.0), passes, state)
    with Profile():
        told = fit(story, BatchEM(3, 0.0), passes, state)
    assert told.params.digest() == plain.params.digest()


class Sleepy(NumpySource):
    def read(self, i: int) -> Rows:
        time.sleep(0.01)
        return super().read(i)


class Nothing:
    def merge(self, other: Any) -> Any:
        return self


def test_waiting_for_storage_is_told_from_work() -> None:
    source = Sleepy(np.zeros((10, 1)), chunk_rows=1)
    with Profile() as found:
        Passes(source, scheduler="synchronous").fold(lambda chunk, rows: Nothing())
    seconds = checked(found)
    assert seconds["read"] >= 0.1
    assert found.ahead == 0

    def work(chunk: int, rows: Rows) -> Nothing:
        time.sleep(0.01)
        mark("score")
        return Nothing()

    with Profile() as found:
        Passes(source, workers=1).fold(work)
    assert checked(found)["score"] >= 0.1
    # All but the first chunks were read meanwhile, by another thread.
    assert found.ahead > 0.05


def test_workers_without_work_wait() -> None:
    with Profile() as found:
        Passes(NumpySource(np.zeros((2, 1)), chunk_rows=1), workers=2).fold(
            lambda chunk, rows: time.sleep(0.2 * chunk) or Nothing()
        )
    assert found.workers == 2
    assert checked(found)["wait"] > 0.15


def test_threads_are_told_apart(values: np.ndarray) -> None:
    """Two fits side by side, one of them profiled."""
    passes = Passes(NumpySource(values, chunk_rows=7000), workers=2)
    story, state = warm_start(mixture(Schema.real(4), 3), passes, sample_rows=5000)
    other = threading.Thread(target=fit, args=(story, BatchEM(6, 0.0), passes, state))
    with Profile() as found:
        other.start()
        time.sleep(0.05)
    other.join()
    assert set(found.seconds) == {"other", "wait"}
    assert found.workers == 1


def test_parts_of_fits_in_shared_passes_sum_to_it_too(values: np.ndarray) -> None:
    """Their M-steps and their steps of online EM are taken by threads of the sweep's own."""
    passes = Passes(NumpySource(values, chunk_rows=7000), workers=2)
    learner = Relay((OnlineEM(batch_rows=20_000), BatchEM(3, 0.0)))
    begun = [warm_start(mixture(Schema.real(4), k), passes, sample_rows=5000) for k in (5, 6, 7)]
    candidates = [Candidate(story, learner, state) for story, state in begun]
    with Profile() as found:
        fit_many(candidates, passes, workers=2)
    assert found.workers == 2
    seconds = checked(found)
    for part in ("read", "features", "score", "softmax", "gather", "m_step"):
        assert seconds[part] > 0


def test_passes_side_by_side_share_the_workers() -> None:
    passes = Passes(NumpySource(np.zeros((20, 1)), chunk_rows=1), workers=4)

    def go_over() -> Nothing:
        nothing: Nothing = passes.among(2).fold(lambda chunk, rows: time.sleep(0.02) or Nothing())
        return nothing

    with Profile() as found, ThreadPoolExecutor(4) as pool:
        list(beside(pool, 4, [go_over] * 2))
    # Two threads wait for two each.
    assert found.workers == 4
    checked(found)


def test_one_profile_a_thread() -> None:
    with Profile(), pytest.raises(ConfigError, match="already"):
        Profile().__enter__()


def test_stored_chunks_split_and_all(values: np.ndarray, tmp_path: Path) -> None:
    schema = Schema.real(4)
    dataset, _ = append_batch(tmp_path / "d", "b", [Rows.of(values)], lambda: schema)
    source = Split(dataset.source(), "train", 0.1)
    story = mixture(schema, 2).anchored(Rows.of(values[:1000]))
    with Profile() as found:
        fit(story, BatchEM(2, 0.0), Passes(source, workers=2), FitState(story.vague()))
    seconds = checked(found)
    assert seconds["read"] > 0
    assert seconds["decode"] > 0


def test_as_text_and_as_json() -> None:
    with Profile() as found:
        time.sleep(0.02)
        mark("score")
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["workers"] == 1
    assert list(plain["seconds"]) == [part for part in PARTS if part in plain["seconds"]]
    text = profile_text(plain)
    assert text == found.to_text()
    assert text.splitlines()[0].startswith("score")
    assert "in all" in text


CONFIG = """\
version: 1
name: t
data: {source: x.csv, dataset: d, columns: {a: real, b: real}}
model: {kind: mixture, n_components: 2}
fit: {max_steps: 3}
report: true
orchestrate: none
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savetxt("x.csv", rng.standard_normal((400, 2)), delimiter=",", header="a,b", comments="")
    Path("c.yaml").write_text(CONFIG)
    return tmp_path


def told_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command says on stdout of the time of learning, known to be on stderr as well."""
    from flows.cli import app

    app([*arguments, "--json"], standalone_mode=False)
    told = capsys.readouterr()
    found: dict[str, Any] = json.loads(told.out)["stages"]["fit"]["profile"]
    assert profile_text(found) in told.err
    assert sum(found["seconds"].values()) == pytest.approx(
        found["wall"] * found["workers"], rel=0.05
    )
    assert found["seconds"]["m_step"] > 0
    return found


SWEPT = "sweep={over: {model.n_components: [1, 2, 3]}}"


@pytest.mark.parametrize("command", [("fit", "c.yaml"), ("sweep", "c.yaml", SWEPT)])
def test_the_command_tells_it(
    command: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told_by(capsys, *command, "--profile")
    (report,) = Path("runs").glob("*/report.html")
    assert "seconds of all workers" in report.read_text()


def test_starts_side_by_side_share_the_workers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import stages

    begin_fit = stages.begin_fit
    seen: list[int] = []

    def noted(config: Any, schema: Schema, passes: Passes, **options: Any) -> Any:
        seen.append(passes.workers)
        return begin_fit(config, schema, passes, **options)

    monkeypatch.setattr(stages, "begin_fit", noted)
    told_by(capsys, "sweep", "c.yaml", SWEPT, "compute.workers=6", "--profile")
    assert seen == [2, 2, 2]
    # One that starts alone has them all.
    one = SWEPT.replace("[1, 2, 3]", "[2]")
    told_by(capsys, "sweep", "c.yaml", one, "compute.workers=6", "--profile")
    assert seen[3:] == [6]


def test_a_run_that_is_gone_on_with_tells_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import app
    from flows.stages import begin

    run = begin("c.yaml")
    told_by(capsys, "resume", run.id, "--profile")
    with pytest.raises(ConfigError, match="has learned already: leave --profile out"):
        app(["resume", run.id, "--profile"], standalone_mode=False)
    # What was taken once is told again.
    told_by(capsys, "resume", run.id)


def test_an_update_has_none(folder: Path) -> None:
    from flows.cli import app
    from flows.run import Run

    run = Run.create("c.yaml", kind="update")
    with pytest.raises(ConfigError, match="is an update: a profile is taken of fits and sweeps"):
        app(["resume", run.id, "--profile"], standalone_mode=False)
