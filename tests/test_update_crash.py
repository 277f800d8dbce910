"""Updates that die anywhere: the model is as before or one batch further, and the rerun catches up.

First with storage that dies, then through all of `genstream update`, in this process.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from flows import stages, updating
from flows.run import Run
from genstream import models
from genstream.errors import CorruptError, GenstreamError, StorageError
from genstream.learn import FitState
from genstream.manifests import LocalStorage
from genstream.models import ModelStore
from genstream.online import OnlineEM
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.start import seed_params
from genstream.store import Dataset, fsck, gc
from genstream.stories import mixture
from genstream.updates import Learned, Options, RowsDelivery, caller_id, update

pytestmark = pytest.mark.crash
REAL = Schema.real(2)
OPTIONS = Options(learner=OnlineEM(batch_rows=64), holdout=0.25, max_drop=None)


class Died(BaseException):
    """The process was killed."""


class Mortal(LocalStorage):
    """Local storage that notes its operations, and is dead before or after the n-th for good."""

    log: ClassVar[list[tuple[str, str]]] = []
    budget = 10**9
    late = False

    def _operate(self, what: str, key: str, operation: Callable[[], Any]) -> Any:
        cls = type(self)
        if len(cls.log) >= cls.budget + cls.late:
            raise Died
        cls.log.append((what, key))
        if len(cls.log) > cls.budget and not cls.late:
            raise Died
        found = operation()
        if len(cls.log) > cls.budget:
            raise Died
        return found

    def write(self, key: str, data: bytes) -> None:
        self._operate("write", key, lambda: LocalStorage.write(self, key, data))

    def write_if_absent(self, key: str, data: bytes) -> bool:
        done = self._operate("commit", key, lambda: LocalStorage.write_if_absent(self, key, data))
        return bool(done)

    def hint(self, key: str, data: bytes) -> None:
        self._operate("hint", key, lambda: LocalStorage.hint(self, key, data))

    def read(self, key: str) -> bytes:
        return bytes(self._operate("read", key, lambda: LocalStorage.read(self, key)))

    def delete(self, key: str) -> None:
        self._operate("delete", key, lambda: LocalStorage.delete(self, key))


def rows(seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows.of(rng.standard_normal((100, 2)) + 3.0 * rng.integers(0, 2, 100)[:, None])


def deliveries() -> Iterator[RowsDelivery]:
    """Two good batches, one with the rows of the first, and one of another width."""
    twin = rows(1)[np.random.default_rng(0).permutation(100)]
    wide = Rows.of(np.ones((5, 3)))
    for name, those in {"one": rows(1), "twin": twin, "wide": wide, "two": rows(2)}.items():
        yield RowsDelivery(those, caller_id(name), name)


def learn(path: Path) -> list[Learned]:
    return update(path, deliveries(), OPTIONS)


def view(path: Path) -> Any:
    there = ModelStore(path).snapshot()
    _, state = there.load()
    parts = [part.digest() for part in (state.params, state.stats, state.memory) if part]
    held = [(key, rows.filled().tobytes()) for key, rows in there.held()]
    events = [(e.id, e.status, e.version, e.digest, repr(e.scores)) for e in there.events]
    return there.champion, parts, state.step, held, events, repr(there.reference())


@pytest.mark.parametrize(
    "thorough",
    [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=["some", "all"],
)
def test_death_at_any_operation_leaves_a_version_and_the_rerun_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thorough: bool
) -> None:
    # What is durable is not asked here, only the order of operations: syncing would take minutes.
    monkeypatch.setattr("os.fsync", lambda _: None)
    story = mixture(REAL, 2, covariance="diag").anchored(rows(0))
    params = seed_params(story, rows(0), np.random.default_rng(0))
    fitted = tmp_path / "fitted"
    ModelStore(fitted).publish(story, FitState(params, sample=rows(0)), {})

    calm = Path(shutil.copytree(fitted, tmp_path / "calm"))
    versions = [view(calm)]
    monkeypatch.setattr(models, "LocalStorage", Mortal)
    monkeypatch.setattr(Mortal, "log", [])
    learn(calm)
    log = list(Mortal.log)
    monkeypatch.setattr(models, "LocalStorage", LocalStorage)
    end = view(calm)
    slow = Path(shutil.copytree(fitted, tmp_path / "slow"))
    for one in deliveries():
        update(slow, [one], OPTIONS)
        versions.append(view(slow))
    assert versions[-1] == end
    assert len(set(map(repr, versions))) == 5

    kinds = [(what, key.partition("/")[0]) for what, key in log]
    commits = [n for n, (what, _) in enumerate(kinds) if what == "commit"]
    assert len(commits) == 4
    moments = [(n, late) for n in range(len(log)) for late in (False, True)]
    if not thorough:
        # The first of each kind, around each commit, and a few more.
        first = {kinds.index(kind) for kind in kinds}
        chosen = [(n, bool(n % 2)) for n in first.difference(commits)]
        drawn = np.random.default_rng(0).choice(len(moments), 3, replace=False)
        moments = [*chosen, *((n, True) for n in commits), (commits[-1], False)]
        moments += [(int(i) // 2, bool(i % 2)) for i in drawn]
    seen = set()
    for n, late in moments:
        path = Path(shutil.copytree(fitted, tmp_path / f"{n}-{late}"))
        monkeypatch.setattr(models, "LocalStorage", Mortal)
        monkeypatch.setattr(Mortal, "log", [])
        monkeypatch.setattr(Mortal, "budget", n)
        monkeypatch.setattr(Mortal, "late", late)
        with pytest.raises(Died):
            learn(path)
        monkeypatch.setattr(models, "LocalStorage", LocalStorage)
        left = view(path)
        assert left in versions
        seen.add(versions.index(left))
        learn(path)
        assert view(path) == end
        assert fsck(path) == ()
        shutil.rmtree(path)
    assert seen == {0, 1, 2, 3, 4}


# --- through the whole application ----------------------------------------------------------------

CONFIG = """\
name: crash
data:
  source: landing/*.parquet
  columns: {x: real, n: count, kind: categorical}
  ready: done_marker
  holdout: 0.25
model: {n_components: 2}
fit: {max_steps: 5, n_init: 1, batch_rows: 64}
compute: {workers: 1}
guard: {max_drop: null}
publish: {model: model}
report: false
orchestrate: none
"""
DATASET = ["data.dataset=dataset"]


def table(seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    k = rng.integers(0, 2, 100)
    kinds = np.array(["low", "high"])[k]
    return pa.table({"x": rng.normal(3.0 * k), "n": rng.poisson(1.0 + k), "kind": kinds})


def land(name: str, those: pa.Table) -> None:
    pyarrow.parquet.write_table(those, f"landing/{name}.parquet")
    Path(f"landing/{name}.parquet.done").touch()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders with a model fitted to a first file, without and with a dataset."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for stored in (False, True):
            found[stored] = tmp_path_factory.mktemp("fitted")
            patch.chdir(found[stored])
            Path("landing").mkdir()
            Path("config.yaml").write_text(CONFIG)
            land("b0", table(0))
            stages.run_stages(Run.create("config.yaml", DATASET if stored else ()), quiet=True)
    return found


@pytest.fixture(params=[False, True], ids=["without", "with"])
def folder(
    request: pytest.FixtureRequest,
    fitted: dict[bool, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """A copy of such a folder, with three files landed, as current folder; and the overrides."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    shutil.copytree(fitted[request.param], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    land("b1", table(1))
    land("b2", table(2).set_column(0, "x", pa.array([f"word {i}" for i in range(100)])))
    land("b3", table(3))
    return DATASET if request.param else []


def run(overrides: list[str]) -> dict[str, str]:
    found = updating.update_config("config.yaml", overrides)
    return {line["name"]: line["status"] for line in found["batches"]}


def aside(folder: str) -> Path:
    """A copy of all there is, for a second history."""
    return Path(shutil.copytree(Path.cwd(), Path.cwd().with_name(folder)))


def inbox() -> list[Path]:
    return list(Path("model/inbox").glob("*"))


@pytest.mark.parametrize("folder", [True], ids=["with"], indirect=True)
def test_a_batch_that_is_only_in_the_dataset_is_learned_from_there(
    folder: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = aside("calm")
    from genstream import updates

    honest = updates.learn_batch

    def dies(store: ModelStore, one: Any, options: Options, **how: Any) -> Learned:
        if one.name == "b1.parquet":
            raise Died
        return honest(store, one, options, **how)

    with monkeypatch.context() as patch:
        patch.setattr(updates, "learn_batch", dies)
        with pytest.raises(Died):
            run(folder)
    assert [batch.name for batch in Dataset.open("dataset").batches] == [
        "b0.parquet",
        "b1.parquet",
    ]
    assert ModelStore("model").champion == 1
    Path("landing/b1.parquet").unlink()
    assert run(folder) == {
        "b1.parquet": "learned",
        "b2.parquet": "quarantined",
        "b3.parquet": "learned",
    }
    here = view(Path("model"))
    monkeypatch.chdir(calm)
    run(folder)
    assert view(Path("model")) == here


def test_what_a_dead_process_refused_gets_to_quarantine(
    folder: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Any, done: Learned) -> None:
        if done.event.status == "quarantined":
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(updating.Landing, "close", dies)
        # A process that was killed tidies nothing up.
        patch.setattr(updating.Landing, "leave", lambda _: None)
        with pytest.raises(Died):
            run(folder)
    assert run(folder) == {"b3.parquet": "learned"}
    (kept,) = Path("model/quarantine").glob("*/*")
    assert kept.name == "b2.parquet"
    assert kept.read_bytes() == Path("landing/b2.parquet").read_bytes()
    Path("landing/b2.parquet").unlink()
    again = updating.update_config("config.yaml", folder, retry="b2.parquet")
    assert [line["status"] for line in again["batches"]] == ["quarantined"]
    assert kept.is_file()


