"""Compiled loops where they pay, and whether there are any.

What NumPy does slowly is done by `genstream.loops`, which Numba compiles: the way from log-joints
to responsibilities, and whole E-steps of chunks, as threads that go from one short step of NumPy's
to the next spend their time waiting for the interpreter's lock. Importing Numba costs 0.4 s, so
work of fewer than `SMALL` numbers stays with NumPy and never asks; that is decided from shapes
alone, so that the same rows in the same chunks always take the same way and give the same bits.
Where Numba is not installed, or the environment variable GENSTREAM_COMPILED is 0, NumPy does
everything, with the same results to rounding; draws that fill gaps come block by block, and of
other blocks with the same seed they are others.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import os
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from genstream.errors import ConfigError
from genstream.profile import current, mark

Array = NDArray[Any]

# A chunk with fewer values and scores than this is done before Numba is imported.
SMALL = 1 << 16
# A block of so many is compiled where what it is a part of is not known.
SMALL_BLOCK = 1 << 14
# So few components are worked on without matrix products, and from so many features on blocks take
# so long that threads hardly wait for one another: see `swept`.
FEW, MANY_FEATURES = 4, 600
SWITCH = "GENSTREAM_COMPILED"
_EVERYWHERE = np.empty(0)


def compiled_available() -> bool:
    """Whether compiled loops may be used: Numba is there and not switched off.

    Raises ConfigError where the switch is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH) or "1"
    if switch not in ("0", "1"):
        raise ConfigError(
            f"the environment variable {SWITCH} is {switch!r}: say 0 for NumPy alone, 1 or nothing "
            "for compiled loops"
        )
    return switch == "1" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def version() -> str:
    """The compiler's version, which is part of what decides the last bits; `none` without."""
    return importlib.metadata.version("numba") if compiled_available() else "none"


def pays(n_numbers: int, least: int = SMALL) -> bool:
    """Whether work on so many numbers is to be compiled."""
    return n_numbers >= least and compiled_available() and loops() is not None


def pays_for(values: Any, n_components: int) -> bool:
    """Whether the E-step of a chunk of rows (n, d) is to be compiled."""
    n_rows, n_columns = values.shape
    return pays(n_rows * (n_columns + n_components))


@functools.cache
def loops() -> ModuleType | None:
    """`genstream.loops`, or None where Numba cannot be imported after all."""
    try:
        return importlib.import_module("genstream.loops")
    except ImportError:
        return None


def soft(log_joint: Array, weights: Array | None, sum_r: Array) -> Array:
    """Responsibilities times row weights from log-joints (K, n), in place.

    Returns the (n,) logs of the sums over k, and adds each component's sum of weighted
    responsibilities to `sum_r` (K,). What is more than 700 nats (80 in float32) below the row's
    peak is exactly 0. Only where `pays`.
    """
    found: Any = loops()
    value = np.empty(log_joint.shape[1])
    given = _EVERYWHERE if weights is None else np.ascontiguousarray(weights, dtype=np.float64)
    if log_joint.flags.c_contiguous:
        found.soft(log_joint, given, value, sum_r)
    else:
        work = np.ascontiguousarray(log_joint)
        found.soft(work, given, value, sum_r)
        log_joint[:] = work
    return value


def _written(name: str, values: Array, pivot: Any, out: Array, *options: Any) -> None:
    getattr(loops(), name)(
        np.ascontiguousarray(values), pivot.shift, 1.0 / pivot.scale, *options, out
    )


def pivoted(values: Array, pivot: Any, out: Array) -> Array:
    """`y` (d, n), rows (n, d) in the pivot's coordinates, in a part of `out`.

    `out` is C-ordered and of at least d rows and n columns; here and in what follows, only where
    `pays`.
    """
    _written("pivoted", values, pivot, out, 0)
    return out[: values.shape[1], : len(values)]


def centred(values: Array, pivot: Any, out: Array) -> Array:
    """`y` (n, d) row by row, in the first rows of a C-ordered `out`."""
    _written("centred", values, pivot, out)
    return out[: len(values)]


def within(array: Array, limit: float) -> bool:
    """Whether all of an array of floating-point numbers are there and none is beyond a limit."""
    if array.flags.forc and pays(array.size):
        found: Any = loops()
        return bool(found.within(array.reshape(-1, order="A"), limit))
    # A NaN is the least and the largest of whatever it is among, so that these two tell all.
    with np.errstate(invalid="ignore"):
        return not array.size or (float(array.min()) >= -limit and float(array.max()) <= limit)


def parted(array: Array, limit: float) -> tuple[Array, NDArray[np.bool_]] | None:
    """A copy of an array of floating-point numbers with 0 for NaN, and which of them are there.

    None where it does not pay, or any is beyond a limit.
    """
    if not (array.flags.forc and pays(array.size)):
        return None
    values, there = np.empty_like(array), np.empty_like(array, dtype=np.bool_)
    flat = [a.reshape(-1, order="A") for a in (array, values, there)]
    found: Any = loops()
    return (values, there) if found.parted(flat[0], limit, *flat[1:]) else None


