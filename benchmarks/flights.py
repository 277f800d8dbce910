"""The flights example as an array, for benchmarks that do without the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from benchmarks.data import path
from genstream.schema import Column, Schema

REAL = ("dep_delay", "arr_delay", "air_time", "distance")
CATEGORICAL = ("carrier", "origin", "month")


def flights() -> tuple[np.ndarray[Any, np.dtype[np.float64]], Schema]:
    """(336776, 8) values with NaN for gaps and codes for labels, and their schema."""
    table = pd.read_csv(path("flights.csv.zip"))
    columns = [Column(name) for name in REAL] + [Column("hour", "count")]
    values = [table[name].to_numpy(dtype=float) for name in (*REAL, "hour")]
    for name in CATEGORICAL:
        codes, levels = pd.factorize(table[name].astype(str))
        columns.append(Column(name, "categorical", tuple(levels)))
        values.append(codes.astype(float))
    return np.column_stack(values), Schema(tuple(columns))
