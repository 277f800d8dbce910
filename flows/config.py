"""The configuration of a run: one YAML file, closed vocabularies, and every error at once.

A file is read as YAML 1.2 by a safe loader that keeps the place of each key. `load` applies the
overrides of the command line, validates the whole, and reports all that is wrong together, one
line a problem: ``file:line:column: key.path: what is wrong, what is allowed, did you mean``.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from zoneinfo import available_timezones

from cronsim import CronSim, CronSimError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, CommentedSet, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from genstream.errors import ConfigError, StorageError

Kind = Literal["real", "binary", "count", "categorical"]
Path_ = tuple[str | int, ...]

MAX_BYTES = 1 << 20
"""A configuration is a page of text: a larger file is a mistake or an attack."""

MAX_NODES = 100_000
"""Aliases can make a small file large once expanded; this many values are refused."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_PREFIXES = "kMGT"
_SIZE_UNITS = (
    {"": 1, "B": 1, "KB": 10**3, "KiB": 2**10}
    | {f"{p}B": 1000**n for n, p in enumerate(_PREFIXES, start=1)}
    | {f"{p}iB": 1024**n for n, p in enumerate(_PREFIXES[1:], start=2)}
)
_TIME_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_PASSES = re.compile(r"\s*(\d+)\s*pass(?:es)?\s*")
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*")

_CRON_PARTS = ("minute", "hour", "day-of-month", "month", "day-of-week")
_CRON_FIELDS = f"five fields, {' '.join(_CRON_PARTS)}, as in '15 2 * * *' for 02:15 every day"

IN_PLACE = (
    *(".npy", ".zarr", ".parquet", ".pq", ".arrow", ".arrows", ".feather", ".ipc"),
    *(".nc", ".nc4", ".cdf", ".netcdf"),
)
"""Endings of files already cut into chunks, which need no ingest."""


def in_place(path: str) -> bool:
    """Whether what a path or pattern names, or an array inside of it, needs no ingest.

    Of what lies elsewhere only zarr arrays are read by chunks.
    """
    endings = (".zarr",) if "://" in path else IN_PLACE
    return any(part.lower().endswith(endings) for part in Path(path).parts)


def parse_size(value: object) -> int:
    """Bytes of a size such as `2GiB`, `500MB` or a plain number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        unit = match and _SIZE_UNITS.get(match[2])
        if not match or not unit:
            raise ValueError("expected a size such as 2GiB, 500MB or a number of bytes")
        size = int(float(match[1]) * unit)
    if size <= 0:
        raise ValueError("a size must be positive")
    return size


@dataclass(frozen=True)
class Interval:
    """How often: every so many seconds, or every so many passes over the data."""

    seconds: float | None = None
    passes: int | None = None

    @classmethod
    def parse(cls, value: object) -> Interval:
        """An interval from text such as `5min`, `30s`, `1h` or `10 passes`."""
        if isinstance(value, Interval):
            return value
        text = value if isinstance(value, str) else ""
        if match := _PASSES.fullmatch(text):
            interval = cls(passes=int(match[1]))
        elif match := _TIME.fullmatch(text):
            interval = cls(seconds=float(match[1]) * _TIME_UNITS[match[2]])
        else:
            raise ValueError("expected a time such as 30s, 5min or 1h, or a number such as 1 pass")
        if not (interval.seconds or interval.passes):
            raise ValueError("an interval must be longer than nothing")
        return interval

    def __str__(self) -> str:
        if self.passes is not None:
            return f"{self.passes} pass" + ("es" if self.passes != 1 else "")
        # Without an exponent, so that it is read again.
        return f"{Decimal(repr(self.seconds)):f}".removesuffix(".0") + "s"


def _label(value: object) -> object:
    """Levels written as numbers (months, codes) are labels all the same."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _scheduler(value: object) -> object:
    plain = ("threads", "synchronous", "distributed")
    if isinstance(value, str) and (value in plain or re.fullmatch(r"(tcp|tls|ucx)://\S+", value)):
        return value
    hint = _suggest(str(value), plain)
    given = f", got {_short(value)}"
    raise ValueError(
        f"expected one of {', '.join(plain)}, or an address tcp://host:port{given}{hint}"
    )


def _pause(value: object) -> Interval:
    with contextlib.suppress(ValueError):
        interval = Interval.parse(value)
        if interval.seconds is not None and interval.seconds >= 1:
            return interval
    raise ValueError("expected a time of a second or more, such as 30s, 15min or 1d")


