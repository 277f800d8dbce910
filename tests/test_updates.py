"""A model that lives: every batch once, judged before and after, and never half of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest

import genstream
from genstream.errors import ConfigError, StorageError
from genstream.learn import BatchEM, FitState, fit
from genstream.models import Event, ModelStore, MovedError
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource, row_hash
from genstream.start import warm_start
from genstream.stories import mixture
from genstream.story import Story
from genstream.updates import (
    Options,
    RowsDelivery,
    SourceDelivery,
    TableDelivery,
    caller_id,
    learn_batch,
    most_held,
    settle,
    update,
)

MIXED = Schema(
    (
        Column("delay", "real", unit="min"),
        Column("seats", "count"),
        Column("carrier", "categorical", ("AA", "UA")),
    )
)
# Batches this small move a model by chance more than the guard would let pass.
OPTIONS = Options(learner=OnlineEM(batch_rows=64, t0=8), max_drop=None)


def table(
    n: int, seed: int, carriers: tuple[str, ...] = ("AA", "UA"), shift: float = 0.0
) -> pa.Table:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, n)
    return pa.table(
        {
            "delay": rng.standard_normal(n) + 6.0 * kind + shift,
            "seats": rng.poisson(3 + 20 * kind),
            "carrier": [carriers[i] for i in rng.integers(0, len(carriers), n)],
        }
    )


def rows_of(data: pa.Table) -> np.ndarray:
    codes = {"AA": 0.0, "UA": 1.0}
    return np.column_stack(
        [
            data["delay"].to_numpy(),
            data["seats"].to_numpy().astype(float),
            np.array([codes[label] for label in data["carrier"].to_pylist()]),
        ]
    )


def published(path: Path, seed: int = 0) -> tuple[ModelStore, Story, FitState]:
    passes = Passes(NumpySource(rows_of(table(600, seed)), MIXED, chunk_rows=200), workers=1)
    story, state = warm_start(mixture(MIXED, 2), passes, n_init=1, sample_rows=600)
    state = fit(story, BatchEM(5), passes, state)
    store = ModelStore(path)
    store.publish(story, state, {"run": "first"})
    return store, story, state


def batch(name: str, n: int = 200, seed: int = 1, **how: object) -> TableDelivery:
    data = table(n, seed, **how)
    return TableDelivery(data, caller_id(name), name, columns=tuple(data.column_names))


def test_a_batch_is_learned_once_and_only_once(tmp_path: Path) -> None:
    store, _, _ = published(tmp_path)
    first = learn_batch(store, batch("a"), OPTIONS)
    assert (first.event.status, first.event.version, first.fresh) == ("learned", 2, True)
    before = store.load()[1].params.digest()
    again = learn_batch(store, batch("a"), OPTIONS)
    assert again.fresh is False
    assert again.event.to_json() == first.event.to_json()
    assert store.load()[1].params.digest() == before
    assert store.champion == 2


def test_the_version_is_that_of_online_em_on_the_rows_not_put_aside(tmp_path: Path) -> None:
    store, story, state = published(tmp_path)
    data = rows_of(table(500, 1))
    identity = caller_id("a")
    held = row_hash((int(identity[:16], 16), 0, 500), 7) < np.uint64(int(0.2 * 2.0**64))
    options = replace(OPTIONS, holdout=0.2, seed=7)
    learn_batch(store, RowsDelivery(Rows.of(data), identity, "a"), options)
    expected, _ = options.learner.learn(story, state, Rows.of(data[~held]))
    found = store.load()[1]
    assert found.params.digest() == expected.params.digest()
    assert found.stats is not None
    assert expected.stats is not None
    assert found.stats.digest() == expected.stats.digest()
    ((_, aside),) = store.snapshot().held()
    np.testing.assert_array_equal(aside.values, data[held])
    assert 60 < aside.n_rows < 140


@pytest.mark.parametrize("cuts", [[500], [1, 499], [100, 250, 150], [7] * 71 + [3]])
def test_how_a_batch_is_cut_changes_no_bit(tmp_path: Path, cuts: list[int]) -> None:
    class Cut:
        id, name, columns, extent = caller_id("a"), "a", None, None

        def read(self, known: Schema) -> Iterator[tuple[Rows, Schema]]:
            first = 0
            for n in cuts:
                yield Rows.of(data[first : first + n]), known
                first += n

    data = rows_of(table(500, 1))
    (store, _, _), (other, _, _) = published(tmp_path / "a"), published(tmp_path / "b")
    whole = learn_batch(store, RowsDelivery(Rows.of(data), caller_id("a"), "a"), OPTIONS)
    cut = learn_batch(other, Cut(), OPTIONS)
    assert store.load()[1].params.digest() == other.load()[1].params.digest()
    assert whole.event.digest == cut.event.digest
    for name, value in whole.event.scores.items():
        assert value == pytest.approx(cut.event.scores[name], rel=1e-12)


def test_the_score_of_a_batch_is_that_of_a_model_that_has_not_learned_it(tmp_path: Path) -> None:
    store, story, state = published(tmp_path)
    data = rows_of(table(300, 1))
    done = learn_batch(store, RowsDelivery(Rows.of(data), caller_id("a"), "a"), OPTIONS)
    expected = story.log_prob(state.params, Rows.of(data)).mean()
    assert done.event.scores["prequential"] == pytest.approx(expected, rel=1e-12)
    assert done.drift is not None
    assert not done.drift.outside


def test_columns_are_found_by_name_and_levels_by_label(tmp_path: Path) -> None:
    data = table(300, 1)
    turned = data.select(["carrier", "seats", "delay"])
    (store, _, _), (other, _, _) = published(tmp_path / "a"), published(tmp_path / "b")
    learn_batch(store, TableDelivery(data, caller_id("a"), "a"), OPTIONS)
    learn_batch(other, TableDelivery(turned, caller_id("a"), "a"), OPTIONS)
    expected = store.load()[1].params.digest()
    assert other.load()[1].params.digest() == expected
    schema = Schema(
        (Column("carrier", "categorical", ("UA", "AA")), MIXED["seats"], MIXED["delay"])
    )
    values = rows_of(data)[:, [2, 1, 0]]
    values[:, 0] = 1 - values[:, 0]
    store, _, _ = published(tmp_path / "c")
    source = NumpySource(values, schema, chunk_rows=77)
    learn_batch(store, SourceDelivery(source, caller_id("a"), "a"), OPTIONS)
    assert store.load()[1].params.digest() == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.drop_columns(["seats"]), "lacks 'seats'"),
        (lambda t: t.append_column("gate", t["seats"]), "has 'gate' besides"),
        (
            lambda t: t.rename_columns(["lateness", "seats", "carrier"]),
            "lacks 'delay' and has 'lateness' besides, unlike the files before: was a column",
        ),
        (
            lambda t: t.set_column(0, "delay", pa.array(["late"] * t.num_rows)),
            "row 0, column 'delay': 'late' is not a number",
        ),
        (
            lambda t: t.set_column(1, "seats", pa.array([-1.0] * t.num_rows)),
            "row 0, column 'seats': -1 is not possible in a count column",
        ),
        (lambda t: t.slice(0, 0), "has no rows"),
    ],
)
def test_what_cannot_be_read_goes_to_quarantine(tmp_path: Path, change: object, said: str) -> None:
    store, _, _ = published(tmp_path)
    learn_batch(store, batch("good"), OPTIONS)
    before = store.load()[1].params.digest()
    data = change(table(50, 2))
    bad = TableDelivery(data, caller_id("bad"), "bad", columns=tuple(data.column_names))
    done = learn_batch(store, bad, OPTIONS)
    assert done.event.status == "quarantined"
    assert done.event.reason.startswith("bad: ")
    assert said in done.event.reason
    assert store.load()[1].params.digest() == before
    assert store.champion == 2
    assert learn_batch(store, bad, OPTIONS).fresh is False
    assert learn_batch(store, batch("next", seed=5), OPTIONS).event.status == "learned"


def test_the_guard_keeps_the_old_model_and_says_why(tmp_path: Path) -> None:
    store, _, _ = published(tmp_path)
    for seed in (1, 2, 3):
        learn_batch(store, batch(f"day{seed}", seed=seed), OPTIONS)
    before = store.load()[1].params.digest()
    harmful = replace(OPTIONS, learner=OnlineEM(batch_rows=64, forgetting=0.9), max_drop=0.05)
    # All of one kind: learned in haste, the model forgets the other one.
    data = table(600, 9)
    one_sided = data.filter(pa.compute.less(data["delay"], 3.0))
    odd = TableDelivery(one_sided, caller_id("odd"), "odd")
    done = learn_batch(store, odd, harmful)
    assert done.event.status == "rejected"
    assert "and max_drop is 0.05" in done.event.reason
    scores = done.event.scores
    assert scores["candidate"] < scores["champion"] - 0.05
    assert store.load()[1].params.digest() == before
    assert learn_batch(store, odd, OPTIONS).fresh is False
    lenient = replace(harmful, max_drop=None)
    tried = learn_batch(store, odd, lenient, retry=True)
    assert tried.event.status == "learned"
    assert store.load()[1].params.digest() != before
    assert learn_batch(store, odd, lenient, retry=True).fresh is False


def test_rows_put_aside_of_the_last_batches_are_the_judges(tmp_path: Path) -> None:
    store, story, _ = published(tmp_path)
    options = replace(OPTIONS, window=3)
    for seed in range(1, 6):
        base = store.snapshot()
        champion = base.load()[1].params
        done = learn_batch(store, batch(f"day{seed}", seed=seed), options)
        aside = [rows for _, rows in store.snapshot().held()]
        assert len(aside) == min(seed, 3)
        judged = Rows.concatenate(aside)
        scores = done.event.scores
        assert scores["held_rows"] == judged.n_rows
        assert scores["champion"] == pytest.approx(story.log_prob(champion, judged).mean())
        now = store.load()[1].params
        assert scores["candidate"] == pytest.approx(story.log_prob(now, judged).mean())


@pytest.mark.parametrize(
    ("policy", "status", "champion"),
    [("skip", "duplicate", 2), ("error", "quarantined", 2), ("learn", "learned", 3)],
)
def test_the_same_rows_in_other_bytes(
    tmp_path: Path, policy: str, status: str, champion: int
) -> None:
    store, _, _ = published(tmp_path)
    data = table(200, 1)
    learn_batch(store, TableDelivery(data, caller_id("a"), "a"), OPTIONS)
    mixed = data.take(np.random.default_rng(0).permutation(200))
    options = replace(OPTIONS, duplicates=policy)
    done = learn_batch(store, TableDelivery(mixed, caller_id("b"), "b"), options)
    assert done.event.status == status
    assert store.champion == champion
    if status != "learned":
        assert "the same rows as a" in done.event.reason


def test_new_levels_are_gaps_or_refused_or_learned(tmp_path: Path) -> None:
    data = table(300, 1, carriers=("AA", "ZZ", "UA", "BB"))
    told = {}
    for policy in ("missing", "reject", "add"):
        store, _, _ = published(tmp_path / policy)
        done = learn_batch(
            store, TableDelivery(data, caller_id("a"), "a"), replace(OPTIONS, new_levels=policy)
        )
        story, state = store.load()
        told[policy] = (done.event.status, story.schema["carrier"].levels)
        assert "unseen levels BB, ZZ" in " ".join((*done.event.flags, done.event.reason))
        if policy == "add":
            log_p = story.log_prob(
                state.params, Rows.of([[np.nan, np.nan, float(k)] for k in range(4)])
            )
            shares = np.exp(log_p)
            assert shares.sum() == pytest.approx(1.0)
            assert shares.min() > 0.001
    assert told["missing"] == ("learned", ("AA", "UA"))
    assert told["reject"] == ("quarantined", ("AA", "UA"))
    assert told["add"] == ("learned", ("AA", "UA", "BB", "ZZ"))


def test_added_levels_stay_where_they_are(tmp_path: Path) -> None:
    store, _, _ = published(tmp_path)
    options = replace(OPTIONS, new_levels="add")
    learn_batch(store, batch("a", seed=1, carriers=("UA", "ZZ")), options)
    learn_batch(store, batch("b", seed=2, carriers=("BB", "ZZ", "AA")), options)
    story, state = store.load()
    assert story.schema["carrier"].levels == ("AA", "UA", "ZZ", "BB")
    for _, rows in store.snapshot().held():
        rows.check(story.schema)
    assert np.isfinite(story.log_prob(state.params, Rows.of([[0.0, 3.0, 3.0]]))).all()


def test_rollback_takes_batches_out_and_retry_brings_them_back(tmp_path: Path) -> None:
    store, _, _ = published(tmp_path)
    for seed in (1, 2, 3):
        learn_batch(store, batch(f"day{seed}", seed=seed), OPTIONS)
    third = store.load()[1].params.digest()
    assert store.rollback(3) == 3
    statuses = {e.name: e.status for e in store.snapshot().batches.values()}
    assert statuses == {"day1": "learned", "day2": "learned", "day3": "rolled_back"}
    assert [i for i, _ in store.snapshot().held()] == [caller_id("day1"), caller_id("day2")]
    assert learn_batch(store, batch("day3", seed=3), OPTIONS).fresh is False
    again = learn_batch(store, batch("day3", seed=3), OPTIONS, retry=True)
    assert (again.event.status, again.event.version) == ("learned", 5)
    assert store.load()[1].params.digest() == third
    # Forward again: the version that had learned it first has it.
    assert store.rollback(4) == 4
    assert all(e.status == "learned" for e in store.snapshot().batches.values())
    assert store.rollback(1) == 1
    assert all(e.status == "rolled_back" for e in store.snapshot().batches.values())


def test_a_fit_without_a_batch_makes_it_pending(tmp_path: Path) -> None:
    store, story, state = published(tmp_path)
    learn_batch(store, batch("day1", seed=1), OPTIONS)
    learn_batch(store, batch("day2", seed=2), OPTIONS)
    fitted = [Event(caller_id("day1"), "day1", "learned", n_rows=200)]
    store.publish(story, state, {"run": "second"}, batches=fitted)
    statuses = {e.name: e.status for e in store.snapshot().batches.values()}
    assert statuses == {"day1": "learned", "day2": "pending"}
    assert learn_batch(store, batch("day1", seed=1), OPTIONS).fresh is False
    assert learn_batch(store, batch("day2", seed=2), OPTIONS).event.status == "learned"


def test_a_commit_on_a_model_that_moved_is_refused(tmp_path: Path) -> None:
    store, story, state = published(tmp_path)
    base = store.snapshot()
    learn_batch(store, batch("a"), OPTIONS)
    event = Event(caller_id("b"), "b", "learned")
    with pytest.raises(MovedError):
        store.commit(base, event, model=(story, state))
    with pytest.raises(MovedError):
        store.commit(base, Event(caller_id("a"), "a", "quarantined"))
    # What does not depend on the champion goes through.
    there = store.commit(base, Event(caller_id("c"), "c", "quarantined"))
    assert [e.name for e in there.batches.values()] == ["a", "c"]
    assert there.champion == 2
    assert not list((tmp_path / "held").glob("*.tmp"))


def test_the_loser_of_a_race_learns_from_the_new_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store, _, _), (calm, _, _) = published(tmp_path / "a"), published(tmp_path / "b")
    commit, raced = ModelStore.commit, []

    def overtaken(self: ModelStore, *args: object, **parts: object) -> object:
        if not raced:
            raced.append(1)
            learn_batch(self, batch("faster", seed=1), OPTIONS)
        return commit(self, *args, **parts)

    monkeypatch.setattr(ModelStore, "commit", overtaken)
    learn_batch(store, batch("slower", seed=2), OPTIONS)
    monkeypatch.setattr(ModelStore, "commit", commit)
    learn_batch(calm, batch("faster", seed=1), OPTIONS)
    learn_batch(calm, batch("slower", seed=2), OPTIONS)
    assert store.load()[1].params.digest() == calm.load()[1].params.digest()
    assert [e.name for e in store.snapshot().events] == ["faster", "slower"]


def test_a_long_ledger_moves_to_pages_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genstream.manifests.PAGE", 3)
    store, _, _ = published(tmp_path)
    for n in range(14):
        settle(store, Event(caller_id(str(n)), str(n), "quarantined", reason="because"))
    content = store.snapshot().content
    assert len(content["pages"]) == 3
    assert len(content["batches"]) == 5
    assert [e.name for e in store.snapshot().events] == [str(n) for n in range(14)]


def test_old_manifests_go_when_they_are_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genstream.models.MANIFESTS", 4)
    store, _, _ = published(tmp_path)
    for n in range(14):
        settle(store, Event(caller_id(str(n)), str(n), "quarantined"))
    learn_batch(store, batch("young"), OPTIONS)
    there = len(list((tmp_path / "manifests").glob("*.json")))
    monkeypatch.setattr("genstream.models.GRACE", -60.0)
    for n in range(14, 29):
        settle(store, Event(caller_id(str(n)), str(n), "quarantined"))
    learn_batch(store, batch("last", seed=3), OPTIONS)
    assert there == 16
    assert len(list((tmp_path / "manifests").glob("*.json"))) == 4
    assert len(store.snapshot().batches) == 31
    assert store.champion == 3


def test_any_iterator_of_batches_is_a_source(tmp_path: Path) -> None:
    store, _, _ = published(tmp_path)

    def batches() -> Iterator[object]:
        yield "monday", table(100, 1)
        yield "tuesday", rows_of(table(100, 2))
        yield "monday", table(100, 1)
        yield table(100, 3)

    done = genstream.update(tmp_path, genstream.stream(batches()), OPTIONS)
    assert [one.event.status for one in done] == ["learned"] * 4
    assert [one.fresh for one in done] == [True, True, False, True]
    assert store.champion == 4
    later = genstream.update(tmp_path, genstream.stream([("tuesday", table(100, 2))]), OPTIONS)
    assert later[0].fresh is False


def test_a_component_is_born_of_rows_of_a_new_kind_and_an_empty_one_retires(tmp_path: Path) -> None:
    store, _, _ = published(tmp_path)
    options = replace(OPTIONS, birth=True, max_drop=None)
    rng = np.random.default_rng(3)
    new = np.column_stack([40 + rng.standard_normal(200), rng.poisson(90, 200), np.zeros(200)])
    data = np.concatenate([rows_of(table(200, 1)), new])
    done = learn_batch(store, RowsDelivery(Rows.of(data), caller_id("a"), "a"), options)
    assert any("born" in flag for flag in done.event.flags)
    story, state = store.load()
    assert story.n_components == 3
    assert any("born" in event for event in state.events)
    assert np.abs(state.params.family.mean[:, 0] - 40).min() < 1.0
    # A component that nothing falls to any more is let go.
    gone = replace(OPTIONS, retire=0.3, max_drop=None)
    done = learn_batch(store, batch("b", seed=4), gone)
    assert any("component" in flag for flag in done.event.flags)
    assert store.load()[0].n_components < 3


def test_no_more_rows_are_put_aside_than_the_guard_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genstream.updates.MAX_HELD", 50)
    store, story, state = published(tmp_path)
    data = rows_of(table(2000, 1))
    identity = caller_id("a")
    learn_batch(store, RowsDelivery(Rows.of(data), identity, "a"), replace(OPTIONS, holdout=0.5))
    ((_, aside),) = store.snapshot().held()
    assert aside.n_rows == 50
    hashes = row_hash((int(identity[:16], 16), 0, 2000), OPTIONS.seed)
    kept = hashes < np.partition(hashes, 50)[50]
    np.testing.assert_array_equal(aside.values, data[kept])
    expected, _ = OPTIONS.learner.learn(story, state, Rows.of(data[~kept]))
    assert store.load()[1].params.digest() == expected.params.digest()


def test_few_wide_rows_are_put_aside() -> None:
    assert most_held(1) == 20_000
    assert most_held(784) < 2_000


def test_wrong_options_and_absent_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="window is 0"):
        Options(window=0)
    with pytest.raises(ConfigError, match="max_drop is -1"):
        Options(max_drop=-1.0)
    with pytest.raises(ConfigError, match="holdout is 1"):
        Options(holdout=1.0)
    with pytest.raises(StorageError, match="no model there"):
        update(tmp_path / "none", [batch("a")])
