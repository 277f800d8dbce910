"""Products: different families on different columns, for mixed data.

The columns are shared out among parts, which are independent of one another given the component,

    log p(x | k) = sum_b log p_b(x_b | k),

so parameters, statistics and priors are those of the parts side by side (`block0`, `block1`, ...),
every part learns as it would alone, and gaps are each part's own affair.

One pass walks all parts together. Where a part sorts rows by what they observed, that part leads
and the others load the rows of its blocks. The parts that are linear in their features at the
block at hand build them in one buffer, so that they are scored by one matrix product and gathered
by a second one, however many they are; all others add what they make of the block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from genstream.errors import ConfigError
from genstream.families.blocks import (
    Array,
    Description,
    Family,
    Index,
    Joinable,
    Kernel,
    Levelled,
    Linear,
    LinearBlock,
    Pivot,
    Splittable,
    block_rows,
    slices,
)
from genstream.families.columns_walk import log_prob_given
from genstream.families.levels import LookUpWalk
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Joint, JointStats, Monoid, Record, side_by_side


@dataclass(frozen=True, eq=False)
class Part:
    """A family and the sorted positions of the columns it describes."""

    columns: tuple[int, ...]
    family: Family

    @cached_property
    def index(self) -> NDArray[np.intp]:
        """The positions as an array."""
        return np.array(self.columns, dtype=np.intp)

    def rows(self, rows: Rows) -> Rows:
        """The part's columns of some rows, without a mask where nothing is missing, and without
        weights. Neighbouring columns are a view.
        """
        first, last = self.columns[0], self.columns[-1] + 1
        chosen: Any = slice(first, last) if last - first == len(self.columns) else self.index
        observed = None if rows.observed is None else rows.observed[:, chosen]
        if observed is not None and observed.all():
            observed = None
        return Rows(rows.values[:, chosen], observed)


@dataclass(frozen=True, eq=False)
class Product:
    """K components whose blocks of columns are independent, each block of a family of its own.

    Parameters
    ----------
    schema
        The columns, of any kind.
    parts
        Families on disjoint sets of columns that together are all of them, in the order of their
        first columns. A part has the pivot and the prior it would have alone.

    Raises
    ------
    ConfigError
        Where the parts do not share out the columns, or one of them has factors.
    """

    schema: Schema
    parts: tuple[Part, ...]

    name: ClassVar[str] = "product"
    n_factors: ClassVar[int] = 0

    def __post_init__(self) -> None:
        held = sorted(j for part in self.parts for j in part.columns)
        if held != list(range(self.schema.n_features)):
            raise ConfigError(
                f"the blocks of a product hold columns {held}, but must hold each of the "
                f"{self.schema.n_features} columns once"
            )
        for part in self.parts:
            if list(part.columns) != sorted(part.columns):
                raise ConfigError(f"the columns {part.columns} of a block are not in order")
            if part.family.n_factors or part.family.name == self.name:
                raise ConfigError(
                    f"a block cannot be {part.family.name!r}: products take families without "
                    "factors, and no further products"
                )

    @property
    def settled(self) -> bool:
        return all(getattr(part.family, "settled", False) for part in self.parts)

    @property
    def bound(self) -> bool:
        return any(part.family.bound for part in self.parts)

    @property
    def dtype(self) -> str:
        return self.parts[0].family.dtype

    @property
    def ridge(self) -> float:
        return max(part.family.ridge for part in self.parts)

    @property
    def pivot(self) -> Pivot | None:
        """The parts' pivots, neutral in parts that have none; None where no part has one."""
        if all(part.family.pivot is None for part in self.parts):
            return None
        whole = Pivot.none(self.schema.n_features)
        for part in self.parts:
            pivot = part.family.pivot
            if pivot is not None:
                whole.shift[part.index], whole.scale[part.index] = pivot.shift, pivot.scale
        return whole

    @property
    def prior(self) -> Joint | None:
        priors = [part.family.prior for part in self.parts]
        return None if all(prior is None for prior in priors) else self.prior_type(*priors)

    @property
    def prior_type(self) -> type[Joint]:
        return side_by_side(Joint, *(part.family.prior_type for part in self.parts))

    @property
    def params_type(self) -> type[Joint]:
        return side_by_side(Joint, *(part.family.params_type for part in self.parts))

    @property
    def stats_type(self) -> type[JointStats]:
        return side_by_side(JointStats, *(part.family.stats_type for part in self.parts))

    @property
    def param_names(self) -> tuple[str, ...]:
        """The names that any part knows, for all parts that know them, and those of each block,
        such as `block1.mean`.
        """
        every = dict.fromkeys(name for part in self.parts for name in part.family.param_names)
        own = [
            f"block{i}.{name}"
            for i, part in enumerate(self.parts)
            for name in part.family.param_names
        ]
        return (*every, *own)

    def options(self) -> dict[str, Any]:
        blocks = [
            {
                "columns": list(part.columns),
                "family": part.family.name,
                "options": part.family.options(),
                "pivot": part.family.pivot is not None,
            }
            for part in self.parts
        ]
        return {"blocks": blocks}

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> Product:
        # Products are in the registry themselves, so that it can only be looked at from here.
        from genstream.families import FAMILIES

        parts = []
        for i, told in enumerate(options["blocks"]):
            columns = tuple(told["columns"])
            own = pivot.take(columns, "feature") if pivot is not None and told["pivot"] else None
            family = FAMILIES[told["family"]].of(
                schema.at(columns),
                told["options"],
                own,
                None if prior is None else prior.blocks[i],
            )
            parts.append(Part(columns, family))
        return cls(schema, tuple(parts))

    def with_dtype(self, dtype: str) -> Product:
        return self._with([part.family.with_dtype(dtype) for part in self.parts])

    def _with(self, families: Sequence[Family]) -> Product:
        parts = [replace(p, family=f) for p, f in zip(self.parts, families, strict=True)]
        return replace(self, parts=tuple(parts))

    def labels(self) -> dict[str, Sequence[str]]:
        """Labels of the axes of parameters: each block's own, under its name."""
        return {
            f"block{i}.{axis}": names
            for i, part in enumerate(self.parts)
            for axis, names in self.schema.at(part.columns).labels().items()
        }

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> Product:
        """Each part's own pivot and prior, from its columns of the sample."""
        weights = sample.weights
        return self._with(
            [
                part.family.anchored(
                    replace(part.rows(sample), weights=weights), n_components, weak_prior
                )
                for part in self.parts
            ]
        )

    def vague(self, n_components: int) -> Record:
        return self.params_type(*(part.family.vague(n_components) for part in self.parts))

    def start(
        self, params: Any, sample: Rows, responsibilities: Array, rng: np.random.Generator
    ) -> Record:
        weights = sample.weights
        return self.params_type(
            *(
                part.family.start(
                    theta, replace(part.rows(sample), weights=weights), responsibilities, rng
                )
                for part, theta in self._blocks(params)
            )
        )

    def _blocks(self, record: Any) -> Iterator[tuple[Part, Any]]:
        """Each part with its own parameters or statistics."""
        return zip(self.parts, record.blocks, strict=True)

    def prepare(self, params: Any, log_weights: Array) -> ProductKernel:
        return ProductKernel(self, params, log_weights)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """Each part's own maximum: the expected log-posterior is a sum over parts.

        A component is faulty where it is in any part.
        """
        found = []
        faulty: Any = False
        for i, (part, old) in enumerate(self._blocks(previous)):
            kept = frozenset(
                name
                for name in part.family.param_names
                if name in frozen or f"block{i}.{name}" in frozen
            )
            theta, wrong = part.family.maximise(stats.blocks[i], old, kept)
            found.append(theta)
            faulty = faulty | wrong
        return self.params_type(*found), faulty

    def keep(self, stats: Any, components: Sequence[int]) -> Monoid:
        return self.stats_type(
            *(part.family.keep(sums, components) for part, sums in self._blocks(stats))
        )

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        found = []
        for (part, sums), old in zip(self._blocks(stats), known.blocks, strict=True):
            mended = part.family.possible(sums, old)
            if mended is None:
                return None
            found.append(mended)
        return self.stats_type(*found)

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        return sum(
            part.family.expected_log_prob(theta, sums)
            for (part, theta), sums in zip(self._blocks(params), stats.blocks, strict=True)
        )

    def log_prior(self, params: Any) -> float:
        return sum(part.family.log_prior(theta) for part, theta in self._blocks(params))

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        return self.params_type(
            *(
                part.family.place(theta, component, x[part.index], observed[part.index])
                for part, theta in self._blocks(params)
            )
        )

    @property
    def _split_part(self) -> int | None:
        """The part along which a component is split: of those that can be the one with most real
        columns, else the first one.
        """
        able = [
            i
            for i, part in enumerate(self.parts)
            if isinstance(part.family, Splittable) and part.family.splits
        ]
        real = [len(self.schema.at(part.columns).of_kind("real")) for part in self.parts]
        return max(able, key=real.__getitem__) if able else None

    @property
    def splits(self) -> bool:
        return self._split_part is not None

    def halves(
        self, params: Any, components: Array, apart: float, rng: np.random.Generator
    ) -> tuple[Record, Record]:
        """Halves of one part; all other parts have both halves in common."""
        kept = params.take(components.tolist())
        one, other = list(kept.blocks), list(kept.blocks)
        i = self._split_part
        assert i is not None
        family = cast("Splittable", self.parts[i].family)
        one[i], other[i] = family.halves(params.blocks[i], components, apart, rng)
        return self.params_type(*one), self.params_type(*other)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        out = np.empty((len(component), self.schema.n_features))
        for part, theta in self._blocks(params):
            out[:, part.index] = part.family.draw(theta, component, rng)[0]
        return out, None

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        out = np.empty((resp.shape[1], self.schema.n_features))
        for part, theta in self._blocks(params):
            out[:, part.index] = part.family.fill(theta, resp, rng)
        return out

    def marginal(self, params: Any, columns: Array) -> tuple[Family, Record]:
        """Parts without any of the columns are left out; a single part stands for itself."""
        left = []
        for part, theta in self._blocks(params):
            own = np.flatnonzero(np.isin(part.index, columns))
            if len(own):
                left.append((part.index[own], *part.family.marginal(theta, own)))
        return self._some(columns, left)

    def condition(self, params: Any, x: Array, given: Array) -> tuple[Family, Record, Array]:
        """Each part given its own columns: no others bear on it once the component is known."""
        left = []
        total: Any = 0.0
        for part, theta in self._blocks(params):
            known = given[part.index]
            if known.all():
                total = total + log_prob_given(part.family, theta, x[part.index], known)
            elif known.any():
                family, rest, log_p = part.family.condition(theta, x[part.index], known)
                total = total + log_p
                left.append((part.index[~known], family, rest))
            else:
                every = np.arange(len(part.columns))
                left.append((part.index, *part.family.marginal(theta, every)))
        return *self._some(np.flatnonzero(~given), left), total

    def _some(
        self, columns: Array, left: Sequence[tuple[Array, Family, Record]]
    ) -> tuple[Family, Record]:
        """What families and parameters of some columns, by old positions, make of them together."""
        if len(left) == 1:
            return left[0][1:]
        parts = [
            Part(tuple(int(j) for j in np.searchsorted(columns, own)), family)
            for own, family, _ in left
        ]
        product = Product(self.schema.at(columns), tuple(parts))
        together: Family = product
        return together, product.params_type(*(theta for _, _, theta in left))

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        """The parts' coordinates side by side: each column is as wide as it would be in its part
        alone, so that blocks count by their columns.
        """
        found = [
            part.family.embed(replace(part.rows(rows), weights=rows.weights)) for part in self.parts
        ]
        return (
            np.concatenate([x for x, _ in found], axis=1),
            np.concatenate([mask for _, mask in found], axis=1),
        )

    def rounding(self, params: Any) -> Array:
        every = [part.family.rounding(theta) for part, theta in self._blocks(params)]
        return np.asarray(np.sum(every, axis=0))

    def describe(self, params: Any) -> Description:
        """The parts' descriptions; columns of different parts have covariance 0."""
        told = [(p.index, p.family.describe(theta)) for p, theta in self._blocks(params)]
        mean = np.full((len(told[0][1].mean), self.schema.n_features), np.nan)
        sd = mean.copy()
        levels: dict[int, Array] = {}
        for index, one in told:
            mean[:, index], sd[:, index] = one.mean, one.sd
            levels |= {int(index[j]): p for j, p in one.levels.items()}

        def covariance(k: int) -> Array:
            out = np.diag(sd[k] ** 2)
            for index, one in told:
                if one.covariance is not None:
                    out[np.ix_(index, index)] = one.covariance(k)
            return out

        dependent = any(one.covariance is not None for _, one in told)
        return Description(mean, sd, levels, covariance if dependent else None)

    def n_parameters(self, n_components: int) -> int:
        return sum(part.family.n_parameters(n_components) for part in self.parts)

    def floored(self, params: Any) -> list[tuple[int, int]]:
        return [
            (k, part.columns[j])
            for part, theta in self._blocks(params)
            for k, j in part.family.floored(theta)
        ]

    def with_levels(self, schema: Schema, params: Any, seen: Array) -> tuple[Product, Record]:
        families, found = [], []
        for part, theta in self._blocks(params):
            family, wide = part.family, theta
            new = schema.at(part.columns)
            if new != self.schema.at(part.columns):
                grown = cast("Levelled", family).with_levels(new, theta, seen[part.index])
                family, wide = grown
            families.append(family)
            found.append(wide)
        product = replace(self._with(families), schema=schema)
        return product, product.params_type(*found)

    def stats_with_levels(self, schema: Schema, stats: Any) -> Monoid:
        found = []
        for part, sums in self._blocks(stats):
            new = schema.at(part.columns)
            if new == self.schema.at(part.columns):
                found.append(sums)
            else:
                found.append(cast("Levelled", part.family).stats_with_levels(new, sums))
        return self.stats_type(*found)


