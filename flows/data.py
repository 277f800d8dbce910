"""The rows a configuration means: brought into a dataset or opened in place, fitted or held out."""

from __future__ import annotations

import contextlib
import difflib
import glob
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.config import Config, Drawn, in_place
from genstream.errors import ConfigError, DataError
from genstream.manifests import is_stored
from genstream.schema import Column, Kind, Schema

if TYPE_CHECKING:
    from genstream.rows import Rows
    from genstream.sources import Source
    from genstream.store import IngestReport

ARRAYS = ("zarr.json", ".zarray", ".zgroup")
"""Files by which a folder is known to be a zarr array or group."""

OnRows = Callable[[int], None]

log = logging.getLogger("genstream")


def ingest_data(config: Config, on_rows: OnRows | None = None) -> dict[str, Any]:
    """Bring the source into the dataset; what is there already is left as it is.

    Returns the dataset's path, the manifest that holds the data, its rows, every batch looked at,
    and as `rows_before` the rows of other batches. Raises ConfigError where no dataset is named,
    and DataError where the data are not right.
    """
    from genstream.store import Dataset, ingest

    data = config.data
    path = config.dataset
    if path is None:
        raise ConfigError(
            "data.dataset is not set, so that the source is fitted in place: there is no ingest"
        )
    begin = time.monotonic()
    if isinstance(data.source, Drawn):
        found = _ingest_drawn(data.source, path, data.dtype, on_rows)
    else:
        if is_stored(path):
            _check_columns(config, Dataset.open(path).schema)
        files = expand(config.paths)
        here = [file for file in files if "://" not in file]
        away = [[file] for file in files if "://" in file]
        reports: list[IngestReport] = []
        for group in [here] * bool(here) + away:
            with contextlib.ExitStack() as stack:
                brought = [stack.enter_context(at_hand(file)) for file in group]
                reports.append(
                    ingest(
                        [file for file, _ in brought],
                        path,
                        columns=columns_of(config),
                        id_column=data.id,
                        weights=data.weights,
                        missing=data.missing,
                        null_values=data.null_values,
                        dtype=data.dtype,
                        batch=brought[0][1],
                        on_progress=on_rows,
                    )
                )
        found = reports[-1].to_json()
        found["batches"] = [b for report in reports for b in report.to_json()["batches"]]
    dataset = Dataset.open(path, found["manifest"])
    now = {batch["id"] for batch in found["batches"]}
    refused = refused_batches(config)
    left_out = [batch.id for batch in dataset.batches if batch.id in refused]
    if left_out:
        log.warning(
            "%d batch(es) that %s refused, or that were rolled back, are left out: `genstream show "
            "%s` lists them, `genstream update --retry` tries one again",
            len(left_out),
            config.publish and config.publish.model,
            config.publish and config.publish.model,
        )
    others = [b for b in dataset.batches if b.id not in now and b.id not in left_out]
    if others:
        log.warning(
            "%s also holds %s rows of batches brought in before (%s): all are fitted; name another "
            "data.dataset to fit the source alone",
            path,
            f"{sum(batch.n_rows for batch in others):,}",
            ", ".join(sorted({batch.name for batch in others})[:5]),
        )
    return {
        **found,
        "path": path,
        "left_out": left_out,
        "rows_before": sum(batch.n_rows for batch in others),
        "rows": dataset.n_rows - sum(b.n_rows for b in dataset.batches if b.id in left_out),
        "seconds": round(time.monotonic() - begin, 3),
    }


def refused_batches(config: Config) -> list[str]:
    """Ids of batches that the configuration's model has refused, or that were rolled back.

    A fit leaves them out, until `update --retry` has them learned.
    """
    from genstream.models import ModelStore

    if config.publish is None or not is_stored(config.publish.model):
        return []

    batches = ModelStore(config.publish.model).snapshot().batches.values()
    left = ("rejected", "quarantined", "duplicate", "rolled_back")
    return [event.id for event in batches if event.status in left]


def _check_columns(config: Config, schema: Schema) -> None:
    """Raise ConfigError where a dataset has other columns than the configuration names."""
    wanted = columns_of(config)
    if wanted is None:
        return
    kinds = {n: c.kind if isinstance(c, Column) else c for n, c in wanted.items()}
    there = dict(zip(schema.names, schema.kinds, strict=True))
    odd = [name for name in {**kinds, **there} if kinds.get(name) != there.get(name)]
    if odd:
        raise ConfigError(
            f"data.columns: {odd[0]!r} is {there.get(odd[0], 'not')} in {config.dataset} and "
            f"{kinds.get(odd[0], 'not')} in the configuration: name another data.dataset, or the "
            "columns this one has"
        )


def expand(paths: Sequence[str]) -> list[str]:
    """Files that paths, patterns, folders and URLs mean, in order.

    Raises DataError where one means none.
    """
    from genstream.landing import is_data, list_data

    found: list[str] = []
    for path in paths:
        if "://" in path and in_place(path):
            found.append(path)
            continue
        if "://" in path or (Path(path).is_dir() and not in_place(path)):
            # An array may lie in a folder of any name.
            stored = "://" not in path and any((Path(path) / name).exists() for name in ARRAYS)
            matches = [path] if stored else list_data(path)
            if not matches:
                raise DataError(f"{path}: holds no data yet")
            found += matches
            continue
        found_here = glob.glob(path, recursive=True)  # noqa: PTH207 - a pattern may be absolute
        # A pattern means data, not what says that they are whole or are still on the way.
        there = sorted(p for p in found_here if is_data(Path(p).name))
        matches = there if glob.has_magic(path) else [path]
        if Path(path).exists():
            matches = [path]
        if not matches or not Path(matches[0]).exists():
            near = [str(p) for p in Path(path).parent.glob("*")]
            hint = difflib.get_close_matches(path, near, n=1)
            raise DataError(
                f"{path}: no such file" + (f"; did you mean {hint[0]!r}?" if hint else "")
            )
        found += matches
    return found


