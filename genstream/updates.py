"""A model that lives: new batches are judged, learned once, judged again, and published or not.

A batch is walked twice. First it is read, compared with what the model knows (`genstream.drift`)
and scored, before anything is learned of it (Dawid 1984, "prequential"); a share of its rows,
chosen by a hash of batch, row and seed, is put aside and never learned. Then the other rows are
learned by `OnlineEM`, and the guard compares candidate and champion on the rows put aside of the
last batches, this one included: the candidate must be worse neither on the mean of their rows nor
on most of the batches. What a batch of nonsense gains on its own rows, which may be hundreds of
nats, so pays for nothing that the others lose; and since the rows of rejected batches judge as
well, a stream that has changed for good is learned again once most of the last batches are of the
new kind. What follows is one commit (`genstream.models`): the new version together with the batch
that made it, or the batch's status and reason with the state unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from genstream import growth
from genstream.drift import Drift, Reference, Thresholds, Watch
from genstream.errors import ConfigError, ConflictError, CorruptError, DataError
from genstream.formats import listed
from genstream.landing import Arrived, RowMultiset, by_label
from genstream.learn import FitState
from genstream.models import SETTLED, Event, ModelStore, MovedError, Snapshot
from genstream.online import OnlineEM
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import Source, row_hash, rows_of_piece
from genstream.start import RESCUE_ROWS
from genstream.story import Params, Story
from genstream.tables import Encoder, read_tables
from genstream.threads import one_blas_thread

log = logging.getLogger("genstream")

# Rows of one batch that are put aside at most, and their bytes; more would cost the guard time and
# memory, and add little.
MAX_HELD = 20_000
HELD_NBYTES = 8 << 20
# Badly explained rows of a batch from which a component may be born.
MAX_SURPRISING = 2_048
# Other writers may overtake this often before an update gives up.
ATTEMPTS = 20
# Earlier batches that say what a mean log-likelihood usually is.
HISTORY = 30


class Delivery(Protocol):
    """A batch that can be read as often as it takes."""

    @property
    def id(self) -> str:
        """What the batch is known by: equal ids are the same batch."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """All columns it came with, modelled or not; None where that has no meaning."""

    @property
    def extent(self) -> dict[str, Any] | None:
        """The rows of a growing source that make the batch."""

    def read(self, known: Schema) -> Iterator[tuple[Rows, Schema]]:
        """Its rows by pieces, with the columns of `known` in their order.

        Levels that `known` lacks get codes after its own; the schema that comes with each piece has
        all levels seen so far. Raises DataError where the rows are not of those columns.
        """


@dataclass(frozen=True)
class TableDelivery:
    """A batch in a file, or in a table in memory.

    Parameters
    ----------
    data
        The file, of any format of `genstream.tables.read_tables`, or the table.
    id, name
        As for every delivery.
    weights, null_values, missing
        As for `genstream.store.ingest`.
    columns, extent
        As for every delivery.
    """

    data: Any
    id: str
    name: str
    weights: str | None = None
    null_values: Sequence[str] | None = None
    missing: Literal["allow", "forbid"] = "allow"
    columns: tuple[str, ...] | None = None
    extent: dict[str, Any] | None = None

    def read(self, known: Schema) -> Iterator[tuple[Rows, Schema]]:
        """See `Delivery.read`."""
        encoder = Encoder(
            known=known,
            null_values=self.null_values,
            missing=self.missing,
            carried=() if self.weights is None else (self.weights,),
        )
        first = 0
        chunk_rows = rows_of_piece(known.n_features)
        try:
            for table in read_tables(self.data, columns=encoder.wanted, chunk_rows=chunk_rows):
                rows = encoder.encode(table, first_row=first, place=self.name)
                if self.weights is not None:
                    found = encoder.weights(table, self.weights, first_row=first, place=self.name)
                    rows = replace(rows, weights=found)
                yield rows, encoder.schema
                first += rows.n_rows
        except (DataError, CorruptError) as error:
            # What is damaged here came damaged; the file is a copy whose place says nothing.
            place = str(self.data) if isinstance(self.data, str | Path) else "table"
            raise DataError(str(error).replace(place, self.name, 1)) from None


@dataclass(frozen=True, eq=False)
class SourceDelivery:
    """A batch that is a source: rows of a dataset, of a growing array, or in memory."""

    source: Source
    id: str
    name: str
    columns: tuple[str, ...] | None = None
    extent: dict[str, Any] | None = None

    def read(self, known: Schema) -> Iterator[tuple[Rows, Schema]]:
        """See `Delivery.read`; columns are found by name and levels by label."""
        mine = self.source.schema
        order, schema, codes = _translation(self.name, mine, known)
        for i in range(len(self.source.chunk_rows)):
            rows = self.source.read(i)
            if order != list(range(mine.n_features)):
                rows = rows.select(order)
            for j, table in codes.items():
                values = rows.values.copy()
                values[:, j] = table[rows.values[:, j].astype(np.intp)]
                rows = replace(rows, values=values)
            yield rows, schema


@dataclass(frozen=True, eq=False)
class RowsDelivery:
    """A batch of rows in memory, with the columns and codes of the model."""

    rows: Rows
    id: str
    name: str
    columns: tuple[str, ...] | None = None
    extent: dict[str, Any] | None = None

    def read(self, known: Schema) -> Iterator[tuple[Rows, Schema]]:
        """See `Delivery.read`."""
        if self.rows.n_features != known.n_features:
            raise DataError(
                f"{self.name}: has {self.rows.n_features} columns, the model {known.n_features}: "
                f"{', '.join(known.names[:8])}"
            )
        yield self.rows.check(known), known


def caller_id(name: str) -> str:
    """The id of a batch that its sender names: equal names are the same batch."""
    return hashlib.sha256(f"id:{name}".encode()).hexdigest()


def delivery(arrived: Arrived) -> Delivery:
    """What a program handed over, as a batch to learn.

    Without an id from the caller it gets one of its own, so that after a restart only `duplicates`
    tells whether its rows were learned before.
    """
    identity = uuid.uuid4().hex if arrived.id is None else caller_id(arrived.id)
    if isinstance(arrived.rows, Rows):
        return RowsDelivery(arrived.rows, identity, arrived.name)
    columns = tuple(arrived.rows.column_names)
    return TableDelivery(arrived.rows, identity, arrived.name, columns=columns)


def _translation(
    name: str, mine: Schema, known: Schema
) -> tuple[list[int], Schema, dict[int, NDArray[np.float64]]]:
    """Where the columns of `known` are, `known` with further levels, and codes by code."""
    order, columns, codes = [], [], {}
    for j, column in enumerate(known.columns):
        if column.name not in mine.names:
            raise DataError(f"{name}: no column {column.name!r}")
        found = mine[column.name]
        if found.kind != column.kind:
            raise DataError(f"{name}: column {column.name!r} is {found.kind}, not {column.kind}")
        order.append(mine.index(column.name))
        levels = tuple(dict.fromkeys((*column.levels, *found.levels)))
        if column.kind == "categorical":
            if found.levels != levels[: len(found.levels)]:
                codes[j] = np.array([float(levels.index(label)) for label in found.levels])
            column = Column(column.name, column.kind, levels, column.unit)
        columns.append(column)
    return order, Schema(tuple(columns)), codes


@dataclass(frozen=True)
class Options:
    """How a model learns from what arrives.

    Parameters
    ----------
    learner
        The pace of learning.
    holdout, seed
        Share of each batch's rows that is put aside for the guard, or None for none; the same
        `(batch, row, seed)` are held out as in a fit with this share and seed.
    window
        Batches, the candidate's included, whose rows put aside the guard looks at.
    max_drop
        Nats a row by which the candidate may be worse than the champion, on the mean of these rows
        and on most of these batches; None publishes whatever is finite.
    duplicates
        Rows that were learned before from other bytes: `skip` them, `learn` them once more, or
        `error`, which puts the batch into quarantine.
    new_levels
        Levels that the model has never seen: take them as `missing`, `add` them to the model, or
        `reject` the batch as one that cannot be read.
    birth
        Whether a component may be born from badly explained rows.
    retire
        Mixing weight below which a component is removed, or None to keep all.
    keep
        Versions kept.
    thresholds
        What is called drift.
    """

    learner: OnlineEM = field(default_factory=OnlineEM)
    holdout: float | None = 0.1
    seed: int = 42
    window: int = 7
    max_drop: float | None = 0.05
    duplicates: Literal["skip", "learn", "error"] = "skip"
    new_levels: Literal["missing", "add", "reject"] = "missing"
    birth: bool = False
    retire: float | None = None
    keep: int = 30
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise ConfigError(f"holdout is {self.holdout}: it must lie between 0 and 1")
        if self.window < 1:
            raise ConfigError(f"window is {self.window}: it must be at least 1")
        if self.max_drop is not None and self.max_drop < 0:
            raise ConfigError(f"max_drop is {self.max_drop}: it must not be negative")


@dataclass(frozen=True)
class Learned:
    """What became of a batch: its event, as committed, and how it differed from the usual.

    `fresh` is false where its status was settled before, so that nothing was done.
    """

    event: Event
    drift: Drift | None = None
    fresh: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.event.to_json(),
            "fresh": self.fresh,
            "drift": None if self.drift is None else self.drift.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Learned:
        """Inverse of `to_json`; other keys are no matter. Raises CorruptError as `Drift` does."""
        drift = value["drift"]
        return cls(
            Event.from_json({one.name: value[one.name] for one in fields(Event)}),
            None if drift is None else Drift.from_json(drift),
            value["fresh"],
        )


def update(
    model: str | Path,
    deliveries: Iterable[Delivery | Arrived],
    options: Options | None = None,
    *,
    on_batch: Callable[[Learned], None] | None = None,
) -> list[Learned]:
    """Learn batches into a published model, each once and only once.

    Parameters
    ----------
    model
        The model's folder.
    deliveries
        The batches in their order, made as they are wanted; `genstream.stream` makes them of any
        iterator.
    options
        How to learn.
    on_batch
        Called after each commit.

    Returns
    -------
    What became of each. A batch that cannot be read, or that would make the model worse, is not an
    error: its status says so.

    Raises
    ------
    ConflictError
        Where other writers were faster again and again.
    StorageError
        Where there is no model, or it cannot be written; batches committed before stay.
    """
    store, found = ModelStore(model), []
    for one in deliveries:
        if not (isinstance(one, Arrived) or hasattr(one, "read")):
            raise ConfigError(
                f"cannot learn from {type(one).__name__} as it is: give genstream.stream(batches)"
            )
        batch = delivery(one) if isinstance(one, Arrived) else one
        done = learn_batch(store, batch, options or Options())
        found.append(done)
        if on_batch is not None:
            on_batch(done)
    return found


def learn_batch(
    store: ModelStore, delivery: Delivery, options: Options, *, retry: bool = False
) -> Learned:
    """Learn one batch, or find out why not, and commit what became of it.

    With `retry` also where its status is settled, unless the model has it. Raises as `update` does.
    """
    for _ in range(ATTEMPTS):
        base = store.snapshot()
        known = base.batches.get(delivery.id)
        if (
            known is not None
            and known.status in SETTLED
            and not (retry and known.status != "learned")
        ):
            return Learned(known, fresh=False)
        try:
            with one_blas_thread():
                return _attempt(store, base, delivery, options, retry)
        except MovedError:
            log.info("%s: another writer was faster; looking again", store.path)
    raise ConflictError(
        f"{store.path}: other writers were faster {ATTEMPTS} times: run this again when they are "
        "done"
    )


def settle(store: ModelStore, event: Event, *, retry: bool = False) -> Learned:
    """Commit a status that does not depend on what the model has learned.

    Where the batch's status is settled already that one is returned, unless it is tried again.
    """
    for _ in range(ATTEMPTS):
        base = store.snapshot()
        known = base.batches.get(event.id)
        if (
            known is not None
            and known.status in SETTLED
            and not (retry and known.status != "learned")
        ):
            return Learned(known, fresh=False)
        with contextlib.suppress(MovedError):
            return Learned(_committed(store.commit(base, event)))
    raise ConflictError(f"{store.path}: other writers were faster {ATTEMPTS} times: run this again")


def _committed(there: Snapshot) -> Event:
    return there.events[-1]


@dataclass(eq=False)
class _Reading:
    """What the first walk over a batch finds."""

    schema: Schema
    watch: Watch
    share: float
    seed: int
    key: int
    unseen: dict[int, set[str]] = field(default_factory=dict)
    n_rows: int = 0
    digest: RowMultiset = field(default_factory=RowMultiset)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    held: list[Rows] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.below = np.uint64(min(int(self.share * 2.0**64), 2**64 - 1))
        self.most = most_held(self.schema.n_features)

    def add(self, rows: Rows, schema: Schema) -> None:
        """Take a piece in, its codes under `schema`, which extends the model's."""
        levels = {j: schema.columns[j].levels for j in schema.of_kind("categorical")}
        self.digest.add(by_label(rows, levels))
        self.watch.add(recoded(rows, schema, self.schema))
        for j in schema.of_kind("categorical"):
            column = rows.values[:, j]
            seen = column[rows.is_observed[:, j] & (column >= self.schema.columns[j].n_levels)]
            for code in np.unique(seen).astype(int):
                self.unseen.setdefault(j, set()).add(schema.columns[j].levels[code])
        hashes = row_hash((self.key, self.n_rows, rows.n_rows), self.seed)
        mine = hashes < self.below
        self.held.append(rows[mine])
        self.hashes.append(hashes[mine])
        self.n_rows += rows.n_rows
        self.came = schema
        if sum(map(len, self.hashes)) > 2 * self.most:
            self._trim()

    def _trim(self) -> None:
        """Keep the rows with the lowest hashes: those beyond are learned instead."""
        hashes = np.concatenate(self.hashes)
        if len(hashes) > self.most:
            self.below = np.partition(hashes, self.most)[self.most]
        mine = hashes < self.below
        self.held = [Rows.concatenate(self.held)[mine]]
        self.hashes = [hashes[mine]]

    def close(self) -> Rows:
        """The rows put aside, with the codes they came with."""
        self._trim()
        return self.held[0]

    @property
    def extended(self) -> Schema:
        """The model's schema with the further levels that the batch has, in alphabetical order.

        So it depends on the batch alone, whatever else a dataset may hold.
        """
        columns = list(self.schema.columns)
        for j, labels in self.unseen.items():
            columns[j] = replace(columns[j], levels=(*columns[j].levels, *sorted(labels)))
        return Schema(tuple(columns))


