"""Words and numbers on a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.terminal import bytes_text, expected_steps, table


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
