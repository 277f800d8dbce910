"""A sweep over K in shared passes beside the same fits one by one: bytes read and seconds.

    python -m benchmarks.sweep [--components 2 4 8 16 32] [--rows N] [--gigabytes G] [--dtype D]

The household power benchmark is brought into a dataset of a folder that is removed afterwards
(with `--gigabytes`, rows drawn from a known mixture instead), and the warm starts of all candidates
are made beforehand: learning is what is timed, on the nine tenths of the rows that a configuration
does not hold out. Both ways then take turns, from the same starts to the same tolerance, and must
come to the same bits. Two kinds of dataset are shown: one that the operating system keeps in memory
once it was read, and one of which it has forgotten all before every pass, as it has of data larger
than memory. Prints a line a kind with bytes, seconds and CPU seconds of either way, and their
ratios.
"""

from __future__ import annotations

import functools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import roofline
from benchmarks.data import POWER_COLUMNS, path
from benchmarks.measure import parser
from flows.config import Drawn
from flows.draw import draw_rows, known_story
from genstream.learn import BatchEM, FitState, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import Source, Split
from genstream.start import draw_sample, warm_start
from genstream.store import Dataset, append_batch
from genstream.stories import mixture
from genstream.sweeps import Candidate, fit_many

ALL = (*range(2, 9), *range(10, 33, 2))


class Metered:
    """A source that adds up the bytes of the values that are read of another."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.nbytes = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, i: int) -> Rows:
        """One chunk, counted."""
        rows = self.source.read(i)
        with self._lock:
            self.nbytes += rows.values.nbytes
        return rows


class Forgetting(Passes):
    """Passes before each of which the operating system forgets what it kept of a folder."""

    folder: Path

    def fold(self, work: Callable[[int, Rows], Any]) -> Any:
        roofline.forget(self.folder)
        return super().fold(work)


def stored(folder: Path, n_rows: int | None, gigabytes: float | None, dtype: Any) -> Dataset:
    """The rows as a dataset of a folder."""
    if gigabytes is not None:
        drawn = Drawn(gigabytes=gigabytes, n_components=12, n_features=8, separation=1.5)
        schema, pieces = known_story(drawn)[0].schema, draw_rows(drawn, dtype)
    else:
        values = np.load(path("power/train.npy"), mmap_mode="r")[:n_rows]
        schema = Schema.real(POWER_COLUMNS)
        pieces = (Rows(np.asarray(v, dtype)) for v in np.array_split(values, len(values) // 65_536))
    dataset, _ = append_batch(folder, "rows", pieces, lambda: schema, dtype=dtype)
    return dataset


def candidates(source: Source, numbers: Sequence[int], dtype: str, steps: int) -> list[Candidate]:
    """Mixtures with full covariances, started on the same sample."""
    passes = Passes(source)
    sample = draw_sample(passes, 20_000, 42)
    found = []
    for k in numbers:
        story, state = warm_start(
            mixture(source.schema, k, dtype=dtype),
            passes,
            n_init=1,
            long_steps=10,
            sample=sample,
        )
        found.append(Candidate(story, BatchEM(steps, 1e-4, accelerate=True), state))
    return found


def one_by_one(many: Sequence[Candidate], passes: Passes) -> list[FitState]:
    """Each fit by itself."""
    return [fit(each.story, each.learner, passes, each.state) for each in many]


def side_by_side(many: Sequence[Candidate], passes: Passes) -> list[FitState]:
    """All fits in shared passes."""
    found = []
    for state in fit_many(many, passes, workers=passes.workers):
        if isinstance(state, Exception):
            raise state
        found.append(state)
    return found


class Done(NamedTuple):
    """What a way to fit all candidates took, and came to."""

    seconds: float
    busy: float
    nbytes: int
    states: list[FitState]

    def least(self, other: Done) -> Done:
        """Of two rounds that came to the same, what either took at least."""
        return self._replace(
            seconds=min(self.seconds, other.seconds), busy=min(self.busy, other.busy)
        )


def rounds(
    many: Sequence[Candidate], make: Callable[[Metered], Passes], source: Source, n: int
) -> Iterator[dict[str, Done]]:
    """What both ways came to and took, in turn."""
    ways = {"one by one": one_by_one, "shared": side_by_side}
    for _ in range(n):
        found = {}
        for name, way in ways.items():
            metered = Metered(source)
            begin, busy = time.perf_counter(), time.process_time()
            states = way(many, make(metered))
            spent = time.perf_counter() - begin, time.process_time() - busy
            found[name] = Done(*spent, metered.nbytes, states)
        yield found


def main() -> None:
    """Run both kinds of dataset and print a table."""
    options = parser(__doc__)
    options.add_argument("--components", type=int, nargs="+", default=list(ALL))
    options.add_argument("--rows", type=int, default=None, help="of power, all by default")
    options.add_argument("--gigabytes", type=float, default=None, help="of drawn rows instead")
    options.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options.add_argument("--steps", type=int, default=10, help="of each fit, at most")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--workers", type=int, default=2)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place) / "rows"
        dataset = stored(folder, chosen.rows, chosen.gigabytes, chosen.dtype)
        source = Split(dataset.source(), "train", 0.1, 42)
        many = candidates(source, chosen.components, chosen.dtype, chosen.steps)
        n_rows = sum(source.chunk_rows)
        print(
            f"{n_rows:,} x {source.schema.n_features} rows of {chosen.dtype} in "
            f"{len(source.chunk_rows)} chunks, {len(many)} candidates of K = "
            f"{', '.join(map(str, chosen.components))}, {chosen.workers} workers"
        )
        print(
            "| dataset | steps | read one by one | shared | ratio | s one by one | shared | ratio "
            "| CPU s one by one | shared | ratio |"
        )
        print("|" + "---|" * 11)

        def forgetting(metered: Metered) -> Passes:
            passes = Forgetting(metered, workers=chosen.workers)
            passes.folder = folder
            return passes

        kinds: dict[str, Callable[[Metered], Passes]] = {
            "kept in memory": lambda metered: Passes(metered, workers=chosen.workers),
            "forgotten before every pass": forgetting,
        }
        for kind, make in kinds.items():
            found = list(rounds(many, make, source, chosen.rounds))
            apart, shared = (
                functools.reduce(Done.least, [each[way] for each in found])
                for way in ("one by one", "shared")
            )
            for one, other in zip(apart.states, shared.states, strict=True):
                if one.params.digest() != other.params.digest():
                    raise SystemExit("a fit in shared passes came to other bits than alone")
            steps = [state.step for state in apart.states]
            cells = [
                kind,
                f"{sum(steps)} in all, {max(steps)} at most",
                f"{apart.nbytes / 2**20:,.0f} MiB",
                f"{shared.nbytes / 2**20:,.0f} MiB",
                f"{apart.nbytes / shared.nbytes:.1f}",
            ]
            for mine, ours in ((apart.seconds, shared.seconds), (apart.busy, shared.busy)):
                cells += [f"{mine:.2f}", f"{ours:.2f}", f"{mine / ours:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
