"""Real columns with detection limits: an entry at or beyond a limit is only known to be there.

Of an entry `u ~ N(mean, variance)` the recorded value is `x = u` between the limits and the limit
itself beyond them (Tobin 1958), so that with `a = (lower - mean) / sd`

    p(x <= lower) = Phi(a),   E[u | u <= lower] = mean - sd h,   h = phi(a) / Phi(a),
    Var[u | u <= lower] = variance (1 - a h - h^2),

and the same mirrored above. Limits are a column's own, so that these are constants of a component:
whether an entry is censored is one more feature of it, and the moments of all that are censored
follow from their number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from genstream.families.blocks import LOG_2PI, Array
from genstream.schema import Schema

# Deviations beyond which the log of a tail would overflow.
FARTHEST = 1e150
# Deviations from which on the moments of a tail are those of its asymptotic series.
FAR = 1e3


class Limits:
    """The limits of d real columns, in data units; without one a column has an infinite limit.

    `low` and `high` are the positions of the columns that have a lower and an upper one.
    """

    def __init__(self, schema: Schema, columns: Array) -> None:
        told = [schema.columns[j] for j in columns]
        self.lower = np.array([-np.inf if c.lower is None else c.lower for c in told])
        self.upper = np.array([np.inf if c.upper is None else c.upper for c in told])
        self.low = np.flatnonzero(np.isfinite(self.lower))
        self.high = np.flatnonzero(np.isfinite(self.upper))
        self.none = not (len(self.low) or len(self.high))

    def beyond(
        self, values: Array, observed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(low, n) and (high, n) which entries of rows (n, d) are at a limit or beyond it."""
        # In the precision of the values: a limit that is no binary fraction must meet itself.
        lower, upper = (limit.astype(values.dtype) for limit in (self.lower, self.upper))
        below = (values[:, self.low] <= lower[self.low]).T
        above = (values[:, self.high] >= upper[self.high]).T
        if observed is not None:
            below &= observed[:, self.low].T
            above &= observed[:, self.high].T
        return below, above

    def recorded(self, values: Array) -> Array:
        """(n, d) what is recorded of values (n, d)."""
        return values if self.none else np.clip(values, self.lower, self.upper)

    def mean(self, mean: Array, variance: Array) -> Array:
        """(K, d) means of what is recorded of `N(mean, variance)`, each (K, d)."""
        if self.none:
            return mean
        out = mean.copy()
        sd = np.sqrt(variance)
        for j in np.union1d(self.low, self.high):
            a = np.clip((self.lower[j] - mean[:, j]) / sd[:, j], -FARTHEST, FARTHEST)
            b = np.clip((self.upper[j] - mean[:, j]) / sd[:, j], -FARTHEST, FARTHEST)
            inside = mean[:, j] * (ndtr(b) - ndtr(a)) - sd[:, j] * (_phi(b) - _phi(a))
            below = self.lower[j] * ndtr(a) if np.isfinite(self.lower[j]) else 0.0
            above = self.upper[j] * ndtr(-b) if np.isfinite(self.upper[j]) else 0.0
            out[:, j] = inside + below + above
        return out


class Tails:
    """What components say of censored entries, in pivot coordinates.

    Takes limits, and means and variances (K, d). `log_p` (K, low + high) is the log-probability of
    an entry beyond each limit, `first` and `second` its first two moments there.
    """

    def __init__(
        self, limits: Limits, shift: Array, scale: Array, mean: Array, variance: Array
    ) -> None:
        parts = []
        sides: list[tuple[Array, Array, float]] = [
            (limits.low, limits.lower, -1.0),
            (limits.high, limits.upper, 1.0),
        ]
        for columns, limit, sign in sides:
            at = (limit[columns] - shift[columns]) / scale[columns]
            m, v = mean[:, columns], variance[:, columns]
            sd = np.sqrt(v)
            # Towards the limit from beyond it: above a limit is below it, mirrored.
            a = np.clip(sign * (m - at) / sd, -FARTHEST, FARTHEST)
            log_p = log_ndtr(a)
            far, near = np.minimum(a, -FAR), np.maximum(a, -FAR)
            h = np.exp(-0.5 * (near**2 + LOG_2PI) - log_ndtr(near))
            share = np.clip(1.0 - near * h - h**2, 0.0, 1.0)
            # Far out the terms cancel, and the first ones of their series are exact.
            h = np.where(a < -FAR, -far - 1.0 / far + 2.0 / far**3, h)
            share = np.where(a < -FAR, (1.0 - 6.0 / far**2) / far**2, share)
            first = m + sign * sd * h
            parts.append((log_p, first, v * share + first**2))
        self.log_p, self.first, self.second = (
            np.concatenate(pieces, axis=1) for pieces in zip(*parts, strict=True)
        )


def _phi(z: Any) -> Array:
    """Standard normal density."""
    return np.asarray(np.exp(-0.5 * (z**2 + LOG_2PI)))