def quadratic(values: Array, pivot: Any, out: Array) -> Array:
    """`[y_i y_j (i <= j), y, 1]` of rows, as `pivoted`."""
    d = values.shape[1]
    _written("quadratic", values, pivot, out)
    return out[: d * (d + 1) // 2 + d + 1, : len(values)]


def squares(pivot: Any, together: bool, values: Array, out: Array) -> Array:
    """`[1, y, y^2]`, or `[1, y, |y|^2]`, of rows, as `pivoted`."""
    d = values.shape[1]
    _written("squares", values, pivot, out, together)
    return out[: 1 + d + (1 if together else d), : len(values)]


def swept(
    features: str,
    pivot: Any,
    linear: Any,
    values: Array,
    weights: Array | None,
    buffers: tuple[Array, Array],
    sum_r: Array,
    sums: Array,
    likeliest: bool,
) -> Array | None:
    """The E-step of complete rows (n, d) under K components, times row weights (n,): soft, or all
    responsibility to the `likeliest`.

    `features` are `quadratic`, `squares` or `together`, in which scores are `linear`. Adds the
    responsibilities' sums to `sum_r` (K,), and those of features under them to `sums` (K, p).
    `buffers` for features and scores, C-ordered, say how many rows a block has. Only where `pays`.

    Returns the (n,) log-densities, or log-joints of the likeliest; None, and does nothing, where a
    component needs another arithmetic or features are so many that blocks take long, which NumPy's
    products then do faster.
    """
    n_components, width = linear.eta.shape
    few = features != "quadratic" and n_components <= FEW
    if linear.direct.size or (not few and (linear.fine.size or width > MANY_FEATURES)):
        return None
    found: Any = loops()
    value = np.empty(len(values))
    given = _EVERYWHERE if weights is None else np.ascontiguousarray(weights, dtype=np.float64)
    values = np.ascontiguousarray(values)
    at = pivot.shift, 1.0 / pivot.scale
    if few:
        together = features == "together"
        found.few_swept(together, likeliest, values, *at, linear.whole, given, value, sum_r, sums)
        mark("sweep")
        return value
    form, size = ("quadratic", "squares", "together").index(features), buffers[1].shape[1]
    room, places = np.empty(sums.shape, dtype=linear.eta.dtype), np.empty(size, dtype=np.int32)
    rooms = (*buffers, room, places)

    def step(stages: int, part: slice) -> None:
        some = given[part] if len(given) else given
        found.swept(
            stages,
            form,
            likeliest,
            values[part],
            *at,
            linear.eta,
            linear.turned,
            some,
            size,
            rooms,
            value[part],
            sum_r,
            sums,
        )

    if current() is None:
        step(found.ALL, slice(None))
        return value
    # The same to the bit, with a look at the clock in between.
    stages = zip(found.STAGES, ("features", "score", "softmax", "gather"), strict=True)
    for first, (stage, name) in itertools.product(range(0, len(values), size), stages):
        step(stage, slice(first, first + size))
        mark(name)
    return value


def gather_sure(
    values: Array, pivot: Any, edges: Array, rows: Array, weights: Array, dtype: Any, sums: Array
) -> None:
    """Add the features `quadratic` of some of the rows (n, d) under weights to `sums` (K, p).

    Component k has the pairs from `edges[k]` to `edges[k + 1]`, of whose rows and weights there are
    arrays. Products are of a `dtype`. Only where `pays`.
    """
    room = np.empty((int(np.diff(edges).max(initial=0)), values.shape[1]), dtype)
    at = pivot.shift, 1.0 / pivot.scale
    cast(Any, loops()).gather_sure(values, *at, edges, rows, weights, room, sums)


def where_it_matters(
    scores: Array, y: Array, apart: Array, blur: Array, nothing: float, fast: bool
) -> Array:
    """(C, n) where components that are set apart may matter, from scores (K, n) that are blurred.

    They do where score and blur are not more than `nothing` below the best of all other
    components. `apart` (K,) says which components these are, and `blur` (C, 3) how much a score may
    be off: by `|y|^2`, by `|y|` and at all, with `y` (d, n).
    """
    if fast:
        matters = np.empty((len(blur), scores.shape[1]), dtype=np.bool_)
        cast(Any, loops()).where_it_matters(scores, y, apart, blur, nothing, matters)
        return matters
    least = scores[~apart].max(axis=0, initial=-np.inf).astype(np.float64) - nothing
    square = np.einsum("in,in->n", y, y, dtype=np.float64)
    size = blur @ np.stack([square, np.sqrt(square), np.ones_like(square)])
    return np.asarray(~(scores[apart] + size < least))


def half_square(z: Array, fast: bool) -> Array:
    """(K, n) `-|z|^2 / 2` of the columns of (K, d, n), in float64."""
    if not fast:
        return np.asarray(-0.5 * np.einsum("kin,kin->kn", z, z, dtype=np.float64))
    out = np.empty((z.shape[0], z.shape[2]))
    cast(Any, loops()).half_square(np.ascontiguousarray(z), out)
    return out


def total(resp: Array, fast: bool) -> Array:
    """(n,) sums over the components of (K, n), in float64."""
    if not fast:
        return np.asarray(resp.sum(axis=0, dtype=np.float64))
    out = np.empty(resp.shape[1])
    cast(Any, loops()).total(np.ascontiguousarray(resp), out)
    return out