class ProductKernel:
    """The parts' kernels. The log weights are in the first one's scores only."""

    def __init__(self, family: Product, params: Any, log_weights: Array) -> None:
        self.family, self.n_components = family, len(log_weights)
        self.params, self.log_weights = params, log_weights
        self.dtype = np.dtype(family.dtype)
        nothing = np.zeros_like(log_weights)
        self.kernels: list[Kernel] = [
            part.family.prepare(theta, log_weights if i == 0 else nothing)
            for i, (part, theta) in enumerate(family._blocks(params))
        ]

    def take(self, components: Array) -> ProductKernel:
        """The kernel of some of the components (C,)."""
        some = copy.copy(self)
        some.n_components = len(components)
        some.params, some.log_weights = self.params.take(components), self.log_weights[components]
        some.kernels = []
        nothing = np.zeros(len(components))
        for i, (part, theta) in enumerate(self.family._blocks(some.params)):
            take = getattr(self.kernels[i], "take", None)
            if take is None:
                first = some.log_weights if i == 0 else nothing
                some.kernels.append(part.family.prepare(theta, first))
            else:
                some.kernels.append(take(components))
        return some

    def walk(self, rows: Rows) -> ProductWalk:
        return ProductWalk(self, rows)


class ProductWalk:
    """A walk of all parts over one chunk.

    Among the parts that sort rows by pattern and have gaps in the chunk the widest leads: its
    blocks are the product's, and after them come blocks of the rows of which it has nothing. Where
    there is none, one that sorts rows by their levels leads, and else blocks are consecutive rows.
    """

    def __init__(self, kernel: ProductKernel, rows: Rows) -> None:
        self.kernel, self.parts = kernel, kernel.family.parts
        pieces = [part.rows(rows) for part in self.parts]
        self.walks: list[Any] = [
            inner.walk(piece) for inner, piece in zip(kernel.kernels, pieces, strict=True)
        ]
        self.n_rows, self.observed = rows.n_rows, rows.observed
        sorting = {
            b: len(self.parts[b].columns)
            for b, inner in enumerate(kernel.kernels)
            if getattr(inner, "by_pattern", False) and pieces[b].observed is not None
        }
        self.leader = max(sorting, key=sorting.__getitem__) if sorting else None
        if self.leader is None:
            levelled = (b for b, walk in enumerate(self.walks) if isinstance(walk, LookUpWalk))
            self.leader = next(levelled, None)
        # Features of parts that sort come last: their number changes with the pattern.
        last = sorted(sorting, key=lambda b: b != self.leader)
        self.order = [b for b in range(len(self.parts)) if b not in sorting] + last
        joint = [
            b
            for b in self.order
            if isinstance(self.walks[b], Joinable)
            and getattr(kernel.kernels[b], "dtype", None) == kernel.dtype
        ]
        widths = np.cumsum([0] + [self.walks[b].width for b in joint])
        self.slots = {b: slice(*widths[i : i + 2]) for i, b in enumerate(joint)}
        self.width = int(widths[-1])
        size = block_rows(self.width + 2 * kernel.n_components, kernel.dtype.itemsize)
        self.size = min(getattr(walk, "size", size) for walk in self.walks)
        self.size = min(self.size, size)
        self.linear: Linear | None = None
        self.of: list[Linear] = []
        self._make_room(self.size)

    def _make_room(self, n_rows: int) -> None:
        """Buffers for blocks of so many rows, of which each linear part gets a piece."""
        self.buffer = np.empty((self.width, n_rows), dtype=self.kernel.dtype)
        self.log_p = np.empty((self.kernel.n_components, n_rows), dtype=self.kernel.dtype)
        for b, slot in self.slots.items():
            self.walks[b].build_in(self.buffer[slot])

    def blocks(self) -> Iterator[Index]:
        useful = None if self.observed is None else self.observed.any(axis=1)
        if self.leader is not None:
            lead = self.walks[self.leader]
            lead.size = self.size
            for chosen in lead.blocks():
                self._load(chosen, self.leader)
                yield chosen
            if self.observed is None or useful is None:
                return
            useful &= ~self.observed[:, self.parts[self.leader].index].any(axis=1)
        index = None if useful is None or useful.all() else np.flatnonzero(useful)
        for piece in slices(self.n_rows if index is None else len(index), self.size):
            rest = piece if index is None else index[piece]
            self.load(rest)
            yield rest

    def load(self, index: Index) -> None:
        self._load(index, None)

    def _load(self, index: Index, loaded: int | None) -> None:
        """Make rows the block of all parts but the one that has `loaded` them, and find the parts
        that are linear there.
        """
        n = len(range(self.n_rows)[index]) if isinstance(index, slice) else len(index)
        if n > self.buffer.shape[1]:
            self._make_room(n)
        for b, walk in enumerate(self.walks):
            if b != loaded:
                walk.load(index)
        at = {b: self.walks[b].linear_block for b in self.order if b in self.slots}
        # What a component far out needs to be scored exactly, only its own family knows.
        at = {b: block for b, block in at.items() if block and not block.linear.direct.size}
        if len(at) < 2:
            at = {}
        self.linear_blocks: list[LinearBlock] = list(at.values())
        self.apart = [walk for b, walk in enumerate(self.walks) if b not in at]
        self.levelled = [self.walks[b] for b in at if isinstance(self.walks[b], LookUpWalk)]
        if not at:
            return
        linears = [block.linear for block in self.linear_blocks]
        if len(linears) != len(self.of) or any(
            a is not b for a, b in zip(linears, self.of, strict=True)
        ):
            self.of = linears
            self.linear = Linear(
                np.concatenate([one.whole for one in linears], axis=1),
                np.sum([one.rounding for one in linears], axis=0),
                self.kernel.dtype,
            )
        self.edges = np.cumsum([len(block.features) for block in self.linear_blocks])
        # Side by side in the buffer, as a rule: but a part that did not lead and has gaps builds
        # its features elsewhere.
        first = self.slots[next(iter(at))].start
        places = [
            (first + edge - len(block.features), block)
            for edge, block in zip(self.edges, self.linear_blocks, strict=True)
        ]
        if all(
            np.may_share_memory(self.buffer[place], block.features[0]) for place, block in places
        ):
            self.features = self.buffer[first : first + int(self.edges[-1]), :n]
        else:
            self.features = np.concatenate([block.features for block in self.linear_blocks])
        self._exact: Array | None = None

    def exact(self) -> Array:
        """Features of all linear parts in float64."""
        if self._exact is None:
            self._exact = np.concatenate([block.exact() for block in self.linear_blocks])
        return self._exact

    def score(self) -> Array:
        log_p: Array | None = None
        if self.linear_blocks:
            assert self.linear is not None
            log_p = self.linear.score(self.features, self.exact, self.log_p)
            for one in self.levelled:
                one.look_up(log_p)
        for walk in self.apart:
            more = walk.score()
            if log_p is None:
                log_p = more
            elif more.dtype.itemsize > log_p.dtype.itemsize:
                log_p = more + log_p
            else:
                log_p += more
        assert log_p is not None
        return log_p

    def base(self) -> Array | None:
        total: Array | None = None
        for walk in self.walks:
            base = walk.base()
            if base is not None:
                total = base if total is None else total + base
        return total

    def gather(self, resp: Array) -> None:
        if self.linear_blocks:
            assert self.linear is not None
            own = resp.astype(self.features.dtype, copy=False)
            sums = self.linear.gather(self.features, self.exact, own)
            pieces = np.split(sums, self.edges[:-1], axis=1)
            for block, piece in zip(self.linear_blocks, pieces, strict=True):
                block.add(piece)
            for one in self.levelled:
                one.take_in(own)
        for walk in self.apart:
            walk.gather(resp)

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        out = np.empty((resp.shape[1], self.kernel.family.schema.n_features))
        for part, walk in zip(self.parts, self.walks, strict=True):
            out[:, part.index] = walk.complete(resp, rng)
        return out

    def factors(self, component: Array) -> tuple[Array, Array]:
        """No part has factors, so that they are none."""
        n = len(component)
        return np.zeros((n, 0)), np.zeros((n, 0, 0))

    def close(self) -> Monoid:
        return self.kernel.family.stats_type(*(walk.close() for walk in self.walks))
