"""Datasets and states at rest: immutable pieces under numbered manifests.

A dataset is a ledger of batches, each of which names the segments that hold its rows. It changes by
commits only, as `genstream.manifests` says, and a reader sees all of a commit or nothing of it.
Models, which are states with versions, are `genstream.models`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genstream.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    DataError,
    GenstreamError,
    StorageError,
)
from genstream.learn import FitState, story_of
from genstream.manifests import (
    LocalStorage,
    Manifest,
    Manifests,
    Piece,
    PieceRef,
    Storage,
    collect,
    forget_ledgers,
    grow_ledger,
    read_ledger,
)
from genstream.rows import Rows
from genstream.schema import Column, Kind, Schema
from genstream.segments import DType, Ids, Segment, SegmentWriter, read_record, write_record
from genstream.sources import Piece as RowPiece
from genstream.sources import content_digest, rows_of_piece
from genstream.story import Story

# Times a file is encoded, where other writers add levels of their own at the same time.
ATTEMPTS = 4
# Where a model keeps its pieces: states, pages of its ledger, rows held out, references.
MODEL_FOLDERS = ("states", "ledger", "held", "references")
# Pieces that nothing names are kept this long, in s: they may belong to a commit under way.
GRACE = 24 * 3600.0


@dataclass(frozen=True)
class Batch:
    """Rows that arrived together.

    `id` is the SHA-256 of the bytes they came as, `segments` the pieces that hold them, `columns`
    all that the file had, modelled or not, and `digest` that of its rows as a multiset (both empty
    where none was noted).
    """

    id: str
    name: str
    n_rows: int
    time: str
    status: str
    segments: tuple[dict[str, Any], ...]
    columns: tuple[str, ...] = ()
    digest: str = ""

    @property
    def key(self) -> int:
        """A number for the batch, by which its rows are told from those of others."""
        return int(self.id[:16], 16)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` undoes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Batch:
        """Inverse of `to_json`."""
        columns = tuple(value.get("columns", ()))
        return cls(**{**value, "segments": tuple(value["segments"]), "columns": columns})


class Dataset:
    """A dataset in a folder, as of one manifest.

    `ingest` and `append_batch` make one, `open` opens it. Reading goes through `source`, which
    stays with this manifest whatever is appended meanwhile.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest
        self.schema = Schema.from_json(manifest.content["schema"])
        self.dtype: DType = manifest.content["dtype"]
        self.weighted: bool = manifest.content["weighted"]

    @classmethod
    def open(cls, path: str | Path, manifest: int | None = None) -> Dataset:
        """The dataset in a folder, of its newest manifest or of an older one.

        Raises StorageError where there is none, CorruptError where its manifest is damaged.
        """
        storage = LocalStorage(Path(path))
        manifests = Manifests(storage, "dataset")
        found = manifests.latest() if manifest is None else manifests.read(manifest)
        if found is None:
            raise StorageError(f"{path}: no dataset there: ingest something into it first")
        return cls(storage, found)

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """The ledger, oldest first."""
        return tuple(Batch.from_json(b) for b in read_ledger(self.storage, self.manifest.content))

    @property
    def n_rows(self) -> int:
        """Rows of all batches."""
        return sum(batch.n_rows for batch in self.batches)

    def source(
        self,
        manifest: int | None = None,
        batches: Sequence[str] | None = None,
        columns: Sequence[Column] = (),
    ) -> DatasetSource:
        """The rows of this manifest, or of the one given, as chunks.

        `batches` are ids of those whose rows are wanted; left out, all are. Limits, resolution and
        unit of a column, which are no part of what is stored of its entries, are as its namesake in
        `columns` says, where there is one of its kind and it says any. Raises DataError where there
        are no rows.
        """
        of = self if manifest is None else Dataset.open(self.storage.name, manifest)
        return DatasetSource(of, None if batches is None else tuple(batches), tuple(columns))


