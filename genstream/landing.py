"""What arrives: found where it lands, copied in, and told from what came before.

Files are found by patterns on a local or remote file system and are *ready* once a rule says that
their writer is done. Learning reads only a copy, whose id is the SHA-256 of the bytes copied; what
changes meanwhile is left for next time. Rows are told apart by digests that know nothing of files.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, Literal

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from genstream.errors import ConfigError, DataError, StorageError
from genstream.formats import ending_of_bytes, read_tables
from genstream.manifests import LocalStorage, make_folder, storing, sync_folder, to_json_bytes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import fingerprint, folder_digest, mix
from genstream.tables import Encoder

Ready = Literal["done_marker", "stable_size"]

# Names that say of a whole folder that its writer is done.
DONE_NAMES = ("_SUCCESS", "_DONE")
DONE_ENDING = ".done"
_UNFINISHED = (".tmp", ".temp", ".part", ".partial", ".crdownload", ".filepart", ".swp", "~")
_DATA_FOLDERS = (".zarr", ".parquet")
_FOLDER_METADATA = ("zarr.json", ".zarray", ".zgroup")
# A remote clock may lag behind ours by so much, in s, without a file looking older than it is.
CLOCK_SKEW = 300.0
_BLOCK_NBYTES = 1 << 20
# Files that the hint cache remembers; the oldest are forgotten.
_SEEN = 200_000


# --- finding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A file, or a folder that is one table, that is ready to be learned from.

    Parameters
    ----------
    name
        What it is called: its own name, or as much of its path as tells it from the others found.
    place
        Its path, or its URL.
    size
        Bytes, over all files of a folder.
    modified
        A token of this version, as good as the file system has one (time of change and inode, an
        etag): another one may be new content, the same one with the same size is taken for old.
    folder
        Whether it is a folder.
    """

    name: str
    place: str
    size: int
    modified: str
    folder: bool = False


@dataclass(frozen=True)
class Waiting:
    """Something found that is not ready, and in words why not."""

    name: str
    place: str
    why: str


@dataclass(frozen=True)
class Arrivals:
    """What was found, in the natural order of names (`day2` before `day10`)."""

    ready: tuple[Arrival, ...]
    waiting: tuple[Waiting, ...]


@dataclass(frozen=True)
class _Look:
    """What a file system says of a file or folder; `changed` is a time in s since 1970 or None."""

    size: int
    token: str
    changed: float | None
    folder: bool


@dataclass(frozen=True)
class _Found:
    """A path that a pattern matched, on its file system."""

    fs: Any
    path: str
    below: str

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def place(self) -> str:
        return self.path if self.local else str(self.fs.unstrip_protocol(self.path))

    @property
    def base(self) -> str:
        return PurePosixPath(self.path).name

    def look(self) -> _Look:
        """Size and version now. Raises FileNotFoundError where it is gone."""
        return _look(self.fs, self.path)


