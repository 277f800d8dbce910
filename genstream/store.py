"""Datasets and models at rest: immutable pieces under numbered manifests.

A dataset is a ledger of batches, each of which names the segments that hold its rows. A model is a
list of versions, one of them the champion, each of which names a state. Both change by commits
only, as `genstream.manifests` says, and a reader sees all of a commit or nothing of it.
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
    PieceWriter,
    Storage,
    collect,
)
from genstream.rows import Rows
from genstream.schema import Column, Kind, Schema
from genstream.segments import DType, Ids, Segment, SegmentWriter, read_record, write_record
from genstream.sources import Piece as RowPiece
from genstream.sources import content_digest
from genstream.story import Story

# Ledger entries that a manifest itself holds; older ones move to pages of their own, so that a
# commit does not grow with history.
PAGE = 256
# Times a file is encoded, where other writers add levels of their own at the same time.
ATTEMPTS = 4
# Pieces that nothing names are kept this long, in s: they may belong to a commit under way.
GRACE = 24 * 3600.0


@dataclass(frozen=True)
class Batch:
    """Rows that arrived together.

    `id` is the SHA-256 of the bytes they came as, `segments` the pieces that hold them.
    """

    id: str
    name: str
    n_rows: int
    time: str
    status: str
    segments: tuple[dict[str, Any], ...]

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
        return cls(**{**value, "segments": tuple(value["segments"])})


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
        return tuple(Batch.from_json(b) for b in _ledger(self.storage, self.manifest.content))

    @property
    def n_rows(self) -> int:
        """Rows of all batches."""
        return sum(batch.n_rows for batch in self.batches)

    def source(self, manifest: int | None = None) -> DatasetSource:
        """The rows of this manifest, or of the one given, as chunks.

        Raises DataError where there are none.
        """
        of = self if manifest is None else Dataset.open(self.storage.name, manifest)
        return DatasetSource(of)


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
        )
        columns = schema()
    except BaseException:
        if writer is not None:
            with contextlib.suppress(StorageError):
                writer.discard()
        raise
    empty: dict[str, Any] = {"dtype": dtype, "weighted": weighted, "pages": [], "batches": []}
    manifests = Manifests(storage, "dataset")
    try:
        made = manifests.commit(
            lambda head: _grown(storage, empty if head is None else head.content, batch, columns)
        )
    except GenstreamError:
        # An interrupt may strike just when the commit has been made, and then, or where the ledger
        # cannot be read to be sure, the pieces stay: `gc` finds out whether anything names them.
        with contextlib.suppress(GenstreamError):
            head = manifests.latest()
            known = () if head is None else _ledger(storage, head.content)
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
    if any(entry["id"] == batch.id for entry in _ledger(storage, content)):
        return None
    if "schema" in content:
        known = Schema.from_json(content["schema"])
        if known.names != columns.names or known.kinds != columns.kinds:
            raise DataError(
                f"{batch.name}: has the columns {_described(columns)}; the dataset "
                f"{storage.name} has {_described(known)}"
            )
        if not extends(columns, known):
            # Another writer added levels: the codes of ours would mean something else.
            if not extends(known, columns):
                raise LevelsError(
                    f"{storage.name}: another writer added levels meanwhile: run this again"
                )
            columns = known
    entries = [*content["batches"], batch.to_json()]
    pages = list(content["pages"])
    while len(entries) >= 2 * PAGE:
        page = PieceWriter(storage, "ledger")
        pages.append(page.seal({"batches": entries[:PAGE]}).to_json())
        entries = entries[PAGE:]
    return {**content, "schema": columns.to_json(), "pages": pages, "batches": entries}


def _described(schema: Schema) -> str:
    return ", ".join(f"{column.name} ({column.kind})" for column in schema.columns)


def extends(schema: Schema, known: Schema) -> bool:
    """Whether `schema` is `known`, or that with further levels at the end of some columns."""
    if schema.names != known.names or schema.kinds != known.kinds:
        return False
    pairs = zip(schema.columns, known.columns, strict=True)
    return all(new.levels[: len(old.levels)] == old.levels for new, old in pairs)


def _ledger(storage: Storage, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for page in content["pages"]:
        yield from _page(storage, PieceRef.from_json(page))
    yield from content["batches"]


@functools.lru_cache(maxsize=64)
def _page(storage: Storage, ref: PieceRef) -> tuple[dict[str, Any], ...]:
    return tuple(Piece(storage, ref).content["batches"])


class DatasetSource:
    """The rows of a dataset as of one manifest; see `genstream.sources.Source`."""

    def __init__(self, dataset: Dataset) -> None:
        self.schema = dataset.schema
        self.dtype = np.dtype(dataset.dtype)
        self._storage, self._manifest = dataset.storage, dataset.manifest
        self._weighted = dataset.weighted
        self._segments: list[dict[str, Any]] = []
        chunks: list[int] = []
        # (segment, chunk within it, batch key, first row within the batch) of every chunk.
        self._places: list[tuple[int, int, int, int]] = []
        for batch in dataset.batches:
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
        return _pinned, (self._storage, self._manifest.number, self._manifest.sha256)

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest decoded chunk, in bytes."""
        width = self.schema.n_features * (self.dtype.itemsize + 1) + 8 * self._weighted
        return max(self.chunk_rows) * width

    def read(self, i: int) -> Rows:
        """Chunk `i`. Raises CorruptError, naming the file, where it is not as committed."""
        number, chunk, _, _ = self._places[i]
        return self._segment(number).read(chunk)

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
        }