class LevelsError(ConflictError):
    """Another writer gave the next codes of a categorical column to other levels."""


def append_batch(
    path: str | Path,
    name: str,
    pieces: Iterable[Rows | tuple[Rows, Ids]],
    schema: Callable[[], Schema],
    *,
    dtype: DType = "float64",
    weighted: bool = False,
    batch_id: str | None = None,
    columns: Sequence[str] = (),
    digest: Callable[[], str] = str,
    check: Callable[[], None] | None = None,
) -> tuple[Dataset, Batch | None]:
    """Store rows as one batch of a dataset and commit it, or leave no trace of it.

    Parameters
    ----------
    path
        The dataset's folder; the first batch makes it.
    name
        What the batch is called in the ledger.
    pieces
        Its rows, in order and a bounded number at a time, with ids if they have any.
    schema
        Called when all rows are written: their columns, with all levels seen.
    dtype, weighted
        How values are stored, and whether weights are.
    batch_id
        The SHA-256 of the bytes the rows came as; that of the rows themselves if left out.
    columns
        All columns that they came with, modelled or not.
    digest
        Called when all rows are written: their digest as a multiset.
    check
        Called just before the commit; what it raises undoes the batch.

    Returns
    -------
    The dataset with the batch, and the batch, or None where one with the same id was there.

    Raises
    ------
    DataError
        Where there are no rows, or they do not fit the dataset.
    ConflictError
        Where other writers committed first again and again.
    LevelsError
        Where another writer learned other levels meanwhile: encode the rows again.
    """
    storage = LocalStorage(Path(path))
    writer = None
    try:
        for piece in pieces:
            rows, ids = piece if isinstance(piece, tuple) else (piece, None)
            writer = writer or SegmentWriter(
                storage, rows.n_features, dtype, weighted=weighted, digest=batch_id is None
            )
            writer.add(rows, ids)
        if writer is None or not writer.n_rows:
            raise DataError(f"{name}: has no rows")
        segments = writer.close()
        if check is not None:
            check()
        batch = Batch(
            batch_id or writer.digest,
            name,
            writer.n_rows,
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            "stored",
            tuple(segments),
            tuple(columns),
            digest(),
        )
        found = schema()
    except BaseException:
        if writer is not None:
            with contextlib.suppress(StorageError):
                writer.discard()
        raise
    empty: dict[str, Any] = {"dtype": dtype, "weighted": weighted, "pages": [], "batches": []}
    manifests = Manifests(storage, "dataset")
    try:
        made = manifests.commit(
            lambda head: _grown(storage, empty if head is None else head.content, batch, found)
        )
    except GenstreamError:
        # An interrupt may strike just when the commit has been made, and then, or where the ledger
        # cannot be read to be sure, the pieces stay: `gc` finds out whether anything names them.
        with contextlib.suppress(GenstreamError):
            head = manifests.latest()
            known = () if head is None else read_ledger(storage, head.content)
            if all(entry["id"] != batch.id for entry in known):
                writer.discard()
        raise
    if made is None:
        writer.discard()
        return Dataset.open(path), None
    return Dataset(storage, made), batch


def _grown(
    storage: Storage, content: dict[str, Any], batch: Batch, columns: Schema
) -> dict[str, Any] | None:
    """The content of the next manifest, or None where the batch is there already."""
    if any(entry["id"] == batch.id for entry in read_ledger(storage, content)):
        return None
    if "schema" in content:
        known = Schema.from_json(content["schema"])
        if known.names != columns.names or known.kinds != columns.kinds:
            raise DataError(
                f"{batch.name}: has the columns {_described(columns)}; the dataset "
                f"{storage.name} has {_described(known)}"
            )
        # Another writer may have added levels: the codes of ours would mean something else.
        if not (extends(columns, known) or extends(known, columns)):
            raise LevelsError(
                f"{storage.name}: another writer added levels meanwhile: run this again"
            )
        columns = columns.completed(known)
    ledger = grow_ledger(storage, content, [batch.to_json()])
    return {**content, "schema": columns.to_json(), **ledger}


