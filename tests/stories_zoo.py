"""One small story of every kind, with parameters to draw rows from: what is tried with all of them.

A kind is one line in `ZOO`: a function of a generator that gives a story of a few components over
a few columns, and parameters for it whose components are not all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import oracles
from numpy.typing import NDArray

from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import seed_params
from genstream.stories import Block, factors, mixture
from genstream.story import Params, Story

Array = NDArray[Any]
Maker = Callable[[np.random.Generator], tuple[Story, Params]]

K = 3


def of_oracles(kind: str, rng: np.random.Generator) -> tuple[Story, Params]:
    """A story of `oracles.STORIES`."""
    story = oracles.make_story(kind, K)
    return story, oracles.random_params(story, rng, apart=2.5)


def of_tails(rng: np.random.Generator) -> tuple[Story, Params]:
    """Three t distributions, from nearly Cauchy to nearly Gaussian."""
    story = mixture(Schema.real(3), K, tails="student")
    normal = oracles.random_params(oracles.make_story("full", K), rng, apart=2.5)
    family: Any = normal.family
    kind: Any = story.family.params_type
    dof = np.array([2.0, 8.0, 50.0])
    return story, Params(normal.weights, kind(family.mean, family.covariance, dof))


def of_heaps(make: Callable[[], Story], rng: np.random.Generator) -> tuple[Story, Params]:
    """A story with the parameters that a start finds in heaps of rows of the right kinds."""
    story = make()
    n = 240
    label = rng.integers(0, 3, n)[:, None]
    columns = {
        "real": lambda j: 4.0 * np.cos(2.0 * label[:, 0] + j) + rng.normal(size=n),
        "binary": lambda j: rng.random(n) < 0.2 + 0.6 * ((label[:, 0] + j) % 3 == 0),
        "count": lambda j: rng.poisson(1.0 + 5.0 * ((label[:, 0] + j) % 3)),
        "categorical": lambda j: (
            (label[:, 0] + rng.integers(0, 2, n)) % story.schema.columns[j].n_levels
        ),
    }
    values = np.column_stack([columns[c.kind](j) for j, c in enumerate(story.schema.columns)])
    rows = Rows.of(values.astype(float))
    return story, seed_params(story.anchored(rows), rows, rng)


COUNTS = Schema(tuple(Column(f"n{j}", "count") for j in range(4)))
MADE: dict[str, Callable[[], Story]] = {
    "counts": lambda: mixture(COUNTS, K, counts={"n0": "negative_binomial", "n1": "zero_inflated"}),
    "blocks": lambda: mixture(oracles.MIXED, K, blocks=[Block(("delay", "distance"), "full")]),
    "factors": lambda: factors(Schema.real(4), 1),
    "factor mixture": lambda: factors(Schema.real(4), 1, K, noise="isotropic"),
}
ZOO: dict[str, Maker] = {
    **{kind: partial(of_oracles, kind) for kind in oracles.STORIES},
    "student": of_tails,
    **{kind: partial(of_heaps, make) for kind, make in MADE.items()},
}


def drawn(
    name: str, n_rows: int, *, gaps: float = 0.0, weighted: bool = False, seed: int = 0
) -> tuple[Story, Params, Array, Array | None]:
    """A story of the zoo, its parameters, rows drawn from them (NaN a gap) and row weights."""
    rng = np.random.default_rng([seed, *name.encode()])
    story, params = ZOO[name](rng)
    values = oracles.with_gaps(story.draw(params, n_rows, rng).values, gaps, rng)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], n_rows) if weighted else None
    return story, params, values, weights


def passes_over(
    story: Story, values: Array, weights: Array | None = None, chunk: int = 50, **options: Any
) -> Passes:
    """Passes over rows in memory, in chunks."""
    return Passes(NumpySource(values, story.schema, weights, chunk), **{"workers": 1, **options})
