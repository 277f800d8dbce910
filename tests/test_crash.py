"""Storage that dies between any two operations: afterwards all is old, or all is new."""

from __future__ import annotations

import errno
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genstream import models, store
from genstream.learn import FitState
from genstream.manifests import LocalStorage
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stories import mixture
from genstream.story import Story

pytestmark = pytest.mark.crash
REAL = Schema.real(2)
Action = Callable[[Path], object]


class Died(BaseException):
    """The process was killed."""


class Mortal(LocalStorage):
    """Local storage that fails before or after its n-th operation, and from then on or just then.

    Staying dead stands for a killed process; failing once for an interrupt, after which the process
    tidies up.
    """

    budget = 10**9
    done = 0
    late = False
    once = False

    def _operate(self, operation: Callable[[], Any]) -> Any:
        cls = type(self)
        if cls.once and cls.done > cls.budget:
            return operation()
        if cls.done >= cls.budget + (1 if cls.late else 0):
            raise Died
        cls.done += 1
        if cls.done > cls.budget and not cls.late:
            raise Died
        try:
            return operation()
        finally:
            if cls.done > cls.budget:
                raise Died

    def write_all(self, files: Mapping[str, bytes]) -> None:
        for key, data in files.items():
            self._operate(functools.partial(LocalStorage.write_all, self, {key: data}))

    def write_if_absent(self, key: str, data: bytes) -> bool:
        return bool(self._operate(lambda: LocalStorage.write_if_absent(self, key, data)))

    def hint(self, key: str, data: bytes) -> None:
        self._operate(lambda: LocalStorage.hint(self, key, data))

    def read(self, key: str) -> bytes:
        return bytes(self._operate(lambda: LocalStorage.read(self, key)))

    def list(self, prefix: str) -> Iterator[tuple[str, float]]:
        found: Iterator[tuple[str, float]] = self._operate(
            lambda: iter(list(LocalStorage.list(self, prefix)))
        )
        return found

    def delete(self, key: str) -> None:
        self._operate(lambda: LocalStorage.delete(self, key))


def rows(seed: int) -> Rows:
    return Rows.of(np.random.default_rng(seed).standard_normal((250, 2)))


def add(seed: int) -> Action:
    def act(path: Path) -> object:
        return store.append_batch(path, f"part-{seed}", [rows(seed)], lambda: REAL)

    return act


def dataset_view(path: Path) -> Any:
    try:
        dataset = store.Dataset.open(path)
    except store.StorageError:
        return None
    source = dataset.source()
    whole = [source.read(i).values for i in range(len(source.chunk_rows))]
    return [b.name for b in dataset.batches], np.concatenate(whole).tobytes()


def model() -> tuple[Story, FitState]:
    story = mixture(REAL, 2, covariance="diag").anchored(rows(0))
    return story, FitState(story.vague())


def checkpoint(step: int) -> Action:
    def act(path: Path) -> object:
        story, state = model()
        state = FitState(state.params, step=step)
        return store.save_checkpoint(path, story, state, keep=2)

    return act


def checkpoint_view(path: Path) -> Any:
    found = store.load_checkpoint(path)
    return None if found is None else (found[1].step, found[1].params.digest())


def publish(run: str) -> Action:
    return lambda path: models.ModelStore(path).publish(*model(), {"run": run})


def learn(batch: str) -> Action:
    def action(path: Path) -> object:
        shelf = models.ModelStore(path)
        base = shelf.snapshot()
        if batch in base.batches:
            return None
        event = models.Event(batch, f"{batch}.csv", "learned", n_rows=3)
        held = Rows.of(np.full((3, 2), float(len(base.batches))))
        return shelf.commit(base, event, model=model(), held=held, reference={"of": batch})

    return action


def rollback(path: Path) -> object:
    return models.ModelStore(path).rollback(1)


def model_view(path: Path) -> Any:
    try:
        shelf = models.ModelStore(path)
        champion = shelf.champion
    except store.StorageError:
        return None
    # What a process has in memory says nothing of the disk.
    models._known_state.cache_clear()
    _, state = shelf.load()
    runs = [v.record.get("run") for v in shelf.versions()]
    there = shelf.snapshot()
    batches = {key: (event.status, event.version) for key, event in there.batches.items()}
    held = [(key, rows.values.tolist()) for key, rows in there.held()]
    return champion, runs, batches, held, there.reference(), state.params.digest()


CASES: dict[str, tuple[list[Action], Action, Callable[[Path], Any]]] = {
    "first batch": ([], add(1), dataset_view),
    "third batch": ([add(1), add(2)], add(3), dataset_view),
    "a duplicate": ([add(1), add(2)], add(1), dataset_view),
    "first checkpoint": ([], checkpoint(1), checkpoint_view),
    "fourth checkpoint": (
        [checkpoint(1), checkpoint(2), checkpoint(3)],
        checkpoint(4),
        checkpoint_view,
    ),
    "first version": ([], publish("a"), model_view),
    "second version": ([publish("a")], publish("b"), model_view),
    "first learned batch": ([publish("a")], learn("x"), model_view),
    "second learned batch": ([publish("a"), learn("x")], learn("y"), model_view),
    "rollback": ([publish("a"), publish("b")], rollback, model_view),
}


