"""Patterns of gaps: which rows have the same columns observed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import Array


class Patterns:
    """The patterns in (n, d) masks.

    `observed` (p, d) are the patterns, `width` (p,) how many columns each observes, `counts` (p,)
    how many rows it has, `of_row` (n,) the pattern of each row. `order` (n,) lists the rows pattern
    after pattern, those of one in their own order; pattern i begins at `starts[i]` of it.
    """

    def __init__(self, observed: NDArray[np.bool_]) -> None:
        words = _words(observed)
        self.order = np.lexsort(words.T)
        alike = words[self.order]
        other = (alike[1:] != alike[:-1]).any(axis=1)
        first = np.flatnonzero(np.append(np.ones(min(1, len(words)), dtype=bool), other))
        self.starts = np.append(first, len(words))
        self.counts = np.diff(self.starts)
        self.observed = observed[self.order[first]]
        self.width = self.observed.sum(axis=1)
        self.of_row = np.empty(len(words), dtype=np.intp)
        self.of_row[self.order] = np.repeat(np.arange(len(first)), self.counts)

    def frequent(self, n_rows: int) -> NDArray[np.bool_]:
        """(p,) which patterns observe anything, and have at least so many rows."""
        return np.asarray((self.counts >= n_rows) & (self.width > 0))

    def rows(self, pattern: int) -> Array:
        """The rows of one pattern."""
        return self.order[self.starts[pattern] : self.starts[pattern + 1]]


def numbered(numbers: Array) -> tuple[Array, Array]:
    """The different ones of (n,) whole numbers in rising order, and the position of each in them:
    what is sorted already is not sorted again.
    """
    step = np.diff(numbers)
    if (step < 0).any():
        return np.unique(numbers, return_inverse=True)
    new = np.append(np.ones(min(1, len(numbers)), dtype=bool), step != 0)
    return numbers[new], np.cumsum(new) - 1


def _words(observed: NDArray[np.bool_]) -> Array:
    """(n, w) masks as words of 16 bits, which are sorted digit by digit, without comparisons."""
    n, d = observed.shape
    n_words = -(-d // 16)
    if d % 16:
        padded = np.zeros((n, 16 * n_words), dtype=bool)
        padded[:, :d] = observed
        observed = padded
    return np.packbits(observed).view(np.uint16).reshape(n, n_words)
