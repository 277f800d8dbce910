"""Logarithms of factorials of counts, most of which are small and looked up."""

from __future__ import annotations

import functools

import numpy as np
from scipy.special import gammaln

from genstream.families.blocks import Array

# Counts below this are looked up, in half a MiB.
LOOKED_UP = 1 << 16


@functools.cache
def _table() -> Array:
    return np.asarray(gammaln(np.arange(1.0, LOOKED_UP + 1.0)))


def log_factorial(counts: Array) -> Array:
    """`log x!` in float64 of counts of any shape, to the bit what `gammaln(x + 1)` is."""
    with np.errstate(invalid="ignore"):
        whole = counts.astype(np.int32)
    # What is negative is large without its sign.
    if whole.view(np.uint32).max(initial=0) < LOOKED_UP and (whole == counts).all():
        return _table()[whole]
    return np.asarray(gammaln(counts.astype(np.float64) + 1.0))
