"""What the columns of a row are: names, kinds, levels and units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from genstream.errors import ConfigError, DataError

Kind = Literal["real", "binary", "count", "categorical"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NUMERIC: tuple[Kind, ...] = ("real", "binary", "count")


@dataclass(frozen=True)
class Column:
    """One column of a row.

    Parameters
    ----------
    name
        Unique within a schema, not empty.
    kind
        `real` (any finite number), `binary` (0 or 1), `count` (0, 1, 2, ...) or `categorical`
        (the position of a level, 0 .. L-1).
    levels
        Labels of a categorical column in the order of their codes; for a binary column the two
        labels of 0 and 1, or nothing where the data are 0 and 1 themselves.
    unit
        Free text shown beside figures (`min`, `mile`).
    lower, upper
        Detection limits of a real column: a value at or beyond one is censored, that is known to be
        there and no more. Independent columns heed them; elsewhere values are taken as they are.
    resolution
        The step in which a real column is recorded: whole minutes, hundredths of a volt. No
        component can be narrower than the noise of rounding to such steps, `resolution^2 / 12`,
        which Gaussians and independent columns take for the least variance.
    """

    name: str
    kind: Kind = "real"
    levels: tuple[str, ...] = ()
    unit: str = ""
    lower: float | None = None
    upper: float | None = None
    resolution: float | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a column has an empty name: give every column a name")
        if self.kind not in KINDS:
            raise ConfigError(
                f"column {self.name!r}: kind {self.kind!r} is not one of {', '.join(KINDS)}"
            )
        if len(set(self.levels)) != len(self.levels):
            raise ConfigError(f"column {self.name!r}: a level is listed twice in {self.levels}")
        if self.levels and self.kind not in ("categorical", "binary"):
            raise ConfigError(f"column {self.name!r}: a {self.kind} column has no levels")
        if self.kind == "categorical" and not self.levels:
            raise ConfigError(f"column {self.name!r}: a categorical column needs its levels")
        if self.kind == "binary" and len(self.levels) not in (0, 2):
            raise ConfigError(
                f"column {self.name!r}: a binary column has two levels, not {len(self.levels)}"
            )
        limits = [limit for limit in (self.lower, self.upper) if limit is not None]
        if limits and self.kind != "real":
            raise ConfigError(f"column {self.name!r}: a {self.kind} column has no limits")
        if not all(map(math.isfinite, limits)) or limits != sorted(set(limits)):
            raise ConfigError(
                f"column {self.name!r}: limits {self.lower} and {self.upper} must be finite, the "
                "lower one below the upper one"
            )
        if self.resolution is not None:
            if self.kind != "real":
                raise ConfigError(f"column {self.name!r}: a {self.kind} column has no resolution")
            if not (math.isfinite(self.resolution) and self.resolution > 0):
                raise ConfigError(
                    f"column {self.name!r}: resolution {self.resolution} must be a positive number"
                )

    @property
    def n_levels(self) -> int:
        """Number of values a categorical column can take; 0 for other kinds."""
        return len(self.levels) if self.kind == "categorical" else 0

    @property
    def limited(self) -> bool:
        """Whether the column has a detection limit."""
        return self.lower is not None or self.upper is not None

    @property
    def least_variance(self) -> float:
        """Variance of rounding to the column's resolution; 0 where none is said."""
        return (self.resolution or 0.0) ** 2 / 12.0

    def completed(self, known: Column) -> Column:
        """The column, with what it does not say itself as `known` has it, and the longer levels.

        Raises ConfigError where limits of the two contradict each other.
        """
        try:
            return replace(
                self,
                levels=max(self.levels, known.levels, key=len),
                unit=self.unit or known.unit,
                lower=known.lower if self.lower is None else self.lower,
                upper=known.upper if self.upper is None else self.upper,
                resolution=known.resolution if self.resolution is None else self.resolution,
            )
        except ConfigError as error:
            raise ConfigError(
                f"{error}: what is not said is as in the data stored before; say both limits"
            ) from None

    def code(self, value: float | str) -> float:
        """The number that stands for a value in `Rows`: a level's position, or the number itself.

        A number goes for the level so labelled, 7.0 for `7` too, and is no position where all
        labels are numbers. Raises DataError where the value is neither a level nor a number.
        """
        labels = [str(value)]
        if isinstance(value, float) and value.is_integer():
            labels.append(f"{value:.0f}")
        for label in labels:
            if label in self.levels:
                return float(self.levels.index(label))
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        by_label = self.levels and (isinstance(value, str) or all(map(_is_number, self.levels)))
        if by_label or not math.isfinite(number):
            allowed = f"the levels {', '.join(self.levels[:8])}" if self.levels else "a number"
            raise DataError(f"column {self.name!r} cannot be {value!r}: it takes {allowed}")
        return number