def most_held(n_features: int) -> int:
    """Rows of one batch that are put aside at most."""
    return min(MAX_HELD, max(500, HELD_NBYTES // (8 * n_features)))


def recoded(rows: Rows, have: Schema, want: Schema) -> Rows:
    """The rows, whose codes are of `have`, with those of `want`: other labels become gaps."""
    values, observed = rows.values, rows.observed
    for j in want.of_kind("categorical"):
        mine, theirs = have.columns[j].levels, want.columns[j].levels
        if mine == theirs[: len(mine)]:
            continue
        codes = {label: float(code) for code, label in enumerate(theirs)}
        table = np.array([codes.get(label, np.nan) for label in mine])
        found = table[rows.values[:, j].astype(np.intp)]
        if values is rows.values:
            values, observed = values.copy(), rows.is_observed.copy()
        assert observed is not None
        values[:, j] = np.nan_to_num(found)
        observed[:, j] &= ~np.isnan(found)
    return rows if values is rows.values else Rows(values, observed, rows.weights)


def _attempt(
    store: ModelStore, base: Snapshot, delivery: Delivery, options: Options, retry: bool
) -> Learned:
    story, state = base.load()
    compared = base.reference()
    if compared is not None:
        reference = Reference.from_json(compared)
    else:
        sample = state.sample
        if sample is None:
            # Published without the rows it began with: the model itself says what is usual.
            rng = np.random.default_rng(options.seed)
            sample = Rows.of(story.draw(state.params, RESCUE_ROWS, rng).values)
        reference = Reference.of(story, state.params, sample)
        compared = reference.to_json()
    event = Event(delivery.id, delivery.name, "learned", extent=delivery.extent)

    def commit(event: Event, **parts: Any) -> Event:
        return _committed(
            store.commit(
                base,
                event,
                window=options.window,
                keep=options.keep,
                reference=compared,
                columns=delivery.columns if event.status == "learned" else None,
                **parts,
            )
        )

    reading = _Reading(
        story.schema,
        Watch(reference, story, state.params, options.thresholds),
        options.holdout or 0.0,
        options.seed,
        int(delivery.id[:16], 16),
    )
    try:
        check_columns_alike(delivery, base.content.get("columns"))
        for rows, schema in delivery.read(story.schema):
            reading.add(rows, schema)
        if not reading.n_rows:
            raise DataError(f"{delivery.name}: has no rows")
        unseen = [
            f"column {story.schema.names[j]!r}: unseen levels {listed(sorted(labels))}"
            for j, labels in reading.unseen.items()
        ]
        if unseen and options.new_levels == "reject":
            raise DataError(f"{delivery.name}: {'; '.join(unseen)}: and new_levels is 'reject'")
    except DataError as error:
        return Learned(commit(replace(event, status="quarantined", reason=str(error))))
    held = reading.close()
    known = reading.extended if options.new_levels == "add" else story.schema
    held = recoded(held, reading.came, known)
    history = [
        (float(e.scores["prequential"]), e.n_rows)
        for e in base.batches.values()
        if e.status == "learned" and e.scores.get("prequential") is not None
    ]
    drift = reading.watch.result(history[-HISTORY:], delivery.name)
    flags = [*unseen, *drift.flags]
    same_name = [e for e in base.batches.values() if e.name == delivery.name and e.id != event.id]
    if same_name:
        flags.append(f"{delivery.name}: other bytes came under this name before")
    event = replace(
        event,
        n_rows=reading.n_rows,
        digest=reading.digest.hexdigest(),
        flags=tuple(flags),
        scores=_scores(drift),
    )
    twin = _twin(base, event)
    if twin is not None and not retry and options.duplicates != "learn":
        reason = f"the same rows as {twin.name}, in other bytes"
        if options.duplicates == "error":
            event = replace(event, status="quarantined", reason=f"{reason}: duplicates is 'error'")
        else:
            event = replace(event, status="duplicate", reason=reason)
        return Learned(commit(event), drift)
    candidate, learned, events = _learned(story, state, delivery, reading, known, options)
    flags += events
    others = [one for one in base.held() if one[0] != event.id]
    before = others[1 - options.window :] if options.window > 1 else []
    # The rows of a fit, which have no id, stand for the batches that there have not been yet.
    missing = options.window - 1 - len(before)
    judges = [(rows, 1 if identity else 1 + missing) for identity, rows in before]
    judges.append((held, 1))
    verdict, scores = _judged(story, state.params, candidate, learned.params, judges, options)
    event = replace(event, scores={**event.scores, **scores}, flags=tuple(flags))
    if verdict:
        mine = recoded(held, known, story.schema)
        return Learned(commit(replace(event, status="rejected", reason=verdict), held=mine), drift)
    record = {
        "batch": {"id": event.id, "name": event.name},
        "rows": event.n_rows,
        "digest": learned.params.digest(),
        "held_out": {"mean_loglik": scores["candidate"], "n_rows": scores["held_rows"]},
        "null_values": base.version().record.get("null_values"),
    }
    done = commit(event, model=(candidate, learned), record=record, held=held)
    return Learned(done, drift)


def check_columns_alike(delivery: Delivery, columns: Sequence[str] | None) -> None:
    """Raise DataError where a file lacks columns that files of this model have, or has others."""
    if delivery.columns is None or not columns:
        return
    lacking = [name for name in columns if name not in delivery.columns]
    further = [name for name in delivery.columns if name not in columns]
    told = []
    if lacking:
        told.append(f"lacks {', '.join(map(repr, lacking))}")
    if further:
        told.append(f"has {', '.join(map(repr, further))} besides")
    if told:
        hint = ": was a column renamed?" if lacking and further else ""
        raise DataError(f"{delivery.name}: {' and '.join(told)}, unlike the files before{hint}")


def _twin(base: Snapshot, event: Event) -> Event | None:
    """A batch that the model has learned and that has the same rows."""
    for other in base.batches.values():
        if other.status == "learned" and other.digest == event.digest and other.id != event.id:
            return other
    return None


def _scores(drift: Drift) -> dict[str, Any]:
    return {
        "prequential": drift.mean_loglik if np.isfinite(drift.mean_loglik) else None,
        "band": list(drift.band),
        "outside": drift.outside,
        "surprising": drift.surprising,
    }


def _learned(
    story: Story,
    state: FitState,
    delivery: Delivery,
    reading: _Reading,
    known: Schema,
    options: Options,
) -> tuple[Story, FitState, list[str]]:
    """Story and state once the rows that were not put aside are learned, and what happened."""
    events: list[str] = []
    if known != story.schema:
        story, state = growth.with_levels(story, state, known)
        events += [
            f"column {old.name!r} has further levels {', '.join(new.levels[len(old.levels) :])}"
            for old, new in zip(reading.schema.columns, known.columns, strict=True)
            if old != new
        ]
    n_rows = reading.n_rows - reading.held[0].n_rows
    start, before = story, state.params

    def pieces() -> Iterator[Rows]:
        first = 0
        for rows, schema in delivery.read(reading.schema):
            hashes = row_hash((reading.key, first, rows.n_rows), reading.seed)
            first += rows.n_rows
            yield recoded(rows[hashes >= reading.below], schema, known)

    def surprising(rows: Rows) -> NDArray[np.bool_]:
        return start.log_prob(before, rows) < reading.watch.reference.quantile_001

    learned = pieces()
    if options.birth:
        # Before they are learned: a component that has widened to reach them would hide them.
        odd = _first(MAX_SURPRISING, (rows[surprising(rows)] for rows in pieces()))
        if odd is not None:
            seed = (options.seed ^ reading.key) % 2**63
            story, state, born = growth.birth(story, state, odd, seed=seed)
            events += born
            if born:
                # What is born of rows has learned them.
                learned, n_rows = _but(odd.n_rows, pieces(), surprising), n_rows - odd.n_rows
    state, _ = options.learner.learn(story, state, learned, n_rows=n_rows)
    if options.retire is not None:
        story, state, gone = growth.retire(story, state, options.retire)
        events += gone
    if events:
        last = replace(state.trace[-1], events=(*state.trace[-1].events, *events))
        state = replace(state, trace=(*state.trace[:-1], last))
    return story, state, events


def _first(most: int, pieces: Iterable[Rows]) -> Rows | None:
    """The first rows of some pieces; None where there are none."""
    found: list[Rows] = []
    for rows in pieces:
        left = most - sum(piece.n_rows for piece in found)
        if left <= 0:
            break
        if rows.n_rows:
            found.append(rows[slice(0, left)])
    return Rows.concatenate(found) if found else None


def _but(
    most: int, pieces: Iterable[Rows], chosen: Callable[[Rows], NDArray[np.bool_]]
) -> Iterator[Rows]:
    """The pieces without the first rows that are chosen."""
    for rows in pieces:
        mine = chosen(rows)
        mine &= np.cumsum(mine) <= most
        most -= int(mine.sum())
        yield rows[~mine]


def _judged(
    story: Story,
    champion: Params,
    candidate: Story,
    params: Params,
    batches: Sequence[tuple[Rows, int]],
    options: Options,
) -> tuple[str, dict[str, Any]]:
    """Why the candidate is refused (empty where it is not), and the scores of both.

    Scores are means over the rows of all `batches`. What is judged is their difference, and the
    median over the batches, each counted as often as stands beside it, of the mean difference: of
    an even number the lower.
    """
    arrays = (np.asarray(value) for _, _, value in params.leaves())
    if not all(np.isfinite(array).all() for array in arrays):
        return "the candidate's parameters are not finite", _pair(None, None, 0)
    means, masses, gains = [], [], []
    for rows, times in batches:
        # Both are asked about the same entries: levels that only the candidate knows would be dear.
        asked = recoded(rows, candidate.schema, story.schema)
        weights = np.where(asked.is_observed.any(axis=1), asked.row_weights, 0.0)
        if weights.sum() > 0:
            pair = story.log_prob(champion, asked), candidate.log_prob(params, asked)
            before, after = (_mean(log_p, weights) for log_p in pair)
            means.append([before, after])
            masses.append(weights.sum())
            # Where the champion has no finite score, any finite one is a gain.
            gains += [after - before if np.isfinite(before) else np.inf] * times
    if not means:
        return "", _pair(None, None, 0)
    old, new = np.average(means, axis=0, weights=masses)
    scores = _pair(float(old), float(new), sum(rows.n_rows for rows, _ in batches))
    if not np.isfinite(new):
        return "the candidate's log-likelihood of the rows put aside is not finite", scores
    if options.max_drop is None:
        return "", scores
    middle = sorted(gains)[(len(gains) - 1) // 2]
    if np.isfinite(old) and new < old - options.max_drop:
        verdict = (
            f"held out, the candidate has {new:.4f} nats a row and the champion {old:.4f}: "
            f"{old - new:.4f} less, and max_drop is {options.max_drop:g}"
        )
    elif middle < -options.max_drop:
        verdict = (
            f"on rows put aside of most of the last {len(means)} batches the candidate is worse, "
            f"by {-middle:.4f} nats a row in the middle one, and max_drop is {options.max_drop:g}"
        )
    else:
        verdict = ""
    return verdict, scores


def _pair(champion: float | None, candidate: float | None, n_rows: int) -> dict[str, Any]:
    def plain(value: float | None) -> float | None:
        return value if value is not None and np.isfinite(value) else None

    return {"champion": plain(champion), "candidate": plain(candidate), "held_rows": n_rows}


def _mean(log_p: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float(weights @ np.where(weights > 0, log_p, 0.0) / weights.sum())
