"""Memory is a promise: a pass holds a few chunks, however many there are."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest

from genstream.learn import EStep
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.stories import mixture
from genstream.story import Story

CHUNK, COLUMNS = 16_384, 8


class Stream:
    """A source that makes each chunk when it is read, and remembers which are still alive."""

    def __init__(self, n_chunks: int, schema: Schema, gaps: float) -> None:
        self.schema, self.gaps = schema, gaps
        self.chunk_rows = (CHUNK,) * n_chunks
        self.chunk_nbytes = CHUNK * COLUMNS * 9
        self.alive: list[weakref.ref[Any]] = []
        self.most = 0

    def read(self, i: int) -> Rows:
        rng = np.random.default_rng(i)
        values = rng.integers(0, 2, (CHUNK, COLUMNS)) + rng.random((CHUNK, COLUMNS)) * (
            self.schema.kinds[0] == "real"
        )
        if self.gaps:
            values[rng.random(values.shape) < self.gaps] = np.nan
        rows = Rows.of(values)
        self.alive = [one for one in self.alive if one() is not None]
        self.alive.append(weakref.ref(rows.values))
        self.most = max(self.most, len(self.alive))
        return rows


def stories() -> list[Any]:
    real = Schema.real(COLUMNS)
    counts = Schema(tuple(Column(f"c{j}", "count") for j in range(COLUMNS)))
    return [
        pytest.param(mixture(real, 4, covariance="full"), id="full"),
        pytest.param(mixture(real, 4, covariance="tied"), id="tied"),
        pytest.param(mixture(real, 4, covariance="diag"), id="diag"),
        pytest.param(mixture(counts, 4), id="count"),
    ]


@pytest.mark.parametrize("gaps", [0.0, 0.2])
@pytest.mark.parametrize("story", stories())
def test_a_pass_holds_one_chunk_a_worker_without_help_of_the_collector(
    story: Story, gaps: float
) -> None:
    stream = Stream(12, story.schema, gaps)
    story = story.anchored(stream.read(0))
    passes = Passes(stream, scheduler="synchronous")
    gc.collect()
    gc.disable()
    try:
        passes.fold(EStep(story, story.vague()))
    finally:
        gc.enable()
    # The chunk just read, the one before it while its name is rebound, and slack for the caller.
    assert stream.most <= 3


@pytest.mark.parametrize("story", stories())
def test_peak_memory_of_a_pass_does_not_grow_with_the_number_of_chunks(story: Story) -> None:
    def peak(n_chunks: int) -> int:
        stream = Stream(n_chunks, story.schema, 0.0)
        anchored = story.anchored(stream.read(0))
        passes = Passes(stream, scheduler="synchronous")
        tracemalloc.start()
        try:
            passes.fold(EStep(anchored, anchored.vague()))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(4), peak(32)
    assert many < few * 1.2


def test_rows_in_memory_are_not_copied_by_a_pass() -> None:
    values = np.random.default_rng(0).standard_normal((400_000, COLUMNS))
    source = NumpySource(values, chunk_rows=CHUNK)
    story = mixture(source.schema, 4).anchored(Rows.of(values[:1000]))
    passes = Passes(source, workers=1)
    tracemalloc.start()
    try:
        passes.fold(EStep(story, story.vague()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes / 2
