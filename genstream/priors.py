"""How strong the conjugate priors of a story are.

Every family has a weak conjugate prior, `p_0(theta)`, whose pseudo-rows are fixed from a sample of
rows. A prior of strength `s` is worth `s` times as many of them,

    p(theta) ~ p_0(theta)^s,

so that the M-step stays the exact mode of a conjugate posterior, and EM climbs log-likelihood plus
log-prior whatever `s` is. Many components on few rows each need more of it than the weak prior is
worth; how much, rows held out tell (`genstream.tuning`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from genstream.errors import ConfigError
from genstream.stats import Joint, Record

MOST_PSEUDO_ROWS = 1e9
"""No number of a prior may be larger: sums with it would lose what the rows say."""


@dataclass(frozen=True)
class Prior:
    """The conjugate prior of a story's parameters. All of its defaults are the weak prior.

    Parameters
    ----------
    strength
        s above: times the pseudo-rows of the weak prior. For K Gaussians over d columns with a
        covariance each, the weak prior is worth `2 d + 3` rows to the covariance of a component
        and 0.01 to its mean; for independent real columns 5 to a variance; for all others one row.
        In a product of families each part has its own.
    spread
        Times the variances that the weak prior expects. Those are a share `1 / K` of the sample's
        volume (Fraley & Raftery 2007, section 3.2), in units of its pseudo-rows.
    independence
        Pseudo-rows that say that the columns of a component are uncorrelated, whatever their
        variances (`NormalWishart`): of Gaussians with full or tied covariances. The correlations of
        a component of n rows become about `n / (n + independence)` of what they would be.
    frequencies
        Pseudo-rows of binary, count and categorical columns, at the sample's own frequencies and
        means; None stands for `strength`. Of independent columns, negative binomial and
        zero-inflated ones; gamma-Poisson factors too.
    weights
        Pseudo-rows of each component in the Dirichlet prior of the mixing weights; None stands for
        `strength / K`, s rows in all.

    Raises
    ------
    ConfigError
        Where strength or spread are not positive numbers, one of the others is negative, or any
        is above `MOST_PSEUDO_ROWS`.
    """

    strength: float = 1.0
    spread: float = 1.0
    independence: float = 0.0
    frequencies: float | None = None
    weights: float | None = None

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in ("frequencies", "weights") and value is None:
                continue
            positive = name in ("strength", "spread")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (positive and value == 0):
                word = "a positive number" if positive else "a number that is not negative"
                raise ConfigError(f"prior: {name} is {value!r}: it must be {word}")
            if value > MOST_PSEUDO_ROWS:
                raise ConfigError(
                    f"prior: {name} is {value!r}: it must be at most {MOST_PSEUDO_ROWS:g}"
                )

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | Prior | None) -> Prior | None:
        """The prior that `weak`, a mapping of its parameters, or a prior stands for.

        None stays None: maximum likelihood. Raises ConfigError where it is none of those.
        """
        if given is None or isinstance(given, Prior):
            return given
        if isinstance(given, str) and given == "weak":
            return cls()
        if isinstance(given, Mapping):
            known = tuple(cls.__dataclass_fields__)
            unknown = [str(name) for name in given if name not in known]
            if unknown:
                raise ConfigError(
                    f"prior: there is no {unknown[0]!r}; there are {', '.join(known)}"
                )
            return cls(**given)
        raise ConfigError(f"prior {given!r} is not one of weak, None, or a prior's strength")

    def pseudo_rows(self, n_components: int) -> float:
        """Pseudo-rows of each component in the prior of the mixing weights."""
        return self.strength / n_components if self.weights is None else float(self.weights)

    def __str__(self) -> str:
        said = {
            "strength": f"{self.strength:g} times the pseudo-rows of the weak ones",
            "spread": f"variances {self.spread:g} times as large",
            "independence": f"{self.independence:g} pseudo-rows without correlation",
            "frequencies": f"{self.frequencies} pseudo-rows of columns that are not real",
            "weights": f"{self.weights} pseudo-rows a mixing weight",
        }
        usual = Prior()
        words = [said[name] for name in said if getattr(self, name) != getattr(usual, name)]
        return f"conjugate, {', '.join(words)}" if words else "weak conjugate"

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, which `of` turns back into an equal prior."""
        return asdict(self)

    def applied(self, known: Record | None, now: Prior | None = None) -> Record | None:
        """A family's prior, made as strong and wide as this one from what it is `now` (weak)."""
        if known is None:
            return None
        if isinstance(known, Joint):
            return type(known)(*(self.applied(block, now) for block in known.blocks))
        now = now or Prior()
        strength, spread = self.strength / now.strength, self.spread / now.spread
        made: Record = known
        if strength != 1.0 or spread != 1.0:
            made = known.stronger(strength, spread)  # type: ignore[attr-defined]
        rows = self.strength if self.frequencies is None else float(self.frequencies)
        if hasattr(made, "rows") and made.rows != rows:
            made = replace(made, rows=rows)  # type: ignore[call-arg]
        if self.independence != now.independence and hasattr(made, "independence"):
            made = replace(made, independence=float(self.independence))  # type: ignore[call-arg]
        return made
