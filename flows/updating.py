"""What an update does: it finds what arrived, and has it learned once and only once.

The bytes of a batch are hashed while they are copied in, and all else reads the copy. With
`data.dataset` the copy then goes into the dataset, so that a later fit has its rows too; without
one its rows are kept nowhere. A batch that is refused stays in the model's `quarantine` folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import Config, Drawn, load
from flows.data import columns_of, expand, open_data
from flows.model import online_of
from flows.run import Run
from genstream.errors import ConfigError, CorruptError, DataError, RefusedError
from genstream.landing import Copy, discard
from genstream.manifests import is_stored, storing
from genstream.models import SETTLED

if TYPE_CHECKING:
    from genstream.growing import Range
    from genstream.models import Event, ModelStore
    from genstream.report import UpdateInput
    from genstream.schema import Schema
    from genstream.sources import Source
    from genstream.updates import Delivery, Learned, Options

log = logging.getLogger("genstream")

REFUSED = ("rejected", "quarantined")
"""Statuses of batches that a person should look at: an update that has any exits with 1."""

MAX_ADVICE = 10
"""Refused batches of which a report says how to try them again."""


def begin(
    config_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    retry: str | None = None,
    batch_id: str | None = None,
    stdin: bool = False,
) -> Run:
    """A new run that will update the model of a configuration.

    `retry` names a batch that was refused or rolled back, to be tried again. Raises ConfigError
    where there is no model to update, and makes no run.
    """
    config = load(config_path, overrides)
    model_of(config)
    run = Run.create(config_path, overrides, kind="update")
    run.update(retry=retry, batch_id=batch_id, stdin=stdin)
    return run


def model_of(config: Config) -> ModelStore:
    """The model that a configuration updates. Raises ConfigError where there is none."""
    from genstream.models import ModelStore

    if config.publish is None:
        raise ConfigError("publish.model is not set: say which model is to be updated")
    if isinstance(config.data.source, Drawn):
        raise ConfigError("data.source: drawn data do not arrive: name files to update from")
    store = ModelStore(config.publish.model)
    if not is_stored(store.path):
        raise ConfigError(
            f"{config.publish.model}: no model there yet: `genstream fit` makes the first version"
        )
    return store


def update_config(
    config_path: str | os.PathLike[str], overrides: Sequence[str] = (), **how: Any
) -> dict[str, Any]:
    """Make a run and carry it out in this process; see `begin` and `carry_out`."""
    return carry_out(begin(config_path, overrides, **how))


def carry_out(run: Run, on_batch: Callable[[Learned], None] | None = None) -> dict[str, Any]:
    """Learn everything new for a run of `begin`, in this process.

    A run that found nothing leaves no folder behind: a schedule would pile them up. One that is
    done is not done again.
    """
    if run.status == "done":
        return run.stage("update")
    with run.working():
        found = update(run, on_batch)
        if found["batches"] and run.config.report:
            found = run.record("update", {**found, "report": report(run)["path"]})
    if not found["batches"]:
        shutil.rmtree(run.path, ignore_errors=True)
    return found


def refuse(found: dict[str, Any]) -> None:
    """Raise RefusedError where batches were refused that were not before."""
    refused = [b for b in found["batches"] if b["status"] in REFUSED]
    if refused:
        first = refused[0]
        reason = first["reason"].removeprefix(f"{first['name']}: ")
        others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise RefusedError(
            f"{first['name']} was {first['status']}{others}: {reason}; the model is as it "
            f"was without it, and `genstream update CONFIG --retry {first['id'][:12]}` tries again"
        )


def update(run: Run, on_batch: Callable[[Learned], None] | None = None) -> dict[str, Any]:
    """Learn all batches that are new, one commit each, and record what became of them.

    Raises as `genstream.updates.update` does; what was committed before stays, and the next update
    goes on from there.
    """
    from genstream.drift import table as drift_table
    from genstream.updates import Learned, learn_batch

    config, info = run.config, run.info()
    store, options = model_of(config), options_of(config)
    landing = Landing(config, store)
    if info.get("stdin"):
        arriving = landing.standard_input(info.get("batch_id"))
    elif info.get("retry"):
        arriving = landing.again(str(info["retry"]))
    else:
        arriving = landing.arrived()
    lines: list[dict[str, Any]] = []
    drifts: list[dict[str, Any]] = []
    refused = 0

    def note(done: Learned) -> None:
        # A line each, so that memory does not grow with all that is known of every batch.
        nonlocal refused
        lines.append(_line(done))
        drifts.extend(drift_table([done.drift] if done.drift is not None else []))
        refused += done.fresh and done.event.status in REFUSED

    for done in batches_of(run):  # where the run goes on after an interruption
        note(done)
    try:
        for number, one in enumerate(arriving, start=len(lines) + 1):
            if isinstance(one, Learned):
                done = one
            else:
                done = learn_batch(store, one, options, retry=landing.retrying)
            if info.get("stdin") and done.event.status in REFUSED:
                # Whoever sends a batch is told each time that the model does not have it.
                done = dataclasses.replace(done, fresh=True)
            landing.close(done)
            note(done)
            run.append_metrics({"step": number, **done.to_json()})
            _tell(done)
            if on_batch is not None:
                on_batch(done)
    finally:
        landing.leave()
    return run.record(
        "update",
        {
            "model": str(store.path),
            "version": store.champion,
            "batches": lines,
            "drift": drifts,
            "waiting": landing.waiting,
            "refused": refused,
        },
    )


def batches_of(run: Run) -> list[Learned]:
    """What became of the batches of a run so far."""
    from genstream.updates import Learned

    return [Learned.from_json(line) for line in run.metrics()]


def report(run: Run) -> dict[str, Any]:
    """Write `report.html` of an update; returns its path.

    Raises ConfigError where the run looked at no batch yet, StorageError where it cannot write.
    """
    from genstream.report import write_update_report

    if not run.metrics():
        raise ConfigError(f"run {run.id} has learned no batch: `genstream resume {run.id}` goes on")
    return run.record("report", {"path": str(write_update_report(run.report, _shown(run)))})


def picture(run: Run) -> bytes | None:
    """A PNG of the scores of the model's last batches; None where none was scored."""
    from genstream.report import scores_png

    return scores_png(_shown(run))