@pytest.mark.parametrize("once", [False, True], ids=["killed", "interrupted"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("case", CASES)
def test_death_at_any_operation_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, late: bool, once: bool
) -> None:
    monkeypatch.setattr("genstream.segments.CHUNK_NBYTES", 100 * 2 * 8)
    # What is durable is not asked here, only the order of operations: syncing would take minutes.
    monkeypatch.setattr("os.fsync", lambda _: None)
    history, action, view = CASES[case]

    def prepared(name: str) -> Path:
        path = tmp_path / name
        for one in history:
            one(path)
        return path

    calm = prepared("calm")
    old = view(calm)
    for place in (store, models):
        monkeypatch.setattr(place, "LocalStorage", Mortal)
    monkeypatch.setattr(Mortal, "budget", 10**9)
    monkeypatch.setattr(Mortal, "done", 0)
    action(calm)
    n_operations = Mortal.done
    for place in (store, models):
        monkeypatch.setattr(place, "LocalStorage", LocalStorage)
    new = view(calm)
    assert n_operations > 3
    seen = set()
    for n in range(n_operations):
        path = prepared(str(n))
        for place in (store, models):
            monkeypatch.setattr(place, "LocalStorage", Mortal)
        monkeypatch.setattr(Mortal, "budget", n)
        monkeypatch.setattr(Mortal, "done", 0)
        monkeypatch.setattr(Mortal, "late", late)
        monkeypatch.setattr(Mortal, "once", once)
        with pytest.raises(Died):
            action(path)
        for place in (store, models):
            monkeypatch.setattr(place, "LocalStorage", LocalStorage)
        left = view(path)
        assert left in (old, new)
        seen.add(repr(left))
        action(path)
        assert view(path) == new
    if old != new:
        assert repr(old) in seen


def everything(path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def message(action: Action, path: Path) -> str:
    try:
        action(path)
    except store.StorageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_said_and_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("genstream.segments.CHUNK_NBYTES", 100 * 2 * 8)
    history, action, view = CASES[case]
    budget = 10**9

    def sync(_: int) -> None:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", sync)
    for one in history:
        one(tmp_path / "calm")
    old, start = view(tmp_path / "calm"), budget
    action(tmp_path / "calm")
    new, n_syncs = view(tmp_path / "calm"), start - budget
    for n in range(n_syncs):
        path = tmp_path / str(n)
        budget = 10**9
        for one in history:
            one(path)
        before = everything(path)
        budget = n
        said = message(action, path)
        assert not said or (str(path) in said and "No space left on device" in said)
        left = view(path)
        # Only the hint and the deletion of what is old may fail without a word.
        assert said or left == new
        assert left in (old, new)
        if left == old and view is dataset_view:
            assert everything(path) == before
        budget = 10**9
        action(path)
        assert view(path) == new


WRITER = """
import sys
import numpy as np
from genstream import store
from genstream.rows import Rows
from genstream.schema import Schema

path, first = sys.argv[1], int(sys.argv[2])
for seed in range(first, first + 10**6):
    rows = Rows.of(np.random.default_rng(seed).standard_normal((250, 2)))
    store.append_batch(path, f"part-{seed}", [rows] * 3, lambda: Schema.real(2))
    print(f"part-{seed}", flush=True)
"""


def test_what_was_acknowledged_outlives_kill_9(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    acknowledged: list[str] = []
    for round_number in range(4):
        first = 1000 * round_number
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path / "d"), str(first + 500 * k)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for k in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            acknowledged.append(writer.stdout.readline().strip())
        time.sleep(rng.uniform(0.0, 0.15))
        for writer in writers:
            writer.kill()
        for writer in writers:
            assert writer.stdout is not None
            acknowledged += writer.stdout.read().split()
            writer.stdout.close()
            writer.wait()
        dataset = store.Dataset.open(tmp_path / "d")
        assert set(acknowledged) <= {batch.name for batch in dataset.batches}
        # A commit may be made just before its writer dies, and then nobody heard of it.
        assert len(dataset.batches) <= len(acknowledged) + 2 * (round_number + 1)
        assert store.fsck(tmp_path / "d") == ()
    store.gc(tmp_path / "d", older_than=-1)
    assert store.fsck(tmp_path / "d") == ()
    for batch in dataset.batches:
        assert batch.n_rows == 750
    source = dataset.source()
    for i, (_, first, n) in enumerate(source.origin(i)[0] for i in range(len(source.chunk_rows))):
        seed = int(dataset.batches[i].name.removeprefix("part-"))
        expected = np.random.default_rng(seed).standard_normal((250, 2))
        np.testing.assert_array_equal(source.read(i).values, np.tile(expected, (3, 1)))
        assert (first, n) == (0, 750)