@functools.lru_cache(maxsize=8)
def _pinned(storage: Storage, number: int, sha256: str) -> DatasetSource:
    manifest = Manifests(storage, "dataset").read(number)
    if manifest.sha256 != sha256:
        raise CorruptError(f"{storage.name}: manifest {number} is not the one that was pinned")
    return DatasetSource(Dataset(storage, manifest))


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
    on_progress
        Called with the rows brought in so far, over all files.

    Raises
    ------
    DataError
        Naming file, row and column; the file leaves nothing behind, those before it stay.
    StorageError
        Where something cannot be read or written.
    """
    if not paths:
        raise ConfigError("there is no file to ingest")
    target, done = Path(dataset), 0
    reports: list[Ingested] = []
    manifests = Manifests(LocalStorage(target), "dataset")
    opened = Dataset.open(target) if manifests.latest() is not None else None
    for path in paths:
        identity = content_digest(path)
        known = {batch.id: batch for batch in opened.batches} if opened else {}
        if identity in known:
            reports.append(Ingested(Path(path).name, identity, known[identity].n_rows, "duplicate"))
            continue
        reader = _Reader(path, columns, id_column, weights, missing, null_values, chunk_rows)
        for attempts_left in reversed(range(ATTEMPTS)):

            def told(n_rows: int, before: int = done) -> None:
                if on_progress is not None:
                    on_progress(before + n_rows)

            pieces, schema = reader.start(opened, told)
            try:
                opened, batch = append_batch(
                    target,
                    reader.name,
                    pieces,
                    schema,
                    dtype=opened.dtype if opened else dtype,
                    weighted=opened.weighted if opened else weights is not None,
                    batch_id=identity,
                    check=functools.partial(_unchanged, path, identity),
                )
                break
            except LevelsError:
                # The codes of this file's new levels are taken: read it again with those known.
                if not attempts_left:
                    raise
                opened = Dataset.open(target)
        assert opened is not None
        stored = batch or next(b for b in opened.batches if b.id == identity)
        done += stored.n_rows
        reports.append(
            Ingested(stored.name, identity, stored.n_rows, "stored" if batch else "duplicate")
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

    @property
    def name(self) -> str:
        return Path(self.path).name

    def start(
        self, opened: Dataset | None, on_rows: Callable[[int], None]
    ) -> tuple[Iterator[Rows | tuple[Rows, Ids]], Callable[[], Schema]]:
        """The rows, to be read once, and what gives their columns when all are read."""
        from genstream.tables import Encoder, read_tables

        place = str(self.path)
        encoder = Encoder(
            self.columns,
            null_values=self.null_values,
            missing=self.missing,
            known=opened.schema if opened else None,
            carried=[column for column in (self.id_column, self.weights) if column is not None],
        )

        def pieces() -> Iterator[Rows | tuple[Rows, Ids]]:
            first = 0
            for table in read_tables(self.path, columns=encoder.wanted, chunk_rows=self.chunk_rows):
                rows = encoder.encode(table, first_row=first, place=place)
                if self.weights is not None:
                    found = encoder.weights(table, self.weights, first_row=first, place=place)
                    rows = replace(rows, weights=found)
                if self.id_column is None:
                    yield rows
                else:
                    yield rows, encoder.ids(table, self.id_column, first_row=first, place=place)
                first += rows.n_rows
                on_rows(first)

        return pieces(), lambda: encoder.schema


def _unchanged(path: str | Path, identity: str) -> None:
    if content_digest(path) != identity:
        raise DataError(f"{path}: changed while it was read: ingest it again")


# --- states and models ---------------------------------------------------------------------------


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
    return None if found is None else _state(storage, found.content["state"])


def _state(storage: Storage, ref: Mapping[str, Any]) -> tuple[Story, FitState]:
    dataset, _ = read_record(storage, PieceRef.from_json(ref))
    story = story_of(dataset)
    return story, FitState.from_dataset(dataset, story)


@dataclass(frozen=True)
class Version:
    """One version of a model: where its state is, and what was found when it was published."""

    number: int
    time: str
    state: dict[str, str]
    record: dict[str, Any]


class ModelStore:
    """Versions of a model in a folder, one of them the champion.

    `publish` and `rollback` are commits; readers see the champion of one manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.storage: Storage = LocalStorage(self.path)
        self._manifests = Manifests(self.storage, "model")

    def _latest(self) -> Manifest:
        found = self._manifests.latest()
        if found is None:
            raise StorageError(f"{self.path}: no model there: publish one first")
        return found

    def publish(
        self, story: Story, state: FitState, record: Mapping[str, Any], *, keep: int = 30
    ) -> int:
        """Add a version and make it the champion; the oldest beyond `keep` are dropped.

        `record` is what a user wants to know of it (scores, rows, the run), as JSON. A `run` in it
        that a version already has makes this a repetition, which changes nothing. Returns the
        version's number. Raises ConflictError where other writers always committed first.
        """
        run = record.get("run")
        known = self._manifests.latest()
        if known is not None and run is not None:
            for entry in known.content["versions"]:
                if entry["record"].get("run") == run:
                    return int(entry["number"])
        ref = write_record(self.storage, "states", state.to_dataset(story), {})
        now = datetime.now(UTC).isoformat(timespec="milliseconds")

        def build(head: Manifest | None) -> dict[str, Any]:
            versions = [] if head is None else list(head.content["versions"])
            number = max((entry["number"] for entry in versions), default=0) + 1
            entry = Version(number, now, ref.to_json(), dict(record))
            return {"versions": [*versions, asdict(entry)][-keep:], "champion": number}

        made = self._manifests.commit(build)
        assert made is not None
        named = {entry["state"]["key"] for entry in made.content["versions"]}
        collect(self.storage, named, "states", older_than=GRACE)
        return int(made.content["champion"])

    def versions(self) -> tuple[Version, ...]:
        """All versions, oldest first. Raises StorageError where there is no model."""
        return tuple(Version(**entry) for entry in self._latest().content["versions"])

    @property
    def champion(self) -> int:
        """Number of the version in use. Raises StorageError where there is no model."""
        return int(self._latest().content["champion"])

    def rollback(self, version: int | None = None) -> int:
        """Make an older version the champion: the one before it, or the one given.

        Raises ConfigError where there is no such version.
        """

        def build(head: Manifest | None) -> dict[str, Any]:
            if head is None:
                raise StorageError(f"{self.path}: no model there: publish one first")
            numbers = [entry["number"] for entry in head.content["versions"]]
            now = head.content["champion"]
            older = [n for n in numbers if n < now]
            wanted = version if version is not None else max(older, default=None)
            if wanted not in numbers:
                listed = ", ".join(str(n) for n in numbers)
                raise ConfigError(
                    f"{self.path}: no version to go back to ({listed} are there, {now} is in use)"
                )
            return {**head.content, "champion": wanted}

        made = self._manifests.commit(build)
        assert made is not None
        return int(made.content["champion"])

    def load(self, version: int | Literal["champion"] = "champion") -> tuple[Story, FitState]:
        """Story and state of a version.

        Raises ConfigError where there is no such version, CorruptError where it is damaged.
        """
        content = self._latest().content
        number = content["champion"] if version == "champion" else version
        for entry in content["versions"]:
            if entry["number"] == number:
                return _state(self.storage, entry["state"])
        listed = ", ".join(str(entry["number"]) for entry in content["versions"])
        raise ConfigError(f"{self.path}: has no version {version}; it has {listed}")


def load(
    path: str | Path, version: int | Literal["champion"] = "champion"
) -> tuple[Story, FitState]:
    """Story and state of a published model; see `ModelStore.load`."""
    return ModelStore(path).load(version)


# --- upkeep --------------------------------------------------------------------------------------


def _pieces(storage: Storage, manifest: Manifest) -> Iterator[PieceRef]:
    """The pieces that a manifest of any kind names, in itself or in pages of its ledger."""
    content = manifest.content
    if manifest.kind == "dataset":
        yield from map(PieceRef.from_json, content["pages"])
        for batch in _ledger(storage, content):
            yield from map(PieceRef.from_json, batch["segments"])
    elif manifest.kind == "model":
        for version in content["versions"]:
            yield PieceRef.from_json(version["state"])
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
    _page.cache_clear()
    problems = []
    for ref in _pieces(storage, manifest):
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
    named = {ref.key for one in in_use for ref in _pieces(storage, one)}
    folders = ("segments", "ledger") if manifest.kind == "dataset" else ("states",)
    return sum(collect(storage, named, folder, older_than=older_than) for folder in folders)