def _shown(run: Run) -> UpdateInput:
    """What the report of an update is made of."""
    from genstream.report import UpdateInput

    config, info, batches = run.config, run.info(), batches_of(run)
    store = model_of(config)
    given = shlex.quote(info["config"])
    refused = [done.event for done in batches if done.event.status in REFUSED]
    advice = [
        (
            f"genstream update {given} --retry {event.id[:12]}",
            f"try {event.name} again, once it or the configuration is mended",
        )
        for event in refused[:MAX_ADVICE]
    ]
    model = shlex.quote(str(store.path))
    advice += [
        (f"genstream rollback {model}", "go back to the version before"),
        (f"genstream rollback {model} VERSION", "make another version the one in use"),
        (f"genstream update {given} --retry BATCH", "learn a batch again that no longer counts"),
        (f"genstream show {model}", "see all versions and batches"),
    ]
    last = max(done.event.time for done in batches)
    return UpdateInput(
        title=config.name,
        model=store.snapshot(),
        batches=batches,
        waiting=[(one["name"], one["why"]) for one in run.stage("update").get("waiting", ())],
        advice=advice,
        created=datetime.fromisoformat(info.get("finished") or last),
    )


def options_of(config: Config) -> Options:
    """How the configuration says to learn."""
    from genstream.updates import Options

    guard = config.guard
    return Options(
        # A batch is gone through once, however often a fit goes through its rows.
        learner=dataclasses.replace(online_of(config), max_passes=1),
        holdout=config.data.holdout,
        seed=config.fit.seed,
        window=guard.window,
        max_drop=guard.max_drop,
        duplicates=config.data.duplicates,
        new_levels=config.data.new_levels,
        birth=guard.birth,
        retire=guard.retire,
        keep=config.publish.keep if config.publish else 30,
    )


def _tell(done: Learned) -> None:
    event = done.event
    log.info("%s: %s%s", event.name, event.status, f": {event.reason}" * bool(event.reason))
    for flag in event.flags:
        log.info("%s: %s", event.name, flag)


def _line(done: Learned) -> dict[str, Any]:
    """A batch in the table of a run."""
    event, scores = done.event, done.event.scores
    return {
        "name": event.name,
        "id": event.id,
        "rows": event.n_rows,
        "status": event.status if done.fresh else f"{event.status} before",
        "version": event.version,
        **{key: scores.get(key) for key in ("prequential", "champion", "candidate")},
        "outside": scores.get("outside"),
        "flags": list(event.flags),
        "reason": event.reason,
    }