def _described(schema: Schema) -> str:
    return ", ".join(f"{column.name} ({column.kind})" for column in schema.columns)


def extends(schema: Schema, known: Schema) -> bool:
    """Whether `schema` is `known`, or that with further levels at the end of some columns."""
    if schema.names != known.names or schema.kinds != known.kinds:
        return False
    pairs = zip(schema.columns, known.columns, strict=True)
    return all(new.levels[: len(old.levels)] == old.levels for new, old in pairs)


class DatasetSource:
    """The rows of a dataset as of one manifest, or of some of its batches.

    See `genstream.sources.Source`.
    """

    def __init__(
        self,
        dataset: Dataset,
        only: tuple[str, ...] | None = None,
        columns: tuple[Column, ...] = (),
    ) -> None:
        self._columns = columns
        self.schema = _described_as(dataset.schema, columns)
        self.dtype = np.dtype(dataset.dtype)
        self._storage, self._manifest, self._only = dataset.storage, dataset.manifest, only
        self._weighted = dataset.weighted
        self._segments: list[dict[str, Any]] = []
        chunks: list[int] = []
        # (segment, chunk within it, batch key, first row within the batch) of every chunk.
        self._places: list[tuple[int, int, int, int]] = []
        for batch in dataset.batches:
            if only is not None and batch.id not in only:
                continue
            first = 0
            for entry in batch.segments:
                for i, start in enumerate(range(0, entry["n_rows"], entry["chunk_rows"])):
                    n = min(entry["chunk_rows"], entry["n_rows"] - start)
                    self._places.append((len(self._segments), i, batch.key, first))
                    chunks.append(n)
                    first += n
                self._segments.append(dict(entry))
        if not chunks:
            raise DataError(f"{dataset.storage.name}: the dataset has no rows yet")
        self.chunk_rows = tuple(chunks)
        self._opened: dict[int, Segment] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A manifest's number says it all: a ledger of thousands of batches need not travel with
        # every task, and a worker opens each segment's index only once.
        manifest = self._manifest.number, self._manifest.sha256
        return _pinned, (self._storage, *manifest, self._only, self._columns)

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest decoded chunk, in bytes."""
        width = self.schema.n_features * (self.dtype.itemsize + 1) + 8 * self._weighted
        return max(self.chunk_rows) * width

    def read(self, i: int) -> Rows:
        """Chunk `i`. Raises CorruptError, naming the file, where it is not as committed."""
        number, chunk, _, _ = self._places[i]
        return self._segment(number).read(chunk)

    @property
    def has_ids(self) -> bool:
        """Whether all rows have ids."""
        return all(self._segment(number).has_ids for number in range(len(self._segments)))

    def ids(self, i: int) -> list[Any] | None:
        """Ids of the rows of chunk `i`, or None where they have none."""
        number, chunk, _, _ = self._places[i]
        return self._segment(number).ids(chunk)

    def _segment(self, number: int) -> Segment:
        found = self._opened.get(number)
        if found is None:
            found = self._opened[number] = Segment(self._storage, self._segments[number])
        return found

    def origin(self, i: int) -> tuple[RowPiece, ...]:
        """The batch of chunk `i`, and where in it the chunk begins."""
        _, _, key, first = self._places[i]
        return ((key, first, self.chunk_rows[i]),)

    def identity(self) -> dict[str, Any]:
        """Kind, place, manifest and its digest, rows, chunks."""
        return {
            "kind": "dataset",
            "name": self._storage.name,
            "manifest": self._manifest.number,
            "sha256": self._manifest.sha256,
            "n_rows": sum(self.chunk_rows),
            "n_chunks": len(self.chunk_rows),
            "columns": list(self.schema.names),
        } | ({} if self._only is None else {"batches": list(self._only)})


def _described_as(schema: Schema, columns: Iterable[Column]) -> Schema:
    """A schema with what columns of the same names and kinds say of limits, resolution and unit."""
    told = {(column.name, column.kind): column for column in columns}
    return Schema(
        tuple(
            replace(new, levels=old.levels).completed(old)
            if (new := told.get((old.name, old.kind))) is not None
            else old
            for old in schema.columns
        )
    )


@functools.lru_cache(maxsize=8)
def _pinned(
    storage: Storage,
    number: int,
    sha256: str,
    only: tuple[str, ...] | None,
    columns: tuple[Column, ...],
) -> DatasetSource:
    manifest = Manifests(storage, "dataset").read(number)
    if manifest.sha256 != sha256:
        raise CorruptError(f"{storage.name}: manifest {number} is not the one that was pinned")
    return DatasetSource(Dataset(storage, manifest), only, columns)


# --- ingest --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ingested:
    """What became of one file: `stored`, or `duplicate` where its bytes were there already."""

    name: str
    id: str
    rows: int
    status: Literal["stored", "duplicate"]


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did: the manifest that holds the data, and every file looked at."""

    manifest: int
    batches: tuple[Ingested, ...]
    columns: dict[str, Kind]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "batches": [asdict(batch) for batch in self.batches]}


