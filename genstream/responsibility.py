"""How log-joints become responsibilities: what makes EM soft, hard, sampled or truncated.

The E-step scores a block of rows under every component, `log p(x, k)`. A rule turns these into the
weights `r_k` with which a row counts for each component; everything else is the same for all ways
of learning. Each rule is the best it can be among the weights it may choose from, so that

    F(r, theta) = sum_n w_n sum_k r_nk (log p(x_n, k | theta) - log r_nk)

climbs from step to step, and is the log-likelihood where any weights may be chosen. What is drawn
climbs on the average only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from genstream import compiled
from genstream.errors import ConfigError

Array = NDArray[Any]

# Turns log-joints (K, n) into responsibilities in place, and returns the (n,) contributions
# sum_k r (log joint - log r) to the objective.
Rule = Callable[[Array], Array]
# Seed of the fit, its step and the chunk at hand.
Key = tuple[int, int, int]

# From so many components on, looking for those near a row pays: at half as many all are scored in
# about the same time.
MANY = 512
RULES = ("soft", "hard", "sampled", "truncated", "nearest")


def soft(log_joint: Array) -> Array:
    """Responsibilities `r_k = p(k | x)`; the objective is `log p(x)`."""
    fast = compiled.pays(log_joint.size, compiled.SMALL_BLOCK)
    return weighted_soft(log_joint, None, np.zeros(len(log_joint)), fast)


def weighted_soft(log_joint: Array, weights: Array | None, sum_r: Array, fast: bool) -> Array:
    """`soft`, times row weights (n,) if there are any; their sums over rows are added to `sum_r`.

    `fast` says that `compiled.pays` for what the block is a part of. What is hardly more than
    nothing becomes 0: denormal numbers slow a matrix product many times over.
    """
    if fast:
        return compiled.soft(log_joint, weights, sum_r)
    peak = log_joint.max(axis=0)
    log_joint -= peak
    least = -80.0 if log_joint.dtype == np.float32 else -700.0
    low = log_joint < least
    np.maximum(log_joint, least, out=log_joint)
    np.exp(log_joint, out=log_joint)
    log_joint[low] = 0.0
    total = log_joint.sum(axis=0)
    share = 1.0 / total
    if weights is not None:
        share *= weights.astype(share.dtype)
    log_joint *= share
    sum_r += log_joint.sum(axis=1, dtype=np.float64)
    value: Array = np.add(peak, np.log(total, dtype=np.float64), dtype=np.float64)
    return value


def hard(log_joint: Array) -> Array:
    """All responsibility to the likeliest component; the objective is its log-joint.

    This is classification EM (Celeux & Govaert 1992); with equal spherical Gaussians, k-means.
    """
    best = log_joint.argmax(axis=0)
    every = np.arange(log_joint.shape[1])
    objective: Array = log_joint[best, every].astype(np.float64)
    log_joint[:] = 0.0
    log_joint[best, every] = 1.0
    return objective


@dataclass(frozen=True)
class Truncated:
    """Responsibility to the `n` likeliest components of a row alone, `r_k = p(k | x, k likely)`.

    The objective is the logarithm of what these sum to: the best bound on `log p(x)` with so many
    components a row, which EM never decreases (Lucke & Eggert 2010, section 2). With `n = 1` it is
    `hard`, with `n = K` it is `soft`.

    Raises
    ------
    ConfigError
        Where `n` is less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"n is {self.n}: a row needs at least 1 component")

    def __call__(self, log_joint: Array) -> Array:
        if self.n >= len(log_joint):
            return soft(log_joint)
        others = np.argpartition(log_joint, -self.n, axis=0)[: -self.n]
        np.put_along_axis(log_joint, others, -np.inf, axis=0)
        value = soft(log_joint)
        np.put_along_axis(log_joint, others, 0.0, axis=0)
        return value


