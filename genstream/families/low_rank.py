"""Second moments explained by few factors: the covariance `W W' + noise` that fits them best.

Maximises over loadings `W_k` (d, q) and noise `psi`

    F = sum_k -1/2 [N_k log|C_k| + tr(inv(C_k) T_k)] - 1/2 sum_j [a log psi_j + b_j / psi_j],
    C_k = W_k W_k' + diag(psi),

with `T_k` (d, d) a scatter matrix worth `N_k` rows and the last sum an inverse-gamma prior. With
`S_k = T_k / N_k` and eigenvalues `l_1 >= l_2 >= ...` and vectors `u_i` of `inv(psi)^1/2 S_k
inv(psi)^1/2`, the best loadings for given noise are known (Joreskog 1967, eq. 11; Tipping & Bishop
1999, appendix A):

    W_k = psi^1/2 [u_1 ... u_q] diag(max(l_i - 1, 0))^1/2.

What is left is a function of the noise alone. Noise that is one number has a closed form; diagonal
noise is found by Fisher scoring on `log psi` with a line search, so that F never falls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Array = NDArray[Any]

# Scoring ends when a step promises less than so many nats a row.
TOLERANCE = 1e-10
MAX_STEPS = 200
# Of matrices at least this wide, the largest eigenvalues are found alone where all are at least
# `FEW` times as many: twice as fast.
WIDE, FEW = 48, 8
# The most a logarithm of noise may move in one step.
LONGEST = 1.0

# Of noise (d,): minus F in nats, its gradient (d,) and Fisher information (d, d) along `log psi`.
Evaluate = Callable[[Array], tuple[float, Array, Array]]


@dataclass(frozen=True)
class NoisePrior:
    """`-1/2 [weight log psi_j + pull_j / psi_j]` and the least noise allowed, both (p,): an entry
    a column, or a single one where noise is one number.
    """

    weight: float
    pull: Array
    floor: Array


def best_loadings(moment: Array, noise: Array, n_factors: int) -> Array:
    """(K, d, q) loadings that fit second moments (K, d, d) best under noise (K, d).

    Columns come by falling eigenvalue, each with the sign that makes its largest entry positive;
    those that nothing is left for are zero.
    """
    deviation = np.sqrt(noise)
    value, vector = _top(moment / (deviation[:, :, None] * deviation[:, None, :]), n_factors)
    loadings = deviation[:, :, None] * vector * np.sqrt(np.maximum(value - 1, 0.0))[:, None, :]
    largest = np.abs(loadings).argmax(axis=1)[:, None, :]
    sign = np.where(np.take_along_axis(loadings, largest, axis=1) < 0, -1.0, 1.0)
    return np.asarray(loadings * sign)


def _top(matrices: Array, n_factors: int) -> tuple[Array, Array]:
    """The q largest eigenvalues (K, q) and vectors (K, d, q), zeros where d is less than q."""
    d = matrices.shape[1]
    if d >= WIDE and n_factors * FEW <= d:
        wanted = (d - n_factors, d - 1)
        pairs = [linalg.eigh(one, subset_by_index=wanted, check_finite=False) for one in matrices]
        value, vector = (np.stack(found) for found in zip(*pairs, strict=True))
    else:
        value, vector = np.linalg.eigh(matrices)
    value, vector = value[:, ::-1][:, :n_factors], vector[:, :, ::-1][:, :, :n_factors]
    short = n_factors - value.shape[1]
    if short:
        value = np.pad(value, ((0, 0), (0, short)))
        vector = np.pad(vector, ((0, 0), (0, 0), (0, short)))
    return value, vector


def spherical_noise(moment: Array, count: Array, n_factors: int, prior: NoisePrior) -> float:
    """The best noise variance common to second moments (K, d, d), if loadings are free.

    It is the mean of the eigenvalues that no factor explains, with the prior's share (Tipping &
    Bishop 1999, eq. 8). An eigenvalue below it is one of these whatever its rank.
    """
    value = np.linalg.eigvalsh(moment)[:, ::-1]
    rest, top = value[:, n_factors:], value[:, :n_factors]
    total = float(count @ rest.sum(axis=1)) + float(prior.pull.sum())
    weight = float(count.sum()) * rest.shape[1] + prior.weight
    order = np.argsort(top, axis=None)
    shares = np.repeat(count, top.shape[1])[order]
    for eigenvalue, share in zip(top.ravel()[order], shares, strict=True):
        if weight > 0 and eigenvalue * weight >= total:
            break
        total += float(share * eigenvalue)
        weight += float(share)
    return float(max(total / max(weight, 1e-300), prior.floor.max()))


def diagonal_noise(
    moment: Array,
    count: Array,
    noise: Array,
    prior: NoisePrior,
    *,
    n_factors: int = 0,
    loadings: Array | None = None,
    anew: bool = False,
) -> Array:
    """(d,) the best noise common to second moments (K, d, d) worth `count` (K,) rows.

    Loadings are free, or given (K, d, q). `noise` (d,) is where the search begins, and F is at
    least what it is there. F may have several peaks: where nothing is known yet (`anew`) the search
    begins at the variances and at Joreskog's (1967) bound on the noise too, and the best is taken.
    The prior has d entries, or one for noise that is one number.
    """
    single = len(prior.pull) == 1
    rows = max(float(count.sum()), 1.0)

    def evaluate(log_noise: Array) -> tuple[float, Array, Array]:
        psi = np.exp(log_noise)
        wide = np.full(moment.shape[1], psi[0]) if single else psi
        if loadings is None:
            value, slope, information = _profile(moment, count, wide, n_factors)
        else:
            value, slope, information = _given(moment, count, wide, loadings)
        if single:
            slope, information = slope.sum(keepdims=True), information.sum(keepdims=True)
        value += 0.5 * float((prior.weight * log_noise + prior.pull / psi).sum())
        slope = slope + 0.5 * (prior.weight - prior.pull / psi)
        information = information + np.diag(0.5 * prior.pull / psi)
        return value, slope, information

    begins = [noise]
    if anew:
        pooled = np.einsum("k,kij->ij", count / rows, moment)
        variance = np.diagonal(pooled)
        precision = np.linalg.inv(pooled + np.diag(np.maximum(1e-3 * variance, prior.floor)))
        begins += [variance, (1 - 0.5 * n_factors / len(variance)) / np.diagonal(precision)]
    least, tolerance = np.log(prior.floor), TOLERANCE * rows
    ends = []
    for begin in begins:
        start = np.maximum(begin.mean(keepdims=True) if single else begin, prior.floor)
        ends.append(_scoring(evaluate, np.log(start), least, tolerance))
    found = np.exp(min(ends, key=lambda end: end[0])[1])
    return np.full(moment.shape[1], found[0]) if single else found


def _profile(
    moment: Array, count: Array, noise: Array, n_factors: int
) -> tuple[float, Array, Array]:
    """Minus F, its slope and information at the best loadings for some noise, without the prior.

    The information is `1/2 N (P o P)` with `P` the projection on what no factor explains
    (Lawley & Maxwell 1971, section 4.3).
    """
    deviation = np.sqrt(noise)
    white = moment / np.outer(deviation, deviation)
    top, vector = _top(white, n_factors)
    active = top > 1
    gain = np.where(active, top, 1.0)
    diagonal = np.diagonal(white, axis1=1, axis2=2)
    fit = np.log(gain).sum(axis=1) - (gain - 1).sum(axis=1) + diagonal.sum(axis=1)
    value = 0.5 * float(count @ (np.log(noise).sum() + fit))
    explained = (vector**2 @ (gain - 1)[:, :, None])[..., 0]
    slope = 0.5 * (count @ (1 - diagonal + explained))
    used = vector * active[:, None, :]
    left = np.eye(len(noise)) - used @ vector.swapaxes(1, 2)
    information = 0.5 * np.einsum("k,kij->ij", count, left**2)
    return value, slope, information


def _given(
    moment: Array, count: Array, noise: Array, loadings: Array
) -> tuple[float, Array, Array]:
    """Minus F, its slope and information for given loadings, without the prior."""
    scaled = loadings / noise[:, None]
    inner = np.eye(loadings.shape[2]) + loadings.swapaxes(1, 2) @ scaled
    precision = np.diag(1 / noise) - scaled @ np.linalg.solve(inner, scaled.swapaxes(1, 2))
    fitted = precision @ moment
    trace = np.trace(fitted, axis1=1, axis2=2)
    log_det = np.log(noise).sum() + np.linalg.slogdet(inner)[1]
    value = 0.5 * float(count @ (log_det + trace))
    missed = np.einsum("kij,kji->ki", fitted, precision)
    slope = 0.5 * noise * (count @ (np.diagonal(precision, axis1=1, axis2=2) - missed))
    information = 0.5 * np.outer(noise, noise) * np.einsum("k,kij->ij", count, precision**2)
    return value, slope, information


def _scoring(
    evaluate: Evaluate, begin: Array, least: Array, tolerance: float
) -> tuple[float, Array]:
    """Minimise by Fisher scoring with halved steps, above the bounds `least`: value and place."""
    at = begin
    value, slope, information = evaluate(at)
    for _ in range(MAX_STEPS):
        free = (at > least) | (slope < 0)
        if not free.any():
            break
        inner = information[np.ix_(free, free)]
        # Where few directions are left unexplained the information has no full rank.
        ridge = 1e-9 * np.trace(inner) / len(inner) + 1e-300
        step = np.zeros_like(at)
        step[free] = -np.linalg.solve(inner + ridge * np.eye(len(inner)), slope[free])
        step *= min(1.0, LONGEST / max(float(np.abs(step).max()), 1e-300))
        if not -float(slope @ step) > tolerance:
            break
        for _ in range(40):
            fresh = np.maximum(at + step, least)
            found = evaluate(fresh)
            if found[0] < value:
                break
            step = step / 2
        else:
            break
        at, (value, slope, information) = fresh, found
    return value, at