def find_arrivals(
    patterns: str | Path | Sequence[str | Path],
    *,
    ready: Ready = "done_marker",
    settle: float = 2.0,
    seen: Seen | None = None,
) -> Arrivals:
    """Look where things land: what is ready, and what is still waited for.

    Parameters
    ----------
    patterns
        Paths or globs, local or of any file system that fsspec knows (`s3://bucket/in/*.parquet`).
        A plain folder stands for all files in it; a zarr store, or a folder `*.parquet`, is one
        arrival. Hidden and unfinished files (`.x`, `x.tmp`, `x.part`, `x~`) and markers are none.
    ready
        `done_marker`: `x.done` beside `x`, or `_SUCCESS` or `_DONE` in its folder, says so.
        `stable_size`: size and time of change stay the same for `settle` seconds, or the time of
        change is older than that. All files are waited for at once. A time of change in the future
        says nothing, and that of a remote file must be `CLOCK_SKEW` older.
    settle
        Seconds.
    seen
        Versions handled before, which are not waited for again.

    Raises
    ------
    ConfigError
        Where there is no pattern, or nothing knows its kind of URL.
    StorageError
        Where a local folder is not there, or one cannot be listed.
    """
    if ready not in ("done_marker", "stable_size"):
        raise ConfigError(f"ready {ready!r} is not one of done_marker, stable_size")
    given = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    if not given:
        raise ConfigError("there is no path or pattern to look at: name one")
    found: dict[str, _Found] = {}
    waiting: list[Waiting] = []
    for pattern in map(str, given):
        matched = _matches(pattern)
        if not matched and not _is_glob(pattern):
            name = PurePosixPath(pattern).name or pattern
            if not _is_folder(pattern):
                waiting.append(Waiting(name, pattern, "is not there"))
        for one in matched:
            found.setdefault(one.place, one)
    names = _names(list(found.values()))
    first: dict[str, _Look] = {}
    for place, one in found.items():
        try:
            first[place] = _looked(one)
        except FileNotFoundError:
            waiting.append(Waiting(names[place], place, "vanished while it was looked at"))
    arrivals = {
        place: Arrival(names[place], place, look.size, look.token, look.folder)
        for place, look in first.items()
    }
    if ready == "done_marker":
        folders = {_folder(found[place]): found[place].fs for place in first}
        beside = {folder: _listed(fs, folder) for folder, fs in folders.items()}
        excuses = {
            place: _unmarked(found[place], look, beside[_folder(found[place])])
            for place, look in first.items()
        }
    else:
        known = {p for p, a in arrivals.items() if seen is not None and seen.get(a) is not None}
        excuses = _unsettled(found, first, known, settle)
    for place, why in excuses.items():
        if why:
            waiting.append(Waiting(names[place], place, why))
    done = [a for place, a in arrivals.items() if not excuses[place]]
    return Arrivals(
        tuple(sorted(done, key=lambda a: _natural(a.name, a.place))),
        tuple(sorted(waiting, key=lambda w: _natural(w.name, w.place))),
    )


def _is_glob(pattern: str) -> bool:
    return any(mark in pattern for mark in "*?[")


def _file_system(place: str) -> tuple[Any, str]:
    """The file system of a path or URL, without what it listed before, and the path in it."""
    try:
        fs, path = fsspec.core.url_to_fs(place)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{place}: {str(error).splitlines()[0]}") from None
    fs.invalidate_cache()
    return fs, str(path)


def _is_folder(pattern: str) -> bool:
    fs, path = _file_system(pattern)
    return bool(fs.isdir(path))


def _matches(pattern: str) -> list[_Found]:
    """What a pattern stands for: existing files and folders that are tables."""
    fs, path = _file_system(pattern)
    parts = PurePosixPath(path).parts
    fixed = parts
    try:
        # What is there under this very name is meant, whatever marks are in it (`r[1].csv`).
        open_ended = _is_glob(pattern) and not fs.exists(path)
        if open_ended:
            n = next(i for i, part in enumerate(parts) if _is_glob(part))
            fixed = parts[:n]
        if not open_ended and fs.isdir(path) and not _is_table(fs, path):
            listed = fs.ls(path, detail=False)
        elif open_ended:
            listed = fs.glob(path)
            top = str(PurePosixPath(*fixed)) if fixed else ""
            if isinstance(fs, LocalFileSystem) and not listed and not Path(top).is_dir():
                raise StorageError(f"{top}: no such folder: make it, or mend the pattern {pattern}")
        else:
            fixed = parts[:-1]
            listed = [path] if fs.exists(path) else []
    except OSError as error:
        raise StorageError(f"{pattern}: cannot be listed: {error.strerror or error}") from error
    found = []
    for one in sorted(str(p).rstrip("/") for p in listed):
        below = PurePosixPath(one).parts[len(fixed) :]
        if any(part.startswith(".") or part == "_temporary" for part in below):
            continue
        if not below or not is_data(below[-1]):
            continue
        # What lies within a folder that is one table is no table of its own.
        inside = [PurePosixPath(*fixed, *below[:n]).as_posix() for n in range(1, len(below))]
        if any(_is_table(fs, folder) for folder in inside):
            continue
        if fs.isdir(one) and not _is_table(fs, one):
            continue
        if isinstance(fs, LocalFileSystem) and _is_special(Path(one)):
            continue
        found.append(_Found(fs, one, "/".join(below)))
    return found