@dataclass(frozen=True)
class Nearest:
    """Soft responsibilities among the components that matter near a row, which alone are scored:
    see `genstream.nearest`, by which a story follows this rule.

    The objective is a bound on the log-likelihood, as a rule within 0.003 nats a row. Lists of
    components change from step to step, so that it may fall by as much as `slack`. With few
    components or rows everything is scored, and the rule is `soft`.

    Parameters
    ----------
    least
        A component matters where it has more than this share of the responsibility for a row. So
        small a share stands for more elsewhere in the cell.
    checked
        Share of the rows, the worst explained ones, that are scored under all components.
    cell_rows
        Rows that share a list, at least. Larger cells have longer lists and lose less.
    tolerance
        Nats a row that lists may lose, by an estimate, whenever they are shortened.

    Raises
    ------
    ConfigError
        Where a number is out of its range.
    """

    least: float = 1e-5
    checked: float = 0.02
    cell_rows: int = 1024
    tolerance: float = 5e-3

    slack: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        ranges = [
            ("least", 0 <= self.least < 1, "at least 0 and below 1"),
            ("checked", 0 <= self.checked <= 1, "between 0 and 1"),
            ("cell_rows", self.cell_rows >= 1, "at least 1"),
            ("tolerance", self.tolerance >= 0, "at least 0"),
        ]
        for name, right, allowed in ranges:
            if not right:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be {allowed}")

    def __call__(self, log_joint: Array) -> Array:
        return soft(log_joint)


@dataclass(frozen=True)
class Sampled:
    """All responsibility to one component, drawn from `p(k | x)`: stochastic EM (Celeux & Diebolt
    1985).

    Draws follow from (seed, key), where the key is seed, step and chunk of a fit: not from which
    worker does a chunk, nor from where a fit was stopped. The objective is `log p(x)`, which is
    `log p(x, k) - log p(k | x)` whichever component is drawn.

    Parameters
    ----------
    seed
        Number of the stream of draws, beside the fit's own seed.

    Raises
    ------
    ConfigError
        Where `seed` is negative.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: it must not be negative")

    def bind(self, key: Key) -> Rule:
        """The rule for one chunk of one step, whose blocks are met in a fixed order."""
        rng = np.random.default_rng([self.seed, *key])

        def sampled(log_joint: Array) -> Array:
            value = soft(log_joint)
            reached = np.cumsum(log_joint, axis=0, dtype=np.float64)
            mark = rng.random(log_joint.shape[1]) * reached[-1]
            drawn = np.minimum((reached <= mark).sum(axis=0), len(log_joint) - 1)
            log_joint[:] = 0.0
            log_joint[drawn, np.arange(len(drawn))] = 1.0
            return value

        return sampled


Responsibility = Rule | Sampled


def by_size(n_components: int) -> Responsibility:
    """The rule where nothing is said: `soft`, and `Nearest` from `MANY` components on."""
    return Nearest() if n_components >= MANY else soft


def climbs(responsibility: Responsibility) -> bool:
    """Whether EM by a rule can be accelerated: its bound is the log-likelihood, or close to it."""
    return responsibility is soft or isinstance(responsibility, Nearest)


def rule_of(responsibility: Responsibility, key: Key | None) -> Rule:
    """The rule for one chunk. Raises ConfigError where a rule that draws has no key."""
    if not isinstance(responsibility, Sampled):
        return responsibility
    if key is None:
        raise ConfigError("sampled responsibilities need a key: seed, step and chunk")
    return responsibility.bind(key)


def named(name: str, *, n: int = 3, seed: int = 0) -> Responsibility:
    """The rule called `name`, one of `RULES`; `n` is that of `Truncated`, `seed` of `Sampled`.

    Raises ConfigError where there is no rule of that name.
    """
    if name not in RULES:
        raise ConfigError(f"responsibility {name!r} is not one of {', '.join(RULES)}")
    if name == "sampled":
        return Sampled(seed)
    if name == "truncated":
        return Truncated(n)
    if name == "nearest":
        return Nearest()
    return soft if name == "soft" else hard