@dataclass(frozen=True)
class Schema:
    """The columns of a row, in the order in which `Rows.values` holds them."""

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        if not self.columns:
            raise ConfigError("a schema needs at least one column")
        seen: set[str] = set()
        for column in self.columns:
            if column.name in seen:
                raise ConfigError(f"column {column.name!r} appears twice")
            seen.add(column.name)

    @classmethod
    def real(cls, names: int | Iterable[str]) -> Schema:
        """A schema of real columns, from their names or their number (`x0`, `x1`, ...)."""
        labels = (f"x{j}" for j in range(names)) if isinstance(names, int) else names
        return cls(tuple(Column(str(name)) for name in labels))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(column.kind for column in self.columns)

    @property
    def n_features(self) -> int:
        return len(self.columns)

    def __getitem__(self, name: str) -> Column:
        return self.columns[self.index(name)]

    def index(self, name: str) -> int:
        """Position of the column called `name`. Raises DataError where there is none."""
        for j, column in enumerate(self.columns):
            if column.name == name:
                return j
        raise DataError(f"no column {name!r}; the columns are {', '.join(self.names)}")

    def of_kind(self, kind: Kind) -> tuple[int, ...]:
        """Positions of the columns of one kind."""
        return tuple(j for j, column in enumerate(self.columns) if column.kind == kind)

    def labels(self) -> dict[str, list[str]]:
        """Labels of the axes of records over these columns: of each kind, of all and of levels."""
        labels: dict[str, list[str]] = {
            kind: [self.columns[j].name for j in self.of_kind(kind)] for kind in NUMERIC
        }
        labels["feature"] = list(self.names)
        labels["level"] = [
            f"{self.columns[j].name}={level}"
            for j in self.of_kind("categorical")
            for level in self.columns[j].levels
        ]
        return labels

    def select(self, names: Sequence[str]) -> Schema:
        """The schema of some columns, in the order named."""
        return Schema(tuple(self[name] for name in names))

    def at(self, columns: Iterable[int]) -> Schema:
        """The schema of some columns, by position."""
        return Schema(tuple(self.columns[j] for j in columns))

    def completed(self, known: Schema) -> Schema:
        """The schema, each column completed by that of `known` at its place."""
        pairs = zip(self.columns, known.columns, strict=True)
        return Schema(tuple(column.completed(other) for column, other in pairs))

    def to_json(self) -> list[dict[str, Any]]:
        """A list of plain dictionaries, one a column; `from_json` undoes it."""
        return [
            {"name": c.name, "kind": c.kind, "levels": list(c.levels), "unit": c.unit}
            | {
                name: getattr(c, name)
                for name in ("lower", "upper", "resolution")
                if getattr(c, name) is not None
            }
            for c in self.columns
        ]

    @classmethod
    def from_json(cls, columns: Iterable[Mapping[str, Any]]) -> Schema:
        """Inverse of `to_json`. Raises ConfigError where a column is not valid."""
        return cls(
            tuple(
                Column(
                    c["name"],
                    c["kind"],
                    tuple(c.get("levels", ())),
                    c.get("unit", ""),
                    c.get("lower"),
                    c.get("upper"),
                    c.get("resolution"),
                )
                for c in columns
            )
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
