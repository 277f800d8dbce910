"""Records of arrays, and sufficient statistics as a monoid over them.

Parameters and statistics are both frozen dataclasses whose fields are arrays, numbers or further
records. Fields are made with `axes(...)`, which names their dimensions, so that every record
converts to a labelled `xarray.Dataset` and back without code of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from genstream.errors import ComputeError, CorruptError

if TYPE_CHECKING:
    import xarray

Array = NDArray[Any]
R = TypeVar("R", bound="Record")


def axes(*names: str) -> Any:
    """A dataclass field holding an array whose dimensions are called `names`.

    A first axis called `component` makes it one entry a component; without it the array is shared
    by all components.
    """
    return dataclasses.field(metadata={"axes": names})


@dataclass(frozen=True, eq=False)
class Record:
    """A frozen dataclass of arrays, numbers and further records."""

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...], Any]]:
        """(dotted name, axis names, value) of every array and number, in field order."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Record):
                scope = field.metadata.get("scope", "")
                for name, names, leaf in value.leaves(f"{prefix}{field.name}."):
                    own = tuple(n if n == "component" else scope + n for n in names)
                    yield name, own, leaf
            elif value is not None:
                yield prefix + field.name, field.metadata.get("axes", ()), value

    def take(self, index: Sequence[int], axis: str = "component", fill: float = 0.0) -> Self:
        """Some entries along an axis, in the order of `index`, of every array that has it.

        Position -1 stands for a new entry, which holds `fill`.
        """
        chosen = np.asarray(index, dtype=np.intp)

        def taken(value: Any, names: tuple[str, ...]) -> Any:
            if axis not in names:
                return value
            along = names.index(axis)
            out = np.take(value, np.maximum(chosen, 0), axis=along)
            out[(slice(None),) * along + (chosen < 0,)] = fill
            return out

        return _map(self, taken)

    def put(self, other: Self, index: Sequence[int], axis: str = "component") -> Self:
        """This record with the entries of another one at `index` along an axis, where they have it.

        What has no such axis stays.
        """
        chosen = np.asarray(index, dtype=np.intp)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            old, new = getattr(self, field.name), getattr(other, field.name)
            names = field.metadata.get("axes", ())
            if isinstance(old, Record):
                values[field.name] = old.put(new, index, axis)
            elif axis in names:
                values[field.name] = out = old.copy()
                out[(slice(None),) * names.index(axis) + (chosen,)] = new
        return dataclasses.replace(self, **values)

    def graft(self, other: Self, names: Collection[str], prefix: str = "") -> Self:
        """This record with some leaves of another, by their dotted names or the ends of these."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            old, new = getattr(self, field.name), getattr(other, field.name)
            name = prefix + field.name
            if isinstance(old, Record):
                values[field.name] = old.graft(new, names, name + ".")
            elif any(name == each or name.endswith("." + each) for each in names):
                values[field.name] = new
        return dataclasses.replace(self, **values)

    def digest(self) -> str:
        """Sha256 of the names, shapes and bytes of all leaves: equal where every bit is."""
        sha = hashlib.sha256()
        for name, _, value in self.leaves():
            array = np.ascontiguousarray(value)
            sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            sha.update(array.tobytes())
        return sha.hexdigest()

    def to_dataset(self, labels: Mapping[str, Sequence[str]] | None = None) -> xarray.Dataset:
        """A labelled dataset with one variable a leaf; `labels` gives coordinates by axis name.

        An axis ending in `_other` is the second of a pair (a covariance's columns) and takes its
        partner's labels.
        """
        import xarray

        coordinates = {}
        variables = {}
        for name, names, value in self.leaves():
            variables[name] = (names, np.asarray(value))
            for axis in names:
                if labels and axis.removesuffix("_other") in labels:
                    coordinates[axis] = list(labels[axis.removesuffix("_other")])
        return xarray.Dataset(variables, coords=coordinates)

    @classmethod
    def from_dataset(
        cls, dataset: xarray.Dataset, prefix: str = "", **nested: type[Record]
    ) -> Self:
        """Inverse of `to_dataset`; `nested` names the type of each field that is a record.

        A nested record none of whose variables is there becomes None. Raises CorruptError where a
        variable is missing.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name = prefix + field.name
            inner = nested.get(field.name) or field.metadata.get("record")
            if inner is not None:
                here = any(str(v).startswith(name + ".") for v in dataset.variables)
                values[field.name] = inner.from_dataset(dataset, name + ".") if here else None
            elif name not in dataset:
                # Written before there was such a field.
                if field.default is not dataclasses.MISSING:
                    continue
                raise CorruptError(f"variable {name!r} is missing from the stored {cls.__name__}")
            else:
                array = dataset[name].values
                number = not field.metadata.get("axes")
                values[field.name] = array.item() if number else np.ascontiguousarray(array)
        return cls(**values)


def record(inner: type[Record]) -> Any:
    """A dataclass field holding a record of type `inner`, or None."""
    return dataclasses.field(default=None, metadata={"record": inner})


@dataclass(frozen=True, eq=False)
class Monoid(Record):
    """Statistics that add: `merge` is associative and commutative, `scale` distributes over it.

    Integer fields count what was seen and are not scaled; all else is.
    """

    def merge(self, other: Self) -> Self:
        """The statistics of both pieces of data together."""
        return _zip(self, other)

    def scale(self, by: float | Array) -> Self:
        """Statistics weighing `by` times as much: one factor, or one per component (K,).

        Arrays shared by all components have no factor of their own and are scaled by the mean
        of `by`.
        """
        factor = np.asarray(by, dtype=np.float64)

        def scaled(value: Any, names: tuple[str, ...]) -> Any:
            if isinstance(value, int):
                return value
            if factor.ndim and names[:1] == ("component",):
                return value * factor.reshape(-1, *([1] * (value.ndim - 1)))
            return value * float(factor.mean())

        return _map(self, scaled)

    def zero(self) -> Self:
        """The statistics of no data, in the shape of these: the neutral element of `merge`."""
        return _map(self, lambda value, _: value * 0)


class Placed:
    """Statistics of `n_components` components, summed from those of some of them at a time.

    Entries of a component go to its place; what has no `component` axis adds up.
    """

    def __init__(self, n_components: int) -> None:
        self.n_components = n_components
        self._form: Monoid | None = None
        self._sums: list[Any] = []

    def add(self, stats: Monoid, components: NDArray[np.intp]) -> None:
        """Add the statistics of some components (C,), of which none is there twice."""
        leaves = list(stats.leaves())
        if self._form is None:
            self._form = stats
            self._sums = [self._nothing(value, names) for _, names, value in leaves]
        for i, (_, names, value) in enumerate(leaves):
            if "component" in names:
                along = names.index("component")
                self._sums[i][(slice(None),) * along + (components,)] += value
            else:
                self._sums[i] = self._sums[i] + value

    def _nothing(self, value: Any, names: tuple[str, ...]) -> Any:
        if "component" not in names:
            return value * 0
        shape = list(value.shape)
        shape[names.index("component")] = self.n_components
        return np.zeros(shape, dtype=value.dtype)

    def close(self) -> Any:
        """The sum. At least one piece must have been added."""
        assert self._form is not None
        sums = iter(self._sums)
        return _map(self._form, lambda _value, _names: next(sums))


@dataclass(frozen=True, eq=False)
class Joint(Record):
    """Records side by side, in fields called `block0`, `block1`, ...: see `side_by_side`."""

    @property
    def blocks(self) -> tuple[Any, ...]:
        """The records, in order."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __reduce__(self) -> tuple[Any, ...]:
        inner = tuple(field.metadata["record"] for field in dataclasses.fields(self))
        return _joined, (type(self).__mro__[1], inner, self.blocks)


@dataclass(frozen=True, eq=False)
class JointStats(Joint, Monoid):
    """Statistics side by side."""


J = TypeVar("J", bound=Joint)


def side_by_side(base: type[J], *inner: type[Record]) -> type[J]:
    """The type of a record of records of types `inner`, as fields `block0`, `block1`, ...

    Axes of one block are not those of another, though their names be the same: all but `component`
    are called `block0.feature`, `block1.feature`, ... in datasets.
    """
    key: Any = base
    made: type[J] = _side_by_side(key, inner)
    return made


@functools.cache
def _side_by_side(base: Any, inner: tuple[Any, ...]) -> Any:
    blocks: list[Any] = []
    place = {"__module__": base.__module__}
    for i, kind in enumerate(inner):
        about = {"record": kind, "scope": f"block{i}."}
        blocks.append((f"block{i}", kind, dataclasses.field(default=None, metadata=about)))
    return dataclasses.make_dataclass(
        base.__name__, blocks, bases=(base,), frozen=True, eq=False, namespace=place
    )


def _joined(base: Any, inner: tuple[Any, ...], blocks: tuple[Any, ...]) -> Joint:
    joined: Joint = _side_by_side(base, inner)(*blocks)
    return joined


def _map(item: R, function: Callable[[Any, tuple[str, ...]], Any]) -> R:
    values = {}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if isinstance(value, Record):
            value = _map(value, function)
        elif value is not None:
            value = function(value, field.metadata.get("axes", ()))
        values[field.name] = value
    return dataclasses.replace(item, **values)


def _zip(left: R, right: R) -> R:
    values = {}
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, Record):
            values[field.name] = _zip(a, b)
        else:
            values[field.name] = None if a is None else a + b
    return dataclasses.replace(left, **values)


def record_to_json(item: Record | None) -> dict[str, Any] | None:
    """The arrays and numbers of a record by their dotted names, as plain lists and numbers."""
    if item is None:
        return None
    return {name: np.asarray(value).tolist() for name, _, value in item.leaves()}


def record_from_json(kind: type[R], data: Mapping[str, Any] | None) -> R | None:
    """Inverse of `record_to_json`, to the bit. A record of which nothing is there becomes None."""
    if data is None:
        return None
    nested: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for name, value in data.items():
        own, _, rest = name.partition(".")
        if rest:
            nested.setdefault(own, {})[rest] = value
        else:
            values[name] = np.array(value, dtype=np.float64) if isinstance(value, list) else value
    for field in dataclasses.fields(kind):
        if field.name in nested:
            inner = field.metadata["record"]
            values[field.name] = record_from_json(inner, nested[field.name])
    return kind(**values)


EMPTY = "there is no chunk to fold: the source is empty"


class Tree:
    """Merges what is added, in order, along the fixed binary tree, holding log2(n) of it."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, Any]] = []

    def add(self, value: Any) -> None:
        """The next value."""
        size = 1
        while self._stack and self._stack[-1][0] == size:
            value = self._stack.pop()[1].merge(value)
            size *= 2
        self._stack.append((size, value))

    def total(self) -> Any:
        """All that was added. Raises ComputeError where that is nothing."""
        if not self._stack:
            raise ComputeError(EMPTY)
        _, total = self._stack.pop()
        while self._stack:
            total = self._stack.pop()[1].merge(total)
        return total


def fold_tree(values: Iterable[Any]) -> Any:
    """Merge values in order along the fixed binary tree; see `Tree`."""
    tree = Tree()
    for value in values:
        tree.add(value)
    return tree.total()
