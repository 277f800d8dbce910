"""The household power benchmark: test log-likelihood within half an hour on two cores.

    python -m benchmarks.power gaussian|story|recorded [--minutes 30] [--components K] [--rows N]

Data and space are those of the published benchmark (`benchmarks.data.power`): nats a row of the
standardised columns. Published neural densities: Real NVP -0.02, MAF 0.14, MAF MoG 0.30, MADE MoG
0.40. Three models:

`gaussian`
    A mixture of Gaussians with full covariances, nothing else.
`story`
    It uses the known dequantisation: the sub-meters were recorded in whole watt-hours, to which the
    benchmark adds uniform noise, so that they are three categorical columns a component beside
    three Gaussian ones. An exact density in the same space: within a bin of width 1 it is the
    level's probability, `log p(level) - log(1 / sd)` in standardised units.
`recorded`
    It uses one more thing that is known of the recording: the active power is an even number of
    watts. The noise is 1 W wide, so that half of the line is empty; the column is cut into steps of
    2 W, each of which is one of two halves (a binary column) and a place that noise fills evenly.

The route is that of `genstream.splitting`: few components on a sample, split until there are K.
Then comes incremental EM on all rows, whose first passes gain most, and accelerated batch EM, whose
later ones do. Of Gaussians each row meets the components near it, in the last passes all. How
strong the prior is, is chosen on the validation rows (`genstream.tuning`), as is the model kept;
test rows are looked at once, at the end. The time of day is in undithered whole minutes, so that
its variance has a floor of 1/12 square minutes in every component; the share of components that sit
on it is printed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import POWER_COLUMNS, path
from benchmarks.measure import parser
from genstream.incremental import IncrementalEM
from genstream.learn import BatchEM, FitState, Outcome
from genstream.passes import Passes
from genstream.priors import Prior
from genstream.responsibility import Nearest, Responsibility, soft
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.splitting import grow
from genstream.stories import mixture
from genstream.story import Story
from genstream.tuning import best_prior, scores

Array = NDArray[np.float64]

METERS = slice(2, 5)
# Levels that a sub-meter may have beyond those of the training rows.
MARGIN = 8
# Watts: the noise of the benchmark, and the step of the recording.
NOISE, STEP = 0.001, 0.002
# Shares of the time after which rows meet all components, and after which learning ends.
ONWARD, ENOUGH = 0.75, 0.93
# Passes of incremental EM; passes between two looks at the validation rows, and looks between two
# choices of the prior.
FIRST, LOOK, CHOOSE = 12, 6, 3
TASKS, GROUP = 16, 4
# More passes than any of the learners makes.
MANY = 100_000
# Rows of a validation or test chunk.
CHUNK = 1 << 14


@dataclass(frozen=True, eq=False)
class Space:
    """How rows of the benchmark become rows of a model.

    `rows` turns standardised rows (n, 6) into rows of `schema`; `gain` nats are added to each
    row's log-density to have it in the standardised space.
    """

    schema: Schema
    rows: Callable[[Array], Array]
    gain: float


def gaussian_space(sd: Array) -> Space:
    """The standardised columns as they are."""
    columns = [Column(name) for name in POWER_COLUMNS[:-1]]
    minute = Column(POWER_COLUMNS[-1], resolution=float(1 / sd[-1]))
    return Space(Schema((*columns, minute)), lambda rows: rows, 0.0)


def levels_of(rows: Array, mean: Array, sd: Array) -> Array:
    """(n, 3) the whole watt-hours of the sub-meters, their noise in [0, 1) taken off."""
    # A hair, lest rounding in the standardisation takes a row with noise 0 to the level below.
    return np.maximum(np.floor(rows[:, METERS] * sd[METERS] + mean[METERS] + 1e-9), 0.0)


def story_space(mean: Array, sd: Array, train: Array) -> Space:
    """Sub-meters as levels: a bin is `1 / sd` wide, and filled evenly."""
    most = levels_of(train, mean, sd).max(axis=0).astype(int) + MARGIN

    def rows(values: Array) -> Array:
        out = values.copy()
        out[:, METERS] = levels_of(values, mean, sd)
        return out

    gaussian = gaussian_space(sd).schema
    meters = [
        Column(name, "categorical", tuple(str(i) for i in range(n + 1)))
        for name, n in zip(POWER_COLUMNS[METERS], most, strict=True)
    ]
    schema = Schema((*gaussian.columns[:2], *meters, gaussian.columns[-1]))
    return Space(schema, rows, float(np.log(sd[METERS]).sum()))


def recorded_space(mean: Array, sd: Array, train: Array) -> Space:
    """The same, and the active power as the half of a step and a place in it, from 0 to the step:
    a row's place moves twice as fast as its power.
    """
    inner = story_space(mean, sd, train)

    def rows(values: Array) -> Array:
        power = values[:, 0] * sd[0] + mean[0]
        step = np.floor(power / STEP + 1e-9)
        place = power - step * STEP
        half = np.clip(np.floor(place / NOISE + 1e-6), 0, 1)
        out = inner.rows(values)
        out[:, 0] = (step * STEP + 2 * (place - half * NOISE) - mean[0]) / sd[0]
        return np.column_stack([out, half])

    schema = Schema((*inner.schema.columns, Column("second_half", "binary")))
    return Space(schema, rows, inner.gain + float(np.log(STEP / NOISE)))


def loaded(model: str, n_rows: int | None) -> tuple[Space, dict[str, Array]]:
    """The space of a model, and the rows of each part in it."""
    about = json.loads(path("power/about.json").read_text(encoding="utf-8"))
    mean, sd = np.array(about["mean"]), np.array(about["sd"])
    parts = {part: np.load(path(f"power/{part}.npy")) for part in ("train", "validation", "test")}
    parts["train"] = parts["train"][:n_rows]
    if model == "gaussian":
        space = gaussian_space(sd)
    else:
        make = story_space if model == "story" else recorded_space
        space = make(mean, sd, parts["train"])
    return space, {part: space.rows(rows) for part, rows in parts.items()}


def story_of(schema: Schema, n_components: int, prior: Prior) -> Story:
    """The model, whose Gaussian columns have full covariances."""
    return mixture(schema, n_components, covariance="full", prior=prior, dtype="float32")


def candidates(now: Prior) -> list[Prior]:
    """A prior and others about it, to be told apart by validation rows."""
    about = [now]
    for name in ("independence", "strength", "frequencies"):
        value = getattr(now, name)
        if value is not None:
            about += [replace(now, **{name: value * by}) for by in (0.5, 2.0)]
    return about


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self, minutes: float) -> None:
        self.begin, self.cpu, self.seconds = time.perf_counter(), time.process_time(), 60 * minutes

    def share(self) -> float:
        """The share of the time that has passed."""
        return (time.perf_counter() - self.begin) / self.seconds

    def __str__(self) -> str:
        wall, cpu = time.perf_counter() - self.begin, time.process_time() - self.cpu
        return f"{wall:.0f} s, {cpu:.0f} processor s"


@dataclass(frozen=True, eq=False)
class Kept:
    """The model that validation rows liked best so far."""

    value: float
    story: Story
    state: FitState


def main() -> None:
    """Fit, choose on validation rows, and look at the test rows once."""
    options = parser(__doc__)
    options.add_argument("model", choices=("gaussian", "story", "recorded"))
    options.add_argument("--minutes", type=float, default=30.0)
    options.add_argument("--components", type=int)
    options.add_argument("--rows", type=int, help="training rows; all by default")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = options.parse_args()
    clock = Clock(chosen.minutes)
    space, parts = loaded(chosen.model, chosen.rows)
    gain, schema = space.gain, space.schema
    k = chosen.components or (4096 if chosen.model == "gaussian" else 3072)

    def passes_over(part: str, chunk_rows: int) -> Passes:
        source = NumpySource(parts[part].astype(np.float32), schema, chunk_rows=chunk_rows)
        return Passes(source, workers=chosen.workers)

    n_train = len(parts["train"])
    passes = passes_over("train", -(-n_train // TASKS))
    held_out = passes_over("validation", CHUNK)

    def staged(story: Story, state: FitState) -> None:
        value = state.trace[-1].mean_loglik + gain
        print(f"K={story.n_components}: sample {value:.4f} nats a row, {clock}", flush=True)

    levels = None if chosen.model == "gaussian" else 4.0
    prior = Prior(0.1, independence=32.0, frequencies=levels, weights=0.0)
    # Of levels, scoring a row under all components takes less than finding those near it.
    near: Responsibility = Nearest() if chosen.model == "gaussian" else soft
    story, state = grow(
        story_of(schema, k, prior),
        passes,
        seed=chosen.seed,
        responsibility=None if chosen.model == "gaussian" else soft,
        on_stage=staged,
    )
    best = Kept(-np.inf, story, state)
    n_passes = looks = 0
    learned = np.nan

    def look(name: str) -> None:
        """Score validation rows, choose the prior anew now and then, and keep the best model."""
        nonlocal best, looks, story, state
        looks += 1
        assert state.stats is not None
        if looks % CHOOSE == 0:
            assert isinstance(story.prior, Prior)
            story, params, tried = best_prior(
                story, state.params, state.stats, candidates(story.prior), held_out
            )
            # What acceleration and the memo remember is of another prior's objective.
            state = FitState(params, seed=state.seed, stats=state.stats, sample=state.sample)
            value = max(one.mean_loglik for one in tried)
        else:
            (value,) = scores(story, [state.params], held_out)
        if value > best.value:
            best = Kept(value, story, state)
        print(
            f"{name} {n_passes}: train {learned + gain:.4f}, validation {value + gain:.4f}, "
            f"{story.prior}, {clock}",
            flush=True,
        )

    incremental = IncrementalEM(MANY, 0.0, responsibility=near, tasks=TASKS, group=GROUP)
    while n_passes < FIRST and clock.share() < ONWARD:
        state, info = incremental.step(story, state, passes)
        learned = info.mean_loglik
        n_passes += info.n_rows == n_train or (info.step - 1) % (TASKS // GROUP) == 0
    look("incremental pass")
    batch = BatchEM(MANY, 0.0, near, accelerate=True)
    while clock.share() < ENOUGH and state.outcome is not Outcome.NONFINITE:
        if clock.share() > ONWARD and batch.responsibility is not soft:
            batch = replace(batch, responsibility=soft)
        state, info = batch.step(story, state, passes)
        learned = info.mean_loglik
        n_passes += 1
        if n_passes % LOOK == 0:
            look("batch pass")
    look("batch pass")
    story, state = best.story, best.state
    (test,) = scores(story, [state.params], passes_over("test", CHUNK))
    on_floor = len({component for component, _ in story.family.floored(state.params.family)})
    uses = {
        "gaussian": "of Gaussian components only",
        "story": "of a story that uses the known dequantisation (categorical sub-meters)",
        "recorded": "of a story that uses the known dequantisation (categorical sub-meters, and an "
        "active power in steps of 2 W)",
    }[chosen.model]
    print(
        f"test log-likelihood {test + gain:.4f} nats a row {uses}; validation "
        f"{best.value + gain:.4f}; K={k}, prior {story.prior}, {n_passes} passes over "
        f"{n_train:,} rows, {on_floor / k:.1%} of components on the floor, {clock}, load "
        f"{os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
