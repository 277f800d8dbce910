"""Loops that Numba compiles, run without the interpreter's lock: see `genstream.compiled`.

NumPy walks an array once an operation and has no vectorised float64 `exp` on many a machine (9 ns a
number where a polynomial takes 1.4). Here a block's lanes of rows stay in the first cache from the
largest log-joint to the normalised responsibility. A loop over rows is a function of its own on
contiguous one-dimensional arrays, which is what LLVM turns into vector instructions, but where
numbers are looked up one at a time.

Multiplications and additions may be contracted, and the sign of zero is not kept; NaN and infinity
are, so that a row that is not finite shows in its value. A sum over rows may be taken by vector
lanes: in an order that the machine's type and the array's length alone decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import extending

F = TypeVar("F", bound=Callable[..., Any])

# Rows worked on at a time: two lanes of sums and one of scores are a few KiB.
LANE = 256
# The same where all columns of these are kept, in float64: as many as have `FEW_NUMBERS`.
FEW, MANY_FEW, FEW_NUMBERS = 64, 256, 1 << 13


def _compiled(reorder: bool = False) -> Callable[[F], F]:
    """Compile without the lock, kept on disk between processes where a folder can be written to."""
    fast = {"contract", "nsz"} | ({"reassoc"} if reorder else set())

    def decorate(function: F) -> F:
        def made(cache: bool) -> Any:
            return numba.njit(nogil=True, fastmath=fast, error_model="numpy", cache=cache)(function)

        try:
            return cast(F, made(cache=True))
        except RuntimeError:  # Numba found no folder for its cache.
            return cast(F, made(cache=False))

    return decorate


# exp(v) = 2^n exp(r), n = round(v / log 2), by Cody & Waite's two-part log 2 and, for |r| <=
# log(2) / 2, the polynomial with p(0) = 1 whose largest relative error is least (Remez 1934): 1.3
# times the machine epsilon of float64 and 0.8 times that of float32. Adding 1.5 * 2^52 (2^23)
# rounds to an integer, which then stands in the low bits; shifted into the exponent of 1 it is 2^n.


@numba.njit(inline="always")
def _exp64(v: float) -> float:
    """The exponential of -700 <= v <= 0, or NaN."""
    t = v * 1.4426950408889634 + 6755399441055744.0
    n = t - 6755399441055744.0
    r = (v - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = 2.777936921433875e-07
    p = p * r + 2.7645097631661323e-06
    p = p * r + 2.480111596262173e-05
    p = p * r + 0.0001984115789744216
    p = p * r + 0.0013888889256253424
    p = p * r + 0.008333333395863904
    p = p * r + 0.04166666666559338
    p = p * r + 0.16666666666524038
    p = p * r + 0.5000000000000083
    p = p * r + 1.000000000000009
    p = p * r + 1.0
    bits = (np.float64(t).view(np.int64) + np.int64(1023)) << np.int64(52)
    return p * np.int64(bits).view(np.float64)


_LOG2E = np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)
_HIGH, _LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C5, _C4, _C3 = np.float32(0.0082903123), np.float32(0.0418979302), np.float32(0.1666763574)
_C2, _C1, _C0 = np.float32(0.4999915063), np.float32(0.9999997020), np.float32(1.0)


@numba.njit(inline="always")
def _exp32(v: Any) -> Any:
    """The exponential of -80 <= v <= 0, or NaN, in float32."""
    t = v * _LOG2E + _ROUND
    n = t - _ROUND
    r = (v - n * _HIGH) - n * _LOW
    p = _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _C1
    p = p * r + _C0
    bits = (np.float32(t).view(np.int32) + np.int32(127)) << np.int32(23)
    return p * np.int32(bits).view(np.float32)


@_compiled()
def _raise_peak(x: Any, peak: Any) -> None:
    for i in range(x.shape[0]):
        # The form of one machine instruction, which max() is not.
        peak[i] = x[i] if x[i] > peak[i] else peak[i]  # noqa: FURB136


@_compiled()
def _raise_peak_4(a: Any, b: Any, c: Any, d: Any, peak: Any) -> None:
    """Four components at a time: the peak is read and written once."""
    for i in range(peak.shape[0]):
        p = peak[i]
        p = a[i] if a[i] > p else p  # noqa: FURB136
        p = b[i] if b[i] > p else p  # noqa: FURB136
        p = c[i] if c[i] > p else p  # noqa: FURB136
        peak[i] = d[i] if d[i] > p else p  # noqa: FURB136


def _exp(v: Any) -> Any:
    """`_exp64` or `_exp32`, by the type of `v`."""


@extending.overload(_exp, inline="always", strict=False)
def _exp_of(v: Any) -> Any:
    if v == numba.types.float32:
        return lambda v: _exp32(v)
    return lambda v: _exp64(v)


@_compiled()
def _exp_sum(x: Any, peak: Any, least: Any, zero: Any, total: Any) -> None:
    """`exp(x - peak)`, exactly 0 below the clip `least`, added to `total`."""
    for i in range(x.shape[0]):
        v = x[i] - peak[i]
        # Written so that NaN is not below the clip.
        low = v < least
        e = _exp(least if low else v)
        e = zero if low else e
        x[i] = e
        total[i] += e


@_compiled()
def _exp_sum_2(x: Any, y: Any, peak: Any, least: Any, zero: Any, total: Any) -> None:
    """Two components at a time: two polynomials are under way at once."""
    for i in range(x.shape[0]):
        v, w = x[i] - peak[i], y[i] - peak[i]
        low, lower = v < least, w < least
        e, f = _exp(least if low else v), _exp(least if lower else w)
        e = zero if low else e
        f = zero if lower else f
        x[i] = e
        y[i] = f
        total[i] += e + f


@_compiled()
def _peak_of(x: Any, start: int, stop: int, peak: Any) -> None:
    """The largest of each column of (K, n), between two columns."""
    K = x.shape[0]
    peak[:] = x[0, start:stop]
    k = 1
    while k + 4 <= K:
        a, b, c, d = x[k], x[k + 1], x[k + 2], x[k + 3]
        _raise_peak_4(a[start:stop], b[start:stop], c[start:stop], d[start:stop], peak)
        k += 4
    while k < K:
        _raise_peak(x[k, start:stop], peak)
        k += 1


@_compiled(reorder=True)
def _scale_sum(x: Any, factor: Any) -> float:
    """`x *= factor`, and the sum of what it becomes, in float64."""
    s = 0.0
    for i in range(x.shape[0]):
        v = x[i] * factor[i]
        x[i] = v
        s += np.float64(v)
    return s


@_compiled()
def soft(log_joint: Any, weights: Any, value: Any, sum_r: Any) -> None:
    """Responsibilities of log-joints (K, n) in place, in their arithmetic, times weights.

    `weights` are (n,), or empty: all 1. `value` (n,) takes the log of the sum over k, `sum_r` (K,)
    is added the rows' sums; all three are float64. `log_joint` may be a part of a wider array.
    """
    K, n = log_joint.shape
    number = log_joint.dtype.type
    least, zero, one = number(-80.0 if log_joint.itemsize == 4 else -700.0), number(0), number(1)
    peaks, totals = np.empty(LANE, log_joint.dtype), np.empty(LANE, log_joint.dtype)
    for start in range(0, n, LANE):
        stop = min(start + LANE, n)
        m = stop - start
        peak, total = peaks[:m], totals[:m]
        _peak_of(log_joint, start, stop, peak)
        total[:] = zero
        for k in range(0, K - 1, 2):
            first, second = log_joint[k, start:stop], log_joint[k + 1, start:stop]
            _exp_sum_2(first, second, peak, least, zero, total)
        if K % 2:
            _exp_sum(log_joint[K - 1, start:stop], peak, least, zero, total)
        for i in range(m):
            value[start + i] = np.float64(peak[i]) + math.log(np.float64(total[i]))
            total[i] = one / total[i]
        if weights.shape[0]:
            for i in range(m):
                total[i] *= number(weights[start + i])
        for k in range(K):
            sum_r[k] += _scale_sum(log_joint[k, start:stop], total)


@_compiled()
def _raise_best(x: Any, k: int, peak: Any, best: Any) -> None:
    for i in range(x.shape[0]):
        # A NaN stays, as the place of the first one.
        kept = x[i] <= peak[i] or peak[i] != peak[i]
        best[i] = best[i] if kept else k
        peak[i] = peak[i] if kept else x[i]


@_compiled()
def _raise_best_2(x: Any, y: Any, k: int, peak: Any, best: Any) -> None:
    """Two components at a time."""
    for i in range(x.shape[0]):
        p, b = peak[i], best[i]
        kept = x[i] <= p or p != p
        p, b = p if kept else x[i], b if kept else np.int32(k)
        kept = y[i] <= p or p != p
        peak[i] = p if kept else y[i]
        best[i] = b if kept else np.int32(k + 1)


@_compiled()
def hard(log_joint: Any, weights: Any, best: Any, value: Any, sum_r: Any) -> None:
    """The first of the largest of each column of log-joints (K, n), as `best` (n,); `value` (n,)
    takes its log-joint, and `sum_r` (K,) is added the rows' weights, (n,) or empty: all 1.
    """
    K, n = log_joint.shape
    peaks = np.empty(LANE, log_joint.dtype)
    for start in range(0, n, LANE):
        stop = min(start + LANE, n)
        peak, at = peaks[: stop - start], best[start:stop]
        peak[:] = log_joint[0, start:stop]
        at[:] = 0
        for k in range(1, K - 1, 2):
            x, y = log_joint[k, start:stop], log_joint[k + 1, start:stop]
            _raise_best_2(x, y, k, peak, at)
        if K > 1 and K % 2 == 0:
            _raise_best(log_joint[K - 1, start:stop], K - 1, peak, at)
        for i in range(stop - start):
            value[start + i] = np.float64(peak[i])
            sum_r[at[i]] += weights[start + i] if weights.shape[0] else 1.0


@_compiled()
def one_hot(best: Any, weights: Any, out: Any) -> None:
    """The weights of rows in the place of their components, of (K, n); all else is 0."""
    out[:] = out.dtype.type(0)
    for i in range(best.shape[0]):
        out[best[i], i] = weights[i] if weights.shape[0] else 1.0


# Features of a block of rows (n, d), C-ordered, in pivot coordinates `y = (x - shift) * inverse`:
# one row of `out`, C-ordered and at least n wide, a feature. `y` is rounded to the arithmetic of
# `out` once it is computed.


@_compiled()
def pivoted(x: Any, shift: Any, inverse: Any, at: int, out: Any) -> None:
    """`y`, from row `at` on."""
    n, d = x.shape
    for i in range(d):
        s, f = shift[i], inverse[i]
        row = out[at + i]
        for r in range(n):
            row[r] = (x[r, i] - s) * f


@_compiled()
def _centred(x: Any, shift: Any, inverse: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = (x[i] - shift[i]) * inverse[i]


@_compiled()
def centred(x: Any, shift: Any, inverse: Any, out: Any) -> None:
    """`y` row by row, in the order of (n, d)."""
    for r in range(x.shape[0]):
        _centred(x[r], shift, inverse, out[r])


@_compiled(reorder=True)
def within(x: Any, limit: float) -> bool:
    """Whether all of (n,) numbers are there and none is larger than a limit."""
    beyond = 0
    for i in range(x.shape[0]):
        beyond += not (abs(x[i]) <= limit)
    return beyond == 0


@_compiled()
def _product(a: Any, b: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] = a[r] * b[r]


@_compiled()
def _add_square(a: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] += a[r] * a[r]


@_compiled()
def quadratic(x: Any, shift: Any, inverse: Any, out: Any) -> None:
    """`[y_i y_j (i <= j), y, 1]`."""
    n, d = x.shape
    first = d * (d + 1) // 2
    pivoted(x, shift, inverse, first, out)
    out[first + d, :n] = 1.0
    at = 0
    for i in range(d):
        for j in range(i, d):
            _product(out[first + i, :n], out[first + j, :n], out[at, :n])
            at += 1


@_compiled()
def squares(x: Any, shift: Any, inverse: Any, together: bool, out: Any) -> None:
    """`[1, y, y^2]`, or with the squares of all columns `together` `[1, y, |y|^2]`."""
    n, d = x.shape
    out[0, :n] = 1.0
    pivoted(x, shift, inverse, 1, out)
    if together:
        out[1 + d, :n] = 0.0
    for i in range(d):
        if together:
            _add_square(out[1 + i, :n], out[1 + d, :n])
        else:
            _product(out[1 + i, :n], out[1 + i, :n], out[1 + d + i, :n])


@_compiled()
def _add_squares(x: Any, shift: Any, inverse: Any, weight: float, out: Any) -> None:
    d = x.shape[0]
    for i in range(d):
        y = (x[i] - shift[i]) * inverse[i]
        v = weight * y
        out[i] += v
        out[d + i] += v * y


@_compiled()
def gather_best(x: Any, shift: Any, inverse: Any, best: Any, weights: Any, sums: Any) -> None:
    """Add the features `[1, y, y^2]` of rows (n, d) to the `sums` (K, p) of their components."""
    for r in range(x.shape[0]):
        weight = weights[r] if weights.shape[0] else 1.0
        row = sums[best[r]]
        row[0] += weight
        _add_squares(x[r], shift, inverse, weight, row[1:])


# Features `[1, y, |y|^2]` of a block as rows `y` (n, d) and their squares (n,): that no row has to
# be turned into columns is worth more than what the matrix products could do besides.


@_compiled(reorder=True)
def _row_and_square(x: Any, shift: Any, inverse: Any, y: Any) -> float:
    square = 0.0
    for i in range(y.shape[0]):
        v = (x[i] - shift[i]) * inverse[i]
        y[i] = v
        square += v * v
    return square


@_compiled()
def _rows_and_squares(x: Any, shift: Any, inverse: Any, y: Any, square: Any) -> None:
    for r in range(x.shape[0]):
        square[r] = _row_and_square(x[r], shift, inverse, y[r])


@_compiled()
def _add_line(x: Any, constant: Any, slope: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] += constant + slope * x[i]


@_compiled()
def _score_rows(eta: Any, slopes: Any, y: Any, square: Any, out: Any) -> None:
    np.dot(slopes, y.T, out)
    for k in range(eta.shape[0]):
        _add_line(square, eta[k, 0], eta[k, -1], out[k])


@_compiled()
def _add_row(y: Any, weight: float, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] += weight * y[i]


@_compiled()
def _gather_best_rows(y: Any, square: Any, best: Any, weights: Any, sums: Any) -> None:
    d = y.shape[1]
    for r in range(y.shape[0]):
        weight = weights[r] if weights.shape[0] else 1.0
        row = sums[best[r]]
        row[0] += weight
        _add_row(y[r], weight, row[1 : 1 + d])
        row[1 + d] += weight * square[r]


@_compiled(reorder=True)
def _sum_and_dot(a: Any, b: Any) -> Any:
    first = second = 0.0
    for r in range(a.shape[0]):
        v = np.float64(a[r])
        first += v
        second += v * b[r]
    return first, second


@_compiled()
def _gather_rows(r: Any, y: Any, square: Any, room: Any, sums: Any) -> None:
    K, d = r.shape[0], y.shape[1]
    first = room.reshape(-1)[: K * d].reshape((K, d))
    np.dot(r, y, first)
    for k in range(K):
        n, second = _sum_and_dot(r[k], square)
        sums[k, 0] += n
        sums[k, 1 + d] += second
        for j in range(d):
            sums[k, 1 + j] += first[k, j]


# Functions of their own also lest all is inlined in one: `soft` then lost its vector instructions.


@_compiled()
def _gather(r: Any, f: Any, turned: bool, room: Any, sums: Any) -> None:
    """Add (K, p) responsibilities by features, `turned` as `Linear` has it."""
    K, p = sums.shape
    if turned:
        other = room.reshape((p, K))
        np.dot(f, r.T, other)
        for k in range(K):
            for j in range(p):
                sums[k, j] += other[j, k]
    else:
        np.dot(r, f.T, room)
        for k in range(K):
            for j in range(p):
                sums[k, j] += room[k, j]


@_compiled()
def _weigh_row(x: Any, shift: Any, inverse: Any, weight: float, first: Any, out: Any) -> None:
    root = math.sqrt(weight)
    for i in range(out.shape[0]):
        y = (x[i] - shift[i]) * inverse[i]
        first[i] += weight * y
        out[i] = root * y


@_compiled()
def gather_sure(
    x: Any, shift: Any, inverse: Any, edges: Any, rows: Any, weights: Any, room: Any, sums: Any
) -> None:
    """Add the features of `quadratic` of pairs of a component and a row to `sums` (K, p).

    Those of component k lie between `edges` k and k + 1: the numbers of their rows among those of
    `x` (n, d), and their weights. Products are in the arithmetic of `room` (m, d), for as many
    pairs as any component has.
    """
    K, p = sums.shape
    d = x.shape[1]
    square = np.empty((d, d), room.dtype)
    for k in range(K):
        m = edges[k + 1] - edges[k]
        if not m:
            continue
        y = room[:m]
        for r in range(m):
            at = edges[k] + r
            weight = np.float64(weights[at])
            sums[k, p - 1] += weight
            _weigh_row(x[rows[at]], shift, inverse, weight, sums[k, p - 1 - d : p - 1], y[r])
        np.dot(y.T, y, square)
        at = 0
        for i in range(d):
            for j in range(i, d):
                sums[k, at] += square[i, j]
                at += 1


# What `swept` does with a block, in this order; all of it together.
STAGES = FEATURES, SCORE, SOFTMAX, GATHER = 1, 2, 4, 8
ALL = sum(STAGES)


@_compiled()
def swept(
    stages: int,
    form: int,
    likeliest: bool,
    x: Any,
    shift: Any,
    inverse: Any,
    eta: Any,
    turned: bool,
    weights: Any,
    size: int,
    buffers: Any,
    value: Any,
    sum_r: Any,
    sums: Any,
) -> None:
    """The E-step of complete rows (n, d) in blocks of `size`, all without the interpreter: `soft`,
    or `hard` where a row is of its likeliest component.

    Where threads take turns at the interpreter's lock between the steps of a block, they wait for
    one another longer than a short step takes. `form` says which features: 0 `quadratic`, 1
    `squares`, 2 these together. `eta` (K, p) are their natural parameters, and `turned` is as
    `Linear` has it; `weights`, `value` and `sum_r` are as those of `soft`, and `sums` (K, p) are
    added the sums of features. `buffers` are of at least p, K rows of `size` numbers and (K, p), in
    the arithmetic of `eta`, and (size,) integers.
    """
    n = x.shape[0]
    K, p = eta.shape
    features, scores, room, places = buffers
    features, scores = features.reshape(-1), scores.reshape(-1)
    d = x.shape[1]
    slopes = np.ascontiguousarray(eta[:, 1 : 1 + d])
    for start in range(0, n, size):
        stop = min(start + size, n)
        m = stop - start
        # Of the block's own width, for the matrix products.
        f, r = features[: p * m].reshape((p, m)), scores[: K * m].reshape((K, m))
        y, square = features[: m * d].reshape((m, d)), features[m * d : m * d + m]
        some = weights[start:stop] if weights.shape[0] else weights
        best = places[:m]
        if stages & FEATURES:
            if form == 0:
                quadratic(x[start:stop], shift, inverse, f)
            elif form == 1:
                squares(x[start:stop], shift, inverse, False, f)
            else:
                _rows_and_squares(x[start:stop], shift, inverse, y, square)
        if stages & SCORE:
            if form == 2:
                _score_rows(eta, slopes, y, square, r)
            else:
                np.dot(eta, f, r)
        if stages & SOFTMAX:
            if likeliest:
                hard(r, some, best, value[start:stop], sum_r)
            else:
                soft(r, some, value[start:stop], sum_r)
        if stages & GATHER:
            if likeliest and form == 2:
                _gather_best_rows(y, square, best, some, sums)
            elif form == 2:
                _gather_rows(r, y, square, room, sums)
            elif likeliest and form == 1:
                gather_best(x[start:stop], shift, inverse, best, some, sums)
            else:
                if likeliest:
                    one_hot(best, some, r)
                _gather(r, f, turned, room, sums)


@_compiled()
def _add_quadratic(y: Any, slope: float, curvature: float, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] += (slope + curvature * y[r]) * y[r]


@_compiled()
def _add_quadratics(y: Any, i: int, slope: Any, curvature: Any, out: Any) -> None:
    """Of columns i to i + 3 at once: the sum is read and written once."""
    a, b, c, d = y[i], y[i + 1], y[i + 2], y[i + 3]
    p, q, s, t = slope[0], slope[1], slope[2], slope[3]
    e, f, g, h = curvature[0], curvature[1], curvature[2], curvature[3]
    for r in range(out.shape[0]):
        first = (p + e * a[r]) * a[r] + (q + f * b[r]) * b[r]
        out[r] += first + ((s + g * c[r]) * c[r] + (t + h * d[r]) * d[r])


@_compiled(reorder=True)
def _moments(y: Any, weight: Any) -> Any:
    """`sum r y` and `sum r y^2`."""
    first = second = 0.0
    for r in range(y.shape[0]):
        v = weight[r] * y[r]
        first += v
        second += v * y[r]
    return first, second


@_compiled()
def few_swept(
    together: bool,
    likeliest: bool,
    x: Any,
    shift: Any,
    inverse: Any,
    eta: Any,
    weights: Any,
    value: Any,
    sum_r: Any,
    sums: Any,
) -> None:
    """As `swept` with the features of `squares`, for so few components that matrix products would
    run far below their rate: all in float64 on a few rows at a time, whose coordinates stay in the
    first cache and whose features are never written.
    """
    n, d = x.shape
    K = eta.shape[0]
    size = min(MANY_FEW, max(FEW, FEW_NUMBERS // max(1, d)))
    y, room = np.empty((d, size)), np.empty(K * size)
    found, best = np.zeros(K), np.empty(size, np.int32)
    for start in range(0, n, size):
        stop = min(start + size, n)
        m = stop - start
        pivoted(x[start:stop], shift, inverse, 0, y)
        scores = room[: K * m].reshape((K, m))
        for k in range(K):
            score = scores[k]
            score[:] = eta[k, 0]
            slope, curvature = eta[k, 1 : 1 + d], eta[k, 1 + d :]
            i = 0
            while i + 4 <= d and not together:
                _add_quadratics(y, i, slope[i : i + 4], curvature[i : i + 4], score)
                i += 4
            while i < d:
                _add_quadratic(y[i, :m], slope[i], curvature[0 if together else i], score)
                i += 1
        some = weights[start:stop] if weights.shape[0] else weights
        if likeliest:
            hard(scores, some, best[:m], value[start:stop], found)
            one_hot(best[:m], some, scores)
        else:
            soft(scores, some, value[start:stop], found)
        for k in range(K):
            for i in range(d):
                first, second = _moments(y[i, :m], scores[k])
                sums[k, 1 + i] += first
                sums[k, 1 + d if together else 1 + d + i] += second
    for k in range(K):
        sum_r[k] += found[k]
        sums[k, 0] += found[k]


@_compiled()
def where_it_matters(
    scores: Any, y: Any, apart: Any, blur: Any, nothing: float, matters: Any
) -> None:
    """Rows n for which some components may matter though their scores (K, n) are blurred.

    `apart` (K,) says which components these are and `blur` (C, 3) how large their blur is: by
    `|y|^2`, by `|y|` and at all, with `y` (d, n). `matters` (C, n) takes where a score and its blur
    are not more than `nothing` below the best of all other components.
    """
    K, n = scores.shape
    peak = np.empty(n, scores.dtype)
    peak[:] = -np.inf
    square = np.zeros(n)
    for k in range(K):
        if not apart[k]:
            _raise_peak(scores[k], peak)
    for i in range(y.shape[0]):
        _add_square(y[i], square)
    c = 0
    for k in range(K):
        if apart[k]:
            for r in range(n):
                size = blur[c, 0] * square[r] + blur[c, 1] * math.sqrt(square[r]) + blur[c, 2]
                matters[c, r] = not (scores[k, r] + size < peak[r] - nothing)
            c += 1


@_compiled()
def _add_to(x: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] += x[r]


@_compiled()
def total(x: Any, out: Any) -> None:
    """(n,) float64 sums over the rows of a C-ordered (K, n)."""
    out[:] = 0.0
    for k in range(x.shape[0]):
        _add_to(x[k], out)


@_compiled()
def half_square(z: Any, out: Any) -> None:
    """(K, n) `|z|^2 / -2` of the columns of a C-ordered (K, d, n)."""
    for k in range(z.shape[0]):
        out[k] = 0.0
        for i in range(z.shape[1]):
            _add_square(z[k, i], out[k])
        for r in range(out.shape[1]):
            out[k, r] *= -0.5


# Rows whose patterns of gaps differ, side by side: see `genstream.families.lanes`. Tiles of them
# are worked on as vectors: what is held of one stays in the nearer caches. Matrix products are of
# whole tiles: what stands in columns beyond the last row is 0, or nobody looks at it.
# A tile has up to T = `TILE` rows: as many as `TILE_NUMBERS` allow, but not so few that calls cost
# more than what they do.
TILE, TILE_NUMBERS, LEAST_TILE = 256, 1 << 15, 64


@_compiled()
def _tile_rows(n: int, d: int, size: int) -> int:
    """Rows of a tile, of n in all: of d columns, `size` of which are solved for."""
    most = TILE_NUMBERS // (4 * d + size * (size + 5) // 2)
    return min(TILE, max(LEAST_TILE, most // 32 * 32), (n + 7) // 8 * 8)


@_compiled()
def _subtract_product(a: Any, b: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] -= a[r] * b[r]


@_compiled()
def _add_product(a: Any, b: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] += a[r] * b[r]


@_compiled()
def _subtract_number(a: Any, number: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] = a[r] - number


@_compiled()
def _masked_distance(a: Any, number: Any, mask: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] = (a[r] - number) * mask[r]


@_compiled(reorder=True)
def _weighed(a: Any, weight: Any, out: Any) -> float:
    """`weight a` in `out`, and its sum."""
    total = a.dtype.type(0)
    for r in range(a.shape[0]):
        v = a[r] * weight[r]
        out[r] = v
        total += v
    return np.float64(total)


@_compiled()
def pivoted_rows(x: Any, index: Any, shift: Any, inverse: Any, out: Any) -> None:
    """As `pivoted`, of the rows `index` (m,) of (n, d)."""
    for start in range(0, index.shape[0], FEW):
        stop = min(start + FEW, index.shape[0])
        for i in range(x.shape[1]):
            s, f = shift[i], inverse[i]
            for r in range(start, stop):
                out[i, r] = (x[index[r], i] - s) * f


@_compiled()
def _factors_of_rows(factor: Any, pattern: Any, lower: Any) -> None:
    """The triangle of each row's factor, (s (s + 1) / 2, T), of the patterns' (s, s, p)."""
    at = 0
    for i in range(factor.shape[0]):
        for j in range(i + 1):
            for r in range(pattern.shape[0]):
                lower[at, r] = factor[i, j, pattern[r]]
            at += 1


@_compiled()
def _solve(lower: Any, g: Any, x: Any, m: int, square: Any) -> None:
    """`x` (s, T) of `L D L' x = g`, and `g'x` (m,); `g` is overwritten."""
    size = g.shape[0]
    at = 0
    square[:] = 0
    for i in range(size):
        for j in range(i):
            _subtract_product(lower[at, :m], g[j, :m], g[i, :m])
            at += 1
        _product(g[i, :m], lower[at, :m], x[i, :m])
        _add_product(g[i, :m], x[i, :m], square)
        at += 1
    for i in range(size - 1, 0, -1):
        at = i * (i + 1) // 2
        for j in range(i):
            _subtract_product(lower[at + j, :m], x[i, :m], x[j, :m])


@_compiled()
def _from_peak(peak: Any, pattern: Any, square: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] = peak[pattern[r]] - 0.5 * square[r]


@_compiled()
def score_by_gaps(
    y: Any,
    mean: Any,
    which: Any,
    pattern: Any,
    columns: Any,
    matrix: Any,
    precision: Any,
    factor: Any,
    peak: Any,
    solved: Any,
    out: Any,
) -> None:
    """Solve for what is missing: `x` (k, s, n) in `solved`, and the scores in rows `which` (k,) of
    `out` (K, n).

    `y` (d, n) are the rows, `pattern` (n,) says which pattern each of them has, `columns` (s, n)
    what it misses. `peak` (K, p) is a pattern's score at distance 0. `matrix` (k,) says which of
    the precisions (c, d, d) and factors (c, s, s, p) a component with `mean` (k, d) has.
    """
    d, n = y.shape
    size = columns.shape[0]
    tile = _tile_rows(n, d, size)
    rows, mask = np.zeros((d, tile), y.dtype), np.zeros((d, tile), y.dtype)
    e, slope = np.zeros((d, tile), y.dtype), np.zeros((d, tile), y.dtype)
    g, x = np.empty((size, tile), y.dtype), np.empty((size, tile), y.dtype)
    lower = np.empty((size * (size + 1) // 2, tile), y.dtype)
    square, explained = np.empty(tile, y.dtype), np.empty(tile, y.dtype)
    for start in range(0, n, tile):
        stop = min(start + tile, n)
        m = stop - start
        at = pattern[start:stop]
        for i in range(d):
            rows[i, :m] = y[i, start:stop]
        mask[:] = 1
        for a in range(size):
            for r in range(m):
                mask[columns[a, start + r], r] = 0
        for k in range(mean.shape[0]):
            c = matrix[k]
            if k == 0 or c != matrix[k - 1]:
                _factors_of_rows(factor[c], at, lower)
            for i in range(d):
                _masked_distance(rows[i], mean[k, i], mask[i], e[i])
            np.dot(precision[c], e, slope)
            square[:] = 0
            for i in range(d):
                _add_product(e[i], slope[i], square)
            for a in range(size):
                for r in range(m):
                    g[a, r] = slope[columns[a, start + r], r]
            _solve(lower, g, x, m, explained[:m])
            for a in range(size):
                solved[k, a, start:stop] = x[a, :m]
            for r in range(m):
                square[r] -= explained[r]
            _from_peak(peak[which[k]], at, square, out[which[k], start:stop])


@_compiled()
def score_by_observed(
    y: Any,
    mean: Any,
    which: Any,
    pattern: Any,
    columns: Any,
    matrix: Any,
    factor: Any,
    peak: Any,
    solved: Any,
    out: Any,
) -> None:
    """As `score_by_gaps`, solving for what is observed: in `columns` (s, n)."""
    d, n = y.shape
    size = columns.shape[0]
    tile = _tile_rows(n, d, size)
    g, x = np.empty((size, tile), y.dtype), np.empty((size, tile), y.dtype)
    lower = np.empty((size * (size + 1) // 2, tile), y.dtype)
    square = np.empty(tile, y.dtype)
    for start in range(0, n, tile):
        stop = min(start + tile, n)
        m = stop - start
        at = pattern[start:stop]
        for k in range(mean.shape[0]):
            c = matrix[k]
            if k == 0 or c != matrix[k - 1]:
                _factors_of_rows(factor[c], at, lower)
            for a in range(size):
                for r in range(m):
                    column = columns[a, start + r]
                    g[a, r] = y[column, start + r] - mean[k, column]
            _solve(lower, g, x, m, square[:m])
            for a in range(size):
                solved[k, a, start:stop] = x[a, :m]
            _from_peak(peak[which[k]], at, square, out[which[k], start:stop])


@_compiled()
def gather_lanes(
    by_gaps: bool,
    y: Any,
    mean: Any,
    columns: Any,
    matrix: Any,
    covariance: Any,
    solved: Any,
    weights: Any,
    first: Any,
    second: Any,
) -> None:
    """Add to `first` (k, d) and `second` (k, d, d), float64, the sums of `r e` and `r e e'` of
    completed distances `e` from each mean under weights (k, n).

    With what is missing in `columns` (s, n), `e` there is `-x`; with what is observed in them it is
    `covariance x` elsewhere. A tile in which a component has no part costs it nothing.
    """
    d, n = y.shape
    size = columns.shape[0]
    tile = _tile_rows(n, d, size)
    rows, x = np.zeros((d, tile), y.dtype), np.zeros((d, tile), y.dtype)
    e, weighed = np.zeros((d, tile), y.dtype), np.zeros((d, tile), y.dtype)
    products = np.empty((d, d), y.dtype)
    for start in range(0, n, tile):
        stop = min(start + tile, n)
        m = stop - start
        for i in range(d):
            rows[i, :m] = y[i, start:stop]
            e[i, m:] = 0
            weighed[i, m:] = 0
        for k in range(mean.shape[0]):
            weight = weights[k, start:stop]
            if not weight.any():
                continue
            if by_gaps:
                for i in range(d):
                    _subtract_number(rows[i, :m], mean[k, i], e[i, :m])
                for a in range(size):
                    for r in range(m):
                        e[columns[a, start + r], r] = -solved[k, a, start + r]
            else:
                x[:] = 0
                for a in range(size):
                    for r in range(m):
                        x[columns[a, start + r], r] = solved[k, a, start + r]
                np.dot(covariance[matrix[k]], x, e)
                for a in range(size):
                    for r in range(m):
                        column = columns[a, start + r]
                        e[column, r] = rows[column, r] - mean[k, column]
            for i in range(d):
                first[k, i] += _weighed(e[i, :m], weight, weighed[i, :m])
            np.dot(weighed, e.T, products)
            for i in range(d):
                for j in range(d):
                    second[k, i, j] += products[i, j]


@_compiled()
def sums_by_pattern(pattern: Any, weights: Any, out: Any) -> None:
    """Add the weights (K, n) of each pattern's rows to (K, p)."""
    for k in range(weights.shape[0]):
        for r in range(pattern.shape[0]):
            out[k, pattern[r]] += weights[k, r]