def grows(config: Config) -> bool:
    """Whether the source is one array or table that is fitted where it lies, and may get rows."""
    paths = config.paths
    if config.dataset is not None or len(paths) != 1:
        return False
    return Path(paths[0]).exists() or not glob.has_magic(paths[0])


def _source(
    config: Config, files: Sequence[str] | None = None, schema: Schema | None = None
) -> Source:
    """The rows that lie where they are: of all the source, or of some of its files."""
    from genstream import tables

    data = config.data
    return tables.open_source(
        files or expand(config.paths),
        schema or columns_of(config),
        data.weights,
        null_values=data.null_values,
        missing=data.missing,
    )


def fitted_batches(
    config: Config, pinned: Mapping[str, Any]
) -> tuple[list[Event], tuple[str, ...]]:
    """The batches that a fit of a configuration has learned, and the columns that they came with.

    `pinned` says which data those were, as for `open_data`. Without a dataset each file is a batch,
    known by its bytes; one source alone, which may get further rows, is the range of its rows.
    """
    from genstream.models import Event
    from genstream.sources import content_digest

    if config.dataset is not None:
        from genstream.store import Dataset

        left_out = set(pinned.get("left_out", ()))
        dataset = Dataset.open(config.dataset, pinned.get("manifest"))
        kept = [batch for batch in dataset.batches if batch.id not in left_out]
        columns = next((batch.columns for batch in kept if batch.columns), ())
        return [
            Event(b.id, b.name, "learned", n_rows=b.n_rows, digest=b.digest) for b in kept
        ], columns
    if grows(config):
        from genstream.growing import Range, digest

        source = _source(config)
        n = pinned.get("n_rows") or sum(source.chunk_rows)
        rows = Range(0, n, digest(source, 0, n))
        name = str(source.identity()["name"])
        extent = dataclasses.asdict(rows)
        return [
            Event(rows.batch_id(name), f"{name}[0:{n}]", "learned", n_rows=n, extent=extent)
        ], ()
    from genstream.landing import RowMultiset, by_label

    files, events = pinned.get("files") or expand(config.paths), []
    schema = open_data(config, pinned).train.schema
    levels = {j: schema.columns[j].levels for j in schema.of_kind("categorical")}
    for path in files:
        part, seen = _source(config, [path], schema), RowMultiset()
        for i in range(len(part.chunk_rows)):
            seen.add(by_label(part.read(i), levels))
        name, n_rows = Path(path).name, seen.n_rows
        event = Event(content_digest(path), name, "learned", n_rows=n_rows, digest=seen.hexdigest())
        events.append(event)
    return events, ()


