"""Loops that Numba compiles, run without the interpreter's lock: see `genstream.compiled`.

NumPy walks an array once an operation and has no vectorised float64 `exp` on many a machine (9 ns a
number where a polynomial takes 1.4). Here a block's lanes of rows stay in the first cache from the
largest log-joint to the normalised responsibility. Every loop over rows is a function of its own on
contiguous one-dimensional arrays, which is what LLVM turns into vector instructions.

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

F = TypeVar("F", bound=Callable[..., Any])

# Rows worked on at a time: two lanes of sums and one of scores are a few KiB.
LANE = 256


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


# exp(v) = 2^n exp(r), n = round(v / log 2), by Cody & Waite's two-part log 2 and Taylor's series,
# whose next term is below the unit roundoff for |r| <= log(2) / 2. Adding 1.5 * 2^52 (2^23) rounds
# to an integer, which then stands in the low bits; shifted into the exponent of 1 it is 2^n.


@numba.njit(inline="always")
def _exp64(v: float) -> float:
    """The exponential of -700 <= v <= 0, or NaN."""
    t = v * 1.4426950408889634 + 6755399441055744.0
    n = t - 6755399441055744.0
    r = (v - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = 1.0 / 479001600
    p = p * r + 1.0 / 39916800
    p = p * r + 1.0 / 3628800
    p = p * r + 1.0 / 362880
    p = p * r + 1.0 / 40320
    p = p * r + 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    bits = (np.float64(t).view(np.int64) + np.int64(1023)) << np.int64(52)
    return p * np.int64(bits).view(np.float64)


_LOG2E = np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)
_HIGH, _LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C7, _C6, _C5, _C4, _C3, _C2, _C1 = (np.float32(1 / n) for n in (5040, 720, 120, 24, 6, 2, 1))


@numba.njit(inline="always")
def _exp32(v: Any) -> Any:
    """The exponential of -80 <= v <= 0, or NaN, in float32."""
    t = v * _LOG2E + _ROUND
    n = t - _ROUND
    r = (v - n * _HIGH) - n * _LOW
    p = _C7
    p = p * r + _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _C1
    p = p * r + _C1
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


@_compiled()
def _exp_sum64(x: Any, peak: Any, total: Any) -> None:
    """`exp(x - peak)`, exactly 0 below the clip, added to `total`."""
    for i in range(x.shape[0]):
        v = x[i] - peak[i]
        # Written so that NaN is not below the clip.
        low = v < -700.0
        e = _exp64(-700.0 if low else v)
        e = 0.0 if low else e
        x[i] = e
        total[i] += e


@_compiled()
def _exp_sum64_2(x: Any, y: Any, peak: Any, total: Any) -> None:
    """Two components at a time: two polynomials are under way at once."""
    for i in range(x.shape[0]):
        v, w = x[i] - peak[i], y[i] - peak[i]
        low, lower = v < -700.0, w < -700.0
        e, f = _exp64(-700.0 if low else v), _exp64(-700.0 if lower else w)
        e = 0.0 if low else e
        f = 0.0 if lower else f
        x[i] = e
        y[i] = f
        total[i] += e + f


_CLIP32, _ZERO32 = np.float32(-80.0), np.float32(0.0)


@_compiled()
def _exp_sum32(x: Any, peak: Any, total: Any) -> None:
    for i in range(x.shape[0]):
        v = x[i] - peak[i]
        low = v < _CLIP32
        e = _exp32(_CLIP32 if low else v)
        e = _ZERO32 if low else e
        x[i] = e
        total[i] += e


@_compiled()
def _exp_sum32_2(x: Any, y: Any, peak: Any, total: Any) -> None:
    for i in range(x.shape[0]):
        v, w = x[i] - peak[i], y[i] - peak[i]
        low, lower = v < _CLIP32, w < _CLIP32
        e, f = _exp32(_CLIP32 if low else v), _exp32(_CLIP32 if lower else w)
        e = _ZERO32 if low else e
        f = _ZERO32 if lower else f
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
def soft64(log_joint: Any, weights: Any, value: Any, sum_r: Any) -> None:
    """Responsibilities of float64 log-joints (K, n) in place, times weights.

    `weights` are (n,), or empty: all 1. `value` (n,) takes the log of the sum over k, `sum_r` (K,)
    is added the rows' sums. `log_joint` may be a part of a wider array.
    """
    K, n = log_joint.shape
    peaks, totals = np.empty(LANE), np.empty(LANE)
    for start in range(0, n, LANE):
        stop = min(start + LANE, n)
        m = stop - start
        peak, total = peaks[:m], totals[:m]
        _peak_of(log_joint, start, stop, peak)
        total[:] = 0.0
        for k in range(0, K - 1, 2):
            _exp_sum64_2(log_joint[k, start:stop], log_joint[k + 1, start:stop], peak, total)
        if K % 2:
            _exp_sum64(log_joint[K - 1, start:stop], peak, total)
        for i in range(m):
            value[start + i] = peak[i] + math.log(total[i])
            total[i] = 1.0 / total[i]
        if weights.shape[0]:
            for i in range(m):
                total[i] *= weights[start + i]
        for k in range(K):
            sum_r[k] += _scale_sum(log_joint[k, start:stop], total)


@_compiled()
def soft32(log_joint: Any, weights: Any, value: Any, sum_r: Any) -> None:
    """As `soft64`, of float32 log-joints; `value` and `sum_r` are float64."""
    K, n = log_joint.shape
    peaks, totals = np.empty(LANE, np.float32), np.empty(LANE, np.float32)
    one = np.float32(1.0)
    for start in range(0, n, LANE):
        stop = min(start + LANE, n)
        m = stop - start
        peak, total = peaks[:m], totals[:m]
        _peak_of(log_joint, start, stop, peak)
        total[:] = np.float32(0.0)
        for k in range(0, K - 1, 2):
            _exp_sum32_2(log_joint[k, start:stop], log_joint[k + 1, start:stop], peak, total)
        if K % 2:
            _exp_sum32(log_joint[K - 1, start:stop], peak, total)
        for i in range(m):
            value[start + i] = np.float64(peak[i]) + math.log(np.float64(total[i]))
            total[i] = one / total[i]
        if weights.shape[0]:
            for i in range(m):
                total[i] *= np.float32(weights[start + i])
        for k in range(K):
            sum_r[k] += _scale_sum(log_joint[k, start:stop], total)


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
    """(n,) `|z|^2 / -2` of the columns of a C-ordered (d, n)."""
    out[:] = 0.0
    for i in range(z.shape[0]):
        _add_square(z[i], out)
    for r in range(out.shape[0]):
        out[r] *= -0.5