def list_data(pattern: str) -> list[str]:
    """Paths or URLs of the files that a pattern, a folder or a URL stands for, in natural order.

    Raises StorageError where it cannot be looked at.
    """
    found = _matches(pattern)
    return [one.place for one in sorted(found, key=lambda one: _natural(one.below, one.place))]


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe, a socket or a device, which nobody reads to an end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def is_data(name: str) -> bool:
    """Whether a file of this name may be data, rather than a marker or still on its way."""
    marker = name in DONE_NAMES or name.endswith(DONE_ENDING)
    return not marker and not name.lower().endswith(_UNFINISHED)


def _is_table(fs: Any, folder: str) -> bool:
    """Whether a folder is one table, by its name or by what lies in it."""
    if folder.endswith(_DATA_FOLDERS):
        return bool(fs.isdir(folder))
    return any(fs.exists(f"{folder}/{name}") for name in _FOLDER_METADATA)


def _names(found: list[_Found]) -> dict[str, str]:
    """The shortest name of each place that none of the others has."""
    names: dict[str, str] = {}
    for choices in zip(*((f.base, f.below, f.place) for f in found), strict=True):
        times = Counter(choices)
        for one, name in zip(found, choices, strict=True):
            if one.place not in names and times[name] == 1:
                names[one.place] = name
    return names


def _natural(name: str, place: str) -> tuple[Any, ...]:
    """Orders text as people do: runs of digits by their value."""
    pieces = re.split(r"([0-9]+)", name)
    return [int(p) if i % 2 else p for i, p in enumerate(pieces)], name, place


def _look(fs: Any, path: str) -> _Look:
    if isinstance(fs, LocalFileSystem):
        place = Path(path)
        status = place.stat()
        if not place.is_dir():
            token = f"{status.st_mtime_ns}-{status.st_ino}"
            return _Look(status.st_size, token, status.st_mtime, folder=False)
        found = [file.stat() for file in place.rglob("*") if file.is_file()]
        newest = max((s.st_mtime for s in found), default=status.st_mtime)
        return _Look(sum(s.st_size for s in found), fingerprint(place), newest, folder=True)
    info = fs.info(path)
    if info["type"] != "directory":
        return _Look(int(info["size"]), *_version(fs, path, info), folder=False)
    versions, size, changed = [], 0, []
    for name, one in sorted(fs.find(path, detail=True).items()):
        token, when = _version(fs, name, one)
        versions.append(f"{name} {one['size']} {token}\n")
        size += int(one["size"])
        changed.append(when)
    times = [when for when in changed if when is not None]
    newest_time = max(times) if times and len(times) == len(changed) else None
    token = hashlib.sha256("".join(versions).encode()).hexdigest()
    return _Look(size, token, newest_time, folder=True)


def _version(fs: Any, path: str, info: Mapping[str, Any]) -> tuple[str, float | None]:
    """A token for the version of a remote file, and when it changed, where that is known."""
    tags = [str(info[key]) for key in _TAGS if info.get(key)]
    when: Any = None
    try:
        when = fs.modified(path)
    except FileNotFoundError:
        raise
    except Exception:  # noqa: BLE001 - many file systems have no such time and say so in many ways
        when = next((info[key] for key in _TIMES if info.get(key)), None)
    if isinstance(when, datetime):
        when = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    changed = float(when) if isinstance(when, int | float) else None
    if when is not None:
        tags.append(str(when))
    return "-".join(tags) or str(fs.ukey(path)), changed


_TAGS = ("ETag", "etag", "e_tag", "generation", "md5Hash", "content_md5", "VersionId", "checksum")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


def _looked(one: _Found) -> _Look:
    try:
        return one.look()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"{one.place}: cannot be looked at: {error.strerror or error}"
        ) from error


def _folder(one: _Found) -> str:
    return one.place.rpartition("/")[0]


def _listed(fs: Any, folder: str) -> frozenset[str]:
    """Names of what lies in a folder."""
    try:
        listed = fs.ls(folder or "/", detail=False)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    return frozenset(PurePosixPath(name).name for name in listed)


