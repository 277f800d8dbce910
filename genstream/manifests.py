"""Immutable pieces under numbered manifests: how anything comes to be stored.

A piece is a set of files under a fresh unique id, sealed by an index of their sizes and digests.
Nothing names a piece until a *commit* puts a complete manifest `manifests/N.json` where none was:
the one atomic step, in which exactly one of several writers succeeds. The newest manifest is the
truth, and `HEAD` only a hint of where to look for it. A reader therefore sees either all of a
commit or nothing of it, and a crash leaves no more than unnamed pieces.

Everything goes through the few operations of `Storage`, so that another backend needs only those.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from genstream.errors import ConflictError, CorruptError, StorageError

FORMAT = 1
RETRIES = 8
# Seconds that a writer who lost a race waits at most before it tries again.
MAX_PAUSE = 1.0
# Ledger entries that a manifest itself holds; older ones move to pages of their own, so that a
# commit does not grow with history.
PAGE = 64
# Files that are synced at a time: a piece of many files then takes a few writes of the journal.
SYNC_THREADS = 4


class Storage(Protocol):
    """The operations that stored things need. Keys are relative, with `/` between their parts.

    Each raises StorageError, naming the place, when the storage refuses. Storages of the same place
    are equal, and picklable, so that other processes can read.
    """

    def __hash__(self) -> int:
        """A hash of the place."""

    @property
    def name(self) -> str:
        """The place, for messages."""

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Put files under keys never used before, and make all of them durable."""

    def write_if_absent(self, key: str, data: bytes) -> bool:
        """Put a whole file unless the key is taken, durably; whether it was put."""

    def hint(self, key: str, data: bytes) -> None:
        """Replace a small file; it may be lost or old, never torn."""

    def read(self, key: str) -> bytes:
        """The file under a key. Raises FileNotFoundError where there is none."""

    def list(self, prefix: str) -> Iterator[tuple[str, float]]:
        """(key, time of writing in s since 1970) of every file below a folder."""

    def delete(self, key: str) -> None:
        """Remove a file, if it is there."""


