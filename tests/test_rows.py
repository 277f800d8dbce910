"""Rows: gaps become masks, weights are checked, and every refusal names its place."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from genstream.errors import DataError
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import seed_params
from genstream.stories import mixture

tables = hnp.arrays(
    st.sampled_from([np.float64, np.float32]),
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
    elements=st.floats(allow_infinity=False, allow_nan=True, width=32),
)


class TestOf:
    @given(tables)
    def test_gaps_become_a_mask_and_come_back(self, array: np.ndarray) -> None:
        before = array.copy()
        rows = Rows.of(array)
        np.testing.assert_array_equal(array, before)
        assert np.isfinite(rows.values).all()
        assert rows.values.dtype == array.dtype
        assert (rows.observed is None) == (not np.isnan(array).any())
        np.testing.assert_array_equal(rows.is_observed, ~np.isnan(array))
        np.testing.assert_array_equal(rows.filled(), array)
        assert (rows.n_rows, rows.n_features) == array.shape

    @pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.bool_, np.float16])
    def test_other_numbers_become_the_smallest_floats_that_hold_them(self, dtype: Any) -> None:
        rows = Rows.of(np.array([[0, 1], [1, 1]], dtype=dtype))
        assert rows.values.dtype == (np.float64 if dtype == np.int64 else np.float32)
        np.testing.assert_array_equal(rows.values, [[0, 1], [1, 1]])

    def test_lists_are_arrays(self) -> None:
        rows = Rows.of([[1, None], [2.5, 3]])
        np.testing.assert_array_equal(rows.is_observed, [[True, False], [True, True]])

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1.0, 2.0], "2D array"),
            (np.zeros((2, 2, 2)), "3 dimensions"),
            ([["a", "b"]], "not numbers"),
            ([["1.5", "2"]], "not numbers"),
            ([[1 + 2j, 0]], "Complex data not supported"),
            ([[10**400, 0.5]], "not numbers"),
            (np.array([["2020-01-01", "NaT"]], dtype="datetime64[ns]"), "not numbers"),
            ([[object()]], "not numbers"),
            ([[1.0, np.inf]], "row 0, column 1 is infinite"),
            ([[1.0, 2.0], [-np.inf, np.nan]], "row 1, column 0 is infinite"),
        ],
    )
    def test_what_is_no_table_of_numbers_is_refused(self, values: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            Rows.of(values)

    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize("order", ["C", "F", "rows apart"])
    def test_many_numbers_are_read_as_few_are(self, dtype: Any, order: str) -> None:
        """Of many, gaps are told apart in compiled loops."""
        rng = np.random.default_rng(0)
        array = rng.normal(size=(40_000, 5)).astype(dtype)
        array[rng.random(array.shape) < 0.2] = np.nan
        array[0, 0], array[1, 1] = -0.0, np.finfo(dtype).tiny
        given_ = np.repeat(array, 2, axis=0)[::2]
        if order != "rows apart":
            given_ = np.asarray(array, order=order)  # type: ignore[call-overload]
        rows = Rows.of(given_)
        np.testing.assert_array_equal(rows.is_observed, ~np.isnan(array))
        np.testing.assert_array_equal(rows.values, np.where(np.isnan(array), 0, array))
        assert rows.values.dtype == dtype
        assert not np.shares_memory(rows.values, given_)
        for bad in (np.inf, -np.inf):
            given_[30_000, 2] = bad
            with pytest.raises(DataError, match="row 30000, column 2 is infinite"):
                Rows.of(given_)
        if dtype == np.float64:
            given_[30_000, 2] = 1e200
            with pytest.raises(DataError, match=r"row 30000, column 2: 1e\+200 is too large"):
                Rows.of(given_)

    def test_the_place_of_an_error_counts_from_the_first_row(self) -> None:
        with pytest.raises(DataError, match="row 107, column 'v' is infinite"):
            Rows.of(np.diag([np.inf] * 8)[7:, 6:], first_row=107, names=["u", "v"])


class TestWeights:
    @pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
    def test_a_wrong_weight_names_its_row(self, bad: float) -> None:
        with pytest.raises(DataError, match="row 12 has weight"):
            Rows.of(np.zeros((3, 1)), [1.0, 1.0, bad], first_row=10)

    def test_one_weight_a_row(self) -> None:
        with pytest.raises(DataError, match="one weight a row"):
            Rows.of(np.zeros((3, 1)), [1.0, 1.0])

    def test_a_number_weighs_all_rows(self) -> None:
        np.testing.assert_array_equal(Rows.of(np.zeros((3, 1)), 2).row_weights, [2, 2, 2])

    def test_ones_by_default(self) -> None:
        rows = Rows.of(np.zeros((3, 1)))
        assert rows.weights is None
        np.testing.assert_array_equal(rows.row_weights, np.ones(3))


@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7),
        elements=st.one_of(st.just(np.nan), st.floats(-5, 5)),
    ),
    st.lists(st.integers(0, 7), max_size=4),
    st.booleans(),
)
def test_pieces_put_together_are_the_whole(
    array: np.ndarray, cuts: list[int], weighted: bool
) -> None:
    rows = Rows.of(array, np.arange(len(array)) if weighted else None)
    edges = [0, *sorted(min(c, len(array)) for c in cuts), len(array)]
    # Made from their own piece of the array, so that some have a mask and others none.
    pieces = [
        Rows.of(array[a:b], None if rows.weights is None else rows.weights[a:b])
        for a, b in itertools.pairwise(edges)
    ]
    whole = Rows.concatenate(pieces)
    np.testing.assert_array_equal(whole.filled(), array)
    np.testing.assert_array_equal(whole.row_weights, rows.row_weights)


def test_pieces_with_and_without_weights_go_together() -> None:
    whole = Rows.concatenate([Rows.of([[1.0]]), Rows.of([[2.0]], [3.0])])
    np.testing.assert_array_equal(whole.row_weights, [1.0, 3.0])


def test_a_slice_shares_memory_and_an_index_copies() -> None:
    rows = Rows.of([[1.0, np.nan], [2.0, 3.0], [4.0, 5.0]], [1, 2, 3])
    assert np.shares_memory(rows[1:].values, rows.values)
    chosen = rows[np.array([2, 0])]
    assert not np.shares_memory(chosen.values, rows.values)
    np.testing.assert_array_equal(chosen.filled(), [[4.0, 5.0], [1.0, np.nan]])
    np.testing.assert_array_equal(chosen.row_weights, [3, 1])


def test_select_takes_columns() -> None:
    rows = Rows.of([[1.0, np.nan, 3.0]], [2.0]).select([2, 1])
    np.testing.assert_array_equal(rows.filled(), [[3.0, np.nan]])
    np.testing.assert_array_equal(rows.row_weights, [2.0])


def test_nbytes_counts_all_that_is_held() -> None:
    assert Rows.of(np.zeros((4, 2))).nbytes == 64
    assert Rows.of([[np.nan, 1.0]] * 4, 1.0).nbytes == 64 + 8 + 32


class TestCheck:
    schema = Schema(
        (
            Column("real"),
            Column("binary", "binary"),
            Column("count", "count"),
            Column("level", "categorical", ("a", "b")),
        )
    )

    def test_possible_rows_pass(self) -> None:
        rows = Rows.of([[-0.5, 1, 1e7, 1], [np.nan] * 4, [1e150, 0, 0, 0]])
        assert rows.check(self.schema) is rows

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            (1, 2),
            (1, 0.5),
            (1, -1),
            (2, -1),
            (2, 1.5),
            (3, 2),
            (3, 0.5),
            (3, -1),
        ],
    )
    def test_an_impossible_entry_names_row_and_column(self, column: int, value: float) -> None:
        values = np.zeros((3, 4))
        values[1, column] = value
        values[0, column] = np.nan
        name = self.schema.names[column]
        with pytest.raises(DataError, match=f"row 41, column '{name}': {value:g}"):
            Rows.of(values).check(self.schema, first_row=40)

    def test_a_gap_is_possible_anywhere(self) -> None:
        Rows.of(np.full((2, 4), np.nan)).check(self.schema)

    def test_columns_are_counted(self) -> None:
        with pytest.raises(DataError, match="3 columns, the schema 4"):
            Rows.of(np.zeros((2, 3))).check(self.schema)


class TestSparse:
    """Rows whose values are CSR say what the same rows say as an array."""

    def pair(self) -> tuple[Rows, Rows]:
        rng = np.random.default_rng(0)
        array = rng.poisson(0.4, (30, 7)).astype(float)
        weights = rng.uniform(0, 2, 30)
        return Rows.of(sparse.csr_array(array), weights), Rows.of(array, weights)

    def test_slices_selections_and_sums_of_pieces(self) -> None:
        one, two = self.pair()
        assert one.is_sparse
        assert not two.is_sparse
        assert (one.n_rows, one.n_features) == (two.n_rows, two.n_features) == (30, 7)
        assert one.nbytes == one.values.data.nbytes + one.values.indices.nbytes + (
            one.values.indptr.nbytes + 30 * 8
        )
        mask = np.arange(30) % 3 == 0
        for index in (slice(3, 11), np.array([4, 4, 0]), mask):
            piece, other = one[index], two[index]
            assert piece.is_sparse
            np.testing.assert_array_equal(piece.dense().values, other.values)
            np.testing.assert_array_equal(piece.row_weights, other.row_weights)
        np.testing.assert_array_equal(one.select([5, 0]).dense().values, two.select([5, 0]).values)
        np.testing.assert_array_equal(one.filled(), two.filled())
        assert one.is_observed.all()
        assert one.is_observed.shape == (30, 7)
        joined = Rows.concatenate([one[:4], one[4:]])
        assert joined.is_sparse
        np.testing.assert_array_equal(joined.dense().values, two.values)
        np.testing.assert_array_equal(joined.weights, two.weights)
        mixed = Rows.concatenate([one[:4], two[4:]])
        assert not mixed.is_sparse
        np.testing.assert_array_equal(mixed.values, two.values)

    @pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok"])
    def test_any_format_becomes_canonical_csr_and_is_left_as_it_was(self, form: str) -> None:
        array = np.array([[0, 2, 0], [1, 0, 3]])
        for kind in (sparse.csr_array, sparse.csr_matrix):
            given = kind(array).asformat(form)
            rows = Rows.of(given)
            assert isinstance(rows.values, sparse.csr_array)
            assert rows.values.has_canonical_format
            assert rows.values.dtype == np.float64
            np.testing.assert_array_equal(rows.dense().values, array)
            np.testing.assert_array_equal(given.toarray(), array)

    def test_doubles_are_summed_in_a_copy(self) -> None:
        given = sparse.csr_array(([1.0, 2.0, 4.0], [1, 1, 0], [0, 3]), shape=(1, 2))
        rows = Rows.of(given)
        np.testing.assert_array_equal(rows.dense().values, [[4.0, 3.0]])
        np.testing.assert_array_equal(given.data, [1.0, 2.0, 4.0])

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (np.nan, "row 8, column 'c' is nan: sparse values cannot have gaps"),
            (np.inf, "row 8, column 'c' is inf"),
            (1e200, "row 8, column 'c' is 1e\\+200"),
        ],
    )
    def test_refusals_name_the_place(self, value: float, message: str) -> None:
        array = sparse.csr_array(np.array([[0, 1, 0], [0, 0, value]]))
        with pytest.raises(DataError, match=message):
            Rows.of(array, first_row=7, names=["a", "b", "c"])
        with pytest.raises(DataError, match="not numbers"):
            Rows.of(sparse.csr_array(np.array([[1j, 0]])))

    @pytest.mark.parametrize(
        ("kind", "bad"), [("count", -1.0), ("count", 0.5), ("binary", 2.0), ("categorical", 3.0)]
    )
    def test_check_finds_what_it_finds_in_an_array(self, kind: Any, bad: float) -> None:
        levels = ("x", "y", "z") if kind == "categorical" else ()
        schema = Schema((Column("a"), Column("b", kind, levels), Column("c")))
        array = np.array([[-0.5, 1.0, 0.0], [0.0, 0.0, 1.5], [2.0, bad, 0.0]])
        Rows.of(sparse.csr_array(array[:2])).check(schema)
        said = []
        for values in (array, sparse.csr_array(array)):
            with pytest.raises(DataError) as caught:
                Rows.of(values).check(schema, first_row=10)
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert "row 12, column 'b'" in said[0]
        with pytest.raises(DataError, match="2 columns"):
            Rows.of(sparse.csr_array(array)).select([0, 1]).check(schema)

    def test_a_source_keeps_them_sparse(self) -> None:
        one, two = self.pair()
        source = NumpySource(one.values, chunk_rows=8)
        assert source.chunk_rows == (8, 8, 8, 6)
        chunks = [source.read(i) for i in range(4)]
        assert all(chunk.is_sparse for chunk in chunks)
        np.testing.assert_array_equal(Rows.concatenate(chunks).dense().values, two.values)
        assert source.chunk_nbytes >= max(chunk.nbytes for chunk in chunks)

    def test_families_that_need_arrays_see_them(self) -> None:
        one, two = self.pair()
        story = mixture(Schema.real(7), 2, covariance="diag").anchored(one)
        params = seed_params(story, one, np.random.default_rng(0))
        np.testing.assert_array_equal(story.log_prob(params, one), story.log_prob(params, two))
        np.testing.assert_array_equal(story.impute(params, one), two.values)