def _unmarked(one: _Found, look: _Look, beside: frozenset[str]) -> str:
    """Why a file is not ready by its markers; nothing where it is."""
    if not beside.isdisjoint((one.base + DONE_ENDING, *DONE_NAMES)):
        return ""
    if look.folder and not _listed(one.fs, one.path).isdisjoint(DONE_NAMES):
        return ""
    return (
        f"no {one.base}{DONE_ENDING} beside it and no {' or '.join(DONE_NAMES)} in its folder yet"
    )


def _unsettled(
    found: Mapping[str, _Found], first: Mapping[str, _Look], known: set[str], settle: float
) -> dict[str, str]:
    """Why each file is not ready by its size, after a second look where one is needed."""
    now = time.time()
    excuses = dict.fromkeys(first, "")
    again = []
    for place, look in first.items():
        margin = settle if found[place].local else settle + CLOCK_SKEW
        old = look.changed is not None and look.changed < now - margin
        if not old and place not in known:
            again.append(place)
    if not again:
        return excuses
    time.sleep(settle)
    for place in again:
        found[place].fs.invalidate_cache()
        try:
            look = _looked(found[place])
        except FileNotFoundError:
            excuses[place] = f"vanished within {settle:g} s"
            continue
        if look.size != first[place].size:
            excuses[place] = (
                f"its size changed from {first[place].size} to {look.size} bytes within "
                f"{settle:g} s"
            )
        elif look.token != first[place].token:
            excuses[place] = f"it was written to within {settle:g} s"
    return excuses


# --- copying in ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """Bytes that are ours: nobody writes to them any more.

    `id` is the SHA-256 of a file, and of a folder what `genstream.sources.content_digest` says;
    `path` is the copy, alone in a folder of its own; `nbytes` its size.
    """

    id: str
    path: Path
    name: str
    nbytes: int


@dataclass(frozen=True)
class Changed:
    """Not a copy: what arrived changed, or vanished, since it was found; look again next time."""

    arrival: Arrival
    why: str


def copy_in(arrival: Arrival, inbox: str | Path) -> Copy | Changed:
    """Copy what arrived into a fresh folder below `inbox`, under its own name, durably.

    Bytes are hashed while they are copied. Where size or version are not those of `arrival` before
    and after, or the copy is of another size, the copy is discarded and `Changed` says why. Raises
    StorageError where something cannot be read or written; nothing is left behind then.
    """
    fs, path = _file_system(arrival.place)
    one = _Found(fs, path, arrival.name)
    if why := _difference(one, arrival):
        return Changed(arrival, why)
    with _fresh(Path(inbox)) as folder:
        target = folder / one.base
        try:
            copied = _copy_folder(fs, path, target) if arrival.folder else _copy(fs, path, target)
        except FileNotFoundError:
            why = "vanished while it was copied"
        else:
            fs.invalidate_cache()
            why = _difference(one, arrival)
        if not why and copied.nbytes != arrival.size:
            why = f"{copied.nbytes} bytes could be copied of {arrival.size}"
        if why:
            shutil.rmtree(folder)
            return Changed(arrival, why)
        with storing(folder):
            sync_folder(folder)
            sync_folder(folder.parent)
        return Copy(copied.id, target, arrival.name, copied.nbytes)


def discard(copy: Copy) -> None:
    """Remove a copy and the folder it is alone in, if they are there."""
    shutil.rmtree(copy.path.parent, ignore_errors=True)


def sweep(inbox: str | Path, *, older_than: float = 24 * 3600.0) -> int:
    """Remove folders of copies to which nothing was written for so many seconds.

    Killed processes leave such. Other files in `inbox` stay. Returns the number removed.
    """
    removed = 0
    top = Path(inbox)
    for folder in sorted(top.iterdir()) if top.is_dir() else []:
        if not re.fullmatch(r"[0-9a-f]{32}", folder.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
            times = [p.stat().st_mtime for p in (folder, *folder.rglob("*"))]
            if max(times) < time.time() - older_than:
                shutil.rmtree(folder)
                removed += 1
    return removed


@dataclass(frozen=True)
class _Copied:
    id: str
    nbytes: int


@contextlib.contextmanager
def _fresh(inbox: Path) -> Iterator[Path]:
    """A new folder below `inbox`, gone again where an error or interrupt leaves this."""
    folder = inbox / uuid.uuid4().hex
    with storing(folder):
        make_folder(folder)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _difference(one: _Found, arrival: Arrival) -> str:
    """How what is there now differs from what was found; nothing where it does not."""
    try:
        look = _looked(one)
    except FileNotFoundError:
        return "vanished since it was found"
    if look.size != arrival.size:
        return f"its size changed from {arrival.size} to {look.size} bytes"
    if (look.token, look.folder) != (arrival.modified, arrival.folder):
        return "it was written to since it was found"
    return ""


def _copy(fs: Any, path: str, target: Path) -> _Copied:
    """Copy one file, hashing it, and sync it. Raises FileNotFoundError where it is gone."""
    try:
        stream = fs.open(path, "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    with stream:
        return _write(_blocks(stream, path), target)


def _copy_folder(fs: Any, path: str, target: Path) -> _Copied:
    """Copy all files below a folder; the id is that of the copy's content."""
    with storing(target):
        make_folder(target)
    digests: dict[PurePath, str] = {}
    nbytes = 0
    for name in fs.find(path):
        below = PurePath(*PurePosixPath(name).relative_to(path).parts)
        copy = target / below
        with storing(copy):
            make_folder(copy.parent)
        copied = _copy(fs, name, copy)
        digests[below] = copied.id
        nbytes += copied.nbytes
    for folder in {target, *((target / below).parent for below in digests)}:
        with storing(folder):
            sync_folder(folder)
    return _Copied(folder_digest(digests), nbytes)