@contextlib.contextmanager
def at_hand(path: str) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Within it a file lies on this machine: its path, and id and name where it is a copy.

    Raises DataError where it changes while it is fetched, StorageError where it cannot be.
    """
    if "://" not in path:
        yield path, None
        return
    from genstream.landing import Changed, copy_in, find_arrivals

    with tempfile.TemporaryDirectory(prefix="genstream-") as folder:
        (arrival,) = find_arrivals([path], ready="stable_size", settle=0.0).ready
        copy = copy_in(arrival, folder)
        if isinstance(copy, Changed):
            raise DataError(f"{path}: {copy.why}: try again when it is whole")
        yield str(copy.path), (copy.id, copy.name)


def _ingest_drawn(
    drawn: Drawn, path: str, dtype: Literal["float32", "float64"], on_rows: OnRows | None
) -> dict[str, Any]:
    """Draw rows straight into a dataset that holds nothing else."""
    from flows import draw
    from genstream.store import Dataset, append_batch

    identity = hashlib.sha256(f"{drawn.model_dump_json()}{dtype}".encode()).hexdigest()
    name = f"{drawn.gigabytes:g} GiB of a {drawn.story}"
    done = 0

    def rows() -> Iterator[Rows]:
        nonlocal done
        for piece in draw.draw_rows(drawn, dtype):
            yield piece
            done += piece.n_rows
            if on_rows is not None:
                on_rows(done)

    if is_stored(path):
        dataset = Dataset.open(path)
        if [batch.id for batch in dataset.batches] != [identity]:
            raise ConfigError(
                f"data.dataset: {path} holds other data than are to be drawn: name another "
                "folder, or leave it out"
            )
        status = "duplicate"
    else:
        schema = draw.known_story(drawn)[0].schema
        dataset, _ = append_batch(
            path,
            name,
            rows(),
            lambda: schema,
            dtype=dtype,
            batch_id=identity,
        )
        status = "stored"
    batch = {"name": name, "id": identity, "rows": dataset.n_rows, "status": status}
    return {"manifest": dataset.manifest.number, "batches": [batch]}


@dataclass(frozen=True)
class Data:
    """The rows of a run: those fitted, and those held out where there are any."""

    train: Source
    held_out: Source | None


def open_data(config: Config, pinned: Mapping[str, Any] | None = None) -> Data:
    """The rows a configuration means.

    `pinned` is what `ingest_data` found: the manifest of the dataset that is meant, and the batches
    left out of it; or, where data are fitted in place, the `files`. Without it those are the newest
    manifest's, and all, and whatever files there are now.

    Raises DataError where there are no rows, or where they do not have the columns named.
    """
    from genstream import sources, tables

    data, pinned = config.data, pinned or {}
    if config.dataset is not None:
        from genstream.store import Dataset

        dataset = Dataset.open(config.dataset, pinned.get("manifest"))
        left_out = set(pinned.get("left_out", ()))
        ids = [batch.id for batch in dataset.batches]
        kept = [i for i in ids if i not in left_out]
        told = [c for c in (columns_of(config) or {}).values() if isinstance(c, Column)]
        whole: Source = dataset.source(
            batches=None if len(kept) == len(ids) else kept, columns=told
        )
    else:
        whole = tables.open_source(
            [_found_by_all(config, file) for file in pinned.get("files") or expand(config.paths)],
            columns_of(config),
            data.weights,
            null_values=data.null_values,
            missing=data.missing,
        )
    if data.test is not None:
        test_file = tables.open_source(
            _found_by_all(config, data.test),
            whole.schema,
            data.weights,
            null_values=data.null_values,
            missing=data.missing,
        )
        return Data(whole, test_file)
    share = config.holdout
    if share is None:
        return Data(whole, None)
    seed = config.fit.seed
    train, test = (sources.Split(whole, part, share, seed) for part in ("train", "test"))
    return Data(train, test)


def _found_by_all(config: Config, path: str) -> str:
    """A path by which workers find a file, too: those of a given cluster may be elsewhere."""
    if "://" in path or "://" not in config.compute.scheduler:
        return path
    return str(Path(path).absolute())


def files_of(identity: Mapping[str, Any]) -> list[str]:
    """The files, or the one array or table, that a source's identity names."""
    inner = identity.get("source", identity)
    if "files" in inner:
        return [str(name) for name in inner["files"]]
    return [str(one["name"]) for one in inner.get("sources", [inner])]


def columns_of(config: Config) -> dict[str, Kind | Column] | None:
    """The columns named; one whose levels are still to be learned is known by its kind alone."""
    specs = config.column_specs()
    if specs is None:
        return None
    return {
        name: spec.kind
        if spec.kind == "categorical" and spec.levels is None
        else Column(
            name,
            spec.kind,
            tuple(spec.levels or ()),
            spec.unit,
            spec.lower,
            spec.upper,
            spec.resolution,
        )
        for name, spec in specs.items()
    }
