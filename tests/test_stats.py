"""The laws of the monoid, on statistics of every story made by random merges."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genstream.errors import CorruptError
from genstream.rows import Rows
from genstream.stats import Monoid, Record, axes, record
from genstream.story import Story, StoryStats

K = 3
STORY = {kind: oracles.make_story(kind, K) for kind in (*oracles.STORIES, "blocks")}
PARAMS = {
    kind: oracles.random_params(story, np.random.default_rng(1)) for kind, story in STORY.items()
}


def statistics(story: Story, params: Any, seed: int) -> StoryStats:
    rng = np.random.default_rng(seed)
    values = story.draw(params, int(rng.integers(1, 30)), rng).values
    gapped = oracles.with_gaps(values, float(rng.choice([0.0, 0.5])), rng)
    weights = rng.uniform(0, 5, len(values)) if rng.random() < 0.5 else None
    return story.e_step(params, Rows.of(gapped, weights))


seeds = st.integers(0, 2**32 - 1)
factors = st.one_of(
    st.floats(0, 8),
    st.lists(st.floats(0, 8), min_size=K, max_size=K).map(np.array),
)
laws = pytest.mark.parametrize("kind", (*oracles.STORIES, "blocks"))
few = settings(max_examples=20, deadline=None)


@laws
class TestLaws:
    @few
    @given(seeds, seeds)
    def test_merge_commutes_to_the_bit(self, kind: str, a: int, b: int) -> None:
        one, two = (statistics(STORY[kind], PARAMS[kind], s) for s in (a, b))
        assert oracles.identical(one.merge(two), two.merge(one))

    @few
    @given(seeds, seeds, seeds)
    def test_merge_associates(self, kind: str, a: int, b: int, c: int) -> None:
        x, y, z = (statistics(STORY[kind], PARAMS[kind], s) for s in (a, b, c))
        assert oracles.distance(x.merge(y).merge(z), x.merge(y.merge(z))) < 1e-13

    @few
    @given(seeds)
    def test_zero_is_neutral_to_the_bit(self, kind: str, a: int) -> None:
        x = statistics(STORY[kind], PARAMS[kind], a)
        assert oracles.identical(x.merge(x.zero()), x)
        assert oracles.identical(x.zero().merge(x), x)
        assert all(not np.any(value) for _, _, value in x.zero().leaves())

    @few
    @given(seeds, seeds, factors)
    def test_scale_distributes(self, kind: str, a: int, b: int, by: Any) -> None:
        x, y = (statistics(STORY[kind], PARAMS[kind], s) for s in (a, b))
        assert oracles.distance(x.merge(y).scale(by), x.scale(by).merge(y.scale(by))) < 1e-12

    @few
    @given(seeds, st.floats(0.1, 8), st.floats(0.1, 8))
    def test_scale_composes(self, kind: str, a: int, by: float, then: float) -> None:
        x = statistics(STORY[kind], PARAMS[kind], a)
        assert oracles.distance(x.scale(by).scale(then), x.scale(by * then)) < 1e-13
        assert oracles.identical(x.scale(1.0), x)

    @few
    @given(seeds)
    def test_scaling_leaves_counts_of_rows(self, kind: str, a: int) -> None:
        x = statistics(STORY[kind], PARAMS[kind], a)
        half = x.scale(0.5)
        assert (half.n_rows, half.n_unobserved) == (x.n_rows, x.n_unobserved)
        assert half.weight == pytest.approx(x.weight / 2)
        assert half.objective == pytest.approx(x.objective / 2)

    def test_scaling_by_component_touches_its_own_entries(self, kind: str) -> None:
        x = statistics(STORY[kind], PARAMS[kind], 7)
        by = np.array([0.0, 1.0, 2.0])
        for (_, names, a), (_, _, b) in zip(x.leaves(), x.scale(by).leaves(), strict=True):
            if names[:1] == ("component",):
                for k in range(K):
                    np.testing.assert_array_equal(b[k], a[k] * by[k])

    def test_merging_leaves_both_as_they_were(self, kind: str) -> None:
        x, y = (statistics(STORY[kind], PARAMS[kind], s) for s in (3, 4))
        before = [np.array(value) for _, _, value in x.leaves()]
        x.merge(y)
        x.scale(2.0)
        for (_, _, value), old in zip(x.leaves(), before, strict=True):
            np.testing.assert_array_equal(value, old)

    @few
    @given(seeds)
    def test_dataset_round_trip_is_exact(self, kind: str, a: int) -> None:
        x = statistics(STORY[kind], PARAMS[kind], a)
        back = STORY[kind].stats_from(x.to_dataset())
        assert oracles.identical(back, x)
        for field in fields(x):
            assert type(getattr(back, field.name)) is type(getattr(x, field.name))


@dataclass(frozen=True, eq=False)
class Inner(Monoid):
    total: np.ndarray = axes("component", "feature")


@dataclass(frozen=True, eq=False)
class Outer(Monoid):
    n: int
    share: float
    spread: np.ndarray = axes("feature", "feature_other")
    inner: Inner | None = record(Inner)


class TestRecord:
    full = Outer(3, 0.1, np.eye(2), Inner(np.arange(6.0).reshape(3, 2)))

    def test_leaves_are_named_by_their_path(self) -> None:
        assert [(name, names) for name, names, _ in self.full.leaves()] == [
            ("n", ()),
            ("share", ()),
            ("spread", ("feature", "feature_other")),
            ("inner.total", ("component", "feature")),
        ]

    def test_labels_become_coordinates_of_both_of_a_pair(self) -> None:
        dataset = self.full.to_dataset({"feature": ["u", "v"]})
        assert list(dataset["feature"].values) == ["u", "v"]
        assert list(dataset["feature_other"].values) == ["u", "v"]
        assert "component" not in dataset.coords
        assert float(dataset["spread"].sel(feature="u", feature_other="u")) == 1.0

    def test_a_record_that_is_not_there_stays_none(self) -> None:
        empty = Outer(1, 2.0, np.zeros((2, 2)))
        back = Outer.from_dataset(empty.to_dataset())
        assert back.inner is None
        assert empty.merge(empty).inner is None
        assert empty.scale(2.0).inner is None

    def test_a_missing_variable_is_named(self) -> None:
        dataset = self.full.to_dataset().drop_vars("inner.total")
        dataset["inner.other"] = 1.0
        with pytest.raises(CorruptError, match=r"inner\.total.*Inner"):
            Outer.from_dataset(dataset)

    def test_arrays_shared_by_components_scale_by_the_mean(self) -> None:
        scaled = self.full.scale(np.array([1.0, 2.0, 6.0]))
        np.testing.assert_array_equal(scaled.spread, 3 * np.eye(2))
        assert scaled.share == pytest.approx(0.3)
        assert scaled.n == 3

    def test_records_are_frozen(self) -> None:
        with pytest.raises(AttributeError):
            self.full.n = 4  # type: ignore[misc]

    def test_a_plain_record_has_no_merge(self) -> None:
        assert not hasattr(Record, "merge")