def _blocks(stream: BinaryIO, place: str) -> Iterator[bytes]:
    """The bytes of a stream, a bounded number at a time."""
    while True:
        try:
            block = stream.read(_BLOCK_NBYTES)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{place}: cannot be read: {error.strerror or error}") from error
        if not block:
            return
        yield block


def _write(blocks: Iterable[bytes], target: Path) -> _Copied:
    """Write blocks to a new file, hashing them, and sync it."""
    sha = hashlib.sha256()
    nbytes = 0
    with storing(target):
        file = target.open("xb")
    try:
        for block in blocks:
            sha.update(block)
            nbytes += len(block)
            with storing(target):
                file.write(block)
        with storing(target):
            file.flush()
            os.fsync(file.fileno())
    finally:
        # What a full disk refused is refused again here, and has been told.
        with contextlib.suppress(OSError):
            file.close()
    return _Copied(sha.hexdigest(), nbytes)


def spool(stream: BinaryIO, inbox: str | Path, *, name: str = "stdin") -> Copy:
    """Copy a stream, such as standard input, into a fresh folder below `inbox`, durably.

    Its first bytes say whether it is an Arrow stream or file, parquet, JSON lines or CSV, and the
    copy is called `name` with the ending of its format. Raises DataError where there is nothing to
    read or the format is not known, StorageError where it cannot be stored.
    """
    blocks = _blocks(stream, name)
    head = b""
    for block in blocks:
        head += block
        if len(head) >= 4096:
            break
    if not head.strip():
        raise DataError(f"{name}: is empty: send a table")
    try:
        ending = ending_of_bytes(head[:4096])
    except DataError as error:
        raise DataError(f"{name}: {error}") from None

    def everything() -> Iterator[bytes]:
        yield head
        yield from blocks

    with _fresh(Path(inbox)) as folder:
        target = folder / (name + ending)
        copied = _write(everything(), target)
        with storing(folder):
            sync_folder(folder)
            sync_folder(folder.parent)
    return Copy(copied.id, target, target.name, copied.nbytes)


class Seen:
    """A hint: the ids of versions hashed before, so that old files need not be hashed again.

    One JSON file, replaced as a whole. It may be lost, old or damaged, and then says nothing: which
    batches were learned stands with the model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries: dict[str, tuple[int, str, str]] = {}
        self._changed = False
        for place, entry in read_hint(self.path).items():
            match entry:
                case [int(size), str(token), str(identity)] if _is_digest(identity):
                    self._entries[place] = size, token, identity

    def get(self, arrival: Arrival) -> str | None:
        """The id of this version, if it was put before."""
        size, token, identity = self._entries.get(arrival.place, (None, None, None))
        return identity if (size, token) == (arrival.size, arrival.modified) else None

    def put(self, arrival: Arrival, identity: str) -> None:
        """Remember the id of this version, in place of an older version's."""
        entry = arrival.size, arrival.modified, identity
        if self._entries.get(arrival.place) != entry:
            self._entries.pop(arrival.place, None)
            self._entries[arrival.place] = entry
            self._changed = True

    def save(self) -> None:
        """Write the file, if anything was put; that it cannot be written does no harm."""
        if not self._changed:
            return
        write_hint(self.path, dict(list(self._entries.items())[-_SEEN:]))
        self._changed = False


