"""Sources that grow in place: which rows are new, and whether the old ones are still the same.

A zarr array or a parquet file is appended to by somebody else. A batch is then a range of its rows,
known by a digest of their content; what was learned from must still be there, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genstream.errors import ConfigError, CorruptError, DataError
from genstream.landing import Waiting, canonical, read_hint, write_hint
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import Piece, Source, n_rows


@dataclass(frozen=True)
class Range:
    """Rows `first` to `last` (exclusive) of a source.

    `digest` is the SHA-256 of their canonical bytes in order: float64, gaps and weights included,
    the same however they are chunked.
    """

    first: int
    last: int
    digest: str

    def batch_id(self, name: str) -> str:
        """Id of the batch that these rows of the source called `name` are (SHA-256)."""
        text = f"{name}\n{self.first} {self.last} {self.digest}\n"
        return hashlib.sha256(text.encode()).hexdigest()


class Growth:
    """Finds the rows that a source got since it was last learned from.

    Parameters
    ----------
    hints
        A file that remembers what was verified and how the files looked then, so that nothing is
        read where nothing changed. It may be lost or damaged; None: everything is read each time.
    settle
        Files that changed less than so many seconds ago are looked at twice.
    """

    def __init__(self, hints: str | Path | None = None, *, settle: float = 2.0) -> None:
        self.hints = None if hints is None else Path(hints)
        self.settle = settle

    def new_rows(self, source: Source, known: Sequence[Range]) -> Range | Waiting | None:
        """The rows after those known, once these are verified.

        Parameters
        ----------
        source
            What grows, opened just now; see `genstream.tables.open_source`.
        known
            The ranges learned from (or rejected), one after another from row 0.

        Returns
        -------
        The new range, None where there are no further rows, or `Waiting` where the source is being
        written to: open it again later.

        Raises
        ------
        DataError
            Naming the first range whose rows changed or are no longer there.
        ConfigError
            Where the ranges do not follow each other from row 0.
        """
        name = str(source.identity()["name"])
        done = _checked(known)
        looks = _looks(source)
        if self._in_motion(source, looks):
            return Waiting(name, name, f"it was written to within {self.settle:g} s")
        total = n_rows(source)
        verified = self._verified(name, looks)
        try:
            for one in known:
                if one not in verified:
                    _verify(source, name, one, total)
            found = None if total <= done else Range(done, total, digest(source, done, total))
        except (DataError, CorruptError):
            # Rows that are half-written look like changed or damaged ones.
            if _looks(source) != looks:
                return Waiting(name, name, "it was written to while it was read")
            raise
        if _looks(source) != looks:
            return Waiting(name, name, "it was written to while it was read")
        self._remember(name, looks, [*known, *([] if found is None else [found])])
        return found

    def is_unchanged(self, source: Source, rows: Range) -> bool:
        """Whether a range has the content it had, to be asked again before its batch is committed.

        Read again where the files look different, or nothing is remembered of how they looked.
        """
        name = str(source.identity()["name"])
        if rows in self._verified(name, _looks(source)):
            return True
        if n_rows(source) < rows.last:
            return False
        try:
            return digest(source, rows.first, rows.last) == rows.digest
        except (DataError, CorruptError):
            return False

    def _in_motion(self, source: Source, looks: str) -> bool:
        """Whether files that changed just now go on changing."""
        newest = _newest(source)
        now = time.time()
        if newest is None or newest < now - self.settle:
            return False
        time.sleep(self.settle)
        return _looks(source) != looks

    def _verified(self, name: str, looks: str) -> frozenset[Range]:
        """Ranges that were verified when the files looked as they do now."""
        if self.hints is None or not looks:
            return frozenset()
        match read_hint(self.hints).get(name):
            case [str(before), list(ranges)] if before == looks:
                return frozenset(
                    Range(*one)
                    for one in ranges
                    if isinstance(one, list) and [type(x) for x in one] == [int, int, str]
                )
        return frozenset()

    def _remember(self, name: str, looks: str, ranges: Sequence[Range]) -> None:
        if self.hints is None or not looks:
            return
        entry = [looks, [[one.first, one.last, one.digest] for one in ranges]]
        entries = read_hint(self.hints)
        if entries.get(name) != entry:
            write_hint(self.hints, entries | {name: entry})


def digest(source: Source, first: int, last: int) -> str:
    """SHA-256 of the canonical bytes of rows `first` to `last`, chunk by chunk."""
    sha = hashlib.sha256()
    for i, start, stop in _overlaps(source, first, last):
        sha.update(canonical(source.read(i)[start:stop]).astype("<f8", copy=False).tobytes())
    return sha.hexdigest()


def _overlaps(source: Source, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(chunk, from, to) of every chunk with rows in a range, counted within the chunk."""
    before = 0
    for i, n in enumerate(source.chunk_rows):
        start, stop = max(first - before, 0), min(last - before, n)
        if start < stop:
            yield i, start, stop
        before += n


