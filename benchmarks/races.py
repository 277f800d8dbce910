"""Let several `genstream update` run at once on one model and one landing folder, again and again.

    python -m benchmarks.races [--races 50] [--rows 400] [--seed 0]

Two of three races are of two processes, with a file that lands meanwhile, the others of eight; half
of them are with a dataset, half without one. Every process has to exit with 0, or with 4 and its
message; afterwards one more update learns what landed too late. Then every batch has to be in the
ledger once, and the model has to be, to the bit, the one that learns the same batches by itself in
the order of the ledger. Exits with 1 where anything is otherwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet

from benchmarks.landings import (
    SETTINGS,
    fit_first,
    land,
    make_table,
    start_update,
    view,
    wrongs,
)
from benchmarks.measure import parser
from flows import updating
from genstream.models import ModelStore

# Batches of a race; one of them has the rows of another, in another order.
N_BATCHES = 4
OVERTAKEN = "another writer was faster"


def write_files(folder: Path, seed: int, n_rows: int) -> dict[str, Path]:
    """The files of a race by their names."""
    folder.mkdir(parents=True)
    files: dict[str, Path] = {}
    for number in range(1, N_BATCHES + 1):
        table = make_table(1000 * seed + number, n_rows)
        if number == N_BATCHES:
            twin = pyarrow.parquet.read_table(files["b1.parquet"])
            table = twin.take(np.random.default_rng(seed).permutation(n_rows))
        place = folder / f"b{number}.parquet"
        pyarrow.parquet.write_table(table, place)
        files[place.name] = place
    return files


def race(
    folder: Path, settings: Sequence[str], files: dict[str, Path], n: int, delay: float | None
) -> tuple[Counter[str], list[str]]:
    """Let `n` updates run at once; how they ended and were overtaken, and what is wrong.

    With a `delay`, the third file lands so many s after the start of the processes.
    """
    late = None if delay is None else files["b3.parquet"]
    for file in files.values():
        if file is not late:
            land(file, folder)
    runners = [
        start_update(folder, settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(n)
    ]
    if late is not None:
        assert delay is not None
        time.sleep(delay)
        land(late, folder)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for runner in runners:
        told, complaint = runner.communicate()
        seen[f"exit {runner.returncode}"] += 1
        explained = runner.returncode == 4 and "run this again" in told
        if runner.returncode != 0 and not explained:
            wrong.append(f"a process ended with {runner.returncode}: {told}{complaint}")
    for log in folder.glob("runs/*/log.txt"):
        seen["overtaken"] += log.read_text(encoding="utf-8").count(OVERTAKEN)
    known = {event.name for event in ModelStore(folder / "model").snapshot().batches.values()}
    seen["landed too late"] += len(set(files) - known)
    last = start_update(folder, settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    told, complaint = last.communicate()
    if last.returncode != 0:
        wrong.append(f"the last update ended with {last.returncode}: {told}{complaint}")
    return seen, wrong


def replayed(fitted: Path, folder: Path, settings: Sequence[str], files: dict[str, Path]) -> Path:
    """A model that learns, by itself, the batches of `folder` in the order of its ledger."""
    alone = folder.with_name(f"{folder.name}-alone")
    shutil.copytree(fitted, alone)
    here = Path.cwd()
    os.chdir(alone)
    try:
        for event in ModelStore(folder / "model").snapshot().events:
            if event.name in files:
                land(files[event.name], alone)
                updating.update_config("config.yaml", settings)
    finally:
        os.chdir(here)
    return alone


def main() -> None:
    """Race, learn alone, compare."""
    options = parser(__doc__)
    options.add_argument("--races", type=int, default=50)
    options.add_argument("--rows", type=int, default=400)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    rng = np.random.default_rng(chosen.seed)
    begin = time.monotonic()
    n_wrong = 0
    totals: dict[int, Counter[str]] = {2: Counter(), 8: Counter()}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        fitted = {which: fit_first(top / which, how) for which, how in SETTINGS.items()}
        calm = time.monotonic()
        start_update(fitted["without"], (), stdout=subprocess.DEVNULL).wait()
        calm = time.monotonic() - calm
        for number in range(chosen.races):
            n = (2, 2, 8)[number % 3]
            which = list(SETTINGS)[number % 2]
            settings = SETTINGS[which]
            files = write_files(top / f"files-{number}", number, chosen.rows)
            folder = top / f"race-{number}"
            shutil.copytree(fitted[which], folder)
            delay = float(rng.uniform(0.0, 2.0 * calm)) if n == 2 else None
            seen, wrong = race(folder, settings, files, n, delay)
            totals[n] += seen
            alone = replayed(fitted[which], folder, settings, files)
            there = ModelStore(folder / "model").snapshot().batches.values()
            statuses = {event.name: event.status for event in there if event.name in files}
            wrong += view(folder).differences(view(alone))
            wrong += wrongs(folder, settings, statuses)
            if sorted(statuses.values()) != ["duplicate", "learned", "learned", "learned"]:
                wrong.append(f"the batches became {statuses}")
            for problem in wrong:
                print(f"WRONG race {number} of {n}, {which} a dataset: {problem}", flush=True)
            n_wrong += bool(wrong)
            totals[n]["races"] += 1
            told = ", ".join(f"{key} {value}" for key, value in sorted(seen.items()))
            print(f"  race {number + 1} of {n}, {which} a dataset: {told}", flush=True)
            for used in (folder, alone, top / f"files-{number}"):
                shutil.rmtree(used)
    for n, seen in totals.items():
        told = ", ".join(f"{key} {value}" for key, value in sorted(seen.items()) if key != "races")
        print(f"{seen['races']} races of {n}: {told}")
    print(f"{n_wrong} wrong; {chosen.races} races in {time.monotonic() - begin:.0f} s")
    sys.exit(1 if n_wrong else 0)


if __name__ == "__main__":
    main()