def read_hint(path: Path) -> dict[str, Any]:
    """What a hint cache remembers; nothing where it is not there or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_hint(path: Path, entries: Mapping[str, Any]) -> None:
    """Replace a hint cache as a whole; that it cannot be written does no harm."""
    with contextlib.suppress(StorageError):
        LocalStorage(path.parent).hint(path.name, to_json_bytes(entries))


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


# --- batches from Python --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Arrived:
    """A batch that a program handed over.

    `id` is the caller's own name for it; None where there is none, and then nobody can tell after a
    restart whether it was learned before. `rows` are numbers as `Rows`, or a `pyarrow.Table` that
    is still to be encoded.
    """

    id: str | None
    name: str
    rows: Rows | Any

    @property
    def identified(self) -> bool:
        """Whether this batch can be learned exactly once across restarts."""
        return self.id is not None


def stream(iterable: Iterable[Any], *, schema: Schema | None = None) -> Iterator[Arrived]:
    """Batches of any iterable, one at a time: each is let go before the next is asked for.

    Parameters
    ----------
    iterable
        (n, d) arrays in which NaN is missing, `Rows`, data frames, Arrow tables or record batches;
        or pairs `(id, batch)` with an id of text or a whole number, which identifies the batch
        across restarts.
    schema
        The columns. Rows are then checked against it and tables encoded by it; left out, a table
        stays one.

    Raises
    ------
    DataError
        Naming the item's number, from 0, where it is no batch of rows, has no rows, or other
        columns than the schema or the first one of its kind.
    ConfigError
        Where nothing can be iterated over.
    """
    try:
        items = iter(iterable)
    except TypeError:
        raise ConfigError(
            f"cannot take batches from {type(iterable).__name__}: give an iterable of batches"
        ) from None
    return _arrivals(items, schema)


def _arrivals(items: Iterator[Any], schema: Schema | None) -> Iterator[Arrived]:
    encoder = None if schema is None else Encoder(schema)
    width: int | None = None if schema is None else schema.n_features
    numbers = itertools.count()
    for item in items:
        name = f"item {next(numbers)}"
        identity = None
        if isinstance(item, tuple) and len(item) == 2 and np.ndim(item[0]) == 0:
            if not isinstance(item[0], str | int | np.integer | date):
                raise DataError(
                    f"{name}: its id is a {type(item[0]).__name__}: give text, a whole number or a "
                    "date"
                )
            identity, item = str(item[0]), item[1]
        try:
            if identity == "":
                raise DataError("its id is empty: give each batch an id of its own, or none")
            rows = _batch(item, schema, encoder)
            if isinstance(rows, Rows):
                if not rows.n_rows:
                    raise DataError("has no rows")
                width = rows.n_features if width is None else width
                if rows.n_features != width:
                    raise DataError(f"has {rows.n_features} columns, not {width} as those before")
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        # The caller must be the only one to hold the batch, so that one is in memory at a time.
        del item
        arrived = Arrived(identity, identity or name, rows)
        del rows
        yield arrived
        del arrived


def _batch(item: Any, schema: Schema | None, encoder: Encoder | None) -> Rows | Any:
    """Rows of an array, or a table; encoded where the columns are known."""
    names = None if schema is None else schema.names
    if isinstance(item, Rows):
        return item if schema is None else item.check(schema)
    if isinstance(item, str | bytes | Path | Mapping) or item is None:
        raise DataError(
            f"is a {type(item).__name__}, not a batch of rows: give arrays, data frames or tables"
        )
    if isinstance(item, np.ma.MaskedArray):
        item = np.ma.filled(item.astype(np.float64), np.nan)
    if isinstance(item, np.ndarray | list | tuple):
        try:
            rows = Rows.of(item, names=names)
        except ValueError as error:
            raise DataError(str(error).splitlines()[0]) from None
        return rows if schema is None else rows.check(schema)
    tables = list(read_tables(item))
    table = pa.concat_tables(tables)
    return table if encoder is None else encoder.encode(table)


# --- rows told apart ------------------------------------------------------------------------------


class RowMultiset:
    """Digest of rows that forgets their order: the same rows in any files give the same digest.

    Each row i becomes two 64-bit hashes `h_c(i) = mix(sum_j a_cj mix(bits(x_ij) + k_j))` of the
    bits of its entries as float64, with odd constants `a_cj` and `k_j` of each column and the
    splitmix64 finaliser `mix` (Steele, Lea & Flood 2014); the digest is the number of rows and the
    sums of both hashes modulo 2^64 (Bellare & Micciancio 1997 on sums as hashes of multisets). So
    it merges over pieces, and 128 bits tell rows apart that differ by accident, not by an enemy's
    design.

    A missing entry has one pattern whatever lies beneath, -0.0 is 0.0, a float32 is the float64 of
    its value, and a row without a weight weighs 1. Columns count by position, and categories by
    their codes: both are the caller's to align.
    """

    def __init__(self) -> None:
        self.n_rows = 0
        self._sums = [0, 0]
        self._constants: NDArray[np.uint64] | None = None

    def add(self, rows: Rows) -> None:
        """Add rows, in any order and pieces. Raises DataError where they have other columns."""
        width = rows.n_features + 1
        if self._constants is None:
            self._constants = _column_constants(width)
        elif self._constants.shape[1] != width:
            raise DataError(
                f"the rows have {width - 1} columns, those before {self._constants.shape[1] - 1}"
            )
        keys, *factors = self._constants
        for first in range(0, rows.n_rows, _HASH_ROWS):
            bits = canonical(rows[first : first + _HASH_ROWS]).view(np.uint64)
            mixed = mix(bits + keys)
            for c, factor in enumerate(factors):
                hashes = mix(mixed @ factor)
                self._sums[c] = (self._sums[c] + int(hashes.sum(dtype=np.uint64))) % 2**64
        self.n_rows += rows.n_rows

    def hexdigest(self) -> str:
        """192 bits in hexadecimal: the count and both sums."""
        return struct.pack(">3Q", self.n_rows, *self._sums).hex()


_HASH_ROWS = 2048


def canonical(rows: Rows) -> NDArray[np.float64]:
    """(n, d + 1) float64: entries and weight of each row, equal bits for equal rows.

    Missing entries are one NaN, -0.0 is 0.0, and a row without a weight weighs 1.
    """
    values = np.empty((rows.n_rows, rows.n_features + 1))
    # Adding zero makes -0.0 the other zero.
    np.add(rows.values, 0.0, out=values[:, :-1])
    if rows.observed is not None:
        values[:, :-1][~rows.observed] = np.nan
    values[:, -1] = 1.0 if rows.weights is None else rows.weights + 0.0
    return values


def by_label(rows: Rows, levels: Mapping[int, Sequence[str]]) -> Rows:
    """The rows with numbers that follow from the labels themselves in place of codes.

    `levels` has the labels of each categorical column, by its position. Whatever codes they had,
    the same labels then give the same digest.
    """
    if not levels:
        return rows
    values = rows.values.astype(np.float64)
    for j, labels in levels.items():
        if not labels:
            continue  # nothing but gaps so far
        # 52 bits of a digest are a float64 to the bit.
        digests = [hashlib.sha256(label.encode()).digest() for label in labels]
        table = np.array([int.from_bytes(digest[:8], "big") >> 12 for digest in digests])
        values[:, j] = table[rows.values[:, j].astype(np.intp)]
    return Rows(values, rows.observed, rows.weights)


def _column_constants(width: int) -> NDArray[np.uint64]:
    """(3, width) keys and odd factors: a splitmix64 stream of the number of columns."""
    steps = np.arange(1, 3 * width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    drawn = mix(steps + np.uint64(width)).reshape(3, width)
    return drawn | np.uint64(1)
