"""Words and numbers on a terminal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.terminal import FitProgress, RowProgress, bars, bytes_text, expected_steps, table
from genstream.learn import FitState, StepInfo
from genstream.stats import Record
from genstream.story import Params


def test_steps_left_follow_a_geometric_series() -> None:
    # Gains 1, 1/2, 1/4, ...: after n of them the next is 2^-n.
    objectives = [2.0 - 0.5**n for n in range(6)]
    left = expected_steps(objectives, 1e-3, 1000)
    assert 4 <= left <= 7
    assert expected_steps(objectives, 1e-3, 2) == 2


@pytest.mark.parametrize(
    ("objectives", "tolerance", "expected"),
    [
        ([], 1e-3, 50),
        ([1.0, 2.0], 1e-3, 50),
        ([0.0, 1.0, 3.0], 1e-3, 50),
        ([0.0, 1.0, 1.0], 1e-3, 0),
        ([0.0, 1.0, 1.5], 0.0, 50),
    ],
)
def test_steps_left_where_no_series_says(
    objectives: list[float], tolerance: float, expected: int
) -> None:
    assert expected_steps(objectives, tolerance, 50) == expected


@given(st.lists(st.floats(-1e6, 1e6), max_size=8), st.integers(0, 99))
def test_steps_left_are_within_what_is_allowed(objectives: list[float], at_most: int) -> None:
    assert 0 <= expected_steps(objectives, 1e-4, at_most) <= at_most


def test_tables_align() -> None:
    text = table([{"a": 1000, "b": "x"}, {"a": None, "b": "long"}], ["a", "b"])
    assert text.splitlines() == ["    a  b", "1,000  x", "       long"]


def test_sizes() -> None:
    assert bytes_text(0) == "0 B"
    assert bytes_text(1536) == "1.5 KiB"
    assert bytes_text(3 * 2**30) == "3.0 GiB"
    assert bytes_text(2**50) == "1024.0 TiB"


def test_nothing_is_shown_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with bars() as progress:
        shown = FitProgress(progress, 10, 1e-4)
        rows = RowProgress(progress, "ingest")
        shown.on_start(0, -3.0)
        shown.on_rows(5, 10)
        rows(5)
        rows(10, 10)
    assert capfd.readouterr() == ("", "")


def test_the_bar_of_a_fit_tells_the_log_likelihood_and_the_passes_left() -> None:
    with bars(quiet=True) as progress:
        shown = FitProgress(progress, 20, 1e-3)
        params = Params(np.ones(1), Record())
        for step in range(1, 8):
            info = StepInfo(step, -100.0 * 0.5**step, 0.0, 100.0, 100, 0, 2.0)
            shown.on_step(FitState(params, step=step), info)
        (task,) = progress.tasks
    assert task.description == "pass 8"
    assert "log-likelihood -0.0078, 50 rows/s, about 3 passes (0:06) left" in task.fields["note"]


def test_the_bar_of_a_relay_counts_each_learner_by_itself() -> None:
    with bars(quiet=True) as progress:
        shown = FitProgress(progress, 20, 1e-3)
        shown.on_rows(100, 100)
        params = Params(np.ones(1), Record())
        for step in range(1, 4):
            info = StepInfo(step, -1.0, 0.0, 40.0, 40, 0, 2.0)
            shown.on_step(FitState(params, step=step), info)
        (task,) = progress.tasks
        assert (task.description, task.completed, task.total) == ("part of pass 2", 20, 100)
        assert "20 rows/s" in task.fields["note"]
        info = StepInfo(4, -100.0, 0.0, 100.0, 100, 0, 2.0)
        shown.on_step(FitState(params, step=4, stage=1, origin=3), info)
    assert task.description == "pass 2"
    assert "at most 19 passes" in task.fields["note"]
