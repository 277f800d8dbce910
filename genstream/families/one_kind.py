"""What families have in common whose columns are of one kind and independent given the component.

Such a family says how likely one entry is, what an M-step does with its sums, and how an entry is
drawn; that columns are dropped, given, filled and stored is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from genstream.errors import ConfigError
from genstream.families.blocks import Array, Begun, Pivot
from genstream.families.columns import IndependentColumns
from genstream.families.columns_walk import log_prob_given
from genstream.rows import Rows
from genstream.schema import Kind, Schema
from genstream.stats import Monoid, Record, record


@dataclass(frozen=True, eq=False)
class OneKind(Begun):
    """K components over columns of one `kind`, which names the second axis of all parameters.

    Parameters
    ----------
    schema
        The columns.
    dtype
        Arithmetic of the E-step, float64 or float32; sums are float64 always.
    pivot, prior
        Fixed by `anchored`.

    Raises
    ------
    ConfigError
        Where a column is of another kind.
    """

    schema: Schema
    dtype: str = "float64"
    pivot: Pivot | None = record(Pivot)
    prior: Any = None

    kind: ClassVar[Kind] = "count"
    bound: ClassVar[bool] = False
    n_factors: ClassVar[int] = 0
    ridge: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        for column in self.schema.columns:
            if column.kind != self.kind:
                raise ConfigError(
                    f"column {column.name!r} is {column.kind}: {type(self).__name__} takes "
                    f"{self.kind} columns only"
                )

    def options(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> Self:
        return cls(schema, options["dtype"], pivot, prior)

    def with_dtype(self, dtype: str) -> Self:
        return replace(self, dtype=dtype)

    def keep(self, stats: Any, components: Sequence[int]) -> Monoid:
        kept: Monoid = stats.take(components)
        return kept

    def mean(self, params: Any) -> Array:
        """(K, d) expected value of each column."""
        raise NotImplementedError

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        raise NotImplementedError

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        if rng is not None:
            return self.draw(params, resp.argmax(axis=0), rng)[0]
        return np.asarray(resp.T @ self.mean(params))

    def marginal(self, params: Any, columns: Array) -> tuple[Self, Record]:
        schema = Schema(tuple(self.schema.columns[j] for j in columns))
        pivot = None if self.pivot is None else self.pivot.take(columns.tolist(), "feature")
        kept: Record = params.take(columns.tolist(), self.kind)
        return replace(self, schema=schema, pivot=pivot, prior=None), kept

    def condition(self, params: Any, x: Array, given: Array) -> tuple[Self, Record, Array]:
        rest, kept = self.marginal(params, np.flatnonzero(~given))
        return rest, kept, log_prob_given(self, params, x, given)

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        return IndependentColumns(self.schema, pivot=self.pivot).embed(rows)

    def floored(self, params: Any) -> list[tuple[int, int]]:  # noqa: ARG002
        """None: no parameter has a floor that spoils a fit."""
        return []
