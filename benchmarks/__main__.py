"""One entry to all benchmarks.

    python -m benchmarks list
    python -m benchmarks run [NAME ...] [--rounds R] [--quick] [--json FILE] [--markdown FILE]

A name is a benchmark, the module it is in (`peers`: all comparisons with peers), `suite` (all that
end in tables) or a script (`"stream flights"`), whose own options may follow its name in quotes.
Without a name everything runs. Exits with 1 where a benchmark failed.

To add one: give a module a `BENCHMARKS` (see `measure.Benchmark`) and name it in `SUITE`, or a
`main`, which makes it a script; those named in `SCRIPTS` run where nothing is named.
"""

from __future__ import annotations

import ast
import importlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.measure import ROOT, Benchmark, Options, Table, told

# Modules whose benchmarks end in tables, in the order in which they run.
SUITE = ("roofline", "peers", "gaps", "out_of_core", "goal", "memory")
# Modules with a `main` that prints what it found, as they run where nothing is named.
SCRIPTS = (
    *("matrix", "references", "imputation", "fashion", "optima", "passes", "schedulers"),
    *("kills", "bad_inputs", "stream flights", "stream power", "update_kills", "races"),
    *("schedule", "nearest", "input", "sweep"),
)
# Scripts that have a `--quick` of their own, which that of a run reaches.
QUICK = ("speed",)


def benchmarks(module: str) -> dict[str, Benchmark]:
    """The benchmarks of a module of the suite, by name."""
    found: dict[str, Benchmark] = importlib.import_module(f"benchmarks.{module}").BENCHMARKS
    return found


def scripts() -> dict[str, str]:
    """All scripts, each with the first line of what its module says of itself."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        module = ast.parse(file.read_text())
        mains = {one.name for one in module.body if isinstance(one, ast.FunctionDef)} & {"main"}
        if mains and file.stem not in (*SUITE, "__main__", "contestants", "data"):
            calls = [script for script in SCRIPTS if script.split()[0] == file.stem]
            line = (ast.get_docstring(module) or "").splitlines()[0].rstrip(".")
            found |= dict.fromkeys(calls or [file.stem], line)
    return found


def chosen(names: Sequence[str]) -> tuple[dict[str, Benchmark], list[str]]:
    """Benchmarks and scripts that the names stand for; all of them where there are none.

    Raises
    ------
    SystemExit
        Where a name stands for nothing.
    """
    known = {module: benchmarks(module) for module in SUITE}
    every = {name: one for module in known.values() for name, one in module.items()}
    if not names:
        return every, list(SCRIPTS)
    picked: dict[str, Benchmark] = {}
    called = []
    modules = {script.split()[0] for script in scripts()}
    for name in names:
        if name == "suite":
            picked |= every
        elif name in known:
            picked |= known[name]
        elif name in every:
            picked[name] = every[name]
        elif name.split()[:1] and name.split()[0] in {*modules, *SUITE}:
            called.append(name)
        else:
            raise SystemExit(f"there is no benchmark {name!r}: python -m benchmarks list")
    return picked, called


def listing() -> str:
    """All names, each with what it measures."""
    lines = []
    for module in SUITE:
        lines.append(f"{module}:")
        lines += [f"  {name:16} {one.what}" for name, one in benchmarks(module).items()]
    lines.append("scripts:")
    lines += [f"  {script:16} {line}" for script, line in scripts().items()]
    return "\n".join(lines)


def run(names: Sequence[str], options: Options, files: dict[str, Path | None]) -> bool:
    """Run what the names stand for, print it, and write the files; whether nothing failed."""
    picked, called = chosen(names)
    facts: dict[str, Any] = measure.machine() | measure.peer_versions(options.peers)
    tables: list[Table] = []
    begin = time.monotonic()
    good = True
    for benchmark in picked.values():
        table = benchmark.run(options)
        if options.quick:
            # Few rows are held against nothing.
            table = replace(table, title=f"{table.title}: a quick run on fewer rows", bars=[])
        tables.append(table)
        good &= not tables[-1].failed
        measure.say(tables[-1])
        write(tables, facts | {"minutes": (time.monotonic() - begin) / 60}, options, files)
    for script in called:
        told(f"== {script}")
        command = [sys.executable, "-m", *shlex.split(f"benchmarks.{script}")]
        if options.quick and script.split()[0] in QUICK:
            command.append("--quick")
        good &= subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    return good


def write(
    tables: Sequence[Table], facts: dict[str, Any], options: Options, files: dict[str, Path | None]
) -> None:
    """Write what there is so far, so that a run that is cut short leaves its results."""
    place = files["markdown"]
    if place is not None:
        notes = [
            f"Medians of up to {options.rounds} rounds in turns, {options.threads} threads each."
            + (" **A quick run on few rows: no figures to go by.**" if options.quick else ""),
        ]
        measure.put(place, measure.markdown(tables, facts, notes))
    place = files["json"]
    if place is not None:
        measure.put(place, measure.as_json(tables, facts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options, and list or run."""
    default = Options()
    options = measure.parser(__doc__)
    verbs = options.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="all benchmarks")
    runs = verbs.add_parser("run", help="run some, or all")
    runs.add_argument("names", nargs="*", help="as `list` has them; all where there are none")

    def number(name: str, of: Callable[[str], float], what: str) -> None:
        value = getattr(default, name)
        runs.add_argument(f"--{name}", type=of, default=value, help=f"{what} ({value:g})")

    number("rounds", measure.count, "turns of each contestant, of which the median is told")
    number("budget", measure.amount, "seconds of each contestant in a case")
    number("patience", measure.amount, "seconds until an answer of one is given up")
    number("threads", measure.count, "threads of each contestant")
    runs.add_argument("--quick", action="store_true", help="few rows: to see that all runs")
    runs.add_argument("--whole", action="store_true", help="also what takes hours")
    runs.add_argument(
        "--peers", type=measure.interpreter, default=default.peers, help="the peers' interpreter"
    )
    runs.add_argument("--json", type=measure.output, help="a file for the tables as JSON")
    runs.add_argument("--markdown", type=measure.output, help="a file for them as Markdown")
    told_options = vars(options.parse_args(arguments))
    if told_options.pop("verb") == "list":
        print(listing())
        return 0
    names = told_options.pop("names")
    files = {kind: told_options.pop(kind) for kind in ("json", "markdown")}
    return 0 if run(names, Options(**told_options), files) else 1


if __name__ == "__main__":
    sys.exit(main())