def _cron(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"expected {_CRON_FIELDS}; quote it")
    if len(value.split()) != len(_CRON_PARTS):
        raise ValueError(f"expected {_CRON_FIELDS}")
    if not re.fullmatch(r"(\d+|[A-Za-z]{3}|[*/,\- ])+", value):
        raise ValueError(
            f"expected digits, names such as MON, and the signs * / , - in {_CRON_FIELDS}"
        )
    try:
        CronSim(value, datetime(2024, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        part = str(error).removeprefix("Bad ")
        raise ValueError(
            f"the {part} is out of range, or names a day that never comes: expected {_CRON_FIELDS}"
        ) from None
    return value


def _timezone(value: object) -> object:
    if isinstance(value, str) and value in available_timezones():
        return value
    hint = _suggest(str(value), sorted(available_timezones())) or "; such as UTC or Europe/Paris"
    raise ValueError(f"expected the name of a time zone, got {_short(value)}{hint}")


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _source_tag(value: object) -> str | None:
    if isinstance(value, Mapping | Drawn):
        return "<drawn>"
    return "<paths>" if isinstance(value, list) else "<path>"


def _prior_tag(value: object) -> str:
    return "<prior>" if isinstance(value, Mapping | PriorSpec) else "<word>"


def _weak(value: object) -> object:
    if value != "weak":
        raise ValueError("expected weak, null or a mapping such as {strength: 2}")
    return value


def _column_tag(value: object) -> str:
    return "<column>" if isinstance(value, Mapping | ColumnSpec) else "<kind>"


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["2GiB", "500MB"]}),
]
Every = Annotated[
    Interval,
    BeforeValidator(Interval.parse),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["5min", "30s", "10 passes"]}),
]
Text = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, BeforeValidator(lambda v: _finite(v) if isinstance(v, float) else v)]