@_compiled()
def _cells(matrix: Any, row: Any, column: Any, out: Any) -> None:
    for q in range(out.shape[0]):
        out[q] = matrix[row[q], column[q]]


@_compiled()
def _pivots(column: Any, least: Any, out: Any) -> None:
    """In `out` a column's variances, of which no less than `least` is left; in it one over them."""
    for q in range(out.shape[0]):
        out[q] = max(column[q], least[q])
        column[q] = 1 / out[q]


@_compiled()
def factor_lanes(
    matrices: Any, small: Any, eps: float, n_at_once: int, out: Any, log_det: Any
) -> None:
    """As `genstream.families.lanes.factor_lanes`, of the rows and columns `small` (s, p) of
    matrices (c, d, d); the log-determinants are added to `log_det` (c, p). The product of so many
    pivots at once is within the range of float64.
    """
    size, n = small.shape
    lanes = min(LANE, n)
    pivots, scaled = np.empty((size, lanes), out.dtype), np.empty(lanes, out.dtype)
    least, run = np.empty(lanes, out.dtype), np.empty(lanes)
    for c in range(matrices.shape[0]):
        for start in range(0, n, LANE):
            stop = min(start + LANE, n)
            m = stop - start
            for j in range(size):
                for i in range(j, size):
                    part = out[c, i, j, start:stop]
                    _cells(matrices[c], small[i, start:stop], small[j, start:stop], part)
                top = out[c, j, j, start:stop]
                for r in range(m):
                    least[r] = top[r] * eps
                for h in range(j):
                    _product(out[c, j, h, start:stop], pivots[h, :m], scaled[:m])
                    for i in range(j, size):
                        part = out[c, i, j, start:stop]
                        _subtract_product(out[c, i, h, start:stop], scaled[:m], part)
                _pivots(top, least[:m], pivots[j, :m])
                for i in range(j + 1, size):
                    part = out[c, i, j, start:stop]
                    _product(part, top, part)
            for first in range(0, size, n_at_once):
                run[:m] = 1
                for j in range(first, min(first + n_at_once, size)):
                    _product(run[:m], pivots[j, :m], run[:m])
                for r in range(m):
                    log_det[c, start + r] += math.log(run[r])


