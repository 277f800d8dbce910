"""Passes and seconds until held-out rows are explained as well as by batch EM, less 0.01 nats.

    python -m benchmarks.passes [--components 50 200] [--rows N] [--gigabytes G] [--workers N]

Plain batch EM runs to its tolerance from a warm start; its best held-out value less 0.01 nats is
the goal. Batch EM accelerated and the default learner begin from the same start. Prints a line a
case: passes over the data and seconds of learning until the goal, and what each ends at. The
household power benchmark comes first, then rows drawn from a known mixture, kept in a folder that
is removed afterwards; `--gigabytes 0` leaves them out.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.data import path
from benchmarks.measure import parser
from flows.config import Drawn
from flows.draw import draw_rows, known_story, n_rows
from genstream.learn import BatchEM, FitState, Learner, StepInfo, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.sources import NpySource, NumpySource, Source
from genstream.start import default_learner, warm_start
from genstream.stories import mixture
from genstream.story import Story

SLACK = 0.01
MAX_STEPS = 200


@dataclass
class Course:
    """The held-out value after each pass, with the passes and seconds of learning so far."""

    story: Story
    unseen: Rows
    n_rows: int
    passes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    rows: int = 0
    spent: float = 0.0

    def __call__(self, state: FitState, info: StepInfo) -> None:
        """Note a step, and score once a pass."""
        before = self.rows // self.n_rows
        self.rows += info.n_rows
        self.spent += info.seconds
        if self.rows // self.n_rows == before:
            return
        params = state.params
        if state.stride is not None and state.stride.leapt and state.stats is not None:
            # A leap is not part of the fit until the next pass has looked at it.
            params = self.story.m_step(state.stats, params)
        self.passes.append(self.rows / self.n_rows)
        self.seconds.append(self.spent)
        self.values.append(float(self.story.log_prob(params, self.unseen).mean()))

    def until(self, goal: float) -> str:
        """Passes and seconds until the goal."""
        for number, seconds, value in zip(self.passes, self.seconds, self.values, strict=True):
            if value >= goal:
                return f"{number:.0f} | {seconds:.1f}"
        return "not | reached"


def run(learner: Learner, story: Story, state: FitState, passes: Passes, unseen: Rows) -> Course:
    """One fit from a start, scored as it goes."""
    course = Course(story, unseen, passes.n_rows)
    fit(story, learner, passes, state, [course])
    return course


def compare(name: str, source: Source, unseen: Rows, k: int, workers: int, dtype: str) -> None:
    """Print what plain, accelerated and default learning take to the same goal."""
    passes = Passes(source, workers=workers)
    begin = time.perf_counter()
    story, state = warm_start(mixture(source.schema, k, dtype=dtype), passes)
    started = time.perf_counter() - begin
    first = float(story.log_prob(state.params, unseen).mean())
    learners: dict[str, Learner] = {
        "plain batch": BatchEM(MAX_STEPS),
        "accelerated batch": BatchEM(MAX_STEPS, accelerate=True),
        "default": default_learner(passes.n_rows, max_steps=MAX_STEPS),
    }
    goal = np.inf
    for label, learner in learners.items():
        course = run(learner, story, state, passes, unseen)
        if not np.isfinite(goal):
            goal = max(course.values) - SLACK
        print(
            f"| {name} | {k} | {started:.1f} s, {first:.4f} | {label} | {goal:.4f} "
            f"| {course.until(goal)} | {course.passes[-1]:.0f} | {course.seconds[-1]:.1f} "
            f"| {course.values[-1]:.4f} |",
            flush=True,
        )


def drawn_rows(drawn: Drawn, place: Path, workers: int) -> Source:
    """Rows drawn into a file, float32, mapped rather than read."""
    shape = (n_rows(drawn, "float32"), drawn.n_features)
    out = np.lib.format.open_memmap(place, mode="w+", dtype=np.float32, shape=shape)
    at = 0
    for rows in draw_rows(drawn, "float32", workers=workers):
        out[at : at + rows.n_rows] = rows.values
        at += rows.n_rows
    out.flush()
    return NpySource(place)


def main() -> None:
    """Run all cases."""
    options = parser(__doc__)
    options.add_argument("--components", type=int, nargs="*", default=[50, 200])
    options.add_argument("--rows", type=int, default=None, help="of power, all by default")
    options.add_argument("--gigabytes", type=float, default=3.0, help="of drawn rows")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--dtype", default="float32")
    chosen = options.parse_args()
    print(
        "| data | K | start | learner | goal | passes | s to goal | passes in all | s in all "
        "| held out at the end |"
    )
    print("|" + "---|" * 10)
    for k in chosen.components:
        train = np.load(path("power/train.npy"))[: chosen.rows]
        unseen = Rows.of(np.load(path("power/test.npy")))
        compare("power", NumpySource(train), unseen, k, chosen.workers, chosen.dtype)
    if chosen.gigabytes > 0:
        drawn = Drawn(gigabytes=chosen.gigabytes, n_components=12, n_features=8, separation=1.5)
        story, truth = known_story(drawn)
        unseen = Rows(story.draw(truth, 100_000, np.random.default_rng([drawn.seed, 2])).values)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            source = drawn_rows(drawn, Path(folder) / "rows.npy", chosen.workers)
            name = f"{sum(source.chunk_rows):,} drawn rows"
            compare(name, source, unseen, 12, chosen.workers, chosen.dtype)


if __name__ == "__main__":
    main()
