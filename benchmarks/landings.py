"""A small model, the batches that land for it, and what is left of both after violence.

Twenty batches land in the order of their names: good ones, ones that came before under another name
or in other bytes, and ones that cannot be read. Everything follows from a seed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from genstream.landing import sweep
from genstream.models import ModelStore, Snapshot
from genstream.store import Dataset, fsck, gc

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """\
version: 1
name: landings
data:
  source: landing/*.parquet
  columns: {x: real, y: real, n: count, kind: categorical}
  ready: done_marker
  holdout: 0.2
model: {n_components: 4}
fit: {max_steps: 20, n_init: 2, seed: 7, batch_rows: 256}
compute: {workers: 1}
guard: {max_drop: null}
publish: {model: model, keep: 100}
report: false
orchestrate: none
"""
SETTINGS = {"without": (), "with": ("data.dataset=dataset",)}
"""Overrides of a configuration without and with a dataset."""

N_BATCHES = 20
# Batches by their number: of which earlier one they have the bytes or the rows, and the bad ones.
SAME_BYTES = {6: 2, 11: 10, 17: 8}
SAME_ROWS = {9: 4, 15: 13}
CUT, RENAMED, RETYPED = 5, 8, 14
KINDS = np.array(["low", "middle", "high", "new"])


def make_table(seed: int, n_rows: int, n_kinds: int = 3) -> pa.Table:
    """Rows of a few clusters in mixed columns, with gaps."""
    rng = np.random.default_rng([20261125, seed])
    cluster = rng.integers(0, 4, n_rows)
    columns: dict[str, Any] = {
        name: rng.normal(3.0 * ((cluster + shift) % 4), 1.0 + 0.1 * shift)
        for shift, name in enumerate(("x", "y"))
    }
    gaps = {name: rng.random(n_rows) < 0.05 for name in columns}
    arrays = {name: pa.array(values, mask=gaps[name]) for name, values in columns.items()}
    arrays["n"] = pa.array(rng.poisson(2.0 + cluster))
    arrays["kind"] = pa.array(KINDS[(cluster + rng.integers(0, 2, n_rows)) % n_kinds])
    return pa.table(arrays)


def write_batches(folder: Path, n_rows: int) -> dict[str, str]:
    """The twenty batches as files of `n_rows` rows; of each name what has to become of it.

    One with the bytes of another is left out: those bytes are in the ledger under the first name.
    """
    folder.mkdir(parents=True)
    expected: dict[str, str] = {}
    places: dict[int, Path] = {}
    for number in range(1, N_BATCHES + 1):
        place = places[number] = folder / f"b{number:02d}.parquet"
        if number in SAME_BYTES:
            shutil.copyfile(places[SAME_BYTES[number]], place)
            continue
        status = "learned"
        # From the twelfth on a level comes that the model has never seen.
        table = make_table(number, n_rows, n_kinds=3 + (number >= 12))
        if number in SAME_ROWS:
            status = "duplicate"
            twin = pa.parquet.read_table(places[SAME_ROWS[number]])
            table = twin.take(np.random.default_rng(number).permutation(n_rows))
        elif number == RENAMED:
            status = "quarantined"
            table = table.rename_columns(["x", "why", "n", "kind"])
        elif number == RETYPED:
            status = "quarantined"
            table = table.set_column(0, "x", pa.array([f"word {i}" for i in range(n_rows)]))
        pa.parquet.write_table(table, place)
        if number == CUT:
            status = "quarantined"
            place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])
        expected[place.name] = status
    return expected


def land(file: Path, folder: Path) -> None:
    """A file arrives in the landing folder as a careful writer would bring it."""
    landing = folder / "landing"
    unfinished = landing / f".{file.name}.part"
    shutil.copyfile(file, unfinished)
    unfinished.replace(landing / file.name)
    (landing / f"{file.name}.done").touch()


def start_update(folder: Path, settings: Sequence[str], **streams: Any) -> subprocess.Popen[str]:
    """`genstream update` as a process of its own, the leader of its group."""
    return subprocess.Popen(
        command("update", settings),
        cwd=folder,
        env=environment(),
        text=True,
        start_new_session=True,
        **streams,
    )


def command(verb: str, settings: Sequence[str]) -> list[str]:
    """A verb of the command line for the configuration in the current folder."""
    return [sys.executable, "-m", "flows.cli", verb, "config.yaml", *settings, "--json"]


def environment() -> dict[str, str]:
    """Variables of a process that uses this copy of the code."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def fit_first(folder: Path, settings: Sequence[str]) -> Path:
    """A folder with a configuration, one file landed, and the model fitted to it."""
    (folder / "landing").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    first = folder / "b00.parquet"
    pa.parquet.write_table(make_table(0, 4000), first)
    land(first, folder)
    done = subprocess.run(
        command("fit", settings),
        cwd=folder,
        env=environment(),
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"the first fit ended with {done.returncode}: {done.stdout}{done.stderr}")
    return folder


@dataclass(frozen=True)
class View:
    """All that a model is, but for times: what two histories that are the same have the same."""

    state: dict[str, str]
    ledger: dict[str, dict[str, Any]]

    def differences(self, other: View) -> list[str]:
        """What is not the same, in words."""
        found = [f"{key} differs" for key in self.state if self.state[key] != other.state[key]]
        for key in {**self.ledger, **other.ledger}:
            mine, theirs = self.ledger.get(key), other.ledger.get(key)
            if mine != theirs:
                found.append(f"batch {key[:12]} is {mine} and should be {theirs}")
        return found


def view(folder: Path) -> View:
    """The model in a folder as it is now: digests of its champion, and its batches by id."""
    there = ModelStore(folder / "model").snapshot()
    _, state = there.load()
    held = hashlib.sha256()
    for key, rows in there.held():
        held.update(key.encode() + rows.filled().tobytes())
    digests = {
        "params": state.params.digest(),
        "statistics": "" if state.stats is None else state.stats.digest(),
        "memory": "" if state.memory is None else state.memory.digest(),
        "step": str(state.step),
        "log-likelihoods": repr([info.loglik for info in state.trace]),
        "rows held out": held.hexdigest(),
        "reference": repr(there.reference()),
        "champion": str(there.champion),
    }
    ledger = {key: {**event.to_json(), "time": ""} for key, event in there.batches.items()}
    return View(digests, ledger)


def wrongs(folder: Path, settings: Sequence[str], expected: Mapping[str, str]) -> list[str]:
    """What is wrong with a model once all is learned, by itself: one line each.

    Every batch `expected` is in the ledger once, with its status; what killed processes left behind
    can be removed; and every byte is as committed before and after.
    """
    found: list[str] = []
    model = folder / "model"
    there = ModelStore(model).snapshot()
    statuses = {e.name: e.status for e in there.batches.values() if e.name != "b00.parquet"}
    if statuses != expected:
        odd = {n: (statuses.get(n), s) for n, s in expected.items() if statuses.get(n) != s}
        found.append(f"statuses are not what they should be: {odd or set(statuses)}")
    found += [
        f"{name} is in the ledger {n} times"
        for name, n in counted(there).items()
        if n != 1 and name != "b00.parquet"
    ]
    kept = {path.name for path in (model / "quarantine").glob("*")}
    bad = {key[:32] for key, event in there.batches.items() if event.status == "quarantined"}
    if kept != bad:
        found.append(f"{len(kept)} batches are in quarantine, and {len(bad)} should be")
    sweep(model / "inbox", older_than=-1.0)
    left = list((model / "inbox").glob("*"))
    if left:
        found.append(f"{len(left)} copies are left in the inbox")
    for place in (model, *([folder / "dataset"] if settings else [])):
        found += fsck(place)
        gc(place, older_than=-1.0)
        found += fsck(place)
    if settings:
        stored = [batch.id for batch in Dataset.open(folder / "dataset").batches]
        good = {key for key, e in there.batches.items() if e.status != "quarantined"}
        if len(set(stored)) != len(stored) or set(stored) != good:
            found.append(f"the dataset has {len(stored)} batches, not the {len(good)} good ones")
    return found


def counted(there: Snapshot) -> dict[str, int]:
    """How often each batch is in the ledger, by its name."""
    counts: dict[str, int] = {}
    for event in there.events:
        counts[event.name] = counts.get(event.name, 0) + 1
    return counts
