"""Importance sampling of `log p(x | k)` where a family's own score is a bound.

Factors are drawn in coordinates `u` in which they have no borders, from a mixture of Student
distributions about each row's posterior and of the factors' prior. The share of the prior bounds
the weights (a defensive mixture, Hesterberg 1995), and every draw is weighed by the whole mixture,
whichever part it came from (Owen & Zhou 2000, section 3).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import gammaln, logsumexp

from genstream.families.blocks import Array

# Degrees of freedom of the Student part, and the share of draws that come from the prior.
DOF, PRIOR_SHARE = 5.0, 0.1
# Numbers held at once for the draws of a few rows.
MOST_NUMBERS = 1 << 21


def mean_weights(
    log_likelihood: Callable[[slice, Array], Array],
    log_prior: Callable[[Array], Array],
    prior: Callable[[int], Array],
    mean: Array,
    covariance: Array,
    n_samples: int,
    n_features: int,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """(n,) logs of the mean importance weight, an unbiased estimate of `p(x)`, and of their mean
    square.

    Parameters
    ----------
    log_likelihood
        (m, s) of `log p(x | u)` for a slice of m rows and their (m, s, q) draws.
    log_prior
        (m, s) of `log p(u)` for draws.
    prior
        Draws (number, q) from `p(u)`.
    mean, covariance
        (n, q) and (n, q, q) of the Student part.
    n_samples
        s, the draws a row, at least 2.
    n_features
        d, which with s says how many rows are done at once.
    rng
        Draws depend on it and on nothing else.
    """
    n, q = mean.shape
    n_prior = max(1, round(PRIOR_SHARE * n_samples))
    n_student = n_samples - n_prior
    factor = np.linalg.cholesky(covariance)
    log_scale = np.log(np.einsum("nii->ni", factor)).sum(axis=1)
    log_constant = gammaln((DOF + q) / 2) - gammaln(DOF / 2) - 0.5 * q * np.log(DOF * np.pi)
    first, second = np.empty(n), np.empty(n)
    size = max(1, MOST_NUMBERS // (n_samples * max(n_features, q)))
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        m = rows.stop - start
        width = np.sqrt(DOF / rng.chisquare(DOF, (m, n_student, 1)))
        noise = rng.standard_normal((m, n_student, q)) * width
        student = mean[rows, None] + noise @ factor[rows].swapaxes(1, 2)
        u = np.concatenate([student, prior(m * n_prior).reshape(m, n_prior, q)], axis=1)
        gap = np.linalg.solve(factor[rows], (u - mean[rows, None]).swapaxes(1, 2))
        distance = (gap**2).sum(axis=1)
        log_student = log_constant - 0.5 * (DOF + q) * np.log1p(distance / DOF)
        log_student -= log_scale[rows, None]
        log_p = log_prior(u)
        log_proposal = np.logaddexp(
            log_student + np.log(n_student / n_samples), log_p + np.log(n_prior / n_samples)
        )
        log_weight = log_likelihood(rows, u) + log_p - log_proposal
        first[rows] = logsumexp(log_weight, axis=1) - np.log(n_samples)
        second[rows] = logsumexp(2 * log_weight, axis=1) - np.log(n_samples)
    return first, second
