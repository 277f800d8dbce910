"""Families `p(x | k, t, theta)`: what a component makes of a row, and what it needs summed.

Each family stacks the parameters of all K components in arrays and offers

- `anchored(sample, n_components, prior)`: the family with its pivot and prior fixed from a sample;
- `prepare(params, log_weights)`: a kernel, made once a pass, that holds natural parameters;
- `kernel.walk(rows)`: a walk over one chunk in cache-sized blocks, that scores blocks, gathers
  statistics and returns their sum;
- `maximise(stats, previous)`: the parameters that maximise the expected log-posterior;
- `draw`, `fill`, `marginal`, `condition`, `log_prior` and more.

See `genstream.families.blocks.Family` for the exact protocol. `FAMILIES` is where a stored story
finds its family again.
"""

from __future__ import annotations

from genstream.families.blocks import Family
from genstream.families.columns import IndependentColumns
from genstream.families.factors import Factors
from genstream.families.gamma_poisson import GammaPoisson
from genstream.families.gaussian import Gaussian
from genstream.families.logistic_factors import LogisticFactors
from genstream.families.multinomial import Multinomial
from genstream.families.negative_binomial import NegativeBinomial
from genstream.families.product import Product
from genstream.families.student import Student
from genstream.families.zero_inflated import ZeroInflated

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (
        Gaussian,
        Student,
        IndependentColumns,
        NegativeBinomial,
        ZeroInflated,
        Multinomial,
        Product,
        Factors,
        LogisticFactors,
        GammaPoisson,
    )
}