class Section(BaseModel):
    """Part of a configuration: no key but the named ones, no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class ColumnSpec(Section):
    """A column in full; a column of which only the kind is said may be written `name: kind`."""

    kind: Kind
    levels: list[Annotated[str, BeforeValidator(_label)]] | None = Field(
        None,
        min_length=1,
        description="Labels of a categorical or binary column; left out, they are learned.",
    )
    unit: str = Field("", description="Shown beside figures.")
    lower: Finite | None = Field(
        None, description="Detection limit of a real column: a value at or below it is censored."
    )
    upper: Finite | None = Field(None, description="The same for values at or above it.")
    resolution: Annotated[Finite, Field(gt=0)] | None = Field(
        None,
        description="Step in which a real column is recorded: no component is narrower than the "
        "noise of rounding to it.",
    )


class Drawn(Section):
    """Data drawn from a known story, to see what a fit recovers."""

    story: Literal["mixture"] = "mixture"
    gigabytes: Annotated[Finite, Field(gt=0)] = Field(
        12.0, description="Size of the drawn values, in units of 2^30 bytes."
    )
    n_components: int = Field(8, ge=1)
    n_features: int = Field(16, ge=1)
    covariance: Literal["full", "diag"] = "full"
    separation: Annotated[Finite, Field(gt=0)] = Field(
        3.0, description="Spread of the component means, in standard deviations of a component."
    )
    seed: int = Field(0, ge=0)


class Data(Section):
    """What is fitted, and where it is kept."""

    source: Annotated[
        Annotated[Text, Tag("<path>")]
        | Annotated[list[Text], Field(min_length=1), Tag("<paths>")]
        | Annotated[Drawn, Tag("<drawn>")],
        Discriminator(_source_tag),
    ] = Field(description="A file, a pattern such as landing/*.parquet, a list, or drawn data.")
    dataset: Text | None = Field(
        None, description="Folder where ingest puts the data; left out, they are fitted in place."
    )
    columns: (
        dict[
            Text,
            Annotated[
                Annotated[Kind, Tag("<kind>")] | Annotated[ColumnSpec, Tag("<column>")],
                Discriminator(_column_tag),
            ],
        ]
        | None
    ) = Field(None, min_length=1, description="Columns to model; left out, all, kinds inferred.")
    id: Text | None = Field(None, description="Column carried through to scores.")
    weights: Text | None = Field(None, description="Column of row weights.")
    missing: Literal["allow", "forbid"] = "allow"
    null_values: list[str] | None = Field(None, description="Texts that mean a missing entry.")
    holdout: Annotated[Finite, Field(gt=0, lt=1)] | None = Field(
        0.1, description="Share of the rows held out; null for none."
    )
    test: Text | None = Field(None, description="A file of rows to be held out, in its stead.")
    dtype: Literal["float64", "float32"] = Field(
        "float64", description="Numbers in which the dataset is stored."
    )
    ready: Literal["done_marker", "stable_size"] = Field(
        "stable_size",
        description="When a file that landed is whole: once FILE.done or _SUCCESS stands beside "
        "it, or once its size no longer changes.",
    )
    duplicates: Literal["skip", "learn", "error"] = Field(
        "skip", description="Rows that an update learned before from other bytes."
    )
    new_levels: Literal["missing", "add", "reject"] = Field(
        "missing", description="Levels that a model meets first in an update."
    )


class BlockSpec(Section):
    """Columns of a mixture that share a distribution of their own, given the component."""

    columns: list[Text] = Field(min_length=1)
    family: Literal[
        "full",
        "tied",
        "diag",
        "spherical",
        "student",
        "negative_binomial",
        "zero_inflated",
        "multinomial",
        "independent",
    ] = Field(
        description="full, tied, diag or spherical covariance; student: heavy tails; "
        "negative_binomial or zero_inflated counts; multinomial: counts given their total; "
        "independent: each by its kind."
    )


MOST_PSEUDO_ROWS = 1e9
"""As in `genstream.priors`, whose import would make that of a configuration slow."""


class PriorSpec(Section):
    """How strong the conjugate priors are; `weak` is what all of these leave out."""

    strength: Annotated[Finite, Field(gt=0, le=MOST_PSEUDO_ROWS)] = Field(
        1.0, description="Times the pseudo-rows of the weak priors."
    )
    spread: Annotated[Finite, Field(gt=0, le=MOST_PSEUDO_ROWS)] = Field(
        1.0, description="Times the variances that they expect."
    )
    independence: Annotated[Finite, Field(ge=0, le=MOST_PSEUDO_ROWS)] = Field(
        0.0,
        description="Pseudo-rows that say that the columns of a component are uncorrelated; of "
        "full and tied covariances.",
    )
    frequencies: Annotated[Finite, Field(ge=0, le=MOST_PSEUDO_ROWS)] | None = Field(
        None,
        description="Pseudo-rows of binary, count and categorical columns; left out, strength.",
    )
    weights: Annotated[Finite, Field(ge=0, le=MOST_PSEUDO_ROWS)] | None = Field(
        None, description="Pseudo-rows a mixing weight; left out, strength / n_components."
    )


class Model(Section):
    """What is fitted to the data: the story of how a row comes to be."""

    kind: Literal["mixture", "factors", "mixture_of_factors", "kmeans"] = Field(
        "mixture",
        description="mixture: a row's latent is a component; factors: a vector of factors "
        "(real columns: factor analysis or probabilistic PCA; binary ones: logistic factors; "
        "counts: gamma-Poisson factors); mixture_of_factors: both, for real columns; kmeans: "
        "nearest centres, for real columns.",
    )
    n_components: int | None = Field(
        None, ge=1, description="Of every kind but factors, which has one."
    )
    covariance: Literal["full", "tied", "diag", "spherical"] | None = Field(
        None,
        description="Of a mixture's real columns; full and tied leave columns of other kinds "
        "independent. Left out: full where all columns are real, diag otherwise.",
    )
    tails: Literal["gaussian", "student"] = Field(
        "gaussian", description="student: a mixture's real columns have heavy tails."
    )
    counts: dict[Text, Literal["poisson", "negative_binomial", "zero_inflated"]] | None = Field(
        None, description="Distribution of a mixture's count columns; left out, poisson."
    )
    blocks: list[BlockSpec] | None = Field(
        None, min_length=1, description="Columns of a mixture that go by another distribution."
    )
    n_factors: int | None = Field(None, ge=1, description="Of the two kinds with factors.")
    noise: Literal["diagonal", "isotropic"] = Field(
        "diagonal",
        description="Of factors of real columns. diagonal: factor analysis; isotropic: "
        "probabilistic PCA.",
    )
    shared_noise: bool = Field(
        False, description="Whether the components of a mixture_of_factors share their noise."
    )
    frozen: list[Text] = Field(
        [], description="Names of parameters that the fit leaves as it began: see model.start."
    )
    start: Text | None = Field(
        None,
        description="A model or run whose parameters the fit begins with; left out, many "
        "starts compete on a sample of rows.",
    )
    prior: (
        Annotated[
            Annotated[Literal["weak"], BeforeValidator(_weak), Tag("<word>")]
            | Annotated[PriorSpec, Tag("<prior>")],
            Discriminator(_prior_tag),
        ]
        | None
    ) = Field("weak", description="null for maximum likelihood; a mapping for stronger ones.")


class Fit(Section):
    """How it is fitted."""

    method: Literal["auto", "batch", "online", "incremental"] = Field(
        "auto", description="auto: batch, after one online pass where there are many rows."
    )
    max_steps: int = Field(200, ge=1, description="Passes of batch or incremental EM at most.")
    tolerance: Annotated[Finite, Field(ge=0)] = Field(
        1e-4, description="Nats a row; a step that gains less ends the fit."
    )
    batch_rows: int = Field(4096, ge=1, description="Rows of a mini-batch of online EM.")
    kappa: Annotated[Finite, Field(gt=0.5, le=1)] = Field(
        0.6, description="Step sizes of online EM are (t + t0)^-kappa."
    )
    t0: Annotated[Finite, Field(ge=1)] = Field(
        64.0, description="Mini-batches that what is known before the first one is worth."
    )
    forgetting: Annotated[Finite, Field(gt=0, lt=1)] | None = Field(
        None, description="A constant step size instead, for data that drift."
    )
    passes: int = Field(1, ge=1, description="Passes of online EM.")
    n_init: int = Field(5, ge=1, description="Starts tried on a sample of rows.")
    sample_rows: int = Field(50_000, ge=1, description="Rows of that sample.")
    grow: int | None = Field(
        None,
        ge=1,
        description="Components of a mixture to begin with at most; they are split in two until "
        "there are n_components, in place of starts. For components in the hundreds and more.",
    )
    responsibility: Literal["auto", "soft", "hard", "sampled", "truncated", "nearest"] = Field(
        "auto",
        description="How a row is shared among components: by probability; to the likeliest; to "
        "one drawn by its probability; among the likeliest few; by probability among those near "
        "it, which alone are scored. auto: nearest from 512 components on, else soft.",
    )
    top: int = Field(16, ge=1, description="Components a row may have where truncated.")
    dtype: Literal["float64", "float32"] = "float64"
    seed: int = Field(42, ge=0, lt=2**63)


class Compute(Section):
    """Where it is computed."""

    scheduler: Annotated[
        str,
        BeforeValidator(_scheduler),
        WithJsonSchema(
            {
                "anyOf": [
                    {"enum": ["threads", "synchronous", "distributed"]},
                    {"type": "string", "pattern": "^(tcp|tls|ucx)://"},
                ]
            }
        ),
    ] = "threads"
    workers: int | None = Field(None, ge=1, description="Left out: as many as cores.")
    memory_limit: Size | None = Field(None, description="Resident memory of the whole process.")


class Checkpoint(Section):
    """How often a fit can be resumed from."""

    every: Every = Field(Interval(seconds=300.0), description="A time, or a number of passes.")
    keep: int = Field(3, ge=1)


class Guard(Section):
    """What an update must not make worse, and how a model may change its shape."""

    max_drop: Annotated[Finite, Field(ge=0)] | None = Field(
        0.05, description="Nats a row that the candidate may lose on held-out rows; null for any."
    )
    window: int = Field(7, ge=1, description="Batches whose held-out rows are compared.")
    on_fail: Literal["keep_old"] = "keep_old"
    birth: bool = Field(
        False, description="Whether badly explained rows may make a component of their own."
    )
    retire: Annotated[Finite, Field(gt=0, lt=1)] | None = Field(
        None, description="Mixing weight below which a component is removed; null keeps all."
    )


class Publish(Section):
    """Where a finished model goes."""

    model: Text
    keep: int = Field(30, ge=1)


class Schedule(Section):
    """When `serve` runs the update: at the times of `cron`, or `every` so often."""

    cron: Annotated[str, BeforeValidator(_cron)] | None = Field(
        None, description="Minute, hour, day of month, month, day of week.", examples=["15 2 * * *"]
    )
    every: (
        Annotated[
            Interval,
            BeforeValidator(_pause),
            PlainSerializer(str),
            WithJsonSchema({"type": "string", "examples": ["30s", "15min", "1d"]}),
        ]
        | None
    ) = Field(None, description="Elapsed time, counted from midnight of 1 January 2020.")
    timezone: Annotated[str, BeforeValidator(_timezone)] = Field(
        "UTC", description="Where the clock hangs that cron and days go by."
    )
    overlap: Literal["skip", "queue"] = Field(
        "skip", description="What becomes of a firing while an update still runs."
    )
    catch_up: bool = Field(
        True, description="Run once at the start of `serve` where firings were missed."
    )


MAX_CANDIDATES = 256
"""Models of one sweep: more are a mistake, or wanted one after another."""


class Sweep(Section):
    """Models that are fitted side by side, in shared passes, and compared."""

    over: dict[Text, Annotated[list[Any], Field(min_length=1)]] = Field(
        min_length=1,
        description="Keys of model and fit, such as model.n_components, each with a list of "
        "values: every combination is a candidate.",
        json_schema_extra=lambda schema: schema.update(propertyNames={"enum": list(_SWEPT)}),
    )
    by: Literal["held_out", "bic", "aic", "icl"] = Field(
        "held_out", description="What the best one is best by."
    )

    def cells(self) -> list[dict[str, Any]]:
        """The values of each candidate by key, in order: the last key varies fastest."""
        return [{key: value for key, (_, value) in cell.items()} for cell in _cells(self.over)]


class Config(Section):
    """A whole configuration."""

    version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        "run", description="Appears in the name of run folders."
    )
    data: Data
    model: Model
    fit: Fit = Fit()
    sweep: Sweep | None = None
    compute: Compute = Compute()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    publish: Publish | None = None
    schedule: Schedule | None = None
    report: bool = True
    orchestrate: Literal["auto", "prefect", "none"] = "auto"

    def column_specs(self) -> dict[str, ColumnSpec] | None:
        """The columns of `data`, each in full, or None where they are left to be inferred."""
        if self.data.columns is None:
            return None
        return {
            name: spec if isinstance(spec, ColumnSpec) else ColumnSpec(kind=spec)
            for name, spec in self.data.columns.items()
        }

    @property
    def holdout(self) -> float | None:
        """Share of rows held out; none where a test file is named and no share."""
        if self.data.test is not None and "holdout" not in self.data.model_fields_set:
            return None
        return self.data.holdout

    @property
    def dataset(self) -> str | None:
        """Folder of the dataset; data drawn without one being named get one of their own."""
        source = self.data.source
        if self.data.dataset is None and isinstance(source, Drawn):
            drawn = hashlib.sha256(f"{source.model_dump_json()}{self.data.dtype}".encode())
            return f"data/drawn-{source.gigabytes:g}GiB-{drawn.hexdigest()[:8]}"
        return self.data.dataset

    @property
    def paths(self) -> list[str]:
        """The source's paths and patterns; empty where data are drawn."""
        source = self.data.source
        if isinstance(source, Drawn):
            return []
        return [source] if isinstance(source, str) else list(source)

    def candidates(self) -> dict[str, Config]:
        """The configurations that a sweep is of, in the order of its grid, by what sets each apart.

        Their labels are as `n_components=8, covariance=full`. None of them publishes.
        """
        assert self.sweep is not None
        plain = {**self.dump(), "publish": None}
        found = {}
        for cell in _cells(self.sweep.over):
            document = _Document(_with(plain, cell), "configuration")
            found[_cell_label(cell)] = _validated(document, ())
        return found

    def dump(self) -> dict[str, Any]:
        """Plain values that `validate` turns into an equal configuration."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        plain["data"]["holdout"] = self.holdout
        return plain

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        stream = io.StringIO()
        yaml = YAML(typ="rt", pure=True)
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.dump(self.dump(), stream)
        return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "genstream configuration",
    }


@dataclass
class _Document:
    """Plain values, and for every path in them where its key and its value were written."""

    values: Any
    name: str
    keys: dict[Path_, str] = field(default_factory=dict)
    places: dict[Path_, str] = field(default_factory=dict)

    def place(self, path: Path_, *, key: bool = False) -> str:
        """Where `path` was written, or the nearest part of it that was."""
        if key and path in self.keys:
            return self.keys[path]
        for n in range(len(path), -1, -1):
            if path[:n] in self.places:
                return self.places[path[:n]]
        return self.name

    def problem(self, path: Path_, message: str, *, key: bool = False) -> Problem:
        """What is wrong with the value at `path`, or with its key."""
        return Problem(self.place(path, key=key), _dotted(path), message)

    def get(self, path: Path_) -> Any:
        """The value at `path`. Raises LookupError where there is none."""
        value = self.values
        for part in path:
            if not isinstance(value, dict | list):
                raise KeyError(part)
            value = value[part]  # type: ignore[index]
        return value


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    place: str
    path: str
    message: str

    def __str__(self) -> str:
        return (
            f"{self.place}: {self.path}: {self.message}"
            if self.path
            else (f"{self.place}: {self.message}")
        )


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file, with `key=value` overrides on top.

    Raises ConfigError with every problem found, one a line.
    """
    return _validated(_read(Path(path)), overrides)


