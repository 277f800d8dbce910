"""Compiled loops where they pay, and whether there are any.

What NumPy does slowly is done by `genstream.loops`, which Numba compiles: mostly the way from
log-joints to responsibilities. Importing Numba costs 0.4 s, so work of fewer than `SMALL` numbers
stays with NumPy and never asks; that is decided from shapes alone, so that the same rows in the
same chunks always take the same way and give the same bits. Where Numba is not installed, or the
environment variable GENSTREAM_COMPILED is 0, NumPy does everything, with the same results to
rounding.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# A chunk with fewer scores (rows times components) than this is done before Numba is imported.
SMALL = 1 << 16
# A block of so many is compiled where what it is a part of is not known.
SMALL_BLOCK = 1 << 14
SWITCH = "GENSTREAM_COMPILED"
_EVERYWHERE = np.empty(0)


def compiled_available() -> bool:
    """Whether compiled loops may be used: Numba is there and not switched off."""
    return os.environ.get(SWITCH, "1") != "0" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def version() -> str:
    """The compiler's version, which is part of what decides the last bits; `none` without."""
    return importlib.metadata.version("numba") if compiled_available() else "none"


def pays(n_numbers: int, least: int = SMALL) -> bool:
    """Whether work on so many numbers is to be compiled."""
    return n_numbers >= least and compiled_available() and loops() is not None


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
    found = loops()
    assert found is not None
    value = np.empty(log_joint.shape[1])
    kernel = found.soft32 if log_joint.dtype == np.float32 else found.soft64
    given = _EVERYWHERE if weights is None else np.ascontiguousarray(weights, dtype=np.float64)
    if log_joint.flags.c_contiguous:
        kernel(log_joint, given, value, sum_r)
    else:
        work = np.ascontiguousarray(log_joint)
        kernel(work, given, value, sum_r)
        log_joint[:] = work
    return value