@_compiled()
def add_inverses(factor: Any, small: Any, weight: Any, out: Any) -> None:
    """Add to a symmetric `out` (c, d, d), at the rows and columns `small` (s, p), the sum of the
    inverses of what `factor_lanes` factored under weights (c, p): see
    `genstream.families.lanes.invert_lanes`.
    """
    size, n = small.shape
    inverse = np.empty((size, size, min(LANE, n)), factor.dtype)
    for c in range(factor.shape[0]):
        for start in range(0, n, LANE):
            stop = min(start + LANE, n)
            m = stop - start
            r = weight[c, start:stop]
            if not r.any():
                continue
            for j in range(size - 1, -1, -1):
                top = inverse[j, j, :m]
                top[:] = factor[c, j, j, start:stop]
                for i in range(j + 1, size):
                    part = inverse[i, j, :m]
                    part[:] = 0
                    for h in range(j + 1, size):
                        known = inverse[max(i, h), min(i, h), :m]
                        _subtract_product(known, factor[c, h, j, start:stop], part)
                    _subtract_product(factor[c, i, j, start:stop], part, top)
            for i in range(size):
                for j in range(i + 1):
                    for q in range(m):
                        at = start + q
                        out[c, small[i, at], small[j, at]] += r[q] * inverse[i, j, q]
        for i in range(out.shape[1]):
            for j in range(i):
                out[c, j, i] = out[c, i, j]


@_compiled()
def parted(x: Any, limit: float, values: Any, there: Any) -> bool:
    """Numbers (n,) with 0 for NaN, and which of them are there; false, where any is larger than a
    limit.
    """
    beyond = 0
    for i in range(x.shape[0]):
        v = x[i]
        known = v == v
        there[i] = known
        v = v if known else x.dtype.type(0)
        values[i] = v
        beyond += not (abs(v) <= limit)
    return beyond == 0
