"""Drift: quiet where nothing changed, loud and in words where something did."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from genstream.drift import Drift, Reference, Thresholds, Watch, table
from genstream.errors import ConfigError, CorruptError, DataError
from genstream.growth import birth
from genstream.learn import BatchEM, FitState, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import mixture
from genstream.story import Story

SCHEMA = Schema(
    (
        Column("x"),
        Column("y"),
        Column("still"),
        Column("never"),
        Column("n", "count"),
        Column("b", "binary"),
        Column("c", "categorical", ("p", "q", "r", "s")),
    )
)


def drawn(n: int, seed: int) -> np.ndarray:
    """Rows with a constant column, one never observed, and gaps in `y`."""
    rng = np.random.default_rng(seed)
    k = rng.random(n) < 0.3
    values = np.column_stack(
        [
            rng.normal(np.where(k, 30, 10), 4),
            rng.lognormal(1, 0.7, n),
            np.full(n, 7.0),
            np.full(n, np.nan),
            np.where(rng.random(n) < 0.6, 0, rng.poisson(3, n)),
            rng.random(n) < 0.2,
            rng.choice(4, n, p=[0.6, 0.3, 0.095, 0.005]),
        ]
    )
    values[rng.random(n) < 0.1, 1] = np.nan
    return values


def fitted(values: np.ndarray, schema: Schema, n_components: int) -> tuple[Story, FitState]:
    passes = Passes(NumpySource(values, schema, chunk_rows=8192), workers=1)
    story, state = warm_start(mixture(schema, n_components), passes, n_init=1, sample_rows=10_000)
    return story, fit(story, BatchEM(20), passes, state)


@pytest.fixture(scope="module")
def model() -> tuple[Story, FitState, Reference]:
    story, state = fitted(drawn(10_000, 0), SCHEMA, 3)
    assert state.sample is not None
    return story, state, Reference.of(story, state.params, state.sample)


def seen(model: tuple[Story, FitState, Reference], values: np.ndarray, **options: object) -> Drift:
    story, state, reference = model
    watch = Watch(reference, story, state.params)
    watch.add(Rows.of(values))
    drift = watch.result(**options)
    json.dumps(drift.to_json(), allow_nan=False)
    return drift


def flag(drift: Drift, column: str) -> str:
    return "".join(line for line in drift.flags if line.startswith(f"{column}: "))


def test_a_reference_counts_its_rows(model: tuple[Story, FitState, Reference]) -> None:
    story, state, reference = model
    log_p = story.log_prob(state.params, state.sample)
    assert reference.n_rows == state.sample.n_rows == 2048
    assert reference.mean_loglik == pytest.approx(log_p.mean(), rel=1e-12)
    assert reference.sd_loglik == pytest.approx(log_p.std(), rel=1e-9)
    assert np.mean(log_p < reference.quantile_01) == pytest.approx(0.01, abs=1 / 2048)
    assert np.mean(log_p < reference.quantile_001) == pytest.approx(0.001, abs=1 / 2048)
    x = reference.columns[0]
    assert x.median == pytest.approx(np.median(state.sample.values[:, 0]), rel=0.01)
    assert np.allclose(x.shares[:-1], 1 / 20, atol=2 / 2048)
    for column in reference.columns:
        assert sum(column.shares) == pytest.approx(1, rel=1e-12)
    n = reference.columns[4]
    zero = int(n.bins(np.zeros(1))[0])
    assert n.shares[zero] == np.mean(state.sample.values[:, 4] == 0)
    assert reference.columns[3].median is None
    assert reference.columns[3].missing == 1


def test_a_reference_goes_through_json_to_the_bit(
    model: tuple[Story, FitState, Reference],
) -> None:
    reference = model[2]
    text = json.dumps(reference.to_json(), allow_nan=False)
    assert Reference.from_json(json.loads(text)) == reference
    for broken in ({}, {"columns": [{}]}, {**reference.to_json(), "more": 1}):
        with pytest.raises(CorruptError, match="reference"):
            Reference.from_json(broken)
    drift = seen(model, drawn(700, 9))
    assert Drift.from_json(json.loads(json.dumps(drift.to_json()))) == drift
    with pytest.raises(CorruptError, match="drift"):
        Drift.from_json({"columns": []} | {"wrong": 1})


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=6), where=st.integers(0, 6))
def test_any_cutting_of_a_batch_gives_the_same(
    model: tuple[Story, FitState, Reference], cuts: list[int], where: int
) -> None:
    story, state, reference = model
    rng = np.random.default_rng(1)
    rows = Rows.of(drawn(500, 2), rng.integers(0, 4, 500).astype(float))
    whole = Watch(reference, story, state.params)
    whole.add(rows)
    first, second = (Watch(reference, story, state.params) for _ in range(2))
    edges = [0, *sorted(cuts), 500]
    for i, (start, stop) in enumerate(pairwise(edges)):
        (first if i < where else second).add(rows[start:stop])
    second.merge(first)
    a, b = whole.result(), second.result()
    assert (a.n_rows, a.columns, a.flags) == (b.n_rows, b.columns, b.flags)
    assert b.mean_loglik == pytest.approx(a.mean_loglik, rel=1e-12)
    assert b.standard_error == pytest.approx(a.standard_error, rel=1e-9)
    assert b.surprising == a.surprising
    assert b.band == pytest.approx(a.band, rel=1e-12)


def test_sums_are_those_of_the_rows(model: tuple[Story, FitState, Reference]) -> None:
    story, state, reference = model
    values = drawn(900, 3)
    values[:50] = np.nan
    drift = seen(model, values)
    log_p = story.log_prob(state.params, Rows.of(values[50:]))
    assert (drift.n_rows, drift.n_unobserved) == (900, 50)
    assert drift.mean_loglik == pytest.approx(log_p.mean(), rel=1e-12)
    assert drift.standard_error == pytest.approx(log_p.std() / np.sqrt(850), rel=1e-9)
    assert drift.surprising == pytest.approx(np.mean(log_p < reference.quantile_01), rel=1e-12)
    assert drift.columns[1].missing == pytest.approx(np.isnan(values[:, 1]).mean(), rel=1e-12)
    assert drift.columns[0].median == pytest.approx(np.nanmedian(values[:, 0]), rel=0.021)
    assert drift.columns[0].most == np.nanmax(values[:, 0])


def test_a_row_of_weight_two_counts_as_two(model: tuple[Story, FitState, Reference]) -> None:
    story, state, reference = model
    values = drawn(400, 4)
    watch = Watch(reference, story, state.params)
    watch.add(Rows.of(values, np.full(400, 2.0)))
    twice = watch.result()
    once = seen(model, values)
    # Only shares count, and a common factor is no evidence.
    assert [c.psi for c in twice.columns] == [c.psi for c in once.columns]
    assert twice.mean_loglik == pytest.approx(once.mean_loglik, rel=1e-12)
    padded = np.concatenate([values, drawn(100, 5)])
    watch = Watch(reference, story, state.params)
    watch.add(Rows.of(padded, np.repeat([1.0, 0.0], [400, 100])))
    weightless = watch.result()
    assert weightless.columns == once.columns
    assert weightless.mean_loglik == pytest.approx(once.mean_loglik, rel=1e-12)


@pytest.mark.parametrize("n_rows", [30, 150, 600, 4000])
def test_batches_without_drift_are_quiet(
    model: tuple[Story, FitState, Reference], n_rows: int
) -> None:
    drifts = [seen(model, drawn(n_rows, 1000 + i)) for i in range(100)]
    # One chance in a thousand a batch is granted to columns; a second false alarm in a hundred
    # batches would have a chance of a half per cent.
    assert sum(bool(d.flags) for d in drifts) <= 1
    assert sum(c.level != "none" for d in drifts for c in d.columns) <= 1
    assert not any(d.outside for d in drifts)
    psi = np.array([[c.psi for c in d.columns] for d in drifts])
    # Without the correction, 600 rows would have 0.03 on average in a column of 20 bins.
    assert psi.mean() < 3 / n_rows + 0.002
    share = np.mean([d.surprising for d in drifts])
    assert share == pytest.approx(drifts[0].expected_surprising, abs=0.006)


def shifted(column: int, change: Callable[[np.ndarray], object]) -> np.ndarray:
    values = drawn(600, 77)
    values[:, column] = change(values[:, column])
    return values


@pytest.mark.parametrize(
    "column, change, words",
    [
        (0, lambda x: x + 8, "its distribution shifted strongly"),
        (0, lambda x: x / 60, "values are about 1/[56].* of the reference's: another unit"),
        (0, lambda x: x * 1000, "times the reference's: another unit"),
        (0, lambda x: x * 1.8, "values are about 1.8 times the reference's: another unit"),
        (0, lambda x: np.where(np.arange(600) == 3, 99_999, x), "values from .* to 1e"),
        (0, lambda x: np.where(np.arange(600) < 30, 150, x), "values from .* to 150; the ref"),
        (0, lambda x: 12.5, "every value is 12.5; it varied"),
        (0, lambda x: np.nan, "every value is missing"),
        (
            1,
            lambda x: np.where(np.arange(600) < 200, np.nan, x),
            "missing in 3.* the rows; ",
        ),
        (2, lambda x: 9.0, "its distribution shifted strongly"),
        (2, lambda x: 900.0, "another unit"),
        (2, lambda x: np.arange(600) / 10, "values from 0 to 59.9; the reference has 7 to 7"),
        (3, lambda x: 1.0, "has values; it had none in the reference"),
        (4, lambda x: 0, "every value is 0; it varied"),
        (4, lambda x: x + 2, "its distribution shifted strongly"),
        (5, lambda x: 1 - x, "its distribution shifted strongly"),
        (6, lambda x: 0, "every value is 'p'; it varied"),
        (6, lambda x: 3 - x, "its distribution shifted strongly"),
        (6, lambda x: np.nan, "every value is missing"),
    ],
)
def test_a_changed_column_is_named_in_words(
    model: tuple[Story, FitState, Reference],
    column: int,
    change: Callable[[np.ndarray], object],
    words: str,
) -> None:
    drift = seen(model, shifted(column, change))
    name = SCHEMA.names[column]
    assert re.search(words, flag(drift, name)), drift.flags
    assert all(line.startswith((f"{name}: ", "the mean")) or "surprise" in line
               for line in drift.flags)  # fmt: skip
    assert max(drift.columns, key=lambda c: c.psi).name == name or column == 0


def test_small_shifts_are_measured_but_only_strong_ones_flagged(
    model: tuple[Story, FitState, Reference],
) -> None:
    values = drawn(5000, 6)
    values[:, 6] = np.where(np.arange(5000) % 10 < 2, 1, values[:, 6])
    drift = seen(model, values)
    share = np.bincount(values[:, 6].astype(int), minlength=4) / 5000
    known = np.array(model[2].columns[6].shares[:4])
    expected = ((share - known) * np.log(share / known)).sum()
    assert drift.columns[6].psi == pytest.approx(expected, rel=0.05)
    assert drift.columns[6].level == "moderate"
    assert not flag(drift, "c")


def test_the_band_comes_from_history(model: tuple[Story, FitState, Reference]) -> None:
    reference = model[2]
    values = drawn(800, 8)
    sd = reference.sd_loglik
    rng = np.random.default_rng(3)
    level = reference.mean_loglik - 5 * sd
    past = [(level + m, 800) for m in rng.normal(0, 0.1 * sd, 30)]
    alone = seen(model, values)
    assert not alone.outside
    low, high = alone.band
    assert (low + high) / 2 == pytest.approx(reference.mean_loglik)
    drift = seen(model, values, history=past)
    assert drift.outside
    assert "above" in drift.flags[0]
    low, high = drift.band
    assert (low + high) / 2 == pytest.approx(np.median([m for m, _ in past]))
    assert 0.2 * sd < (high - low) / 2 < 0.8 * sd
    # A third of nonsense does not move it far; so little history does not count.
    wild = [*past, *[(1e6, 800)] * 10, (float("nan"), 800), (0.0, 0)]
    assert seen(model, values, history=wild).band[1] < high + 0.8 * sd
    assert seen(model, values, history=past[:5]).band == alone.band


def test_equal_means_leave_what_follows_from_the_batch_size(
    model: tuple[Story, FitState, Reference],
) -> None:
    reference = model[2]
    past = [(reference.mean_loglik, 400)] * 10
    low, high = seen(model, drawn(400, 8), history=past).band
    assert (high - low) / 2 == pytest.approx(4 * reference.sd_loglik / np.sqrt(400))


def test_noise_of_small_batches_does_not_widen_the_band_of_a_large_one(
    model: tuple[Story, FitState, Reference],
) -> None:
    reference = model[2]
    noise = reference.sd_loglik / np.sqrt(20)
    past = [(reference.mean_loglik + noise * z, 20) for z in norm.ppf((np.arange(40) + 0.5) / 40)]
    low, high = seen(model, drawn(5000, 8), history=past).band
    assert (high - low) / 2 < 4 * 0.4 * noise


def test_values_newly_missing_are_not_taken_for_rare_ones(
    model: tuple[Story, FitState, Reference],
) -> None:
    values = drawn(600, 15)
    values[:30, 6] = np.nan
    # 5% of the rows against half a row of 2,048: 0.05 log(0.05 / 0.00024), less the correction.
    assert seen(model, values).columns[6].psi > 0.2


def test_a_batch_of_other_rows_surprises(model: tuple[Story, FitState, Reference]) -> None:
    values = drawn(600, 10)
    values[::4, 0] = 70
    drift = seen(model, values)
    assert drift.outside
    assert drift.surprising > 0.25
    assert any("rows surprise the model; 1.0% are expected" in line for line in drift.flags)


def test_nothing_and_extremes_stay_finite(model: tuple[Story, FitState, Reference]) -> None:
    story, state, reference = model
    empty = Watch(reference, story, state.params).result()
    assert (empty.n_rows, empty.flags, empty.outside) == (0, (), False)
    unobserved = seen(model, np.full((50, 7), np.nan))
    assert (unobserved.n_unobserved, unobserved.outside) == (50, False)
    assert flag(unobserved, "x") == "x: every value is missing"
    assert not flag(unobserved, "never")
    values = drawn(50, 11)
    values[0, 0] = 1e149
    huge = seen(model, values)
    assert huge.outside
    assert flag(huge, "x").startswith("x: values from")
    alone = Rows.of(drawn(1, 12))
    lonely = Reference.of(story, state.params, alone)
    watch = Watch(lonely, story, state.params)
    watch.add(alone)
    json.dumps(watch.result().to_json(), allow_nan=False)


def test_a_value_stays_in_its_bin_when_stored_in_float32() -> None:
    x = np.where(np.arange(4000) % 2, 0.1, np.random.default_rng(0).normal(0, 1, 4000))
    schema = Schema((Column("x"),))
    story, state = fitted(x[:, None], schema, 1)
    reference = Reference.of(story, state.params, Rows.of(x[:, None]))
    watch = Watch(reference, story, state.params)
    watch.add(Rows.of(x[:, None].astype(np.float32)))
    assert watch.result().columns[0].psi < 0.01


def test_wrong_columns_and_numbers_are_named(model: tuple[Story, FitState, Reference]) -> None:
    story, state, reference = model
    other, _ = fitted(drawn(500, 0)[:, :2], SCHEMA.select(["x", "y"]), 1)
    with pytest.raises(DataError, match=r"reference has columns x, y, still"):
        Watch(reference, other, state.params)
    values = drawn(10, 0)
    values[3, 6] = 4
    with pytest.raises(DataError, match="row 3, column 'c'"):
        Watch(reference, story, state.params).add(Rows.of(values))
    with pytest.raises(DataError, match="something observed"):
        Reference.of(story, state.params, Rows.of(np.full((3, 7), np.nan)))
    for wrong in (
        {"moderate": 0.0},
        {"strong": 0.05},
        {"chance": 1.0},
        {"z": 0.0},
        {"min_history": 1},
        {"between": -1.0},
        {"surprise": 0.05},
        {"max_surprising": 0.0},
        {"missing": 0.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Thresholds(**wrong)


def test_levels_added_since_have_a_bin(model: tuple[Story, FitState, Reference]) -> None:
    _, _, reference = model
    columns = (*SCHEMA.columns[:6], Column("c", "categorical", ("p", "q", "r", "s", "t")))
    story, state = fitted(drawn(2000, 0), Schema(columns), 2)
    watch = Watch(reference, story, state.params)
    values = drawn(600, 13)
    watch.add(Rows.of(values))
    quiet = watch.result()
    assert quiet.columns[6].level == "none"
    values[:200, 6] = 4
    watch = Watch(reference, story, state.params)
    watch.add(Rows.of(values))
    assert flag(watch.result(), "c")


def test_a_table_has_small_rows(model: tuple[Story, FitState, Reference]) -> None:
    quiet = seen(model, drawn(600, 14), name="monday")
    loud = seen(model, shifted(0, lambda x: x / 60), name="tuesday")
    first, second = table([quiet, loud])
    assert (first["name"], first["rows"], first["flags"]) == ("monday", 600, "")
    assert second["columns"].startswith("x ")
    assert len(second["columns"].split(", ")) <= 3
    assert "another unit" in second["flags"]
    json.dumps([first, second], allow_nan=False)


REAL, LABELS = ("dep_delay", "arr_delay", "air_time", "distance"), ("carrier", "origin")


@pytest.fixture(scope="module")
def flights(example_data: Callable[[str], Path]) -> tuple[Schema, np.ndarray, np.ndarray]:
    """Columns, values and (month, day) of the flights of January and February."""
    import zipfile

    with zipfile.ZipFile(example_data("flights.csv.zip")) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".csv"))
        options = pyarrow.csv.ConvertOptions(
            include_columns=["month", "day", *REAL, *LABELS],
            null_values=["", "NA"],
            strings_can_be_null=True,
        )
        with archive.open(name) as file:
            found = pyarrow.csv.read_csv(file, convert_options=options)
    dates = np.column_stack([found["month"].to_numpy(), found["day"].to_numpy()])
    columns = [Column(name) for name in REAL]
    values = [found[name].cast("float64").to_numpy() for name in REAL]
    for name in LABELS:
        levels, codes = np.unique(found[name].to_numpy().astype(str), return_inverse=True)
        columns.append(Column(name, "categorical", tuple(levels.tolist())))
        values.append(codes.astype(float))
    early = dates[:, 0] <= 2
    return Schema(tuple(columns)), np.column_stack(values)[early], dates[early]


def test_flights_by_day(flights: tuple[Schema, np.ndarray, np.ndarray]) -> None:
    schema, values, dates = flights
    story, state = fitted(values[dates[:, 0] == 1], schema, 8)
    assert state.sample is not None
    reference = Reference.of(story, state.params, state.sample)

    def day(
        month: int, number: int, change: Callable[[np.ndarray], None] = lambda x: None
    ) -> Drift:
        x = values[(dates == (month, number)).all(axis=1)].copy()
        change(x)
        watch = Watch(reference, story, state.params)
        watch.add(Rows.of(x))
        return watch.result(history[-30:], f"{month}-{number}")

    history: list[tuple[float, int]] = []
    for number in range(1, 32):
        drift = day(1, number)
        history.append((drift.mean_loglik, drift.n_rows))

    february = {}
    for number in range(1, 29):
        february[number] = drift = day(2, number)
        history.append((drift.mean_loglik, drift.n_rows))
    # The blizzard of 8 and 9 February grounded half the flights.
    assert all("dep_delay: missing in 5" in flag(february[n], "dep_delay") for n in (8, 9))
    assert all(february[n].outside for n in (8, 9))
    others = [drift for number, drift in february.items() if number not in (8, 9)]
    assert sum(drift.outside for drift in others) <= 2
    assert sum(bool(drift.flags) for drift in others) <= 6
    lines = [line for drift in others for line in drift.flags]
    assert not [line for line in lines if "unit" in line or "missing" in line or "every" in line]

    def hours(x: np.ndarray) -> None:
        x[:, 0] /= 60

    def emptied(x: np.ndarray) -> None:
        x[:, 2] = np.nan

    for number in range(1, 29):
        assert "another unit" in flag(day(2, number, hours), "dep_delay")
        assert flag(day(2, number, emptied), "air_time") == "air_time: every value is missing"


def test_flights_of_a_new_kind_give_birth(
    flights: tuple[Schema, np.ndarray, np.ndarray],
) -> None:
    """Long flights that leave early appear in February: 80 a day, of one carrier."""
    schema, values, dates = flights
    story, state = fitted(values[dates[:, 0] == 1], schema, 8)
    learner = OnlineEM(batch_rows=1000)
    carrier = schema["carrier"].levels.index("UA")

    def day(number: int) -> Rows:
        rng = np.random.default_rng(number)
        planted = np.column_stack(
            [
                rng.normal(-25, 3, 80),
                rng.normal(-70, 5, 80),
                rng.normal(840, 8, 80),
                rng.normal(7500, 20, 80),
                np.full(80, carrier),
                rng.integers(0, 3, 80),
            ]
        )
        real = values[(dates == (2, number)).all(axis=1)]
        return Rows.of(np.concatenate([real, planted]))

    assert state.sample is not None
    limit = Reference.of(story, state.params, state.sample).quantile_01
    first = day(1)
    odd = first[story.log_prob(state.params, first) < limit]
    wide, grown, events = birth(story, state, odd)
    assert events == ("component 8 was born from 80 badly explained rows",)
    assert grown.params.family.mean[8] == pytest.approx([-25, -70, 840, 7500], rel=0.05)
    later = Rows.concatenate([day(number) for number in range(15, 29)])

    def gain() -> float:
        after = wide.log_prob(grown.params, later)
        return float((after - story.log_prob(state.params, later)).mean())

    assert gain() > 2
    for number in range(1, 15):
        rows = day(number)
        odd = rows[wide.log_prob(grown.params, rows) < limit]
        # What the weather does to flights is no new kind of them.
        assert birth(wide, grown, odd, min_rows=20)[2] == ()
        state, _ = learner.learn(story, state, rows)
        grown, _ = learner.learn(wide, grown, rows)
    # The model without it has had to widen another component meanwhile.
    assert gain() > 0.5
    assert grown.params.weights[8] > 0.03
