"""What a sweep does, stage by stage: ingest, fit, evaluate, publish the best, report.

Its candidates are runs of their own in the folder of the sweep's run, each with its configuration,
checkpoints, metrics and scores, so that whatever takes a run takes a candidate. They are fitted and
scored in shared passes; one that fails says why and stops no other.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from flows import stages
from flows.config import Config, load
from flows.data import Data, open_data
from flows.plan import make_plan, n_workers, planned_candidates
from flows.run import Run
from flows.showing import candidate_rows, run_row
from flows.terminal import SweepProgress, bars
from genstream.errors import ComputeError, ConfigError, GenstreamError, RefusedError

if TYPE_CHECKING:
    from genstream.evaluate import HeldOut
    from genstream.learn import FitState, StepInfo
    from genstream.passes import Passes
    from genstream.report import SweepInput
    from genstream.rows import Rows
    from genstream.story import Story

OnStep = Callable[["Run", "FitState", "StepInfo"], None]

log = logging.getLogger("genstream")


def begin(config_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """A new run of a sweep that there is memory, disk and data for.

    Raises ConfigError or DataError, and makes no run, where there is not.
    """
    config = load(config_path, overrides)
    if config.sweep is not None:
        make_plan(config).refuse_if_too_small()
    return Run.create(config_path, overrides, kind="sweep")


def carry_out(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """All stages of a sweep that are not done yet, in this process; returns what it found."""
    work: dict[str, Callable[[Run], object]] = {
        "ingest": functools.partial(stages.ingest, quiet=quiet),
        "fit": functools.partial(fit, quiet=quiet),
        "evaluate": functools.partial(evaluate, quiet=quiet),
        "publish": publish,
        "report": report,
    }
    stages.walk(run, work)
    return run.stage("evaluate")


def refuse(run: Run) -> None:
    """Raise RefusedError where candidates of a sweep failed."""
    failed = [row for row in candidate_rows(run) if row["status"] == "failed"]
    if failed:
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RefusedError(
            f"the candidate {failed[0]['candidate']} failed{others}: {failed[0]['reason']}"
        )


# --- fit -----------------------------------------------------------------------------------------


def fit(run: Run, *, quiet: bool = False, on_step: Sequence[OnStep] = ()) -> dict[str, Any]:
    """Fit the candidates of a sweep in shared passes, each from its newest checkpoint or anew.

    As many share their passes as the memory limit allows. Candidates that fail are marked so, and
    stay failed when the run is resumed. Whatever is raised, and whenever, the last finished step of
    each is saved first. Raises ConfigError where one of them has more components than rows.
    """
    config = run.config
    data, record = stages.open_to_fit(run)
    planned_candidates(config, data.train.schema, sum(data.train.chunk_rows))
    candidates = []
    for number, (label, each) in enumerate(config.candidates().items()):
        candidate = run.candidate(number, label, each)
        candidate.write_json("repro.json", record)
        if run.stage("ingest"):
            candidate.record("ingest", run.stage("ingest"))
        candidates.append(candidate)
    sizes = make_plan(config).groups
    log.info("%d candidates, %s in shared passes", len(candidates), " + ".join(map(str, sizes)))
    started = time.monotonic()
    together = alone = 0
    spent = stages.profiled(run)
    with stages.cluster(config.compute), bars(quiet) as progress, spent as profile:
        shown = SweepProgress(progress)
        passes = stages.passes_over(data.train, config.compute, shown.on_rows)
        samples = Samples(passes, config.fit.seed)
        for size, end in zip(sizes, accumulate(sizes), strict=True):
            group = Group(candidates[end - size : end], data, passes, n_workers(config))
            group.fit(samples, shown, on_step)
            together += group.rows_together
            alone += group.rows_alone
    rows = passes.n_rows
    nbytes = stages.row_nbytes(config, data)
    return run.record(
        "fit",
        {
            "candidates": len(candidates),
            "groups": list(sizes),
            "rows": rows,
            "passes": round(together / max(rows, 1) + samples.drawn, 2),
            "passes_alone": round(alone / max(rows, 1) + len(candidates), 2),
            "bytes_read": (together + samples.drawn * rows) * nbytes,
            "bytes_alone": (alone + len(candidates) * rows) * nbytes,
            "seconds": time.monotonic() - started,
            "peak_rss": stages.peak_memory(),
            **profile,
        },
    )


class Samples:
    """The row samples that candidates start from: of each size one, drawn in one pass."""

    def __init__(self, passes: Passes, seed: int) -> None:
        self._passes, self._seed = passes, seed
        self._known: dict[int, Rows] = {}

    @property
    def drawn(self) -> int:
        """How many were drawn, each in a pass."""
        return len(self._known)

    def of(self, n_rows: int) -> Rows:
        """The sample of so many rows."""
        from genstream.start import draw_sample

        if n_rows not in self._known:
            self._known[n_rows] = draw_sample(self._passes, n_rows, self._seed)
        return self._known[n_rows]


class Group:
    """Candidates of a sweep that share their passes."""

    def __init__(self, candidates: Sequence[Run], data: Data, passes: Passes, workers: int) -> None:
        self._all = list(candidates)
        self._data, self._passes, self._workers = data, passes, workers
        self._rows: dict[Run, int] = {}

    @property
    def rows_alone(self) -> int:
        """Rows that the candidates learned from, each for itself."""
        return sum(self._rows.values())

    @property
    def rows_together(self) -> int:
        """Rows that were read for them: once for all, but for those that read for themselves."""
        own = [run for run in self._rows if run.config.fit.method == "incremental"]
        shared = [rows for run, rows in self._rows.items() if run not in own]
        return max(shared, default=0) + sum(self._rows[run] for run in own)

    def fit(self, samples: Samples, shown: SweepProgress, on_step: Sequence[OnStep]) -> None:
        """Fit those that neither are fitted nor have failed."""
        left = [run for run in self._all if not run.stage("fit") and run.status != "failed"]
        try:
            for run in left:
                run.begun()
            self._fit(left, samples, shown, on_step)
        except BaseException as error:
            for run in left:
                if not run.stage("fit") and run.status == "running":
                    run.update(status="interrupted", reason=str(error))
            raise
        for run in self._all:
            # Those that were fitted before an interruption count as well.
            if run not in self._rows:
                self._rows[run] = round(run.stage("fit").get("passes", 0) * self._passes.n_rows)

    def _fit(
        self, left: list[Run], samples: Samples, shown: SweepProgress, on_step: Sequence[OnStep]
    ) -> None:
        from genstream.learn import Outcome
        from genstream.sweeps import Candidate, fit_many

        begun = self._begin(left, samples, shown)
        pass_rows = self._passes.n_rows
        checkpoints: list[stages.Checkpoints] = []
        candidates: list[Candidate] = []
        for run, (story, first) in begun.items():
            config = run.config
            learner = stages.learner_of(config, story, pass_rows)
            candidates.append(Candidate(story, learner, first))
            checkpoints.append(stages.Checkpoints(run, config, story, pass_rows))
            self._rows[run] = sum(info.n_rows for info in first.trace)
        runs = list(begun)
        labels = [run.info()["label"] for run in runs]

        def note(i: int, state: FitState, info: StepInfo) -> None:
            self._rows[runs[i]] += info.n_rows
            checkpoints[i](state, info)
            stages.note_step(runs[i], info, labels[i])
            shown.on_step(i, state, info)
            for call in on_step:
                call(runs[i], state, info)

        shown.begin(len(candidates))
        try:
            ended = fit_many(candidates, self._passes, [note], workers=self._workers)
        finally:
            for each in checkpoints:
                each.close()
        for run, state in zip(runs, ended, strict=True):
            if isinstance(state, Exception):
                fail(run, state)
                continue
            if state.outcome is Outcome.NONFINITE:
                message = f"the fit ended at step {state.step}: {state.outcome.advice}"
                fail(run, ComputeError(message))
                continue
            seconds = sum(info.seconds for info in state.trace)
            rate = self._rows[run] / max(seconds, 1e-9)
            facts = stages.fit_facts(state, pass_rows, seconds, rate)
            read = (self._rows[run] + pass_rows) * stages.row_nbytes(run.config, self._data)
            run.record("fit", {**facts, "bytes_read": read})

    def _begin(
        self, left: list[Run], samples: Samples, shown: SweepProgress
    ) -> dict[Run, tuple[Story, FitState]]:
        """Where each candidate goes on from; one that cannot start has failed."""
        from genstream.store import load_checkpoint
        from genstream.threads import beside

        found = {run: load_checkpoint(run.checkpoint) for run in left}
        new = [run for run in left if found[run] is None]
        # Drawn here, one after another, before threads want them.
        drawn = {run: samples.of(run.config.fit.sample_rows) for run in new}
        stop = threading.Event()
        # No more threads work than there are workers, whoever started them.
        passes = self._passes.among(max(1, min(self._workers, len(new))))

        def start(run: Run) -> tuple[Story, FitState] | Exception:
            try:
                return self._start(run, passes, drawn[run], shown, stop)
            except Exception as error:  # noqa: BLE001 - the other candidates go on
                return error

        with ThreadPoolExecutor(self._workers) as pool:
            try:
                starts = [functools.partial(start, run) for run in new]
                for run, begun in zip(new, beside(pool, self._workers, starts), strict=True):
                    if isinstance(begun, Exception):
                        fail(run, begun)
                        del found[run]
                    else:
                        found[run] = begun
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return {run: begun for run, begun in found.items() if begun is not None}

    def _start(
        self,
        run: Run,
        passes: Passes,
        sample: Rows,
        shown: SweepProgress,
        stop: threading.Event,
    ) -> tuple[Story, FitState]:
        from genstream.store import save_checkpoint

        def on_start(number: int, mean_objective: float) -> None:
            if stop.is_set():
                raise ComputeError("the sweep was interrupted")
            shown.on_start(number, mean_objective)

        config = run.config
        story, state = stages.begin_fit(
            config, self._data.train.schema, passes, sample=sample, on_start=on_start
        )
        save_checkpoint(run.checkpoint, story, state, keep=config.checkpoint.keep)
        return story, state


def fail(run: Run, error: Exception) -> None:
    """Mark a candidate as failed, with the reason; a bug is told in the log with its traceback."""
    reason = str(error) or type(error).__name__
    if not isinstance(error, GenstreamError):
        reason = f"{type(error).__name__}: {reason}"
        log.error("%s: unexpected error", run.info()["label"], exc_info=error)
    log.warning("the candidate %s failed: %s", run.info()["label"], reason)
    run.ended(reason)


# --- evaluate, publish, report -------------------------------------------------------------------


def evaluate(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Score all candidates in one pass over the rows fitted and one over those held out.

    Records which is best by the criterion of the configuration, None where none could be fitted.
    """
    import numpy as np

    from genstream.evaluate import check_rows, held_out_many, rows_to_check

    config = run.config
    data = open_data(config, stages.pinned(run))
    fitted = [each for each in run.candidates if each.stage("fit")]
    if fitted:
        models = [stages.fitted_model(each) for each in fitted]
        asked = [(story, state.params) for story, state in models]
        train, test, unseen = stages.scored(
            config, data, lambda passes: held_out_many(asked, passes), quiet=quiet
        )
        tests: Sequence[HeldOut | Exception | None] = test or [None] * len(fitted)
        rng = np.random.default_rng([config.fit.seed, 3])
        rows = rows_to_check(unseen, rng)
        for each, (story, params), on_train, on_test in zip(
            fitted, asked, train, tests, strict=True
        ):
            for score in (on_train, on_test):
                if isinstance(score, Exception):
                    fail(each, score)
                    break
            else:
                assert not isinstance(on_train, Exception)
                assert not isinstance(on_test, Exception)
                # Each is checked as if it were alone: with the same draws after the same rows.
                check = check_rows(story, params, rows, copy.deepcopy(rng))
                stages.record_scores(each, story, params, on_train, on_test, check)
                each.ended()
    best = best_of(run)
    found = {
        "best": None if best is None else best.id,
        "by": _by(config),
        "held_out": None if best is None else best.stage("evaluate")["held_out"],
    }
    return run.record("evaluate", found)


