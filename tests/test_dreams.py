"""Draws and answers larger than memory: keyed by seed and chunk, lazy, and bounded in memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import xarray
import zarr

from genstream.dreams import draw_array, draws, impute_source
from genstream.errors import ConfigError, DataError
from genstream.families.gaussian import FullParams
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import DaskSource, NumpySource
from genstream.stories import mixture
from genstream.story import Draw, Params, Story

MEANS = np.array([[0.0, 0.0, 0.0], [6.0, -6.0, 3.0]])
COVARIANCES = np.array([np.eye(3), 0.5 * np.eye(3) + 0.5])


def two_groups() -> tuple[Story, Params]:
    story = mixture(Schema.real(["a", "b", "c"]), 2, prior=None)
    return story, Params(np.array([0.3, 0.7]), FullParams(MEANS, COVARIANCES))


def test_chunks_follow_from_seed_and_number() -> None:
    story, params = two_groups()
    pieces = list(draws(story, params, 1_000, seed=3, chunk_rows=300))
    assert [len(piece.values) for piece in pieces] == [300, 300, 300, 100]
    for i, piece in enumerate(pieces):
        expected = story.draw(params, len(piece.values), np.random.default_rng([3, i]))
        np.testing.assert_array_equal(piece.values, expected.values)
        np.testing.assert_array_equal(piece.component, expected.component)
    threads = list(draws(story, params, 1_000, seed=3, chunk_rows=300, workers=3))
    for one, other in zip(pieces, threads, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
    keyed = next(draws(story, params, 5, seed=(3, 1)))
    expected = story.draw(params, 5, np.random.default_rng([3, 1, 0]))
    np.testing.assert_array_equal(keyed.values, expected.values)


def test_an_array_is_the_draws_one_after_another() -> None:
    story, params = two_groups()
    found = draw_array(story, params, 1_000, seed=3, chunk_rows=300).compute()
    pieces = list(draws(story, params, 1_000, seed=3, chunk_rows=300))
    np.testing.assert_array_equal(found["values"], np.concatenate([p.values for p in pieces]))
    np.testing.assert_array_equal(found["component"], np.concatenate([p.component for p in pieces]))
    assert found["component"].dtype == np.intp
    assert found["values"].dims == ("row", "feature")
    assert list(found["feature"].values) == ["a", "b", "c"]
    assert Schema.from_json(json.loads(found.attrs["schema"])) == story.schema
    chosen = found["component"].values == 1
    np.testing.assert_allclose(found["values"].values[chosen].mean(axis=0), MEANS[1], atol=0.2)


def test_of_a_billion_rows_only_the_chunk_asked_for_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story, params = two_groups()
    drawn: list[int] = []
    draw = Story.draw

    def noted(self: Story, params: Params, n: int, rng: np.random.Generator) -> Draw:
        drawn.append(n)
        return draw(self, params, n, rng)

    monkeypatch.setattr(Story, "draw", noted)
    rows = draw_array(story, params, 10**9, chunk_rows=1_000_000)
    assert rows["values"].shape == (10**9, 3)
    assert drawn == []
    part = rows.isel(row=slice(123_456_789, 123_456_792))
    values, component = dask.compute(part["values"].data, part["component"].data)
    assert drawn == [1_000_000]
    expected = draw(story, params, 1_000_000, np.random.default_rng([0, 123]))
    np.testing.assert_array_equal(values, expected.values[456_789:456_792])
    np.testing.assert_array_equal(component, expected.component[456_789:456_792])


def test_a_draw_is_written_chunk_by_chunk(tmp_path: Path) -> None:
    story, params = two_groups()
    rows = draw_array(story, params, 2_500, seed=1, chunk_rows=1_000)
    rows.to_zarr(tmp_path / "drawn.zarr", zarr_format=3, consolidated=False)
    with xarray.open_zarr(tmp_path / "drawn.zarr", consolidated=False) as found:
        np.testing.assert_array_equal(found["values"], rows["values"])
        assert found["values"].data.chunks[0] == (1_000, 1_000, 500)


def test_nothing_cannot_be_drawn() -> None:
    story, params = two_groups()
    with pytest.raises(ConfigError, match="n_rows is 0"):
        draw_array(story, params, 0)
    with pytest.raises(ConfigError, match="chunk_rows is 0"):
        draws(story, params, 5, chunk_rows=0)


def gappy(n_rows: int) -> np.ndarray:
    story, params = two_groups()
    values = story.draw(params, n_rows, np.random.default_rng(0)).values
    hidden = np.random.default_rng(1).random(values.shape) < 0.3
    return np.where(hidden, np.nan, values)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_source_is_imputed_chunk_by_chunk(seed: int | None) -> None:
    story, params = two_groups()
    X = gappy(1_000)
    expected = np.concatenate(
        [
            story.impute(
                params,
                Rows.of(X[first : first + 300]),
                None if seed is None else np.random.default_rng([seed, i]),
            )
            for i, first in enumerate(range(0, 1_000, 300))
        ]
    )
    read: list[int] = []

    def noted(block: np.ndarray) -> np.ndarray:
        read.append(len(block))
        return block

    blocks = da.from_array(X, chunks=(300, 3)).map_blocks(noted, meta=np.empty((0, 0)))
    for source in (NumpySource(X, story.schema, chunk_rows=300), DaskSource(blocks, story.schema)):
        found = impute_source(story, params, source, seed)
        assert found.chunks == ((300, 300, 300, 100), (3,))
        assert read == []
        np.testing.assert_array_equal(found.blocks[1].compute(), expected[300:600])
        np.testing.assert_array_equal(found.compute(), expected)
    seen = ~np.isnan(X)
    np.testing.assert_array_equal(expected[seen], X[seen])
    assert not np.isnan(expected).any()


def test_imputed_rows_are_written(tmp_path: Path) -> None:
    story, params = two_groups()
    X = gappy(1_000)
    found = impute_source(story, params, NumpySource(X, story.schema, chunk_rows=400))
    found.to_zarr(tmp_path / "filled.zarr")
    whole = story.impute(params, Rows.of(X))
    np.testing.assert_allclose(zarr.open_array(tmp_path / "filled.zarr")[:], whole, rtol=1e-10)


def test_values_that_cannot_be_are_named_where_they_are() -> None:
    story, params = two_groups()
    X = np.where(np.arange(3_000).reshape(1_000, 3) == 1_501, np.inf, 0.0)
    source = DaskSource(da.from_array(X, chunks=(300, 3)), story.schema)
    with pytest.raises(DataError, match="row 500, column 'b' is infinite"):
        impute_source(story, params, source).compute()


@pytest.mark.parametrize("what", ["drawn", "filled"])
def test_memory_is_that_of_a_few_chunks(what: str, tmp_path: Path) -> None:
    story, params = two_groups()

    def peak(n_rows: int) -> int:
        # Chunks that outweigh the graph of them, which grows with their number.
        drawn = draw_array(story, params, n_rows, chunk_rows=20_000)["values"].data
        lazy = drawn
        if what == "filled":
            gappy = da.where(drawn > 5, np.nan, drawn)
            lazy = impute_source(story, params, DaskSource(gappy, story.schema))
        with dask.config.set(scheduler="synchronous"):
            tracemalloc.start()
            lazy.to_zarr(tmp_path / f"{n_rows}.zarr")
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert zarr.open_array(tmp_path / f"{n_rows}.zarr").shape == (n_rows, 3)
        return found

    peak(20_000)  # Imports are made once.
    assert peak(480_000) < 1.5 * peak(100_000)
