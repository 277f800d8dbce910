"""How strong a prior should be, as rows that were held out from learning say.

The M-step sees statistics only, so that those of one pass serve for any number of priors: each
makes parameters of its own, and only the held-out rows, of which there are few, are walked once for
each of them. A pass under the best of them, and the choice again, costs no more than EM itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from genstream.errors import ConfigError, DataError
from genstream.passes import Passes
from genstream.priors import Prior
from genstream.rows import Rows
from genstream.stats import Monoid
from genstream.story import Params, Story, StoryStats

# M-steps from the same statistics: under a prior of correlations one does not reach the maximum.
M_STEPS = 2


@dataclass(frozen=True)
class Tried:
    """A prior, and the mean `log p(x)` of the held-out rows under it, in nats."""

    prior: Prior
    mean_loglik: float


@dataclass(frozen=True, eq=False)
class Scored(Monoid):
    """Weight of some rows, and the sum of weight times `log p(x)` under each of some parameters."""

    weight: float
    logliks: tuple[float, ...]

    def merge(self, other: Scored) -> Scored:
        sums = tuple(a + b for a, b in zip(self.logliks, other.logliks, strict=True))
        return Scored(self.weight + other.weight, sums)


@dataclass(frozen=True, eq=False)
class ScoreEach:
    """Work for a pass: the log-likelihood of a chunk under several parameters of one story."""

    story: Story
    params: tuple[Params, ...]

    def __call__(self, _chunk: int, rows: Rows) -> Scored:
        heavy = rows.is_observed.any(axis=1) & (rows.row_weights > 0)
        rows = rows if heavy.all() else rows[heavy]
        weight = rows.row_weights
        sums = tuple(float(weight @ self.story.log_prob(each, rows)) for each in self.params)
        return Scored(float(weight.sum()), sums)


def scores(story: Story, params: Sequence[Params], held_out: Passes) -> list[float]:
    """Mean `log p(x)` of held-out rows, in nats, under each of some parameters, in one pass.

    Raises DataError where no row with a positive weight has anything observed.
    """
    found: Scored = held_out.fold(ScoreEach(story, tuple(params)))
    if not found.weight > 0:
        raise DataError("no held-out row has an observed entry and a positive weight")
    return [value / found.weight for value in found.logliks]


def best_prior(
    story: Story,
    params: Params,
    stats: StoryStats,
    priors: Iterable[Prior],
    held_out: Passes,
) -> tuple[Story, Params, list[Tried]]:
    """The story under the prior that suits the held-out rows best, its parameters, and all tried.

    Parameters
    ----------
    story, params
        Anchored under a prior, and the parameters that the statistics come from.
    stats
        Of the rows learned from.
    priors
        Those to try, at least one; the story's own is one of them only where it is named.
    held_out
        Rows that are in neither `stats` nor the final judgement of the model.

    Raises
    ------
    ConfigError
        Where there is no prior to try, or the story was anchored without one.
    """
    tried = list(priors)
    if not tried:
        raise ConfigError("there is no prior to try")
    stories = [story.with_prior(prior) for prior in tried]
    made = []
    for one in stories:
        theta = params
        for _ in range(M_STEPS):
            theta = one.m_step(stats, theta)
        made.append(theta)
    values = scores(story, made, held_out)
    best = max(range(len(tried)), key=values.__getitem__)
    table = [Tried(prior, value) for prior, value in zip(tried, values, strict=True)]
    return stories[best], made[best], table