def _by(config: Config) -> str:
    assert config.sweep is not None
    return config.sweep.by


def best_of(run: Run) -> Run | None:
    """The best candidate of those that were scored; of equals the first."""
    by = _by(run.config)
    sign = 1.0 if by == "held_out" else -1.0
    best, most = None, -math.inf
    for each in run.candidates:
        value = run_row(each)[by]
        if value is not None and sign * value > most:
            best, most = each, sign * value
    return best


def publish(run: Run) -> dict[str, Any]:
    """Make the best candidate the champion of the configured folder."""
    best, target = best_of(run), run.config.publish
    if best is None or target is None:
        return run.record("publish", {"model": None, "version": None})
    return run.record("publish", stages.publish(best, target))


def report(run: Run) -> dict[str, Any]:
    """Write the report of a sweep, and that of its best candidate; returns their paths."""
    from genstream.report import write_sweep_report

    best = best_of(run)
    found = {"path": str(write_sweep_report(run.report, _report_input(run)))}
    if best is not None:
        found["best"] = stages.report(best)["path"]
    return run.record("report", found)


def picture(run: Run) -> bytes | None:
    """The criterion of a sweep along what it is over, as a PNG; None of fewer than two values."""
    from genstream.report import sweep_png

    return sweep_png(_report_input(run))


def _report_input(run: Run) -> SweepInput:
    from genstream.report import SweepInput

    if not run.stage("evaluate"):
        raise ConfigError(f"run {run.id} was not evaluated yet: `genstream resume {run.id}`")
    config, info, best = run.config, run.info(), best_of(run)
    assert config.sweep is not None
    data = open_data(config, stages.pinned(run))
    return SweepInput(
        title=config.name,
        keys=[key.partition(".")[2] for key in config.sweep.over],
        cells=[list(each.values()) for each in config.sweep.cells()],
        rows=candidate_rows(run),
        by=config.sweep.by,
        best=None if best is None else best.info()["label"],
        data=stages.data_facts(config, data),
        cost=run.stage("fit"),
        reproducibility={
            "run": run.id,
            **stages.time_facts(run.stage("fit")),
            **run.read_json("repro.json"),
        },
        created=datetime.fromisoformat(info.get("finished") or info["created"]),
    )