def validate(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A configuration from plain values, as `Config.dump` gives. Raises ConfigError."""
    return _validated(_Document(dict(values), "configuration"), overrides)


def _read(path: Path) -> _Document:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder: name a configuration file (YAML)")
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size} bytes are too many for a configuration: is it data?")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = _suggest(str(path), near) or "; `genstream init DATA` writes one"
        raise ConfigError(f"{path}: no such configuration{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text in UTF-8 (byte {error.start}): is it data?"
        ) from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    document = _Document(None, str(path))
    _fill(document, (), _parse(text, str(path)), lambda mark: f"{path}:{mark[0] + 1}:{mark[1] + 1}")
    if document.values is None:
        raise ConfigError(f"{path}: is empty: `genstream init DATA` writes a configuration")
    if not isinstance(document.values, dict):
        raise ConfigError(f"{path}:1:1: expected keys such as `data:` and `model:`, got one value")
    return document


def _parse(text: str, name: str) -> Any:
    yaml = YAML(typ="rt", pure=True)
    yaml.version = "1.2"
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = " ".join(str(error.problem or error.context).split())
        raise ConfigError(f"{where}: not valid YAML: {problem.split(' with value')[0]}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{name}: not valid YAML: {problem}") from None


def _fill(
    document: _Document, path: Path_, node: Any, place: Callable[[tuple[int, int]], str]
) -> None:
    """Set `path` of the document to the plain values of `node`, and note where they stand."""
    problems: list[Problem] = []
    count = 0

    def at(mark: Any, fallback: str) -> str:
        return place((mark[0], mark[1])) if mark else fallback

    def plain(node: Any, path: Path_, here: str) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES:
            raise ConfigError(f"{here}: more than {MAX_NODES} values: are aliases nested?")
        document.places[path] = here
        if isinstance(node, CommentedSet | TaggedScalar) or (
            getattr(getattr(node, "tag", None), "value", None)
        ):
            problems.append(Problem(here, _dotted(path), "YAML tags are not supported"))
            return None
        if isinstance(node, CommentedMap):
            result = {}
            for key, value in node.items():
                positions = (node.lc.data or {}).get(key)
                key_place = at(positions and positions[:2], here)
                if isinstance(key, bool) or not isinstance(key, str | int | float):
                    problems.append(
                        Problem(key_place, _dotted(path), f"key {key!r} is not text: quote it")
                    )
                    continue
                inner = (*path, str(key))
                document.keys[inner] = key_place
                result[str(key)] = plain(value, inner, at(positions and positions[2:], here))
            return result
        if isinstance(node, CommentedSeq):
            return [
                plain(value, (*path, i), at((node.lc.data or {}).get(i), here))
                for i, value in enumerate(node)
            ]
        if isinstance(node, str):
            return str(node)
        if isinstance(node, bool) or node is None:
            return node
        if isinstance(node, int | float):
            # The loader keeps how a number was written in subclasses; only its value counts here.
            kind = int if isinstance(node, int) else float
            return kind(node)
        return str(node)  # dates are text to us

    values = plain(node, path, place((0, 0)))
    if problems:
        raise ConfigError("\n".join(map(str, problems)))
    if not path:
        document.values = values
        return
    parent = document.get(path[:-1])
    parent[path[-1]] = values


def _override(document: _Document, n: int, text: str) -> None:
    here = f"override {n} ({text})"
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if parts[:2] == ["sweep", "over"]:
        parts[2:] = [".".join(parts[2:])] if parts[2:] else []  # its keys have a point in them
    if not equals or not all(parts):
        raise ConfigError(f"{here}: expected key=value such as model.n_components=8")
    node: Any = document.values
    path: Path_ = ()
    for part in parts[:-1]:
        inner = _step(node, part, here, path)
        if isinstance(node, dict) and (inner not in node or node[inner] is None):
            node[inner] = {}
        node, path = node[inner], (*path, inner)
    path = (*path, _step(node, parts[-1], here, path))
    for known in (document.keys, document.places):
        for old in [p for p in known if p[: len(path)] == path]:
            del known[old]
    document.keys[path] = here
    _fill(document, path, _parse(value, here), lambda _: here)


def _step(node: Any, part: str, here: str, path: Path_) -> str | int:
    if isinstance(node, dict):
        return part
    if isinstance(node, list):
        if part.isdigit() and int(part) < len(node):
            return int(part)
        raise ConfigError(f"{here}: {_dotted(path)} is a list of {len(node)}: no item {part!r}")
    raise ConfigError(f"{here}: {_dotted(path)} is a value and has no key {part!r}")


def _validated(document: _Document, overrides: Sequence[str]) -> Config:
    for n, text in enumerate(overrides, start=1):
        _override(document, n, text)
    try:
        config = Config.model_validate(document.values)
    except ValidationError as error:
        problems = [_explained(document, details) for details in error.errors()]
        problems += _value_problems(document)
        raise ConfigError("\n".join(dict.fromkeys(map(str, problems)))) from None
    if config.sweep is not None:
        found = _sweep_problems(document, config)
    else:
        found = [document.problem(path, message) for path, message in _contradictions(config)]
    if found:
        raise ConfigError("\n".join(map(str, found)))
    return config


# What a sweep may vary: the data, and which rows are held out, are the same for all candidates.
_SWEPT: tuple[str, ...] = tuple(
    f"{section}.{key}"
    for section, kind in (("model", Model), ("fit", Fit))
    for key in kind.model_fields
    if (section, key) != ("fit", "seed")
)

Cell = dict[str, tuple[int, Any]]
"""A candidate of a sweep: of each key the position of its value in the list, and the value."""


def _cells(over: Mapping[str, Sequence[Any]]) -> list[Cell]:
    lists = [list(enumerate(values)) for values in over.values()]
    return [dict(zip(over, chosen, strict=True)) for chosen in itertools.product(*lists)]


def _cell_label(cell: Cell) -> str:
    parts = []
    for key, (_, value) in cell.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{key.partition('.')[2]}={text}")
    return ", ".join(parts)


def _with(plain: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """Plain values of a configuration as one candidate has them."""
    values = {**plain, "sweep": None}
    for key, (_, value) in cell.items():
        section, _, name = key.partition(".")
        inside = values.get(section)
        values[section] = {**(inside if isinstance(inside, Mapping) else {}), name: value}
    return values


def _value_problems(document: _Document) -> list[Problem]:
    """What is wrong with the keys and values that a sweep is over, each by itself."""
    sweep = document.values.get("sweep") if isinstance(document.values, dict) else None
    over = sweep.get("over") if isinstance(sweep, dict) else None
    found: list[Problem] = []
    for key, values in over.items() if isinstance(over, dict) else ():
        path: Path_ = ("sweep", "over", key)
        if key not in _SWEPT:
            message = "the seed also says which rows are held out: sweep over other keys"
            if key != "fit.seed":
                hint = _suggest(key, _SWEPT) or "; such as model.n_components or model.covariance"
                message = f"a sweep is over keys of model and fit{hint}"
            found.append(document.problem(path, message, key=True))
            continue
        name = tuple(key.split("."))
        for i, value in enumerate(values if isinstance(values, list) else ()):
            here = (*path, i)
            if value in values[:i]:
                found.append(document.problem(here, f"{_short(value)} is listed twice"))
            try:
                Config.model_validate(_with(document.values, {key: (i, value)}))
            except ValidationError as error:
                found += [
                    document.problem((*here, *inside), _explained(document, details).message)
                    for details in error.errors()
                    if (at := _plain_path(details["loc"]))[: len(name)] == name
                    for inside in [at[len(name) :]]
                ]
    return found


def _sweep_problems(document: _Document, config: Config) -> list[Problem]:
    """What is wrong with a sweep, each problem where it was written.

    A value that is wrong by itself is told once, at its place in the list; what is wrong only of
    some combination, where the rest of it was written.
    """
    assert config.sweep is not None
    over, found = config.sweep.over, _value_problems(document)
    n_cells = math.prod(map(len, over.values()))
    if n_cells > MAX_CANDIDATES:
        message = f"these are {n_cells} candidates, and a sweep has at most {MAX_CANDIDATES}"
        found.append(document.problem(("sweep", "over"), message))
    if found:
        return found
    told: dict[tuple[Path_, str], Problem] = {}
    for cell in _cells(over):
        candidate = Config.model_validate(_with(document.values, cell))
        for path, message in _contradictions(candidate):
            swept = ".".join(map(str, path[:2]))
            where = ("sweep", "over", swept, cell[swept][0]) if swept in cell else path
            # Of all combinations that have it, the first one is named.
            problem = document.problem(where, f"{message} (as {_cell_label(cell)})")
            told.setdefault((where, message), problem)
    if config.sweep.by == "held_out" and config.holdout is None and config.data.test is None:
        path = ("sweep", "by")
        message = "no rows are held out: set data.holdout or data.test, or compare by bic"
        told[path, message] = document.problem(path, message)
    return list(told.values())


def _plain_path(path: Sequence[str | int]) -> Path_:
    """Where something is wrong, as it was written: without the names of alternatives."""
    return tuple(part for part in path if not str(part).startswith("<"))


def _explained(document: _Document, details: ErrorDetails) -> Problem:
    path = _plain_path(details["loc"])
    if path and path[-1] == "[key]":
        path = path[:-1]
    kind, context = details["type"], details.get("ctx", {})
    given = f", got {_short(details['input'])}"
    if kind == "extra_forbidden":
        allowed = _allowed_keys(path[:-1])
        message = f"unknown key; allowed are {', '.join(allowed)}{_suggest(str(path[-1]), allowed)}"
        return document.problem(path, message, key=True)
    if kind == "missing":
        message = "is required and missing"
    elif kind == "literal_error":
        allowed = [part.strip("'") for part in re.findall(r"'[^']*'|\d+", context["expected"])]
        choice = "expected" if len(allowed) == 1 else "expected one of"
        hint = _suggest(str(details["input"]), allowed)
        message = f"{choice} {', '.join(allowed)}{given}{hint}"
    elif kind == "value_error":
        message = str(context["error"])
        message += "" if ", got " in message else given
    elif kind == "model_type":
        message = f"expected keys and values{given}"
    elif kind == "too_short" and path[:2] == ("sweep", "over"):
        none = "expected a key such as model.n_components, with at least one value"
        message = f"{'each key needs at least one value' if path[2:] else none}{given}"
    elif kind == "too_short":
        message = f"expected at least {context['min_length']} of them{given}"
    elif kind == "string_pattern_mismatch":
        message = f"expected letters, digits, '.', '_' and '-', at most 64{given}"
    else:
        message = details["msg"].replace("Input should be", "expected").strip()
        message = message[0].lower() + message[1:] + given
    return document.problem(path, message)


def _allowed_keys(path: Path_) -> list[str]:
    """The keys a mapping at `path` may have."""
    section: type[BaseModel] = Config
    for n, part in enumerate(path):
        if isinstance(part, int):
            continue
        if path[:n] == ("data", "columns"):
            section = ColumnSpec
        elif path[: n + 1] != ("data", "columns"):
            section = _section_of(section.model_fields[str(part)].annotation) or section
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_section_of, get_args(annotation))), None)


def _contradictions(config: Config) -> list[tuple[Path_, str]]:
    """What is wrong between keys that are each right by themselves."""
    found: list[tuple[Path_, str]] = []
    data, model = config.data, config.model
    columns = config.column_specs() or {}
    for name, spec in columns.items():
        path = ("data", "columns", name)
        if spec.levels is not None:
            if spec.kind not in ("categorical", "binary"):
                found.append(((*path, "levels"), f"a {spec.kind} column has no levels"))
            elif spec.kind == "binary" and len(spec.levels) != 2:
                found.append(
                    ((*path, "levels"), f"a binary column has two levels, got {len(spec.levels)}")
                )
            if len(set(spec.levels)) != len(spec.levels):
                found.append(((*path, "levels"), "a level is listed twice"))
        found += [
            ((*path, side), f"a {spec.kind} column has no limits")
            for side in ("lower", "upper")
            if getattr(spec, side) is not None and spec.kind != "real"
        ]
        if spec.resolution is not None and spec.kind != "real":
            found.append(((*path, "resolution"), f"a {spec.kind} column has no resolution"))
        if spec.lower is not None and spec.upper is not None and spec.lower >= spec.upper:
            found.append(((*path, "lower"), f"must be below upper, {spec.upper:g}"))
    found += _model_contradictions(model, columns)
    for role in ("id", "weights"):
        name = getattr(data, role)
        if name in columns:
            found.append(
                (("data", role), f"{name!r} is also a modelled column: take it out of data.columns")
            )
    if data.id is not None and data.id == data.weights:
        found.append((("data", "weights"), f"{data.id!r} is already the id of a row"))
    if data.test is not None and config.holdout is not None:
        found.append((("data", "holdout"), "give either a share to hold out or a test file"))
    if data.test is not None and not in_place(data.test):
        found.append((("data", "test"), f"must be read in place, as {', '.join(IN_PLACE)} are"))
    if config.fit.grow is not None:
        if model.start is not None:
            found.append(
                (("fit", "grow"), "model.start says what the fit begins with: leave it out")
            )
        elif model.kind != "mixture":
            found.append((("fit", "grow"), f"only mixtures grow, and the kind is {model.kind}"))
    if config.fit.sample_rows < (model.n_components or 1):
        found.append(
            (("fit", "sample_rows"), f"fewer rows than the {model.n_components} components")
        )
    if model.kind == "kmeans" and config.fit.responsibility not in ("auto", "soft"):
        message = "kmeans gives every row to its nearest centre: leave it out"
        found.append((("fit", "responsibility"), message))
    schedule = config.schedule
    if schedule is not None and (schedule.cron is None) == (schedule.every is None):
        message = "say when, with either cron: '15 2 * * *' or every: 1h"
        message += ", not with both" if schedule.cron else ""
        found.append((("schedule",), message))
    found += _fit_contradictions(config.fit)
    if isinstance(data.source, Drawn):
        found += [
            (("data", key), "has no meaning for drawn data: leave it out")
            for key in ("columns", "id", "weights", "null_values")
            if getattr(data, key) is not None
        ]
    elif data.dataset is None:
        tables = [path for path in config.paths if not in_place(path)]
        if tables:
            able = "zarr arrays" if "://" in tables[0] else ", ".join(IN_PLACE)
            message = (
                f"{tables[0]!r} cannot be fitted in place ({able} can): say where to put the "
                f"data, dataset: data/{config.name}"
            )
            found.append((("data", "source"), message))
        plain = Data(source=data.source)
        found += [
            (
                ("data", key),
                "is minded when data are ingested: name a data.dataset, or leave it out",
            )
            for key in ("id", "dtype")
            if getattr(data, key) != getattr(plain, key)
        ]
    return found


# The keys of a model that mean something only for some kinds.
_OF_KIND = {
    "n_components": ("mixture", "mixture_of_factors", "kmeans"),
    "covariance": ("mixture",),
    "tails": ("mixture",),
    "counts": ("mixture",),
    "blocks": ("mixture",),
    "n_factors": ("factors", "mixture_of_factors"),
    "noise": ("factors", "mixture_of_factors"),
    "shared_noise": ("mixture_of_factors",),
}
_REQUIRED = ("n_components", "n_factors")


def _model_contradictions(
    model: Model, columns: Mapping[str, ColumnSpec]
) -> list[tuple[Path_, str]]:
    found: list[tuple[Path_, str]] = []
    plain = Model()
    for key, kinds in _OF_KIND.items():
        given = getattr(model, key) != getattr(plain, key)
        if given and model.kind not in kinds:
            message = f"is of {' and '.join(kinds)}, and the kind is {model.kind}: leave it out"
            found.append((("model", key), message))
        elif not given and model.kind in kinds and key in _REQUIRED:
            found.append((("model", key), "is required and missing"))
    mixed = [name for name, spec in columns.items() if spec.kind != "real"]
    if mixed and model.kind in ("mixture_of_factors", "kmeans"):
        message = f"{model.kind} needs real columns, and {mixed[0]!r} is {columns[mixed[0]].kind}"
        found.append((("model", "kind"), message))
    if columns and len(mixed) == len(columns) and model.kind == "mixture":
        found += [
            (("model", key), "is of real columns, and data.columns has none: leave it out")
            for key in ("covariance", "tails")
            if getattr(model, key) not in (getattr(plain, key), "diag")
        ]
    if model.n_factors is not None and not mixed and 0 < len(columns) <= model.n_factors:
        message = f"is {model.n_factors}, and must be less than the {len(columns)} real columns"
        found.append((("model", "n_factors"), message))
    found_kinds = {spec.kind for spec in columns.values()}
    if model.kind == "factors" and len(found_kinds) > 1:
        names = " and ".join(sorted(found_kinds))
        message = f"factors are of columns of one kind, and data.columns has {names}"
        found.append((("model", "kind"), message))
    if model.kind == "factors" and "categorical" in found_kinds:
        message = "factors are of real, binary or count columns, not of categorical ones"
        found.append((("model", "kind"), message))
    for name in model.counts or {}:
        if name in columns and columns[name].kind != "count":
            message = f"{name!r} is {columns[name].kind}, not a count column"
            found.append((("model", "counts", name), message))
    seen: set[str] = set()
    for i, block in enumerate(model.blocks or ()):
        for name in block.columns:
            if name in seen:
                found.append((("model", "blocks", i), f"column {name!r} is in a block already"))
            if columns and name not in columns:
                found.append((("model", "blocks", i), f"no column {name!r} in data.columns"))
            seen.add(name)
    if model.frozen and model.start is None:
        message = "name a model whose parameters are kept, with model.start"
        found.append((("model", "frozen"), message))
    return found


def _fit_contradictions(options: Fit) -> list[tuple[Path_, str]]:
    plain = Fit()
    found: list[tuple[Path_, str]] = []

    def refuse(keys: Sequence[str], message: str) -> None:
        found.extend(
            (("fit", key), message) for key in keys if getattr(options, key) != getattr(plain, key)
        )

    if options.forgetting is not None:
        refuse(("kappa", "t0"), "has no meaning beside forgetting, a constant step size")
    if options.method in ("batch", "incremental"):
        refuse(("passes",), f"is of online EM, and the method is {options.method}: use max_steps")
    if options.method == "online":
        refuse(
            ("max_steps", "tolerance"), "is of batch EM, and the method is online: use fit.passes"
        )
    return found


def _suggest(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(path: Path_) -> str:
    return ".".join(map(str, path))
