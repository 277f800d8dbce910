"""Two models that live: taught each day as it lands, beside one frozen and one fitted again.

    python -m benchmarks.stream flights [--days-per-call 1] [--folder FOLDER]
    python -m benchmarks.stream power

Days land as files in `landing/` of a scratch folder, and the command line is called there, in a
process of its own: first `genstream fit`, then `genstream update` for every `--days-per-call` days,
or once for all (0). Flights come as CSV, a call for each of the 334 days from February on; power
as parquet, in one call of 1,395 days. In a `--folder` that is there already the stream goes on: a
day that was learned is not learned again.

Three models are compared by the mean log-likelihood (nats a row) of days that none of them has
learned. The one that lives is scored by the update itself, before it learns; the frozen one stays
as it was fitted; the third is fitted anew before each period to all rows up to it, with the same
components and prior, from the best of five starts. All see the same rows, in which levels that the
first fit did not meet are missing entries.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from benchmarks.data import path
from benchmarks.kills import command
from benchmarks.measure import parser
from genstream.learn import BatchEM, FitState, fit
from genstream.models import Event, ModelStore
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.store import load_checkpoint, save_checkpoint
from genstream.stories import mixture
from genstream.story import Params, Story
from genstream.updates import TableDelivery, recoded

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WAIT = 10.0
"""Seconds by which a file is dated back, so that it counts as whole at once."""


@dataclass(frozen=True)
class Stream:
    """Days in their order, and how they are told of.

    The first `n_fitted` are fitted. `period` is what a day is counted under; a model is fitted
    anew before each, to every `thin`-th row before it. Means leave the first `skip` periods out.
    """

    name: str
    days: dict[str, pd.DataFrame]
    n_fitted: int
    suffix: str
    period: Callable[[str], str]
    days_per_call: int
    skip: int
    thin: int = 1

    def file(self, folder: Path, day: str) -> Path:
        """Where a day lands."""
        return folder / "landing" / f"{day}{self.suffix}"

    def land(self, folder: Path, days: Sequence[str]) -> None:
        """Put days where the configuration looks for them, unless they are there."""
        (folder / "landing").mkdir(exist_ok=True)
        for day in days:
            file = self.file(folder, day)
            if file.exists():
                continue
            table = self.days[day]
            if self.suffix == ".csv":
                table.to_csv(file, index=False)
            else:
                table.to_parquet(file, index=False)
            long_ago = time.time() - WAIT
            os.utime(file, (long_ago, long_ago))


def flights() -> Stream:
    """The flights of 2013 by day, without anything of the calendar."""
    columns = ["dep_delay", "arr_delay", "air_time", "distance", "carrier", "origin"]
    table = pd.read_csv(path("flights.csv.zip"), usecols=["year", "month", "day", *columns])
    date = pd.to_datetime(table[["year", "month", "day"]]).dt.strftime("%Y-%m-%d")
    days = {str(day): rows[columns] for day, rows in table.groupby(date)}
    return Stream("flights", days, 31, ".csv", lambda day: day[:7], days_per_call=1, skip=1)


def power() -> Stream:
    """The household's minutes by day, from 16 December 2006 to 26 November 2010."""
    numbers = ["Global_active_power", "Voltage", "Sub_metering_1", "Sub_metering_2"]
    numbers.append("Sub_metering_3")
    recording = path("minute_household_power.csv.xz")
    table = pd.read_csv(recording, usecols=["Date", *numbers], na_values="?")
    date = pd.to_datetime(table["Date"], format="%d/%m/%Y").dt.strftime("%Y-%m-%d")
    days = {str(day): rows[numbers] for day, rows in table.groupby(date)}
    first = sum(day < "2007-02" for day in days)

    def quarter(day: str) -> str:
        return f"{day[:4]} Q{(int(day[5:7]) + 2) // 3}"

    return Stream("power", days, first, ".parquet", quarter, 0, skip=0, thin=4)


STREAMS = {"flights": flights, "power": power}


def rows_of(file: Path, schema: Schema) -> Rows:
    """All rows of a landed file, as the update reads them; other levels are missing entries."""
    pieces = TableDelivery(file, "", file.name).read(schema)
    return Rows.concatenate([recoded(rows, came, schema) for rows, came in pieces])


def total(story: Story, params: Params, rows: Rows) -> float:
    """Nats of all rows; one with nothing observed has none."""
    return float(story.log_prob(params, rows).sum())