def ingest(
    paths: Sequence[str | Path],
    dataset: str | Path,
    *,
    columns: Mapping[str, Kind | Column] | None = None,
    id_column: str | None = None,
    weights: str | None = None,
    missing: Literal["allow", "forbid"] = "allow",
    null_values: Sequence[str] | None = None,
    dtype: DType = "float64",
    chunk_rows: int = 65_536,
    batch: tuple[str, str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> IngestReport:
    """Bring files into a dataset, each as one batch, by chunks and never whole.

    Parameters
    ----------
    paths
        Files of any format that `genstream.tables.read_tables` knows.
    dataset
        The folder; made where it is not there yet.
    columns
        Kinds, or columns with their levels, by name; what the first file suggests if left out.
        A dataset that exists keeps its own columns, and only learns further levels.
    id_column, weights
        Columns carried beside the data: ids of rows, and their weights.
    missing
        `forbid` refuses the first gap.
    null_values
        Texts that stand for a missing entry.
    dtype
        How a new dataset stores values.
    chunk_rows
        Rows by whose first so many the kinds of columns are told, and the most that are decoded at
        once; wide rows come fewer at a time.
    batch
        Id and name of the one batch in `paths`, where it is a copy that nobody writes to; left
        out, files are known by their bytes and called after themselves.
    on_progress
        Called with the rows brought in so far, over all files.

    Raises
    ------
    DataError
        Naming file, row and column; the file leaves nothing behind, those before it stay.
    StorageError
        Where something cannot be read or written.
    """
    from genstream.formats import table_columns

    if not paths:
        raise ConfigError("there is no file to ingest")
    target, done = Path(dataset), 0
    reports: list[Ingested] = []
    manifests = Manifests(LocalStorage(target), "dataset")
    opened = Dataset.open(target) if manifests.latest() is not None else None
    for path in paths:
        identity, name = batch or (content_digest(path), Path(path).name)
        known = {b.id: b for b in opened.batches} if opened else {}
        if identity in known:
            reports.append(Ingested(name, identity, known[identity].n_rows, "duplicate"))
            continue
        reader = _Reader(path, columns, id_column, weights, missing, null_values, chunk_rows)
        for attempts_left in reversed(range(ATTEMPTS)):

            def told(n_rows: int, before: int = done) -> None:
                if on_progress is not None:
                    on_progress(before + n_rows)

            stored_as = opened.dtype if opened else dtype
            pieces, schema, digest = reader.start(opened, stored_as, told)
            try:
                opened, added = append_batch(
                    target,
                    name,
                    pieces,
                    schema,
                    dtype=stored_as,
                    weighted=opened.weighted if opened else weights is not None,
                    batch_id=identity,
                    columns=table_columns(path),
                    digest=digest,
                    check=None if batch else functools.partial(_unchanged, path, identity),
                )
                break
            except LevelsError:
                # The codes of this file's new levels are taken: read it again with those known.
                if not attempts_left:
                    raise
                opened = Dataset.open(target)
        assert opened is not None
        stored = added or next(b for b in opened.batches if b.id == identity)
        done += stored.n_rows
        reports.append(
            Ingested(stored.name, identity, stored.n_rows, "stored" if added else "duplicate")
        )
    assert opened is not None
    kinds = dict(zip(opened.schema.names, opened.schema.kinds, strict=True))
    return IngestReport(opened.manifest.number, tuple(reports), kinds)


@dataclass(frozen=True)
class _Reader:
    """How one file becomes rows; it can be read again when others were faster to add levels."""

    path: str | Path
    columns: Mapping[str, Kind | Column] | None
    id_column: str | None
    weights: str | None
    missing: Literal["allow", "forbid"]
    null_values: Sequence[str] | None
    chunk_rows: int

    def start(
        self, opened: Dataset | None, dtype: DType, on_rows: Callable[[int], None]
    ) -> tuple[Iterator[Rows | tuple[Rows, Ids]], Callable[[], Schema], Callable[[], str]]:
        """The rows, to be read once, and what gives columns and digest when all are read."""
        from genstream.formats import read_tables, table_columns
        from genstream.landing import RowMultiset, by_label
        from genstream.tables import Encoder

        place, digest = str(self.path), RowMultiset()
        encoder = Encoder(
            self.columns,
            null_values=self.null_values,
            missing=self.missing,
            known=opened.schema if opened else None,
            carried=[column for column in (self.id_column, self.weights) if column is not None],
        )

        def pieces() -> Iterator[Rows | tuple[Rows, Ids]]:
            width = len(encoder.wanted or table_columns(self.path))
            chunk_rows = min(self.chunk_rows, rows_of_piece(width))
            if encoder.wanted is None and chunk_rows < self.chunk_rows:
                # Kinds do not depend on how wide rows are: as many are looked at.
                beginning = read_tables(self.path, chunk_rows=chunk_rows)
                encoder.infer(_first_rows(beginning, self.chunk_rows), place=place)
            first = 0
            for table in read_tables(self.path, columns=encoder.wanted, chunk_rows=chunk_rows):
                rows = encoder.encode(table, first_row=first, place=place)
                if self.weights is not None:
                    found = encoder.weights(table, self.weights, first_row=first, place=place)
                    rows = replace(rows, weights=found)
                # As they are stored: float32 rounds.
                stored = replace(rows, values=rows.values.astype(dtype, copy=False))
                digest.add(by_label(stored, encoder.levels))
                if self.id_column is None:
                    yield rows
                else:
                    yield rows, encoder.ids(table, self.id_column, first_row=first, place=place)
                first += rows.n_rows
                on_rows(first)

        return pieces(), lambda: encoder.schema, digest.hexdigest


def _first_rows(tables: Iterable[Any], n: int) -> Iterator[Any]:
    """The first `n` rows of tables that follow each other."""
    for table in tables:
        yield table.slice(0, n)
        n -= table.num_rows
        if n <= 0:
            return


def _unchanged(path: str | Path, identity: str) -> None:
    if content_digest(path) != identity:
        raise DataError(f"{path}: changed while it was read: ingest it again")


# --- states --------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, story: Story, state: FitState, *, keep: int = 3) -> int:
    """Commit the state of a running fit, and drop all but the newest `keep`.

    The state's dataset names its story. Returns the number of the checkpoint. Raises StorageError
    where it cannot be written; those before it then stay.
    """
    storage = LocalStorage(Path(path))
    ref = write_record(storage, "states", state.to_dataset(story), {})
    manifests = Manifests(storage, "checkpoint")
    made = manifests.commit(lambda _: {"state": ref.to_json(), "step": state.step})
    assert made is not None
    kept = {}
    for number in manifests.numbers():
        if number > made.number - keep:
            kept[number] = manifests.read(number).content["state"]["key"]
        else:
            manifests.delete(number)
    collect(storage, set(kept.values()), "states", older_than=0.0)
    return made.number


def load_checkpoint(path: str | Path) -> tuple[Story, FitState] | None:
    """The newest state of a fit and its story, or None where none was saved yet.

    Raises CorruptError, naming the file, where it is damaged.
    """
    storage = LocalStorage(Path(path))
    found = Manifests(storage, "checkpoint").latest()
    return None if found is None else read_state(storage, found.content["state"])


def read_state(storage: Storage, ref: Mapping[str, Any]) -> tuple[Story, FitState]:
    """Story and state of a piece. Raises CorruptError where it is missing or damaged."""
    dataset, _ = read_record(storage, PieceRef.from_json(ref))
    story = story_of(dataset)
    return story, FitState.from_dataset(dataset, story)


# --- upkeep --------------------------------------------------------------------------------------


def pieces_of(storage: Storage, manifest: Manifest) -> Iterator[PieceRef]:
    """The pieces that a manifest of any kind names, in itself or in pages of its ledger."""
    content = manifest.content
    if manifest.kind == "dataset":
        yield from map(PieceRef.from_json, content["pages"])
        for batch in read_ledger(storage, content):
            yield from map(PieceRef.from_json, batch["segments"])
    elif manifest.kind == "model":
        for version in content["versions"]:
            yield PieceRef.from_json(version["state"])
        yield from map(PieceRef.from_json, content.get("pages", []))
        yield from (PieceRef.from_json(entry["rows"]) for entry in content.get("held", []))
        if content.get("reference"):
            yield PieceRef.from_json(content["reference"])
    else:
        yield PieceRef.from_json(content["state"])


def _newest(path: str | Path) -> tuple[LocalStorage, Manifest]:
    storage = LocalStorage(Path(path))
    manifest = Manifests(storage).latest()
    if manifest is None:
        raise StorageError(f"{path}: no dataset or model there")
    return storage, manifest


def fsck(path: str | Path) -> tuple[str, ...]:
    """What is wrong with a dataset, a model or the checkpoints in a folder: one line a file.

    Every byte that the newest manifest names, directly or not, is read and its digest compared; one
    file is in memory at a time. Nothing is changed. Raises StorageError where nothing is there and
    CorruptError where the ledger itself is damaged.
    """
    storage, manifest = _newest(path)
    forget_ledgers()
    problems = []
    for ref in pieces_of(storage, manifest):
        try:
            piece = Piece(storage, ref)
        except CorruptError as error:
            problems.append(str(error))
            continue
        for name in piece.names:
            try:
                piece.read(name, whole=True)
            except CorruptError as error:
                problems.append(str(error))
    return tuple(problems)


def gc(path: str | Path, *, older_than: float = GRACE) -> int:
    """Delete pieces that nothing in use names and that are older than so many seconds.

    Such files come from writers that were killed, and from states that newer ones replaced. Returns
    the number of files deleted. Raises as `fsck` does, and then deletes nothing.
    """
    storage, manifest = _newest(path)
    in_use = [manifest]
    if manifest.kind == "checkpoint":
        # Old manifests go with their states, so those that are left are wanted.
        manifests = Manifests(storage)
        in_use = [manifests.read(number) for number in manifests.numbers()]
    named = {ref.key for one in in_use for ref in pieces_of(storage, one)}
    folders = {"dataset": ("segments", "ledger"), "model": MODEL_FOLDERS}.get(
        manifest.kind, ("states",)
    )
    return sum(collect(storage, named, folder, older_than=older_than) for folder in folders)
