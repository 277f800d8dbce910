"""Writers that are at a model at once: each batch is learned once, from the champion that is."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from genstream import manifests, models
from genstream.errors import ConflictError, StorageError
from genstream.learn import FitState
from genstream.manifests import LocalStorage
from genstream.models import Event, ModelStore, MovedError
from genstream.online import OnlineEM
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.start import seed_params
from genstream.store import fsck, gc
from genstream.stories import mixture
from genstream.threads import one_blas_thread
from genstream.updates import Learned, Options, RowsDelivery, caller_id, learn_batch, update

REAL = Schema.real(2)
OPTIONS = Options(learner=OnlineEM(batch_rows=64), holdout=0.25, max_drop=None)


def rows(seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows.of(rng.standard_normal((100, 2)) + 3.0 * rng.integers(0, 2, 100)[:, None])


def batch(seed: int) -> RowsDelivery:
    return RowsDelivery(rows(seed), caller_id(str(seed)), f"batch {seed}")


def fit(seed: int = 0) -> tuple[Any, FitState]:
    story = mixture(REAL, 2, covariance="diag").anchored(rows(seed))
    params = seed_params(story, rows(seed), np.random.default_rng(seed))
    return story, FitState(params, sample=rows(seed))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ModelStore(tmp_path / "model").publish(*fit(), {"run": "first"})
    return tmp_path / "model"


def copy(model: Path, name: str) -> Path:
    return Path(shutil.copytree(model, model.with_name(name)))


def view(model: Path) -> Any:
    """All that two models with the same history have the same."""
    there = ModelStore(model).snapshot()
    _, state = there.load()
    digests = [
        part.digest() for part in (state.params, state.stats, state.memory) if part is not None
    ]
    held = [(key, rows.filled().tobytes()) for key, rows in there.held()]
    batches = {k: (e.name, e.status, e.digest, e.scores) for k, e in there.batches.items()}
    return digests, state.step, held, batches


def learned_counts(model: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in ModelStore(model).snapshot().events:
        if event.status == "learned":
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


@dataclass(frozen=True, eq=False)
class Disturbed(RowsDelivery):
    """A batch while which is read for the first time something else happens."""

    meanwhile: Callable[[], object] = lambda: None
    happened: list[bool] = field(default_factory=list)

    def read(self, known: Schema) -> Iterator[tuple[Rows, Schema]]:
        if not self.happened:
            self.happened.append(True)
            self.meanwhile()
        yield from super().read(known)


def disturbed(seed: int, meanwhile: Callable[[], object]) -> Disturbed:
    return Disturbed(rows(seed), caller_id(str(seed)), f"batch {seed}", meanwhile=meanwhile)


def learn(model: Path, delivery: RowsDelivery) -> Learned:
    return learn_batch(ModelStore(model), delivery, OPTIONS)


def test_a_lost_race_is_derived_anew_from_the_new_champion(model: Path) -> None:
    alone = copy(model, "alone")
    done = learn(model, disturbed(1, lambda: learn(model, batch(2))))
    assert done.fresh
    assert done.event.version == 3
    update(alone, [batch(2), batch(1)], OPTIONS)
    assert view(model) == view(alone)
    # The state that lost is gone at once.
    assert gc(model, older_than=-1) == 0
    assert fsck(model) == ()


def test_a_batch_that_another_process_learned_meanwhile_is_not_learned_again(model: Path) -> None:
    alone = copy(model, "alone")
    done = learn(model, disturbed(1, lambda: learn(model, batch(1))))
    assert not done.fresh
    assert done.event.status == "learned"
    learn(alone, batch(1))
    assert view(model) == view(alone)
    assert learned_counts(model) == {"batch 1": 1}


def test_a_rollback_during_an_update_takes_hold(model: Path) -> None:
    alone = copy(model, "alone")
    learn(model, batch(1))
    done = learn(model, disturbed(2, lambda: ModelStore(model).rollback()))
    assert done.event.status == "learned"
    statuses = {e.name: e.status for e in ModelStore(model).snapshot().batches.values()}
    assert statuses == {"batch 1": "rolled_back", "batch 2": "learned"}
    learn(alone, batch(2))
    assert view(model)[:2] == view(alone)[:2]


def test_rows_are_duplicates_only_of_what_the_champion_has(model: Path) -> None:
    learn(model, batch(1))
    again = rows(1)[np.random.default_rng(0).permutation(100)]

    def twin(meanwhile: Callable[[], object] = lambda: None) -> Disturbed:
        return Disturbed(again, caller_id("twin"), "twin", meanwhile=meanwhile)

    calm = copy(model, "calm")
    assert learn(calm, twin()).event.status == "duplicate"
    assert learn(model, twin(lambda: ModelStore(model).rollback())).event.status == "learned"


def test_a_verdict_holds_only_for_the_champion_that_was_asked(model: Path) -> None:
    store = ModelStore(model)
    base = store.snapshot()
    learn(model, batch(1))
    with pytest.raises(MovedError):
        store.commit(base, Event("x", "x", "rejected", digest="of its rows"))
    # What could not be read was compared with nothing.
    store.commit(base, Event("y", "y", "quarantined"))
    statuses = {e.name: e.status for e in store.snapshot().batches.values()}
    assert statuses == {"batch 1": "learned", "y": "quarantined"}


def test_a_fit_that_is_published_during_an_update_has_what_it_lacks_learned_again(
    model: Path,
) -> None:
    update(model, [batch(1), batch(2)], OPTIONS)
    fitted = Event(caller_id("1"), "batch 1", "learned", n_rows=100)

    def publish(where: Path) -> None:
        ModelStore(where).publish(*fit(7), {"run": "second"}, batches=[fitted])

    done = learn(model, disturbed(3, lambda: publish(model)))
    assert done.event.version == 5
    statuses = {e.name: e.status for e in ModelStore(model).snapshot().batches.values()}
    assert statuses == {"batch 1": "learned", "batch 2": "pending", "batch 3": "learned"}
    found = update(model, [batch(1), batch(2), batch(3)], OPTIONS)
    assert [one.fresh for one in found] == [False, True, False]
    alone = model.with_name("alone")
    ModelStore(alone).publish(*fit(7), {"run": "second"}, batches=[fitted])
    update(alone, [batch(3), batch(2)], OPTIONS)
    assert view(model)[:3] == view(alone)[:3]


def test_threads_that_update_at_once_learn_each_batch_once(model: Path) -> None:
    fitted = copy(model, "fitted")
    together = threading.Barrier(3)
    failed: list[BaseException] = []

    def work(order: list[int]) -> None:
        try:
            together.wait(10)
            update(model, [batch(i) for i in order], OPTIONS)
        except BaseException as error:
            failed.append(error)

    orders = ([1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 3, 4])
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert learned_counts(model) == {f"batch {i}": 1 for i in (1, 2, 3, 4)}
    there = ModelStore(model).snapshot()
    update(fitted, [batch(int(event.name[6:])) for event in there.events], OPTIONS)
    assert view(model) == view(fitted)
    assert fsck(model) == ()


def test_a_commit_whose_reply_is_lost_keeps_its_pieces(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = False

    class Deaf(LocalStorage):
        """Storage that commits, says that it failed, and cannot be asked about it at once."""

        def write_if_absent(self, key: str, data: bytes) -> bool:
            nonlocal deaf
            LocalStorage.write_if_absent(self, key, data)
            deaf = True
            raise StorageError(f"{key}: no answer")

        def read(self, key: str) -> bytes:
            nonlocal deaf
            if deaf:
                deaf = False
                raise StorageError(f"{key}: no answer")
            return LocalStorage.read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(models, "LocalStorage", Deaf)
        with pytest.raises(StorageError, match="no answer"):
            learn(model, batch(1))
    assert fsck(model) == ()
    assert not learn(model, batch(1)).fresh
    assert learned_counts(model) == {"batch 1": 1}
    ModelStore(model).load()


def test_a_writer_that_always_loses_gives_up_before_long(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(manifests.time, "sleep", pauses.append)
    monkeypatch.setattr(LocalStorage, "write_if_absent", lambda *_: False)
    with pytest.raises(ConflictError, match="run this again"):
        learn(model, batch(1))
    assert len(pauses) > models.COMMIT_RETRIES
    assert max(pauses) <= manifests.MAX_PAUSE
    assert fsck(model) == ()
    assert gc(model, older_than=-1) == 0


def test_the_limit_on_blas_threads_holds_until_the_last_thread_leaves() -> None:
    def numbers() -> set[int]:
        return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        before = numbers()
        if before != {2}:
            pytest.skip("the BLAS of this machine cannot be given two threads")
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert numbers() == {1}
        second.__exit__(None, None, None)
        assert numbers() == before
