"""Models at rest: versions of a state, one of them the champion, and the batches each has learned.

A model changes by commits of `genstream.manifests` only. One commit names the state, the champion
and the batches consumed together, so that a batch is in the model if and only if the ledger says
so: a crash leaves the version before, and a writer that was overtaken learns of it and looks again.

Versions form a line. One that learned a batch stands on its champion; one that was fitted anew
stands on nothing; after a rollback, what was learned since is no longer in the line. So whether a
batch counts follows from the version that learned it and from the champion.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from genstream.errors import ConfigError, ConflictError, GenstreamError, StorageError
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
    grow_ledger,
    read_ledger,
)
from genstream.rows import Rows
from genstream.segments import read_record, write_record
from genstream.store import GRACE, MODEL_FOLDERS, pieces_of, read_state
from genstream.story import Story

Status = Literal["learned", "rejected", "quarantined", "duplicate", "pending", "rolled_back"]

# Statuses with which a batch is left alone, unless it is asked for by name.
SETTLED: tuple[Status, ...] = ("learned", "rejected", "quarantined", "duplicate", "rolled_back")
# Manifests kept, and none younger than a day is deleted.
MANIFESTS = 64
# Other writers may commit this often while one commit is tried.
COMMIT_RETRIES = 30


class MovedError(ConflictError):
    """Another writer changed what a commit was derived from: look again, and derive it anew."""


@dataclass(frozen=True)
class Event:
    """What became of a batch, as the ledger has it.

    `status` is `learned` (by version `version`), `rejected` (by the guard, the state unchanged),
    `quarantined` (it cannot be read as what the model is of), `duplicate` (its rows were learned
    before, from other bytes) or `pending` (to be learned again, after a fit without it). A batch
    learned by a version that the champion does not stand on reads as `rolled_back`.

    `digest` is that of the rows as a multiset, `extent` the rows of a growing source that make the
    batch, `scores` what was measured, `flags` what was odd, each in plain values.
    """

    id: str
    name: str
    status: Status
    time: str = ""
    n_rows: int = 0
    version: int | None = None
    reason: str = ""
    digest: str = ""
    extent: dict[str, Any] | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` undoes it."""
        return {**asdict(self), "flags": list(self.flags)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Event:
        """Inverse of `to_json`."""
        return cls(**{**value, "flags": tuple(value["flags"])})


@dataclass(frozen=True)
class Version:
    """One version of a model: where its state is, and what was found when it was published.

    `without` are ranges of earlier versions that it does not stand on.
    """

    number: int
    time: str
    state: dict[str, str]
    record: dict[str, Any]
    without: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model as of one manifest."""

    storage: Storage
    manifest: Manifest

    @property
    def content(self) -> dict[str, Any]:
        """What the manifest says."""
        return self.manifest.content

    @property
    def champion(self) -> int:
        """Number of the version in use."""
        return int(self.content["champion"])

    @cached_property
    def versions(self) -> tuple[Version, ...]:
        """All versions that are kept, oldest first."""
        return tuple(Version(**entry) for entry in self.content["versions"])

    def version(self, number: int | Literal["champion"] = "champion") -> Version:
        """A version by its number. Raises ConfigError where it is not there."""
        wanted = self.champion if number == "champion" else number
        for version in self.versions:
            if version.number == wanted:
                return version
        listed = ", ".join(str(version.number) for version in self.versions)
        raise ConfigError(f"{self.storage.name}: has no version {number}; it has {listed}")

    def load(self, number: int | Literal["champion"] = "champion") -> tuple[Story, FitState]:
        """Story and state of a version. Raises as `version` does, and CorruptError on damage."""
        return _state(self.storage, PieceRef.from_json(self.version(number).state))

    def live(self, version: int | None) -> bool:
        """Whether the champion stands on a version, or is it."""
        without = self.content.get("without", ())
        return (
            version is not None
            and version <= self.champion
            and not any(first <= version <= last for first, last in without)
        )

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """The ledger, oldest first, each event as it was committed."""
        return tuple(map(Event.from_json, read_ledger(self.storage, self.content)))

    @cached_property
    def batches(self) -> dict[str, Event]:
        """What holds of each batch now, by its id, in the order in which they first came."""
        found: dict[str, Event] = {}
        for event in self.events:
            known = found.get(event.id)
            if known is not None and known.status == "learned":
                continue  # the champion has it, whatever came later
            if event.status == "learned" and not self.live(event.version):
                event = replace(event, status="rolled_back")
            found[event.id] = event
        return found

    def held(self) -> list[tuple[str, Rows]]:
        """Rows held out of the last batches, oldest first, with the batch's id."""
        return [
            (entry["id"], _read_rows(self.storage, PieceRef.from_json(entry["rows"])))
            for entry in self.content.get("held", ())
            if self.live(entry["version"])
        ]

    def reference(self) -> dict[str, Any] | None:
        """What batches are compared with, as it was committed; None where nothing was yet."""
        ref = self.content.get("reference")
        if ref is None:
            return None
        found: dict[str, Any] = Piece(self.storage, PieceRef.from_json(ref)).content
        return found


class ModelStore:
    """A model in a folder; `publish`, `commit` and `rollback` are commits."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.storage: Storage = LocalStorage(self.path)
        self._manifests = Manifests(self.storage, "model")

    def snapshot(self) -> Snapshot:
        """The model as it is now. Raises StorageError where there is none."""
        found = self._manifests.latest()
        if found is None:
            raise StorageError(f"{self.path}: no model there: publish one first")
        return Snapshot(self.storage, found)

    def publish(
        self,
        story: Story,
        state: FitState,
        record: Mapping[str, Any],
        *,
        keep: int = 30,
        batches: Sequence[Event] = (),
        held: Rows | None = None,
        columns: Sequence[str] = (),
    ) -> int:
        """Add the version of a fit and make it the champion; the oldest beyond `keep` are dropped.

        `record` is what a user wants to know of it (scores, rows, the run), as JSON. A `run` in it
        that a version already has makes this a repetition, which changes nothing. `batches` are
        those that were fitted: others that the model had learned are to be learned again. `held`
        are rows that were held out, `columns` those that the files had.

        Returns the version's number. Raises ConflictError where other writers always committed
        first.
        """
        run = record.get("run")
        known = self._manifests.latest()
        if known is not None and run is not None:
            for entry in known.content["versions"]:
                if entry["record"].get("run") == run:
                    return int(entry["number"])
        # What only the fit's own way of learning goes on from is of no use to a model.
        state = replace(state, past=None, stride=None, memo=None, average=None)
        ref = write_record(self.storage, "states", state.to_dataset(story), {})
        rows = None if held is None else _write_rows(self.storage, held)
        now = _now()

        def build(head: Manifest | None) -> dict[str, Any]:
            content = {} if head is None else head.content
            number = _last(content) + 1
            without = [[1, number - 1]] if number > 1 else []
            entry = Version(number, now, ref.to_json(), dict(record), ())
            fitted = {event.id for event in batches}
            whole = any(event.extent is not None for event in batches)
            before = {} if head is None else Snapshot(self.storage, head).batches
            left = [
                replace(event, status="pending", time=now, version=None)
                for event in before.values()
                if event.status == "learned"
                and event.id not in fitted
                # A fit of a growing source has all of its ranges.
                and not (whole and event.extent is not None)
            ]
            events = [*(replace(b, time=now, version=number) for b in batches), *left]
            return {
                **content,
                "versions": _kept([*content.get("versions", ()), _plain(entry, without)], keep),
                "champion": number,
                "without": without,
                "reference": None,
                "columns": list(columns),
                "held": []
                if rows is None
                else [{"id": "", "version": number, "rows": rows.to_json()}],
                **grow_ledger(self.storage, content, [event.to_json() for event in events]),
            }

        made = self._manifests.commit(build, retries=COMMIT_RETRIES)
        assert made is not None
        self._collect(made)
        return int(made.content["champion"])

    def commit(
        self,
        base: Snapshot,
        event: Event,
        *,
        model: tuple[Story, FitState] | None = None,
        record: Mapping[str, Any] | None = None,
        held: Rows | None = None,
        window: int = 7,
        keep: int = 30,
        reference: Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Snapshot:
        """Commit what became of a batch, with the version that learned it where there is one.

        Parameters
        ----------
        base
            The model as it was looked at. Where another writer has since changed the batch's
            status, or the champion by which its rows were judged, nothing is committed and
            MovedError is raised.
        event
            Its `time` and `version` are filled in here.
        model, record
            The state that has learned the batch, and what is to be known of the version.
        held
            The batch's rows that were held out, those of a rejected one with the champion's codes;
            those of the last `window` batches are kept.
        keep
            Versions kept.
        reference, columns
            What later batches are compared with, and the columns that files have, where the model
            has none yet.

        Returns
        -------
        The model as committed. Raises StorageError where it cannot be written.
        """
        pieces: list[PieceRef] = []
        try:
            state = rows = compared = None
            if model is not None:
                story, fitted = model
                state = _write_state(self.storage, story, fitted)
                pieces.append(state)
            if held is not None and held.n_rows:
                rows = _write_rows(self.storage, held)
                pieces.append(rows)
            if reference is not None and base.content.get("reference") is None:
                compared = PieceWriter(self.storage, "references").seal(reference)
                pieces.append(compared)
            now = _now()
            status = base.batches.get(event.id)
            # Rows that were read, which their digest shows, were compared with what the champion
            # knows: another one may find them good, or new, where this one did not.
            judged = model is not None or bool(event.digest)

            def build(head: Manifest | None) -> dict[str, Any]:
                if head is None:
                    raise MovedError(f"{self.path}: the model was removed meanwhile")
                there = Snapshot(self.storage, head)
                content = there.content
                if there.manifest.number != base.manifest.number and (
                    there.batches.get(event.id) != status
                    or (judged and not _same_champion(there, base))
                ):
                    raise MovedError(f"{self.path}: another writer changed it meanwhile")
                changed = dict(content)
                number = None
                if state is not None:
                    number = _last(content) + 1
                    without = [list(span) for span in content.get("without", ())]
                    entry = Version(number, now, state.to_json(), dict(record or {}))
                    changed["versions"] = _kept(
                        [*content["versions"], _plain(entry, without)], keep
                    )
                    changed["champion"] = number
                if rows is not None:
                    # A rejected batch judges as long as the champion that it was judged by counts.
                    judge = there.champion if number is None else number
                    mine = {"id": event.id, "version": judge, "rows": rows.to_json()}
                    others = [
                        one
                        for one in content.get("held", ())
                        if one["id"] != event.id and there.live(one["version"])
                    ]
                    changed["held"] = [*others, mine][-window:]
                if compared is not None:
                    changed["reference"] = compared.to_json()
                if columns is not None and not content.get("columns"):
                    changed["columns"] = list(columns)
                done = replace(event, time=now, version=number)
                return {**changed, **grow_ledger(self.storage, content, [done.to_json()])}

            made = self._manifests.commit(build, retries=COMMIT_RETRIES)
        except GenstreamError:
            # Where the reply was lost the commit may stand nevertheless: what nobody can be sure of
            # stays, and `gc` finds out whether anything names it.
            with contextlib.suppress(GenstreamError):
                head = self._manifests.latest()
                named = {ref.key for ref in pieces_of(self.storage, head)} if head else set()
                self._forget([ref for ref in pieces if ref.key not in named])
            raise
        assert made is not None
        if state is not None and made.number % 16 == 0:
            self._collect(made)
        return Snapshot(self.storage, made)

    def _forget(self, pieces: Sequence[PieceRef]) -> None:
        """Delete pieces of a commit that was not made."""
        for ref in pieces:
            for name in Piece(self.storage, ref).names:
                self.storage.delete(f"{ref.key}.{name}")
            self.storage.delete(f"{ref.key}.json")

    def _collect(self, made: Manifest) -> None:
        named = {ref.key for ref in pieces_of(self.storage, made)}
        for folder in MODEL_FOLDERS:
            collect(self.storage, named, folder, older_than=GRACE)
        # The newest manifest says all; those before it serve whoever is just looking.
        limit = time.time() - GRACE
        for key, written in list(self.storage.list("manifests")):
            number = PurePosixPath(key).stem
            if number.isdigit() and int(number) <= made.number - MANIFESTS and written < limit:
                self.storage.delete(key)

    def versions(self) -> tuple[Version, ...]:
        """All versions, oldest first. Raises StorageError where there is no model."""
        return self.snapshot().versions

    @property
    def champion(self) -> int:
        """Number of the version in use. Raises StorageError where there is no model."""
        return self.snapshot().champion

    def rollback(self, version: int | None = None) -> int:
        """Make another version the champion: the one it stands on, or the one given.

        What was learned since is then no longer in the model, and learned again on demand only.
        Raises ConfigError where there is no such version.
        """

        def build(head: Manifest | None) -> dict[str, Any]:
            if head is None:
                raise StorageError(f"{self.path}: no model there: publish one first")
            there = Snapshot(self.storage, head)
            numbers = [entry.number for entry in there.versions]
            now = there.champion
            older = [n for n in numbers if n < now and there.live(n)] or [
                n for n in numbers if n < now
            ]
            wanted = version if version is not None else max(older, default=None)
            if wanted not in numbers:
                listed = ", ".join(str(n) for n in numbers)
                raise ConfigError(
                    f"{self.path}: no version to go back to (versions {listed} are there, "
                    f"{now} is in use)"
                )
            # Raises where it is damaged: nobody goes back to nothing.
            read_state(self.storage, there.version(wanted).state)
            without = [list(span) for span in there.version(wanted).without]
            last = _last(head.content)
            if wanted < last:
                without.append([wanted + 1, last])
            return {**head.content, "champion": wanted, "without": without}

        made = self._manifests.commit(build, retries=COMMIT_RETRIES)
        assert made is not None
        return int(made.content["champion"])

    def load(self, version: int | Literal["champion"] = "champion") -> tuple[Story, FitState]:
        """Story and state of a version.

        Raises ConfigError where there is no such version, CorruptError where it is damaged.
        """
        return self.snapshot().load(version)


def load(
    path: str | Path, version: int | Literal["champion"] = "champion"
) -> tuple[Story, FitState]:
    """Story and state of a published model; see `ModelStore.load`."""
    return ModelStore(path).load(version)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _last(content: Mapping[str, Any]) -> int:
    """The highest number that a version was ever given: the newest is always kept."""
    return max((int(entry["number"]) for entry in content.get("versions", ())), default=0)


def _plain(version: Version, without: list[list[int]]) -> dict[str, Any]:
    return {**asdict(version), "without": without}


def _kept(versions: list[dict[str, Any]], keep: int) -> list[dict[str, Any]]:
    return versions[-keep:]


def _same_champion(one: Snapshot, other: Snapshot) -> bool:
    return (
        one.champion == other.champion
        and one.version().state == other.version().state
        and one.content.get("without") == other.content.get("without")
    )


def _state(storage: Storage, ref: PieceRef) -> tuple[Story, FitState]:
    """Story and state of a piece, read once: one update stands on that before it."""
    known = _known_state(storage, ref)
    if not known:
        known.append(read_state(storage, ref.to_json()))
    return known[0]


@functools.lru_cache(maxsize=2)
def _known_state(_storage: Storage, _ref: PieceRef) -> list[tuple[Story, FitState]]:
    """Where a piece's story and state are kept once they are known; a piece never changes."""
    return []


def _write_state(storage: Storage, story: Story, state: FitState) -> PieceRef:
    """Store a state. What a later read would find is kept, as it would be read."""
    dataset = state.to_dataset(story)
    ref = write_record(storage, "states", dataset, {})
    again = story_of(dataset)
    _known_state(storage, ref)[:] = [(again, FitState.from_dataset(dataset, again))]
    return ref


def _write_rows(storage: Storage, rows: Rows) -> PieceRef:
    """Rows as a piece of their own."""
    import xarray

    variables: dict[str, Any] = {"values": (("row", "feature"), np.asarray(rows.filled()))}
    if rows.weights is not None:
        variables["weights"] = (("row",), rows.weights)
    return write_record(storage, "held", xarray.Dataset(variables), {})


@functools.lru_cache(maxsize=8)
def _read_rows(storage: Storage, ref: PieceRef) -> Rows:
    found, _ = read_record(storage, ref)
    weights = found["weights"].values if "weights" in found else None
    return Rows.of(np.ascontiguousarray(found["values"].values), weights)
