"""Scores, assignments and draws of a stored model, chunk by chunk, to a file or to stdout."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from genstream.errors import ConfigError, DataError
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    from genstream.story import Params, Story

CHUNK_ROWS = 65_536


class Verb(Enum):
    """What is written of each row."""

    SCORE = "score"
    ASSIGN = "assign"
    ASSIGN_ALL = "assign-all"


def score_rows(
    verb: Verb,
    model: str,
    data: str,
    output: Path | None,
    *,
    overwrite: bool = False,
    unseen_as_missing: bool = False,
    id_column: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write what `verb` says of every row of `data` under a model.

    `score` gives `log_prob` (nats, in data units), `assign` gives `component` (the likeliest),
    `responsibility` (its posterior probability) and `log_prob`, and `assign-all` the
    responsibility of every component besides. A row is known by its number in `data`, from 0, or
    by the column `id_column`. One chunk is in memory at a time. Raises DataError where `data` do
    not fit the model's columns, naming row, column and level.
    """
    story, params = load_model(model)
    rows_done, total = 0, 0.0
    counted = 0
    with one_blas_thread(), _sink(output, overwrite) as write:
        for rows, ids in _read(data, story.schema, id_column, unseen_as_missing):
            posterior = story.infer(params, rows)
            columns: dict[str, Any] = (
                {"row": np.arange(rows_done, rows_done + rows.n_rows)}
                if ids is None
                else {id_column or "id": pa.array(ids)}
            )
            if verb is not Verb.SCORE:
                component = posterior.component
                columns["component"] = component
                columns["responsibility"] = posterior.responsibilities[
                    np.arange(rows.n_rows), component
                ]
            columns["log_prob"] = posterior.log_prob
            if verb is Verb.ASSIGN_ALL:
                for k in range(story.n_components):
                    columns[f"responsibility_{k}"] = posterior.responsibilities[:, k]
            write(pa.RecordBatch.from_pydict(columns))
            rows_done += rows.n_rows
            observed = rows.is_observed.any(axis=1)
            counted += int(observed.sum())
            total += float(posterior.log_prob[observed].sum())
            if on_progress is not None:
                on_progress(rows_done)
    return {
        "rows": rows_done,
        "unobserved": rows_done - counted,
        "mean_loglik": total / max(counted, 1),
        "output": None if output is None else str(output),
    }


def sample_rows(
    model: str,
    n_rows: int,
    output: Path | None,
    *,
    seed: int = 0,
    with_component: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `n_rows` rows drawn from a model, categories by their labels.

    Each chunk is drawn from the seed and its number.
    """
    story, params = load_model(model)
    with one_blas_thread(), _sink(output, overwrite) as write:
        for i, first in enumerate(range(0, n_rows, CHUNK_ROWS)):
            rng = np.random.default_rng([seed, i])
            drawn = story.draw(params, min(CHUNK_ROWS, n_rows - first), rng)
            columns: dict[str, Any] = {"component": drawn.component} if with_component else {}
            write(pa.RecordBatch.from_pydict(columns | decoded(story.schema, drawn.values)))
    return {"rows": n_rows, "seed": seed, "output": None if output is None else str(output)}


def decoded(schema: Schema, values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Columns of (n, d) values as people write them: labels of categories, whole counts."""
    columns: dict[str, Any] = {}
    for j, column in enumerate(schema.columns):
        x = values[:, j]
        if column.kind == "real":
            columns[column.name] = x
        elif column.levels:
            labels = pa.array(column.levels)
            columns[column.name] = labels.take(pa.array(x.astype(np.int64)))
        else:
            columns[column.name] = x.astype(np.int64)
    return columns


def load_model(reference: str) -> tuple[Story, Params]:
    """The model that `folder`, `folder@version` or a run means. Raises ConfigError for none."""
    raise NotImplementedError


def _read(
    data: str, schema: Schema, id_column: str | None, unseen_as_missing: bool
) -> Iterator[tuple[Rows, Any]]:
    raise NotImplementedError


# --- writing -------------------------------------------------------------------------------------


class _Writer(Protocol):
    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...


class _Csv:
    """Comma-separated values, with a header."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._writer: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        import pyarrow.csv

        if self._writer is None:
            options = pyarrow.csv.WriteOptions(quoting_style="needed")
            self._writer = pyarrow.csv.CSVWriter(self._sink, batch.schema, write_options=options)
        self._writer.write_batch(batch)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Parquet:
    """A row group a chunk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        import pyarrow.parquet

        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path, batch.schema)
        self._writer.write_batch(batch)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Zarr:
    """A group with an array a column."""

    def __init__(self, path: Path) -> None:
        import zarr

        self._group = zarr.open_group(path, mode="w-", zarr_format=3)

    def write(self, batch: pa.RecordBatch) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
                raise ConfigError(
                    f"column {name!r} is text, and a zarr output holds numbers: name a .parquet "
                    "or .csv file"
                )
            values = column.to_numpy(zero_copy_only=False)
            if name in self._group:
                array: Any = self._group[name]
                array.append(values)
            else:
                array = self._group.create_array(
                    name, shape=(0,), dtype=values.dtype, chunks=(CHUNK_ROWS,)
                )
                array.append(values)

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _sink(output: Path | None, overwrite: bool) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Somewhere to write batches to; a file appears whole, when all of it is written."""
    if output is None:
        writer: _Writer = _Csv(pa.PythonFile(sys.stdout.buffer, mode="w"))
        yield writer.write
        writer.close()
        sys.stdout.buffer.flush()
        return
    kinds: dict[str, Callable[[Path], _Writer]] = {
        ".csv": _Csv,
        ".parquet": _Parquet,
        ".zarr": _Zarr,
    }
    kind = kinds.get(output.suffix.lower())
    if kind is None:
        raise ConfigError(f"{output}: an output ends in {', '.join(kinds)}")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists: name another file, or say --overwrite")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}")
    temporary = output.with_name(f".{secrets.token_hex(4)}.{output.name}")
    try:
        writer = kind(temporary)
        yield writer.write
        writer.close()
        if not temporary.exists():
            raise DataError("there are no rows, so that nothing was written")
        if output.is_dir():
            shutil.rmtree(output)
        temporary.replace(output)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