def refitted(
    story: Story, before: Sequence[Path], period: Sequence[Path], thin: int, kept: Path
) -> dict[str, Any]:
    """Nats of each day of a period under a model fitted to the days before, and its seconds.

    They are kept in a file, so that a stream that goes on need not fit again.
    """
    if kept.exists():
        known: dict[str, Any] = json.loads(kept.read_text())
        if len(known["nats"]) == len(period):
            return known
    begin = time.perf_counter()
    rows = Rows.concatenate([rows_of(file, story.schema) for file in before])
    passes = Passes(NumpySource(rows.filled()[::thin], schema=story.schema), workers=1)
    fresh, state = warm_start(
        mixture(story.schema, story.n_components, prior=story.prior),
        passes,
        n_init=5,
        sample_rows=25_000,
    )
    state = fit(fresh, BatchEM(200, 1e-4), passes, state)
    seconds = time.perf_counter() - begin
    nats = [total(fresh, state.params, rows_of(file, story.schema)) for file in period]
    found = {"nats": nats, "seconds": seconds}
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


@dataclass
class Watched:
    """A call of the command line: how long it took, and its memory as batches were committed."""

    seconds: float = 0.0
    seen: list[tuple[float, int, int]] = field(default_factory=list)

    def watch(self, process: subprocess.Popen[str], model: Path) -> None:
        """Note (s, number of the newest manifest, resident bytes) until the process ends."""
        begin = time.perf_counter()
        with suppress(psutil.Error):
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                with suppress(OSError, ValueError):
                    number = int((model / "HEAD").read_text())
                    now = time.perf_counter() - begin
                    self.seen.append((now, number, watched.memory_info().rss))
                time.sleep(0.1)
        self.seconds = time.perf_counter() - begin

    @property
    def n_commits(self) -> int:
        """Commits that were noticed."""
        return self.seen[-1][1] - self.seen[0][1] if self.seen else 0

    @property
    def committing(self) -> float:
        """Seconds from just before the first commit to the last."""
        first, last = self.seen[0][1], self.seen[-1][1]
        begin = max(when for when, number, _ in self.seen if number == first)
        return min(when for when, number, _ in self.seen if number == last) - begin

    def tenths(self) -> tuple[float, float]:
        """Mean resident MiB over the first and the last tenth of the commits.

        Before the first commit the process still grows to its size: that does not count.
        """
        _, numbers, memory = np.array(self.seen, dtype=float).T
        first, last = numbers.min(), numbers.max()
        early = (numbers > first) & (numbers <= first + (last - first) / 10)
        late = numbers >= last - (last - first) / 10
        return float(memory[early].mean() / 2**20), float(memory[late].mean() / 2**20)