class Landing:
    """Where batches come from: copies of what landed, the dataset, standard input.

    Each batch is given as something to learn, or as what became of it where it cannot be read at
    all. `close` is called when it is settled, `leave` at the end.
    """

    def __init__(self, config: Config, store: ModelStore) -> None:
        from genstream.landing import Seen, sweep

        self.config = config
        self.store = store
        self.waiting: list[dict[str, str]] = []
        self.retrying = False
        self.inbox = store.path / "inbox"
        self.quarantine = store.path / "quarantine"
        self._seen = Seen(store.path / "seen.json")
        self._copies: dict[str, Copy] = {}
        sweep(self.inbox)

    def arrived(self) -> Iterator[Delivery | Learned]:
        """All that is new: rows of the dataset that the model lacks, then what has landed."""
        yield from self._stored()
        if grows(self.config):
            yield from self._grown()
            return
        from genstream.landing import Changed, copy_in, find_arrivals

        found = find_arrivals(self.config.paths, ready=self.config.data.ready)
        self.waiting += [{"name": w.name, "why": w.why} for w in found.waiting]
        settled = {e.id for e in self.store.snapshot().batches.values() if e.status in SETTLED}
        for arrival in found.ready:
            if self._seen.get(arrival) in settled:
                continue
            copy = copy_in(arrival, self.inbox)
            if isinstance(copy, Changed):
                self.waiting.append({"name": arrival.name, "why": copy.why})
                continue
            self._copies[copy.id] = copy
            known = self._settled(copy.id)
            if known is not None:
                self._put_away(known)
            else:
                yield self._opened(copy, copy.id)
                known = self._settled(copy.id)
            if known is not None:
                self._seen.put(arrival, copy.id)

    def standard_input(self, batch_id: str | None) -> Iterator[Delivery | Learned]:
        """One batch of all that standard input holds."""
        from genstream.landing import spool
        from genstream.updates import caller_id

        if sys.stdin is None:
            raise DataError("standard input is closed: send a batch there")
        copy = spool(sys.stdin.buffer, self.inbox)
        if batch_id is None:
            log.warning(
                "standard input has no --id, so it is known by its bytes: the same bytes count "
                "once, and rows sent again in other bytes may be learned twice"
            )
            identity = copy.id
        else:
            identity = caller_id(batch_id)
            known = self._settled(identity)
            # Its sender has mended it: what could not be read is looked at again.
            self.retrying = known is not None and known.status == "quarantined"
        yield self._opened(copy, identity, batch_id or f"stdin-{copy.id[:8]}")

    def again(self, reference: str) -> Iterator[Delivery | Learned]:
        """A batch that was refused or rolled back, by its name or the beginning of its id.

        Raises ConfigError where there is none, or its bytes are no longer there.
        """
        event = find_batch(self.store, reference)
        self.retrying = True
        if event.extent is not None:
            yield self._range_again(event)
            return
        stored = self._from_dataset({event.id})
        kept = self._kept(event.id)
        if stored:
            yield from stored
        elif kept is not None:
            yield self._opened(kept, event.id, event.name)
        else:
            yield self._landed_again(event)

    def close(self, done: Learned) -> None:
        """Put the bytes of a settled batch where they belong."""
        self._put_away(done.event)

    def _put_away(self, event: Event) -> None:
        """Keep or let go of the copy of a settled batch, and let go of what quarantine has of it.

        Whoever settled it may have died, or be just about to do the same.
        """
        copy = self._copies.pop(event.id, None)
        stored = self.config.dataset is not None and event.status != "quarantined"
        kept = self._kept(event.id) if event.status == "learned" else None
        if copy is not None and event.status in REFUSED and not stored:
            self._keep(copy, event.id)
        elif copy is not None:
            discard(copy)
        if kept is not None:
            discard(kept)

    def leave(self) -> None:
        """Let go of copies, and remember what was seen."""
        for copy in self._copies.values():
            if copy.path.is_relative_to(self.inbox):
                discard(copy)
        self._seen.save()

    def _settled(self, identity: str) -> Event | None:
        """What became of a batch; None where it is still to be learned."""
        known = self.store.snapshot().batches.get(identity)
        return known if known is not None and known.status in SETTLED else None

    def _stored(self) -> list[Delivery]:
        """Batches of the dataset that the model has neither learned nor refused, in their order."""
        path = self.config.dataset
        from genstream.store import Dataset

        if path is None or not is_stored(path):
            return []

        known = self.store.snapshot().batches
        stored = (batch.id for batch in Dataset.open(path).batches)
        return self._from_dataset(
            {i for i in stored if i not in known or known[i].status not in SETTLED}
        )

    def _from_dataset(self, wanted: set[str]) -> list[Delivery]:
        path = self.config.dataset
        from genstream.store import Dataset
        from genstream.updates import SourceDelivery

        if path is None or not wanted or not is_stored(path):
            return []

        dataset = Dataset.open(path)
        return [
            SourceDelivery(
                dataset.source(batches=[batch.id]), batch.id, batch.name, batch.columns or None
            )
            for batch in dataset.batches
            if batch.id in wanted
        ]

    def _grown(self) -> Iterator[Delivery]:
        """The rows that the source got, as one batch."""
        from genstream.growing import Growth
        from genstream.landing import Waiting

        source = _source(self.config)
        rows = Growth(self.store.path / "verified.json").new_rows(source, self._ranges())
        if isinstance(rows, Waiting):
            self.waiting.append({"name": rows.name, "why": rows.why})
        elif rows is not None:
            yield _range_delivery(source, rows)

    def _ranges(self) -> list[Range]:
        """The ranges of rows that were looked at, one after another from row 0."""
        from genstream.growing import Range

        found: list[Range] = []
        for event in self.store.snapshot().events:
            if event.extent is None:
                continue
            rows = Range(**event.extent)
            if rows.first == 0:
                found = [rows]
            elif found and rows.first == found[-1].last:
                found.append(rows)
        return found

    def _range_again(self, event: Event) -> Delivery:
        from genstream.growing import Growth, Range

        assert event.extent is not None
        source, rows = _source(self.config), Range(**event.extent)
        if not Growth().is_unchanged(source, rows):
            raise DataError(f"{event.name}: its rows are not what they were: fit anew")
        return _range_delivery(source, rows)

    def _opened(self, copy: Copy, identity: str, name: str | None = None) -> Delivery | Learned:
        """What a copy holds, in the dataset where there is one; or that it cannot be read."""
        from genstream.formats import table_columns
        from genstream.models import Event
        from genstream.store import ingest
        from genstream.updates import TableDelivery, check_columns_alike, settle

        data, dataset = self.config.data, self.config.dataset
        name = name or copy.name
        self._copies[identity] = copy
        try:
            delivery = TableDelivery(
                copy.path,
                identity,
                name,
                data.weights,
                data.null_values,
                data.missing,
                table_columns(copy.path),
            )
            check_columns_alike(delivery, self.store.snapshot().content.get("columns"))
            if dataset is None:
                return delivery
            ingest(
                [copy.path],
                dataset,
                columns=columns_of(self.config),
                id_column=data.id,
                weights=data.weights,
                missing=data.missing,
                null_values=data.null_values,
                dtype=data.dtype,
                batch=(identity, name),
            )
        except (DataError, CorruptError) as error:
            if isinstance(error, CorruptError) and str(copy.path) not in str(error):
                raise  # what is damaged is the dataset, which is no fault of the batch
            self._keep(self._copies.pop(identity), identity)
            reason = str(error).replace(str(copy.path), name)
            return settle(
                self.store,
                Event(identity, name, "quarantined", reason=reason),
                retry=self.retrying,
            )
        discard(self._copies.pop(identity))
        (stored,) = self._from_dataset({identity})
        return stored

    def _keep(self, copy: Copy, identity: str) -> None:
        """Move a copy into quarantine, where `again` finds it.

        Another process may do so with the same bytes: the first one's stay. A name that a sender
        gave says nothing of the bytes, of which then the newest are kept.
        """
        folder = self.quarantine / identity[:32]
        if copy.path.parent == folder:
            return
        with storing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if identity != copy.id:
                shutil.rmtree(folder, ignore_errors=True)
            try:
                copy.path.parent.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                discard(copy)

    def _kept(self, identity: str) -> Copy | None:
        folder = self.quarantine / identity[:32]
        for path in folder.iterdir() if folder.is_dir() else ():
            return Copy(identity, path, path.name, 0)
        return None

    def _landed_again(self, event: Event) -> Delivery | Learned:
        """A batch whose bytes are still where they landed."""
        from genstream.landing import Changed, copy_in, find_arrivals

        for arrival in find_arrivals(self.config.paths, ready="stable_size", settle=0.0).ready:
            if self._seen.get(arrival) not in (None, event.id):
                continue
            copy = copy_in(arrival, self.inbox)
            if isinstance(copy, Changed):
                continue
            if copy.id == event.id:
                return self._opened(copy, event.id, event.name)
            discard(copy)
        raise ConfigError(
            f"{event.name} ({event.id[:12]}): its bytes are neither in quarantine nor where they "
            "landed: bring them back to try again"
        )


def _range_delivery(source: Source, rows: Range) -> Delivery:
    from genstream.growing import RangeSource
    from genstream.updates import SourceDelivery

    name = str(source.identity()["name"])
    identity = rows.batch_id(name)
    return SourceDelivery(
        RangeSource(source, rows.first, rows.last, batch=identity),
        identity,
        f"{name}[{rows.first}:{rows.last}]",
        extent=dataclasses.asdict(rows),
    )


def find_batch(store: ModelStore, reference: str) -> Event:
    """A batch of a model's ledger, by its name or the beginning of its id.

    Of several of one name the newest that the model has not learned. Raises ConfigError where there
    is none.
    """
    batches = store.snapshot().batches
    matches = [
        event
        for event in batches.values()
        if event.name == reference or (len(reference) >= 6 and event.id.startswith(reference))
    ]
    open_ones = [event for event in matches if event.status != "learned"] or matches
    if not open_ones:
        refused = [e.name for e in batches.values() if e.status not in ("learned", "duplicate")]
        near = difflib.get_close_matches(reference, refused or [e.name for e in batches.values()])
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{store.path}: no batch {reference!r}{hint}")
    return open_ones[-1]