def _checked(known: Sequence[Range]) -> int:
    """The number of rows known."""
    done = 0
    for one in known:
        if one.first != done or one.last < one.first:
            raise ConfigError(
                f"rows {one.first} to {one.last} do not follow row {done}: give all ranges in order"
            )
        done = one.last
    return done


def _verify(source: Source, name: str, one: Range, total: int) -> None:
    what = f"{name}: rows {one.first} to {one.last - 1}, which were learned from,"
    advice = "restore them, or begin a new model"
    if one.last > total:
        raise DataError(f"{what} are no longer there ({total} rows are): {advice}")
    if digest(source, one.first, one.last) != one.digest:
        raise DataError(f"{what} have changed: {advice}")


def _looks(source: Source) -> str:
    """Digest of how the files of a source look; nothing where it has no local files."""
    try:
        prints = list(_fingerprints(source.identity()))
    except FileNotFoundError:
        return f"vanishing at {time.monotonic_ns()}"
    return hashlib.sha256("\n".join(prints).encode()).hexdigest() if all(prints) and prints else ""


def _fingerprints(identity: dict[str, Any]) -> Iterator[str]:
    for part in (*identity.get("sources", ()), *filter(None, [identity.get("source")])):
        yield from _fingerprints(part)
    found = identity.get("fingerprint")
    if found is not None:
        yield from [found] if isinstance(found, str) else found


def _places(identity: dict[str, Any]) -> Iterator[Path]:
    for part in (*identity.get("sources", ()), *filter(None, [identity.get("source")])):
        yield from _places(part)
    if "fingerprint" in identity:
        yield from map(Path, identity.get("files", [identity["name"]]))


def _newest(source: Source) -> float | None:
    """When the files of a source last changed, in s since 1970; None where it has none."""
    times = []
    for place in _places(source.identity()):
        files = place.rglob("*") if place.is_dir() else [place]
        with contextlib.suppress(FileNotFoundError):
            times += [file.stat().st_mtime for file in files if file.is_file()]
    return max(times, default=None)


class RangeSource:
    """Rows `first` to `last` (exclusive) of a source; see `genstream.sources.Source`.

    `batch` is the id of the batch they are: rows are then told apart by it and by their position in
    the range. Raises DataError where the source has no such rows.
    """

    def __init__(self, source: Source, first: int, last: int, *, batch: str = "") -> None:
        if not 0 <= first < last <= n_rows(source):
            raise DataError(
                f"{source.identity()['name']}: has no rows {first} to {last - 1}, only "
                f"{n_rows(source)} rows"
            )
        self.source = source
        self.first, self.last, self.batch = first, last, batch
        self._parts = tuple(_overlaps(source, first, last))
        self.chunk_rows = tuple(stop - start for _, start, stop in self._parts)
        self._starts = [sum(self.chunk_rows[:i]) for i in range(len(self.chunk_rows))]

    @property
    def schema(self) -> Schema:
        """The schema of the source."""
        return self.source.schema

    @property
    def chunk_nbytes(self) -> int:
        """The source's: a chunk is decoded whole before its rows are cut."""
        return self.source.chunk_nbytes

    def read(self, i: int) -> Rows:
        """Chunk `i` of the range."""
        chunk, start, stop = self._parts[i]
        return self.source.read(chunk)[start:stop]

    def origin(self, i: int) -> tuple[Piece, ...]:
        """The batch of chunk `i`, and where in it the chunk begins."""
        key = int(self.batch[:16], 16) if self.batch else 0
        return ((key, self._starts[i], self.chunk_rows[i]),)

    def identity(self) -> dict[str, Any]:
        """The identity of the source, with the range."""
        source = self.source.identity()
        return {
            "kind": "range",
            "name": f"{source['name']}[{self.first}:{self.last}]",
            "batch": self.batch,
            "n_rows": self.last - self.first,
            "n_chunks": len(self.chunk_rows),
            "columns": list(self.schema.names),
            "source": source,
        }