@pytest.mark.parametrize("part", [0.4, 0.9])
def test_a_full_disk_is_said_and_leaves_nothing(
    folder: list[str], monkeypatch: pytest.MonkeyPatch, part: float
) -> None:
    calm = aside("calm")
    budget = 10**9

    def sync(_: int) -> None:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", sync)
    here = Path.cwd()
    monkeypatch.chdir(calm)
    run(folder)
    end, n_syncs = view(Path("model")), 10**9 - budget
    monkeypatch.chdir(here)
    budget = 10**9
    begun = updating.begin("config.yaml", folder)
    budget = round(part * n_syncs)
    with pytest.raises((StorageError, OSError), match="No space left on device"):
        updating.carry_out(begun)
    assert inbox() == []
    budget = 10**9
    assert fsck("model") == ()
    assert gc("model", older_than=-1) == 0
    if folder:
        assert fsck("dataset") == ()
        assert gc("dataset", older_than=-1) == 0
    run(folder)
    assert view(Path("model")) == end
    assert inbox() == []


@pytest.mark.parametrize("error", [StorageError, CorruptError])
@pytest.mark.parametrize("folder", [True], ids=["with"], indirect=True)
def test_a_dataset_that_cannot_take_it_is_no_fault_of_a_batch(
    folder: list[str], error: type[GenstreamError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error("dataset/segments/1: no good")

    monkeypatch.setattr("genstream.store.ingest", refuse)
    with pytest.raises(error, match="no good"):
        run(folder)
    assert not Path("model/quarantine").exists()
    assert inbox() == []