def call(folder: Path, model: Path, verb: str, config: Path) -> Watched:
    """A verb in a process of its own, which must end well or with batches refused."""
    arguments = [str(config), "orchestrate=none", "report=false"]
    watched = Watched()
    with (
        tempfile.TemporaryFile("w+") as out,
        subprocess.Popen(
            command(verb, *arguments), cwd=folder, stdout=out, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        watched.watch(process, model)
        if process.wait() not in (0, 1):
            out.seek(0)
            raise SystemExit(f"{verb} ended with {process.returncode}: {out.read()[-3000:]}")
    return watched


def first_fit(stream: Stream, folder: Path, config: Path, model: Path) -> tuple[Story, FitState]:
    """Land the first days and fit them through the command line; the state is kept aside."""
    aside = folder / "frozen"
    found = load_checkpoint(aside)
    if found is None:
        stream.land(folder, list(stream.days)[: stream.n_fitted])
        call(folder, model, "fit", config)
        found = ModelStore(model).load(1)
        save_checkpoint(aside, *found)
    return found


def main() -> None:
    """Stream, refit, compare."""
    options = parser(__doc__)
    options.add_argument("stream", choices=[*STREAMS])
    options.add_argument("--days-per-call", type=int, help="0 for all days in one call")
    options.add_argument("--folder", type=Path, help="a scratch folder that is kept")
    options.add_argument("--days", type=int, help="only so many days after the first fit")
    options.add_argument("--fits", type=int, default=1, help="fits anew at a time")
    chosen = options.parse_args()
    stream = STREAMS[chosen.stream]()
    if chosen.days is not None:
        days = list(stream.days.items())[: stream.n_fitted + chosen.days]
        stream = replace(stream, days=dict(days))
    if chosen.days_per_call is not None:
        stream = replace(stream, days_per_call=chosen.days_per_call)
    if chosen.folder is not None:
        chosen.folder.mkdir(parents=True, exist_ok=True)
        run(stream, chosen.folder.resolve(), chosen.fits)
        return
    with tempfile.TemporaryDirectory() as top:
        run(stream, Path(top), chosen.fits)


def run(stream: Stream, folder: Path, n_fits: int) -> None:
    """Do all days of a stream in a folder, and print what came of them."""
    config = CONFIGS / f"{stream.name}-stream.yaml"
    model = folder / "models" / f"{stream.name}-stream"
    story, state = first_fit(stream, folder, config, model)
    every = list(stream.days)
    days = every[stream.n_fitted :]
    periods: dict[str, list[str]] = {}
    for day in days:
        periods.setdefault(stream.period(day), []).append(day)
    calls, refits = [], {}
    # Fits run beside the updates, in processes of their own.
    with ProcessPoolExecutor(n_fits, mp_context=get_context("spawn")) as pool:
        groups = np.array_split(days, -(-len(days) // (stream.days_per_call or len(days))))
        for group in groups:
            stream.land(folder, [str(day) for day in group])
            for name, inside in periods.items():
                if name not in refits and inside[-1] <= group[-1]:
                    earlier = every[: every.index(inside[0])]
                    before, files = (
                        [stream.file(folder, day) for day in some] for some in (earlier, inside)
                    )
                    refits[name] = pool.submit(
                        refitted,
                        story,
                        before,
                        files,
                        stream.thin,
                        folder / "refits" / f"{name}.json",
                    )
            known = {event.name for event in ModelStore(model).snapshot().events}
            if not all(stream.file(folder, day).name in known for day in group):
                calls.append(call(folder, model, "update", config))
        found = {name: job.result() for name, job in refits.items()}
    ledger = {event.name: event for event in ModelStore(model).snapshot().events}
    # Days without any reading are files of the same bytes: those count as one batch.
    names = [stream.file(folder, day).name for day in days]
    events = [ledger[name] for name in names if name in ledger]
    table = compare(
        stream,
        folder,
        (story, state),
        periods,
        ledger,
        {name: one["nats"] for name, one in found.items()},
    )
    print(table)
    print(told(stream, table, events, calls))
    print(f"a fit anew took {np.mean([one['seconds'] for one in found.values()]):.0f} s on average")


@dataclass(frozen=True)
class Table:
    """Mean nats a row of each period under the three models."""

    periods: list[str]
    rows: list[int]
    online: list[float]
    frozen: list[float]
    refit: list[float]

    def mean(self, which: str, skip: int = 0) -> float:
        """Mean over periods, each counting once, but for the first `skip`."""
        return float(np.mean(getattr(self, which)[skip:]))

    def __str__(self) -> str:
        lines = [
            "| period | rows | online | frozen | refit | online - frozen | online - refit |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for name, n, online, frozen, refit in zip(
            self.periods, self.rows, self.online, self.frozen, self.refit, strict=True
        ):
            lines.append(
                f"| {name} | {n:,} | {online:.3f} | {frozen:.3f} | {refit:.3f} "
                f"| {online - frozen:+.3f} | {online - refit:+.3f} |"
            )
        return "\n".join(lines)


def compare(
    stream: Stream,
    folder: Path,
    frozen: tuple[Story, FitState],
    periods: dict[str, list[str]],
    events: dict[str, Event],
    refits: dict[str, list[float]],
) -> Table:
    """The three models over the same rows: those with anything observed."""
    story, state = frozen
    table = Table([], [], [], [], [])
    for name, days in periods.items():
        n_rows = 0
        sums = np.zeros(3)
        for day, refit in zip(days, refits[name], strict=True):
            file = stream.file(folder, day)
            event = events.get(file.name)
            score = None if event is None else event.scores.get("prequential")
            if score is None:
                continue
            rows = rows_of(file, story.schema)
            n = int(rows.is_observed.any(axis=1).sum())
            n_rows += n
            sums += [score * n, total(story, state.params, rows), refit]
        table.periods.append(name)
        table.rows.append(n_rows)
        for column, value in zip((table.online, table.frozen, table.refit), sums, strict=True):
            column.append(float(value / n_rows))
    return table


def told(stream: Stream, table: Table, events: Sequence[Event], calls: Sequence[Watched]) -> str:
    """The figures to quote."""
    counts = Counter(event.status for event in events)
    over = f"{table.periods[stream.skip]} to {table.periods[-1]}"
    online, frozen, refit = (
        table.mean(which, stream.skip) for which in ("online", "frozen", "refit")
    )
    gains = f"online - frozen {online - frozen:+.3f}, online - refit {online - refit:+.3f}"
    three = f"online {online:.3f}, frozen {frozen:.3f}, refit {refit:.3f}"
    lines = [
        f"{over}, mean of periods in nats a row: {three}; {gains}",
        f"{len(events)} batches: {', '.join(f'{n} {status}' for status, n in counts.items())}",
    ]
    if calls:
        seconds = sum(one.seconds for one in calls)
        lines.append(
            f"{len(calls)} call(s) of the command line took {seconds:.0f} s, "
            f"{seconds / len(calls):.2f} s each"
        )
        steady = [one for one in calls if one.n_commits > 10]
        if steady:
            pace = [one.n_commits / one.committing for one in steady]
            lines.append(f"between first and last commit of a call: {np.mean(pace):.2f} updates/s")
            first, last = steady[-1].tenths()
            lines.append(
                f"resident memory, first and last tenth of {steady[-1].n_commits} commits: "
                f"{first:.0f} and {last:.0f} MiB"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
