"""Rotations of loadings: views of a factor model that leave its density as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def varimax(
    loadings: Array, *, normalise: bool = True, tolerance: float = 1e-12, max_steps: int = 1000
) -> tuple[Array, Array]:
    """Rotate loadings (d, q) so that each factor bears on few columns (Kaiser 1958).

    Returns the rotated loadings `loadings @ rotation` and the orthogonal `rotation` (q, q), which
    maximises the variance of the squared loadings of each factor,

        sum_f [1/d sum_j b_jf^4 - (1/d sum_j b_jf^2)^2].

    With `normalise` each column's loadings count as if they were of length 1 (Kaiser's
    normalisation), so that columns that share little count as much. Factors come by falling
    explained variance, with signs that make each one's largest loading positive. Factors `t` turn
    into `t @ rotation`. Steps are those of the symmetric scheme by singular values (Lawley &
    Maxwell 1971, section 6.3), which ends where the criterion gains less than `tolerance` of
    itself.
    """
    d, q = loadings.shape
    length = np.sqrt((loadings**2).sum(axis=1, keepdims=True))
    scaled = loadings / np.where(length > 0, length, 1.0) if normalise else loadings
    rotation = np.eye(q)
    reached = 0.0
    for _ in range(max_steps):
        turned = scaled @ rotation
        pull = scaled.T @ (turned**3 - turned * (turned**2).mean(axis=0))
        left, singular, right = np.linalg.svd(pull)
        rotation = left @ right
        value = float(singular.sum())
        if value <= reached * (1 + tolerance):
            break
        reached = value
    turned = loadings @ rotation
    order = np.argsort(-(turned**2).sum(axis=0), kind="stable")
    largest = turned[np.abs(turned).argmax(axis=0), np.arange(q)] if d else np.ones(q)
    rotation = (rotation * np.where(largest < 0, -1.0, 1.0))[:, order]
    return loadings @ rotation, rotation