@dataclass(frozen=True)
class LocalStorage:
    """A folder of a local file system that has hard links. Made on the first write."""

    root: Path

    def __reduce__(self) -> tuple[Any, ...]:
        # Other processes may work in another folder.
        return type(self), (self.root.absolute(),)

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.root)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Put files, then sync each of them and each folder once; see `Storage.write_all`."""
        paths: dict[Path, Path] = {}
        folders: dict[Path, Path] = {}
        for key, data in files.items():
            path = self._path(key)
            with storing(path):
                write = functools.partial(_write_new, path, data)
                above = self._into_folder(path.parent, write)
            paths[path] = path
            folders |= dict.fromkeys((*above, path.parent), path)
        _sync_all(paths)
        _sync_all(folders)

    def write_if_absent(self, key: str, data: bytes) -> bool:
        """Link a synced temporary file to the key; see `Storage.write_if_absent`."""
        path = self._path(key)
        with storing(path):
            temporary = path.parent / f".{uuid.uuid4().hex}"
            try:
                above = self._into_folder(path.parent, lambda: _write_new(temporary, data))
                for made in (temporary, *above):
                    _sync(made)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)
        return True

    def hint(self, key: str, data: bytes) -> None:
        """Rename a temporary file over the key; see `Storage.hint`."""
        path = self._path(key)
        with storing(path):
            temporary = path.parent / f".{uuid.uuid4().hex}"
            try:
                for above in self._into_folder(path.parent, lambda: _write_new(temporary, data)):
                    _sync(above)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def read(self, key: str) -> bytes:
        """The bytes of a file; see `Storage.read`."""
        path = self._path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(str(path)) from None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error

    def list(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Files below a folder; temporary ones are included; see `Storage.list`."""
        top = self._path(prefix)
        for folder, _, names in os.walk(top):
            for name in sorted(names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield path.relative_to(self.root).as_posix(), path.stat().st_mtime

    def delete(self, key: str) -> None:
        """Remove a file and the folders that it leaves empty; see `Storage.delete`."""
        path = self._path(key)
        with storing(path):
            path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.root:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise CorruptError(f"{self.root}: names a file outside of it: {key!r}")
        return self.root.joinpath(*parts)

    def _into_folder(self, folder: Path, write: Callable[[], Any]) -> Sequence[Path]:
        """Write into a folder, which another process may remove as empty in the meantime.

        Returns the folders that got a new one, which are still to be synced.
        """
        above: tuple[Path, ...] = ()
        for last_try in (False, False, True):
            try:
                above += (*_make_folder(folder),)
                write()
                break
            except FileNotFoundError:
                if last_try:
                    raise
        return above


def is_stored(folder: str | os.PathLike[str]) -> bool:
    """Whether anything was committed into a folder; where a first commit was cut short, nothing."""
    return any(Path(folder, "manifests").glob("[0-9]*.json"))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each synced into its parent."""
    for above in _make_folder(folder):
        sync_folder(above)


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; the parents of all that were made."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
    return [new.parent for new in missing]


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """What the system refuses while a file is written, as a StorageError that names it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_new(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        raise
    except OSError:
        path.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    """Make what a file or a folder holds durable, however it was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(paths: Mapping[Path, Path]) -> None:
    """Sync files or folders, several at a time: a file system writes its journal once for them.

    With each comes the file whose writing failed if it cannot be synced.
    """

    def sync(path: Path, written: Path) -> None:
        with storing(written):
            _sync(path)

    if len(paths) == 1:
        sync(*next(iter(paths.items())))
        return
    with ThreadPoolExecutor(min(SYNC_THREADS, len(paths))) as pool:
        for done in [pool.submit(sync, *pair) for pair in paths.items()]:
            done.result()


def to_json_bytes(value: Any) -> bytes:
    """Canonical JSON: equal values give equal bytes, and numbers keep every bit.

    NumPy numbers and arrays are written as plain ones.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return text.encode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def sha256(data: bytes) -> str:
    """The digest of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class PieceRef:
    """The name of a sealed piece and the digest of its index, as manifests hold them."""

    key: str
    sha256: str

    def to_json(self) -> dict[str, str]:
        """A plain dictionary; `from_json` undoes it."""
        return {"key": self.key, "sha256": self.sha256}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PieceRef:
        """Inverse of `to_json`."""
        return cls(str(value["key"]), str(value["sha256"]))


@dataclass
class PieceWriter:
    """Writes a new piece, file by file, below `folder`, and seals it.

    File `zarr/values/c.0.0` of piece `segments/4f` is stored as `segments/4f.zarr/values/c.0.0`,
    and its index, written last, as `segments/4f.json`.
    """

    storage: Storage
    folder: str
    key: str = field(init=False)
    _files: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.key = f"{self.folder}/{uuid.uuid4().hex}"

    def add(self, files: Mapping[str, bytes], *, checksummed: Collection[str] = ()) -> None:
        """Store files. The last four bytes of those `checksummed` are a CRC-32C of the others."""
        for name, data in files.items():
            entry: dict[str, Any] = {"nbytes": len(data), "sha256": sha256(data)}
            if name in checksummed:
                entry["tail"] = data[-4:].hex()
            self._files[name] = entry
        self.storage.write_all({f"{self.key}.{name}": data for name, data in files.items()})

    def seal(self, content: Mapping[str, Any]) -> PieceRef:
        """Store the index with any further JSON `content`, and give the piece's name."""
        data = to_json_bytes({"format": FORMAT, "files": self._files, "content": content})
        self.storage.write_all({f"{self.key}.json": data})
        return PieceRef(self.key, sha256(data))

    def discard(self) -> None:
        """Delete what was written, sealed or not: nothing names it."""
        for name in self._files:
            self.storage.delete(f"{self.key}.{name}")
        self.storage.delete(f"{self.key}.json")


class Piece:
    """A sealed piece, each file of which is compared with the index when it is read."""

    def __init__(self, storage: Storage, ref: PieceRef) -> None:
        self.storage = storage
        self.ref = ref
        name = f"{ref.key}.json"
        data = read_piece_file(storage, name)
        if sha256(data) != ref.sha256:
            raise CorruptError(f"{storage.name}/{name}: is not the index that was committed")
        index = json.loads(data)
        _check_format(f"{storage.name}/{name}", index)
        self.content: dict[str, Any] = index["content"]
        self._files: dict[str, dict[str, Any]] = index["files"]

    @property
    def names(self) -> tuple[str, ...]:
        """The files of the piece."""
        return tuple(self._files)

    def read(self, name: str, *, whole: bool = False) -> bytes:
        """A file, known to be the one that was stored.

        A file that ends in its own checksum is compared by size and that checksum, since whoever
        decodes it computes the checksum anyway; other files, and all if `whole`, by SHA-256.
        Raises CorruptError, naming the file, when it is missing or not the same.
        """
        key = f"{self.ref.key}.{name}"
        place = f"{self.storage.name}/{key}"
        entry = self._files.get(name)
        if entry is None:
            raise CorruptError(f"{place}: is not in the index of its piece")
        data = read_piece_file(self.storage, key)
        if len(data) != entry["nbytes"]:
            raise CorruptError(f"{place}: has {len(data)} bytes, not {entry['nbytes']}")
        if "tail" in entry and not whole:
            same = data[-4:].hex() == entry["tail"]
        else:
            same = sha256(data) == entry["sha256"]
        if not same:
            raise CorruptError(f"{place}: is not the file that was committed")
        return data


def read_piece_file(storage: Storage, key: str) -> bytes:
    """A file that must be there. Raises CorruptError, naming it, where it is not."""
    try:
        return storage.read(key)
    except FileNotFoundError:
        raise CorruptError(f"{storage.name}/{key}: is missing") from None


@dataclass(frozen=True)
class Manifest:
    """A committed state: its number, of what, what it says, and who committed it when."""

    number: int
    kind: str
    content: dict[str, Any]
    writer: str
    time: str
    sha256: str


class Manifests:
    """The manifests of one dataset or model, and the only way to add one.

    Without a `kind` they can be read whatever they are of, and none can be added.
    """

    def __init__(self, storage: Storage, kind: str | None = None) -> None:
        self.storage = storage
        self.kind = kind

    def latest(self) -> Manifest | None:
        """The newest manifest, or None where nothing was ever committed."""
        found = self._hinted() or self._listed()
        while found is not None and (later := self._try(found.number + 1)) is not None:
            found = later
        return found

    def read(self, number: int) -> Manifest:
        """Manifest `number`. Raises StorageError where there is none, CorruptError if damaged."""
        found = self._try(number)
        if found is None:
            raise StorageError(f"{self.storage.name}: has no version {number}")
        return found

    def delete(self, number: int) -> None:
        """Forget an old manifest. The newest must stay."""
        self.storage.delete(_manifest_key(number))

    def numbers(self) -> tuple[int, ...]:
        """Numbers of all manifests there are."""
        names = (PurePosixPath(key).name for key, _ in self.storage.list("manifests"))
        return tuple(sorted(int(n[:-5]) for n in names if n.endswith(".json") and n[:-5].isdigit()))

    def commit(
        self,
        build: Callable[[Manifest | None], dict[str, Any] | None],
        *,
        retries: int = RETRIES,
    ) -> Manifest | None:
        """Add a manifest whose content `build` derives from the newest one.

        `build` is called again with a newer manifest whenever another writer was faster; it
        returns None when nothing is left to commit, and so does `commit`. Every piece that the
        content names must have been written before. Raises ConflictError after `retries` lost
        races.
        """
        assert self.kind is not None
        for attempt in range(retries + 1):
            head = self.latest()
            content = build(head)
            if content is None:
                return None
            number = 1 if head is None else head.number + 1
            writer = uuid.uuid4().hex
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            body = {
                "format": FORMAT,
                "kind": self.kind,
                "number": number,
                "parent": None if head is None else head.sha256,
                "writer": writer,
                "time": now,
                "content": content,
            }
            data = to_json_bytes({"manifest": body, "sha256": sha256(to_json_bytes(body))})
            if self._put(number, data, writer):
                # The commit stands whether or not the hint can be written.
                with contextlib.suppress(StorageError):
                    self.storage.hint("HEAD", f"{number}\n".encode())
                stored = json.loads(data)["manifest"]["content"]
                return Manifest(number, self.kind, stored, writer, now, sha256(data))
            time.sleep(random.uniform(0, min(0.01 * 2**attempt, MAX_PAUSE)))
        raise ConflictError(
            f"{self.storage.name}: other writers committed first {retries + 1} times: "
            "run this again when they are done"
        )

    def _put(self, number: int, data: bytes, writer: str) -> bool:
        """Whether manifest `number` is ours, whatever reply came back."""
        try:
            if self.storage.write_if_absent(_manifest_key(number), data):
                return True
        except StorageError:
            there = self._try(number)
            if there is None or there.writer != writer:
                raise
            return True
        there = self._try(number)
        return there is not None and there.writer == writer

    def _hinted(self) -> Manifest | None:
        try:
            text = self.storage.read("HEAD").decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
        return self._try(int(text)) if text.isascii() and text.isdigit() else None

    def _listed(self) -> Manifest | None:
        while numbers := self.numbers():
            # None where it was deleted since, because newer ones came: look again.
            if (found := self._try(numbers[-1])) is not None:
                return found
        return None

    def _try(self, number: int) -> Manifest | None:
        key = _manifest_key(number)
        place = f"{self.storage.name}/{key}"
        try:
            data = self.storage.read(key)
        except FileNotFoundError:
            return None
        try:
            envelope = json.loads(data)
            body = envelope["manifest"]
            intact = sha256(to_json_bytes(body)) == envelope["sha256"]
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact or body.get("number") != number:
            raise CorruptError(
                f"{place}: is damaged: its digest does not match: restore it from a copy, or "
                "remove it, which undoes that commit"
            )
        _check_format(place, body)
        if self.kind not in (None, body["kind"]):
            raise StorageError(f"{self.storage.name}: holds a {body['kind']}, not a {self.kind}")
        return Manifest(
            number, body["kind"], body["content"], body["writer"], body["time"], sha256(data)
        )


def _manifest_key(number: int) -> str:
    return f"manifests/{number:06d}.json"


def _check_format(place: str, value: Mapping[str, Any]) -> None:
    if value.get("format") != FORMAT:
        raise StorageError(
            f"{place}: is stored in format {value.get('format')}, this version reads format "
            f"{FORMAT}: use a newer genstream"
        )


def grow_ledger(
    storage: Storage, content: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The `pages` and `batches` of a manifest's content with further entries at the end.

    Full pages are written as pieces here, before the commit that names them.
    """
    held = [*content.get("batches", ()), *entries]
    pages = list(content.get("pages", ()))
    while len(held) >= 2 * PAGE:
        page = PieceWriter(storage, "ledger")
        pages.append(page.seal({"batches": held[:PAGE]}).to_json())
        held = held[PAGE:]
    return {"pages": pages, "batches": held}


def read_ledger(storage: Storage, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of a manifest's ledger, oldest first, from its pages and itself."""
    for page in content.get("pages", ()):
        yield from _page(storage, PieceRef.from_json(page))
    yield from content.get("batches", ())


def forget_ledgers() -> None:
    """Read pages anew from now on, as a check of their bytes must."""
    _page.cache_clear()


@functools.lru_cache(maxsize=512)
def _page(storage: Storage, ref: PieceRef) -> tuple[dict[str, Any], ...]:
    return tuple(Piece(storage, ref).content["batches"])


def collect(storage: Storage, named: set[str], folder: str, *, older_than: float) -> int:
    """Delete the pieces below `folder` that are not `named` and older than so many seconds.

    Younger ones may belong to a commit under way, and so may temporary files beside manifests,
    which are treated alike. Returns the number of files deleted.
    """
    limit = time.time() - older_than
    n_deleted = 0
    for top in (folder, "manifests"):
        for key, written in list(storage.list(top)):
            owner, _, rest = PurePosixPath(key).parts[1].partition(".")
            temporary = not owner and rest
            unnamed = top == folder and f"{folder}/{owner}" not in named
            if (temporary or unnamed) and written < limit:
                storage.delete(key)
                n_deleted += 1
    return n_deleted
