"""Kill `genstream update` at random moments, run it again, and compare the model to the bit.

    python -m benchmarks.update_kills [--kills 100] [--rows 1000] [--seed 0]

Twenty batches land one after another or in clumps; some have the bytes or the rows of others, some
cannot be read. Each update is sent SIGKILL after a random part of the time that an undisturbed one
takes, and run again, which may be killed as well. Half of the kills are with a dataset, half
without one. In the end parameters, statistics, memory, rows held out and ledger have to be those of
updates that nobody disturbed, with every good batch in it once. Exits with 1 where they are not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.landings import SETTINGS, fit_first, land, start_update, view, write_batches, wrongs
from benchmarks.measure import parser
from genstream.models import ModelStore
from genstream.store import Dataset

# Of the kills, those that strike before an update can have begun to learn.
EARLY = 0.15


@dataclass(frozen=True)
class Pace:
    """How long an undisturbed update takes, in s: to begin, and for each file that landed."""

    start: float
    each: float


def clumps(rng: np.random.Generator, files: Sequence[Path]) -> list[list[Path]]:
    """The files in their order, cut into clumps of one to five."""
    found, at = [], 0
    while at < len(files):
        n = int(rng.integers(1, 6))
        found.append(list(files[at : at + n]))
        at += n
    return found


def finish(folder: Path, settings: Sequence[str]) -> float:
    """Let an update come to its end; the seconds it took. Only refused batches may make it fail."""
    begin = time.monotonic()
    process = start_update(folder, settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    told, complaint = process.communicate()
    if process.returncode not in (0, 1):
        raise SystemExit(f"an update ended with {process.returncode}: {told}{complaint}")
    return time.monotonic() - begin


def strike(folder: Path, settings: Sequence[str], moment: float) -> bool:
    """Start an update and kill it after `moment` seconds; whether it still ran."""
    with start_update(
        folder, settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return True
    return False


@dataclass(frozen=True)
class Trail:
    """What an update that was killed leaves behind: events, copies, batches the model lacks."""

    n_events: int
    n_copies: int
    n_ahead: int

    @classmethod
    def of(cls, folder: Path, settings: Sequence[str]) -> Trail:
        """As it is now."""
        model = ModelStore(folder / "model")
        there = model.snapshot()
        stored = Dataset.open(folder / "dataset").batches if settings else ()
        ahead = sum(batch.id not in there.batches for batch in stored)
        return cls(len(there.events), len(list((model.path / "inbox").glob("*"))), ahead)

    def since(self, before: Trail) -> str:
        """How far an update had come when it died, in words."""
        if self.n_copies > before.n_copies:
            return "with a copy in hand"
        if self.n_ahead:
            return "between the commits of dataset and model"
        return "between batches" if self.n_events > before.n_events else "before the first batch"


def main() -> None:
    """Kill, run again, compare."""
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--rows", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    rng = np.random.default_rng(chosen.seed)
    begin = time.monotonic()
    n_wrong = 0
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        expected = write_batches(top / "batches", chosen.rows)
        files = sorted((top / "batches").iterdir())
        for number, (which, settings) in enumerate(SETTINGS.items()):
            wanted = (chosen.kills + number) // len(SETTINGS)
            fitted = fit_first(top / which / "fitted", settings)
            calm = top / which / "calm"
            shutil.copytree(fitted, calm)
            idle = finish(calm, settings)
            for file in files:
                land(file, calm)
            pace = Pace(idle, max(0.05, (finish(calm, settings) - idle) / len(files)))
            truth = view(calm)
            n_wrong += _told(which, "undisturbed", wrongs(calm, settings, expected))
            print(
                f"{which} a dataset, undisturbed: {pace.start:.1f} s to begin and "
                f"{pace.each:.2f} s a batch, parameters {truth.state['params'][:16]}",
                flush=True,
            )
            killed = history = 0
            while killed < wanted:
                folder = top / which / f"history-{history}"
                shutil.copytree(fitted, folder)
                found = _violence(rng, folder, settings, files, pace, wanted - killed)
                problems = [*view(folder).differences(truth), *wrongs(folder, settings, expected)]
                n_wrong += _told(which, f"history {history}", problems)
                killed += found.total()
                told = ", ".join(f"{n} {where}" for where, n in found.most_common())
                verdict = "other bits" if problems else "the same bits"
                print(f"  {found.total()} kills ({told}): {verdict}", flush=True)
                history += 1
                shutil.rmtree(folder)
    print(f"{n_wrong} wrong; {chosen.kills} kills in {time.monotonic() - begin:.0f} s")
    sys.exit(1 if n_wrong else 0)


def _violence(
    rng: np.random.Generator,
    folder: Path,
    settings: Sequence[str],
    files: Sequence[Path],
    pace: Pace,
    most: int,
) -> Counter[str]:
    """Let the files land and be learned, with at most so many kills; where those struck."""
    struck: Counter[str] = Counter()
    waiting = 0
    for clump in clumps(rng, files):
        for file in clump:
            land(file, folder)
        waiting += len(clump)
        # Sometimes more lands before an update comes to its end.
        while struck.total() < most and rng.random() < 0.85:
            if rng.random() < EARLY:
                moment = rng.uniform(0.0, 0.8 * pace.start)
            else:
                moment = rng.uniform(0.8 * pace.start, pace.start + pace.each * waiting)
            before = Trail.of(folder, settings)
            if strike(folder, settings, float(moment)):
                struck[Trail.of(folder, settings).since(before)] += 1
        if rng.random() < 0.4:
            finish(folder, settings)
            waiting = 0
    finish(folder, settings)
    return struck


def _told(which: str, what: str, problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"WRONG {which} a dataset, {what}: {problem}", flush=True)
    return len(problems)


if __name__ == "__main__":
    main()
