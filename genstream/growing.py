"""Sources that grow in place: which rows are new, and whether the old ones are still the same.

A zarr array or a parquet file is appended to by somebody else. A batch is then a range of its rows,
known by a digest of their content; what was learned from must still be there, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from genstream.errors import ConfigError, CorruptError, DataError
from genstream.landing import Waiting, canonical, read_hint, write_hint
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import Piece, Source, fingerprint, n_rows


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
        A file that remembers what was verified and how the files that hold it looked then (sizes
        and times of change), so that nothing is read where nothing changed: of a zarr array or a
        folder of parquet only ranges whose own files changed are read again. It may be lost or
        damaged; None: everything is read each time.
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
        remembered = self._remembered(name)
        try:
            for one in known:
                _verify(source, name, one, total, remembered.get(one))
            found = None if total <= done else Range(done, total, digest(source, done, total))
        except (DataError, CorruptError):
            # Rows that are half-written look like changed or damaged ones.
            if _looks(source) != looks:
                return Waiting(name, name, "it was written to while it was read")
            raise
        ranges = [*known, *([] if found is None else [found])]
        seen = {one: _looks_of(source, one) for one in ranges}
        if _looks(source) != looks:
            return Waiting(name, name, "it was written to while it was read")
        if self.hints is not None and all(seen.values()) and seen != remembered:
            entries = [[r.first, r.last, r.digest, looked] for r, looked in seen.items()]
            write_hint(self.hints, read_hint(self.hints) | {name: entries})
        return found

    def is_unchanged(self, source: Source, rows: Range) -> bool:
        """Whether a range has the content it had, to be asked again before its batch is committed.

        Read again where the files look different, or nothing is remembered of how they looked.
        """
        name = str(source.identity()["name"])
        try:
            _verify(source, name, rows, n_rows(source), self._remembered(name).get(rows))
        except (DataError, CorruptError):
            return False
        return True

    def _in_motion(self, source: Source, looks: str) -> bool:
        """Whether files that changed just now go on changing."""
        newest = _newest(source)
        now = time.time()
        if newest is None or newest < now - self.settle:
            return False
        time.sleep(self.settle)
        return _looks(source) != looks

    def _remembered(self, name: str) -> dict[Range, str]:
        """How the files of each range looked when it was verified."""
        found: dict[Range, str] = {}
        if self.hints is None:
            return found
        entries = read_hint(self.hints).get(name)
        for entry in entries if isinstance(entries, list) else []:
            match entry:
                case [int(first), int(last), str(digested), str(looks)]:
                    found[Range(first, last, digested)] = looks
        return found


def digest(source: Source, first: int, last: int) -> str:
    """SHA-256 of the canonical bytes of rows `first` to `last`, chunk by chunk."""
    sha = hashlib.sha256()
    for i, start, stop in _overlaps(source, first, last):
        sha.update(canonical(source.read(i)[start:stop]).astype("<f8", copy=False).tobytes())
    return sha.hexdigest()


def _overlaps(source: Source, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(chunk, from, to) of every chunk with rows in a range, counted within the chunk."""
    ends = np.cumsum(source.chunk_rows)
    low, high = np.searchsorted(ends, [first, last - 1], side="right").tolist()
    for i in range(low, high + 1):
        n = source.chunk_rows[i]
        before = int(ends[i]) - n
        start, stop = max(first - before, 0), min(last - before, n)
        if start < stop:
            yield i, start, stop


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


def _verify(source: Source, name: str, one: Range, total: int, looked: str | None) -> None:
    """Raise DataError unless a range looks as it did when it was verified, or still is the same."""
    what = f"{name}: rows {one.first} to {one.last - 1}, which were learned from,"
    advice = "restore them, or begin a new model"
    if one.last > total:
        raise DataError(f"{what} are no longer there ({total} rows are): {advice}")
    if looked and looked == _looks_of(source, one):
        return
    if digest(source, one.first, one.last) != one.digest:
        raise DataError(f"{what} have changed: {advice}")


def _looks_of(source: Source, rows: Range) -> str:
    """Digest of columns and of how the files that hold a range look; nothing if not known."""
    known = getattr(source, "files", None)
    if known is None:
        return ""
    held = [known(i) for i, _, _ in _overlaps(source, rows.first, rows.last)]
    if not all(held):
        return ""
    sha = hashlib.sha256(json.dumps(source.schema.to_json()).encode())
    for file in dict.fromkeys(file for files in held for file in files):
        # The name of a single file is not in its own fingerprint.
        sha.update(f"{file} {fingerprint(file)}\n".encode())
    return sha.hexdigest()


def _looks(source: Source) -> str:
    """Digest of how all files of a source look; nothing where it has no local files."""
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
        self._starts = tuple(accumulate(self.chunk_rows, initial=0))

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

    def files(self, i: int) -> tuple[str, ...]:
        """Those of the source's chunk, where it knows them."""
        known = getattr(self.source, "files", None)
        return () if known is None else tuple(known(self._parts[i][0]))

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
