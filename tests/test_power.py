"""The spaces of the household power benchmark: a density stays one where columns become others.

No data are read: rows are made as the recording and the benchmark's noise would make them.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import power
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.priors import Prior
from genstream.rows import Rows
from genstream.start import seed_params

MEAN = np.array([1.1, 240.8, 1.6, 1.8, 7.0, 719.5])
SD = np.array([1.06, 3.24, 6.1, 5.8, 8.4, 415.9])


def recorded(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What was recorded, and the benchmark's rows of it."""
    rng = np.random.default_rng(seed)
    told = np.column_stack(
        [
            0.002 * rng.integers(38, 2000, n),
            np.round(rng.normal(240, 3, n), 2),
            rng.integers(0, 3, n),
            rng.integers(0, 4, n),
            rng.choice([0, 1, 17, 18], n),
            rng.integers(0, 1440, n),
        ]
    )
    rows = told.astype(float)
    rows[:, 0] += 0.001 * rng.random(n)
    rows[:, 1] += 0.01 * rng.random(n)
    rows[:, 2:5] += rng.random((n, 3))
    return told, (rows - MEAN) / SD


def fitted(space: power.Space, rows: np.ndarray):
    sample = Rows.of(space.rows(rows))
    story = power.story_of(space.schema, 4, Prior(1.0, independence=5.0)).anchored(sample)
    begun = FitState(seed_params(story, sample, np.random.default_rng(0)))
    return story, fit(story, BatchEM(10), Resident(sample), begun).params


class TestSpaces:
    def test_levels_are_what_was_recorded(self):
        told, rows = recorded(5000)
        np.testing.assert_array_equal(power.levels_of(rows, MEAN, SD), told[:, 2:5])

    @pytest.mark.parametrize("make", [power.story_space, power.recorded_space])
    def test_density_is_one_in_the_standardised_space(self, make):
        # The mean of p / q over draws from a density q of the standardised space is the mass of p
        # where q is: everywhere but far out, and at levels that nobody saw.
        _, rows = recorded(4000)
        space = make(MEAN, SD, rows)
        story, params = fitted(space, rows)
        rng = np.random.default_rng(1)
        n = 300_000
        low = np.array([-3.0, 228.0, 0.0, 0.0, 0.0, -900.0])
        width = np.array([10.0, 24.0, 3.0, 4.0, 1.0, 3300.0])
        draws = low + width * rng.random((n, 6))
        draws[:, 4] += rng.choice([0, 1, 17, 18], n)
        volume = 4 * np.prod(width / SD)
        log_p = story.log_prob(params, Rows.of(space.rows((draws - MEAN) / SD))) + space.gain
        mass = np.exp(log_p) * volume
        spread = mass.std() / np.sqrt(n)
        assert spread < 0.01
        assert mass.mean() == pytest.approx(1.0, abs=4 * spread + 0.01)

    def test_density_of_a_level_is_its_probability_over_the_width_of_its_bin(self):
        _, rows = recorded(2000)
        space = power.story_space(MEAN, SD, rows)
        story, params = fitted(space, rows)
        meters = [name for name in space.schema.names if name.startswith("sub")]
        part, theta = story.marginal(params, meters)
        levels = np.array([[1.0, 2.0, 17.0]])
        mass = np.exp(part.log_prob(theta, Rows.of(levels)))[0]
        assert np.exp(space.gain) * mass == pytest.approx(mass / np.prod(1 / SD[2:5]), rel=1e-12)

    def test_halves_of_steps_are_never_the_second(self):
        told, rows = recorded(5000)
        space = power.recorded_space(MEAN, SD, rows)
        out = space.rows(rows)
        assert not out[:, -1].any()
        place = (out[:, 0] * SD[0] + MEAN[0] - told[:, 0]) / 0.002
        assert place.min() > -1e-6
        assert place.max() < 1 + 1e-6
        # Spread evenly over the whole step.
        assert abs(np.histogram(place, 4, (0, 1))[0] / 1250 - 1).max() < 0.15
        odd = rows.copy()
        odd[:, 0] += 0.001 / SD[0]
        assert space.rows(odd)[:, -1].all()

    def test_minutes_have_a_floor(self):
        _, rows = recorded(3000)
        rows[:1500, 5] = rows[0, 5]
        space = power.gaussian_space(SD)
        sample = Rows.of(rows)
        story = power.story_of(space.schema, 2, Prior(1e-6)).anchored(sample)
        resp = np.zeros((3000, 2))
        resp[:1500, 0] = resp[1500:, 1] = 1.0
        params = story.m_step(story.e_step(story.vague(), sample, resp), story.vague())
        variance = params.family.covariance[:, 5, 5] * SD[5] ** 2
        assert variance[0] == pytest.approx(1 / 12, rel=1e-3)
        assert story.family.floored(params.family) == [(0, 5)]


class TestCandidates:
    def test_the_prior_at_hand_is_one(self):
        now = Prior(2.0, independence=8.0, frequencies=3.0, weights=0.0)
        found = power.candidates(now)
        assert now in found
        assert len(set(found)) == len(found)
