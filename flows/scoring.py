"""Scores, assignments and draws of a stored model, chunk by chunk, to a file or to stdout."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from flows.data import expand
from flows.run import Run
from genstream.dreams import draws, generator_of_chunk
from genstream.errors import ConfigError, DataError
from genstream.manifests import is_stored
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    from genstream.story import Params, Story

CHUNK_ROWS = 65_536
# Responsibilities held at a time: 32 MiB of them.
HELD = 1 << 22


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
    null_values: Sequence[str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write what `verb` says of every row of `data` under a model.

    `score` gives `log_prob` (nats, in data units), `assign` gives `component` (the likeliest),
    `responsibility` (its posterior probability) and `log_prob`, and `assign-all` the
    responsibility of every component besides; a story with factors adds `factor_0`, ..., their
    posterior means given the likeliest component. Where the story has a bound in place of the
    log-likelihood, the column is called `log_prob_bound`. A row is known by its number in `data`,
    from 0, or by the column `id_column`; rows of a dataset by their ids, where all have one. Texts
    that mean a missing entry in files are `null_values`, or else those of the data that the model
    was fitted to. One chunk is in memory at a time. Raises DataError where `data` do not fit the
    model's columns, naming row, column and level, and ConfigError where what is written has a
    column called `id_column` already.
    """
    story, params, nulls = _found(model)
    wanted = _Wanted(story.schema, id_column, unseen_as_missing, null_values or nulls)
    if output is not None and output.exists() and Path(data).exists() and output.samefile(data):
        raise ConfigError(f"{output} is what is read: name another file to write to")
    rows_done, total = 0, 0.0
    counted = 0
    size = CHUNK_ROWS
    if verb is not Verb.SCORE:
        size = min(size, max(1, HELD // story.n_components))
    with one_blas_thread(), _sink(output, overwrite) as write:
        for rows, ids in _read(data, wanted, size):
            columns: dict[str, Any] = {}
            if verb is Verb.SCORE:
                log_prob = story.log_prob(params, rows)
            else:
                posterior = story.infer(params, rows)
                log_prob, component = posterior.log_prob, posterior.component
                columns["component"] = component
                columns["responsibility"] = posterior.responsibilities[
                    np.arange(rows.n_rows), component
                ]
                if story.n_factors:
                    factors = story.factors(params, rows, component).mean
                    columns |= {f"factor_{i}": factors[:, i] for i in range(story.n_factors)}
            columns["log_prob_bound" if story.bound else "log_prob"] = log_prob
            if verb is Verb.ASSIGN_ALL:
                for k in range(story.n_components):
                    columns[f"responsibility_{k}"] = posterior.responsibilities[:, k]
            write(pa.RecordBatch.from_pydict(wanted.known_by(ids, rows_done, columns)))
            rows_done += rows.n_rows
            observed = rows.is_observed.any(axis=1)
            counted += int(observed.sum())
            total += float(log_prob[observed].sum())
            if on_progress is not None:
                on_progress(rows_done)
    return {
        "rows": rows_done,
        "unobserved": rows_done - counted,
        "mean_loglik": total / max(counted, 1),
        "bound": story.bound,
        "output": None if output is None else str(output),
    }


def impute_rows(
    model: str,
    data: str,
    output: Path | None,
    *,
    draw: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    unseen_as_missing: bool = False,
    id_column: str | None = None,
    null_values: Sequence[str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write every row of `data` with its gaps filled by a model, the model's columns alone.

    A gap holds the conditional mean of a real or count column and the likeliest level of others;
    with `draw`, one draw of all gaps of a row together, which follows from the seed and the
    number of the chunk. Rows are known as in `score_rows`, and the same errors are raised.
    """
    story, params, nulls = _found(model)
    wanted = _Wanted(story.schema, id_column, unseen_as_missing, null_values or nulls)
    if output is not None and output.exists() and Path(data).exists() and output.samefile(data):
        raise ConfigError(f"{output} is what is read: name another file to write to")
    rows_done = gaps = 0
    with one_blas_thread(), _sink(output, overwrite) as write:
        for i, (rows, ids) in enumerate(_read(data, wanted)):
            rng = generator_of_chunk(seed, i) if draw else None
            columns = decoded(story.schema, story.impute(params, rows, rng), whole=draw)
            write(pa.RecordBatch.from_pydict(wanted.known_by(ids, rows_done, columns)))
            rows_done += rows.n_rows
            gaps += int((~rows.is_observed).sum())
            if on_progress is not None:
                on_progress(rows_done)
    return {
        "rows": rows_done,
        "filled": gaps,
        "output": None if output is None else str(output),
    }


def sample_rows(
    model: str,
    n_rows: int,
    output: Path | None,
    *,
    given: Mapping[str, str] | None = None,
    seed: int = 0,
    with_component: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `n_rows` rows drawn from a model, categories by their labels.

    Each chunk is drawn from the seed and its number. `given` values of some columns are what the
    others are drawn from. Raises DataError where a column cannot have its value.
    """
    story, params = load_model(model)
    whole = story.schema
    fixed = {name: whole[name].code(value) for name, value in (given or {}).items()}
    if fixed:
        story, params = story.condition(params, given or {})
    with _sink(output, overwrite) as write:
        for drawn in draws(story, params, n_rows, seed, CHUNK_ROWS):
            columns: dict[str, Any] = {"component": drawn.component} if with_component else {}
            values = np.empty((len(drawn.values), whole.n_features))
            for name, value in fixed.items():
                values[:, whole.index(name)] = value
            values[:, [whole.index(name) for name in story.schema.names]] = drawn.values
            write(pa.RecordBatch.from_pydict(columns | decoded(whole, values)))
    return {"rows": n_rows, "seed": seed, "output": None if output is None else str(output)}


def decoded(schema: Schema, values: np.ndarray[Any, Any], *, whole: bool = True) -> dict[str, Any]:
    """Columns of (n, d) values as people write them: labels of categories, and counts that are
    `whole` as integers; means of counts need not be.
    """
    columns: dict[str, Any] = {}
    for j, column in enumerate(schema.columns):
        x = values[:, j]
        if column.kind == "real" or (column.kind == "count" and not whole):
            columns[column.name] = x
        elif column.levels:
            labels = pa.array(column.levels)
            columns[column.name] = labels.take(pa.array(x.astype(np.int64)))
        else:
            columns[column.name] = x.astype(np.int64)
    return columns


def folder_and_version(reference: str) -> tuple[str, str]:
    """The parts of `folder@version`, of which a folder's own path may have an @, too."""
    folder, _, version = reference.rpartition("@")
    return (folder, version) if folder and not Path(reference).is_dir() else (reference, "")


def load_model(reference: str) -> tuple[Story, Params]:
    """The model that a folder, `folder@version` or a run means.

    Raises ConfigError where there is none.
    """
    return _found(reference)[:2]


def _found(reference: str) -> tuple[Story, Params, list[str] | None]:
    """A model, and the texts that meant a missing entry in the data that it was fitted to."""
    from genstream.models import ModelStore
    from genstream.store import load_checkpoint

    folder, version = folder_and_version(reference)
    if is_stored(folder):
        if version and not version.isdigit():
            raise ConfigError(f"model {reference!r}: a version is a number, as in {folder}@3")
        store = ModelStore(folder)
        number: Any = int(version) if version else "champion"
        story, state = store.load(number)
        return story, state.params, store.snapshot().version(number).record.get("null_values")
    try:
        run = Run.find(reference)
    except ConfigError:
        there = sorted(str(p.parent) for p in Path("models").glob("*/manifests"))
        known = f"; there are {', '.join(there)}" if there else ""
        raise ConfigError(f"no model and no run {reference!r}{known}") from None
    found = load_checkpoint(run.checkpoint)
    if found is None:
        raise ConfigError(f"run {run.id} has not begun to fit: `genstream resume {run.id}`")
    return found[0], found[1].params, run.config.data.null_values


Ids = list[str] | list[int]


@dataclass(frozen=True)
class _Wanted:
    """What is read of rows, and what they are known by in what is written."""

    schema: Schema
    id_column: str | None
    unseen_as_missing: bool
    null_values: Sequence[str] | None

    def known_by(self, ids: Ids | None, first_row: int, columns: dict[str, Any]) -> dict[str, Any]:
        """Columns to write, behind one of ids or else of numbers of rows."""
        if self.id_column in columns:
            raise ConfigError(
                f"--id {self.id_column}: a column of what is written is called so: rename it in "
                "the data, or leave --id out"
            )
        if ids is not None:
            return {self.id_column or "id": pa.array(ids)} | columns
        n_rows = len(next(iter(columns.values())))
        return {"row": np.arange(first_row, first_row + n_rows)} | columns


def _read(data: str, wanted: _Wanted, size: int | None = None) -> Iterator[tuple[Rows, Ids | None]]:
    """Rows with the model's columns, and their ids, chunk by chunk, at most `size` at a time."""
    for rows, ids in _chunks(data, wanted):
        step = size or max(rows.n_rows, 1)
        for first in range(0, rows.n_rows, step):
            part = slice(first, first + step)
            yield rows[part], None if ids is None else ids[part]


def _chunks(data: str, wanted: _Wanted) -> Iterator[tuple[Rows, Ids | None]]:
    from genstream.sources import rows_of_piece
    from genstream.store import Dataset
    from genstream.tables import Encoder, read_tables

    id_column = wanted.id_column
    if is_stored(data):
        source = Dataset.open(data).source()
        has_ids = source.has_ids
        if id_column is not None and not has_ids:
            raise DataError(f"{data}: was ingested without an id, or some of it: leave --id out")
        take = _Recoded(data, source.schema, wanted.schema, wanted.unseen_as_missing)
        for i in range(len(source.chunk_rows)):
            yield take(source.read(i)), source.ids(i) if has_ids else None
        return
    for path in expand([data]):
        encoder = Encoder(
            wanted.schema,
            unseen="missing" if wanted.unseen_as_missing else "error",
            null_values=wanted.null_values,
        )
        names = list(dict.fromkeys([*wanted.schema.names, *([id_column] if id_column else [])]))
        first = 0
        for table in read_tables(path, columns=names, chunk_rows=rows_of_piece(len(names))):
            rows = encoder.encode(table, first_row=first, place=path)
            ids = encoder.ids(table, id_column, first_row=first, place=path) if id_column else None
            yield rows, ids
            first += rows.n_rows


class _Recoded:
    """Takes a model's columns out of rows of a dataset, whose levels may be more or others."""

    def __init__(self, place: str, there: Schema, schema: Schema, unseen_as_missing: bool) -> None:
        self._place, self._unseen_as_missing = place, unseen_as_missing
        self._schema, self._first = schema, 0
        self._columns, self._codes = [], []
        for column in schema.columns:
            if column.name not in there.names:
                raise DataError(
                    f"{place}: has no column {column.name!r}, which the model needs; it has "
                    f"{', '.join(there.names)}"
                )
            found = there[column.name]
            if found.kind != column.kind:
                raise DataError(
                    f"{place}: column {column.name!r} is {found.kind} there and {column.kind} in "
                    "the model"
                )
            codes = {label: code for code, label in enumerate(column.levels)}
            self._columns.append(there.index(column.name))
            self._codes.append(
                np.array([codes.get(label, np.nan) for label in found.levels])
                if found.levels != column.levels
                else None
            )
        self._levels = [there.columns[j].levels for j in self._columns]

    def __call__(self, rows: Rows) -> Rows:
        values = rows.filled()[:, self._columns]
        for j, codes in enumerate(self._codes):
            if codes is None:
                continue
            seen = ~np.isnan(values[:, j])
            before = values[seen, j].astype(np.int64)
            values[seen, j] = codes[before]
            odd = np.flatnonzero(seen & np.isnan(values[:, j]))
            if len(odd) and not self._unseen_as_missing:
                label = self._levels[j][before[np.isnan(codes[before])][0]]
                raise DataError(
                    f"{self._place}: row {self._first + odd[0]}, column "
                    f"{self._schema.names[j]!r}: the model never saw level {label!r}: say "
                    "--unseen-as-missing, or fit it anew"
                )
        self._first += rows.n_rows
        return Rows.of(values, rows.weights)


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
        # Whoever reads our output may have seen enough: end as quietly as other commands do.
        before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            yield writer.write
            writer.close()
            sys.stdout.buffer.flush()
        finally:
            signal.signal(signal.SIGPIPE, before)
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
