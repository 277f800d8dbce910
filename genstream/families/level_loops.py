"""Loops over runs of rows that Numba compiles: `genstream.families.levels` calls them.

A run is rows, one after another, that have the same levels. What a component says of its levels is
looked up once a run, and added or summed along contiguous rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from genstream.loops import _compiled as compiled

# Runs shorter than this are walked here: a call of a vector loop would cost more.
SHORT = 8


@compiled(reorder=True)
def _raise(row: Any, by: Any) -> None:
    for i in range(row.shape[0]):
        row[i] += by


@compiled(reorder=True)
def _total(row: Any) -> Any:
    total = row[0]
    for i in range(1, row.shape[0]):
        total += row[i]
    return total


@compiled()
def add_levels(log_p: Any, table: Any, places: Any, starts: Any) -> None:
    """Add to `log_p` (K, n) entries of a table (K, L), those at `places` (u, c) in each of u runs.

    Run r has the rows from `starts[r]` to `starts[r + 1]`.
    """
    n_runs, n_columns = places.shape
    for k in range(log_p.shape[0]):
        row, own = log_p[k], table[k]
        for r in range(n_runs):
            value = own[places[r, 0]]
            for j in range(1, n_columns):
                value += own[places[r, j]]
            first, last = starts[r], starts[r + 1]
            if last - first < SHORT:
                for i in range(first, last):
                    row[i] += value
            else:
                _raise(row[first:last], value)


@compiled()
def sum_levels(resp: Any, sums: Any, places: Any, starts: Any) -> None:
    """Add to float64 `sums` (K, L), at `places` (u, c), what `resp` (K, n) sums to in each run."""
    n_runs, n_columns = places.shape
    for k in range(resp.shape[0]):
        row, own = resp[k], sums[k]
        for r in range(n_runs):
            first, last = starts[r], starts[r + 1]
            if last - first < SHORT:
                total = row[first]
                for i in range(first + 1, last):
                    total += row[i]
            else:
                total = _total(row[first:last])
            weight = np.float64(total)
            for j in range(n_columns):
                own[places[r, j]] += weight
