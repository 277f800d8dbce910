"""What a run does, stage by stage: ingest, fit, evaluate, publish, report.

Each stage takes a run, does its work with one or two calls of the library, and records in the run
folder what it found. A stage that is recorded is not done again, and a fit goes on from its newest
checkpoint: to resume a run is to walk its stages once more.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flows.config import Compute, Config, Drawn, Publish, load
from flows.data import Data, files_of, ingest_data, open_data
from flows.model import check_components, given_start, make_story, online_of, responsibility_of
from flows.plan import memo_nbytes
from flows.run import Run
from flows.terminal import FitProgress, RowProgress, bars, bytes_text
from genstream import compiled
from genstream.errors import ComputeError, ConfigError, DataError

if TYPE_CHECKING:
    from genstream.evaluate import HeldOut, PredictiveCheck
    from genstream.learn import FitState, Learner, StepInfo
    from genstream.passes import Passes
    from genstream.rows import Rows
    from genstream.schema import Schema
    from genstream.sources import Source
    from genstream.story import Params, Story

T = TypeVar("T")
OnStep = Callable[["FitState", "StepInfo"], None]

CONNECT_SECONDS = 10

log = logging.getLogger("genstream")


def pinned(run: Run) -> dict[str, Any]:
    """The data that a run means, whatever lands while it is at work; see `open_data`."""
    found = dict(run.stage("ingest"))
    identity = run.read_json("repro.json").get("data")
    if run.config.dataset is None and identity:
        found["files"] = files_of(identity)
        found["n_rows"] = identity.get("source", identity)["n_rows"]
    return found


# --- fit -----------------------------------------------------------------------------------------


# How workers of a cluster on this machine are started. By default their allocator gives every chunk
# back to the system, which hands the same memory out again page by page (a tenth of a pass), and
# their processes look after themselves so often that an idle one takes a twentieth of a core.
_WORKERS = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.admin.system-monitor.gil.enabled": False,
}


@contextlib.contextmanager
def cluster(compute: Compute) -> Iterator[None]:
    """Within it the Dask cluster that `compute` means is connected.

    `distributed` starts one of processes on this machine, bound to loopback. Raises ComputeError
    where a cluster does not start or answer.
    """
    if compute.scheduler in ("threads", "synchronous"):
        yield
        return
    import dask
    import distributed

    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(_WORKERS))
        try:
            address: Any = compute.scheduler
            if address == "distributed":
                address = stack.enter_context(
                    distributed.LocalCluster(
                        n_workers=compute.workers or os.cpu_count() or 1,
                        threads_per_worker=1,
                        host="127.0.0.1",
                        dashboard_address="127.0.0.1:0",
                        memory_limit=compute.memory_limit or "auto",
                        silence_logs=logging.CRITICAL,
                    )
                )
            stack.enter_context(distributed.Client(address, timeout=CONNECT_SECONDS))
        except (OSError, TimeoutError, RuntimeError) as error:
            raise ComputeError(
                f"compute.scheduler: no Dask cluster at {compute.scheduler}: {error}"
            ) from error
        yield


def passes_over(
    source: Source, compute: Compute, on_progress: Callable[[int, int], None] | None = None
) -> Passes:
    """Passes over a source, computed where the configuration says."""
    from genstream.passes import Passes

    return Passes(
        source, scheduler=compute.scheduler, workers=compute.workers, on_progress=on_progress
    )


class Checkpoints:
    """Saves the states of a fit, as often as the configuration says; `close` saves the last."""

    def __init__(self, run: Run, config: Config, story: Story, pass_rows: int) -> None:
        self._run, self._story = run, story
        # A step of online or incremental EM is only part of a pass.
        self._rows, self._pass_rows = 0, pass_rows
        self._every, self._keep = config.checkpoint.every, config.checkpoint.keep
        self._time = time.monotonic()
        self._saved: FitState | None = None
        self._state: FitState | None = None

    def __call__(self, state: FitState, info: StepInfo) -> None:
        """Note a state, and save it if it is time to."""
        self._state = state
        every = self._every
        self._rows += info.n_rows
        due = (
            self._rows >= every.passes * self._pass_rows
            if every.passes is not None
            else time.monotonic() - self._time >= (every.seconds or 0.0)
        )
        if due:
            self.close()

    def close(self) -> None:
        """Save the newest state, unless it is saved already."""
        from genstream.store import save_checkpoint

        if self._state is None or self._state is self._saved:
            return
        save_checkpoint(self._run.checkpoint, self._story, self._state, keep=self._keep)
        self._saved, self._time, self._rows = self._state, time.monotonic(), 0


def learner_of(config: Config, story: Story, rows: int) -> Learner:
    """The learner that a configuration means for a story and so many rows."""
    from genstream.incremental import IncrementalEM
    from genstream.learn import BatchEM
    from genstream.responsibility import climbs
    from genstream.start import default_learner

    options = config.fit
    rule, online = responsibility_of(config), online_of(config)
    match options.method:
        case "online":
            return online
        case "incremental":
            return IncrementalEM(
                options.max_steps,
                options.tolerance,
                memo_nbytes=memo_nbytes(config),
                responsibility=rule,
            )
        # What is told by one pass needs no other one before.
        case "auto" if climbs(rule) and not story.single_pass:
            return default_learner(
                rows,
                max_steps=options.max_steps,
                tolerance=options.tolerance,
                online=online,
                n_components=story.n_components,
            )
    return BatchEM(options.max_steps, options.tolerance, rule, accelerate=climbs(rule))


def note_step(run: Run, info: StepInfo, label: str = "") -> None:
    """Keep a line of a fit's trace among the metrics of its run, and in the log."""
    run.append_metrics(
        {
            "step": info.step,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "mean_loglik": info.mean_loglik,
            "mean_objective": info.mean_objective,
            "seconds": info.seconds,
            "rows_per_s": info.n_rows / max(info.seconds, 1e-9),
            "peak_rss": peak_memory(),
            "events": list(info.events),
        }
    )
    of = f"{label}: " if label else ""
    log.info("%sstep %d: mean log-likelihood %.6f", of, info.step, info.mean_loglik)
    for event in info.events:
        log.warning("%sstep %d: %s", of, info.step, event)


def begin_fit(
    config: Config,
    schema: Schema,
    passes: Passes,
    *,
    sample: Rows | None = None,
    on_start: Callable[[int, float], None] | None = None,
) -> tuple[Story, FitState]:
    """The story of a configuration and the state from which its full passes begin.

    Raises ConfigError where there are fewer rows than components.
    """
    from genstream import splitting, start
    from genstream.responsibility import soft

    check_components(config, passes.n_rows)
    story = make_story(config, schema)
    if config.fit.grow is not None:
        rule, stages = responsibility_of(config), itertools.count()

        def on_stage(_: Story, state: FitState) -> None:
            if on_start is not None:
                on_start(next(stages), state.trace[-1].mean_objective)

        return splitting.grow(
            story,
            passes,
            first=config.fit.grow,
            seed=config.fit.seed,
            responsibility=None if rule is soft else rule,
            on_stage=on_stage,
        )
    return start.warm_start(
        story,
        passes,
        given=given_start(config, story),
        responsibility=responsibility_of(config),
        n_init=config.fit.n_init,
        seed=config.fit.seed,
        sample_rows=config.fit.sample_rows,
        sample=sample,
        on_start=on_start,
    )


def fit(run: Run, *, quiet: bool = False, on_step: Sequence[OnStep] = ()) -> dict[str, Any]:
    """Fit the model of a run, from its newest checkpoint or from a warm start.

    Raises ComputeError where the log-likelihood ceased to be finite. Whatever else is raised, and
    whenever, the last finished step is saved first.
    """
    from genstream import learn, store
    from genstream.sources import n_rows

    config = run.config
    data, _ = open_to_fit(run)
    options = config.fit
    begin = time.monotonic()
    with cluster(config.compute), bars(quiet) as progress, profiled(run) as profile:
        shown = FitProgress(progress, options.max_steps, options.tolerance)
        passes = passes_over(data.train, config.compute, shown.on_rows)
        found = store.load_checkpoint(run.checkpoint)
        if found is None:
            log.info("start from a sample of at most %d rows", options.sample_rows)
            story, state = begin_fit(config, data.train.schema, passes, on_start=shown.on_start)
            store.save_checkpoint(run.checkpoint, story, state, keep=config.checkpoint.keep)
        else:
            story, state = found
            log.info("resume after step %d", state.step)
        pass_rows = n_rows(data.train)
        checkpoints = Checkpoints(run, config, story, pass_rows)
        rows_done, pass_seconds = 0, 0.0

        def keep_metrics(_: FitState, info: StepInfo) -> None:
            nonlocal rows_done, pass_seconds
            rows_done += info.n_rows
            pass_seconds += info.seconds
            note_step(run, info)

        try:
            state = learn.fit(
                story,
                learner_of(config, story, pass_rows),
                passes,
                state,
                on_step=(checkpoints, keep_metrics, shown.on_step, *on_step),
            )
        finally:
            checkpoints.close()
    if state.outcome is learn.Outcome.NONFINITE:
        raise ComputeError(f"the fit ended at step {state.step}: {state.outcome.advice}")
    seconds = time.monotonic() - begin
    facts = fit_facts(state, pass_rows, seconds, rows_done / max(pass_seconds, 1e-9))
    read = (rows_done + pass_rows) * row_nbytes(config, data)
    return run.record("fit", {**facts, "bytes_read": read, **profile})


@contextlib.contextmanager
def profiled(run: Run) -> Iterator[dict[str, Any]]:
    """Where `run.json` says `profile`: what is given has it of the time within, once that is over.

    With `Run.record` it says in what was found where the time went.
    """
    from genstream.profile import Profile

    found: dict[str, Any] = {}
    if not run.info().get("profile"):
        yield found
        return
    with Profile() as profile:
        yield found
    found["profile"] = profile.to_json()


def row_nbytes(config: Config, data: Data) -> int:
    """Bytes of a row as a pass reads it."""
    itemsize = 4 if config.data.dtype == "float32" and config.dataset else 8
    return data.train.schema.n_features * itemsize


def fit_facts(state: FitState, pass_rows: int, seconds: float, rows_per_s: float) -> dict[str, Any]:
    """What is recorded of a fit that ended."""
    return {
        "outcome": state.outcome.value,
        "advice": state.outcome.advice,
        "steps": state.step,
        # Online and incremental EM take steps that are parts of a pass.
        "passes": round(sum(info.n_rows for info in state.trace) / max(pass_rows, 1), 2),
        "rows": pass_rows,
        "mean_loglik": state.trace[-1].mean_loglik,
        "n_unobserved": state.trace[-1].n_unobserved,
        "seconds": seconds,
        "rows_per_s": rows_per_s,
        "peak_rss": peak_memory(),
        "digest": state.params.digest(),
    }


def peak_memory() -> int:
    """Most resident memory this process ever had, in bytes.

    Linux hands `ru_maxrss` of whoever started a process down to it, so there the process's own
    high-water mark is read instead.
    """
    try:
        status = Path("/proc/self/status").read_text()
        found = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def open_to_fit(run: Run) -> tuple[Data, dict[str, Any]]:
    """The data of a run that is to be fitted, and the record of it that is kept.

    Raises DataError where the run began with other data.
    """
    data = open_data(run.config, pinned(run))
    record = _reproducibility(run.config, data)
    _check_unchanged(run, record)
    run.write_json("repro.json", record)
    return data, record


def _reproducibility(config: Config, data: Data) -> dict[str, Any]:
    """What decides every bit of a fit."""
    import threadpoolctl

    chunks = data.train.chunk_rows
    names = ("genstream", "numpy", "scipy", "zarr", "dask", "pyarrow")
    return {
        "seed": config.fit.seed,
        "data": data.train.identity(),
        "held_out": None if data.held_out is None else data.held_out.identity(),
        "chunking": {
            "chunks": len(chunks),
            "rows": sum(chunks),
            "sha256": hashlib.sha256(json.dumps(chunks).encode()).hexdigest(),
        },
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in names}
        | {"numba": compiled.version()},
        "blas": [
            f"{pool['internal_api']} {pool['version']} ({pool.get('architecture', 'unknown')})"
            for pool in threadpoolctl.threadpool_info()
            if pool["user_api"] == "blas"
        ],
        "machine": platform.machine(),
        "scheduler": config.compute.scheduler,
    }


def _check_unchanged(run: Run, record: dict[str, Any]) -> None:
    """Raise DataError where a run began with other data than `record` names."""
    before = run.read_json("repro.json")
    for key in ("data", "held_out", "chunking"):
        if before and json.loads(json.dumps(record[key])) != before[key]:
            raise DataError(
                f"run {run.id}: the data are no longer those the run began with ({key} in "
                "repro.json differs): start a new run"
            )
    for name, version in record["versions"].items():
        known = before.get("versions", {}).get(name, version)
        if known != version:
            log.warning("%s is %s now and was %s: bits may differ", name, version, known)


# --- evaluate, publish, report -------------------------------------------------------------------


def fitted_model(run: Run) -> tuple[Story, FitState]:
    """The model of a run, as its newest checkpoint has it. Raises ConfigError where none is."""
    from genstream.store import load_checkpoint

    found = load_checkpoint(run.checkpoint)
    if found is None:
        raise ConfigError(f"run {run.id} has no fitted model yet: `genstream resume {run.id}`")
    return found


def evaluate(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Score the rows fitted and the rows held out, and compare drawn rows with real ones."""
    import numpy as np

    from genstream.evaluate import held_out, predictive_check

    config = run.config
    data = open_data(config, pinned(run))
    story, state = fitted_model(run)
    params = state.params
    train, test, unseen = scored(
        config, data, lambda passes: held_out(story, params, passes), quiet=quiet
    )
    rng = np.random.default_rng([config.fit.seed, 3])
    check = predictive_check(story, params, unseen, rng)
    return record_scores(run, story, params, train, test, check)


def scored(
    config: Config, data: Data, score: Callable[[Passes], T], *, quiet: bool
) -> tuple[T, T | None, Source]:
    """What `score` makes of the rows fitted, and of those held out where there are any.

    Last come the rows that a check should look at: those held out, or else those fitted.
    """
    with cluster(config.compute), bars(quiet) as progress:
        on_rows = RowProgress(progress, "score")
        train = score(passes_over(data.train, config.compute, on_rows))
        if data.held_out is None or not any(data.held_out.chunk_rows):
            return train, None, data.train
        on_rows = RowProgress(progress, "score held-out rows")
        return train, score(passes_over(data.held_out, config.compute, on_rows)), data.held_out


def record_scores(
    run: Run,
    story: Story,
    params: Params,
    train: HeldOut,
    test: HeldOut | None,
    check: PredictiveCheck,
) -> dict[str, Any]:
    """Record how well a fitted model explains the rows fitted and held out."""
    from genstream.evaluate import criteria

    scores = {
        "bound": story.bound,
        "train": train.to_json(),
        "held_out": None if test is None else test.to_json(),
        "criteria": criteria(story, train).to_json(),
    }
    source = run.config.data.source
    if isinstance(source, Drawn):
        from flows.draw import recovery

        scores["recovery"] = recovery(source, params).to_json()
    run.write_json("evaluation.json", {**scores, "check": check.to_json()})
    return run.record("evaluate", {**scores, "peak_rss": peak_memory()})


def publish(run: Run, target: Publish | None = None) -> dict[str, Any]:
    """Make the fitted model the champion of its folder, once however often it is called.

    `target` is where to, if not where the run's own configuration says.
    """
    target = target or run.config.publish
    if target is None:
        return {}
    import numpy as np

    from flows.updating import fitted_batches
    from genstream.evaluate import sample_rows
    from genstream.models import ModelStore
    from genstream.updates import most_held

    config = run.config
    story, state = fitted_model(run)
    data = open_data(config, pinned(run))
    batches, columns = fitted_batches(config, pinned(run))
    held = None
    if data.held_out is not None and config.data.test is None and any(data.held_out.chunk_rows):
        rng = np.random.default_rng([config.fit.seed, 5])
        held = sample_rows(data.held_out, most_held(data.train.schema.n_features), rng)
    scores = run.stage("evaluate")
    record = {
        "run": run.id,
        "rows": run.stage("fit").get("rows"),
        "data": run.read_json("repro.json").get("data"),
        "digest": state.params.digest(),
        "null_values": config.data.null_values,
        **{key: scores.get(key) for key in ("train", "held_out", "criteria")},
    }
    version = ModelStore(target.model).publish(
        story, state, record, keep=target.keep, batches=batches, held=held, columns=columns
    )
    return run.record("publish", {"model": target.model, "version": version})


def report(run: Run) -> dict[str, Any]:
    """Write `report.html` of a run that was evaluated; returns its path."""
    import numpy as np

    from genstream.evaluate import HeldOut, PredictiveCheck, sample_rows
    from genstream.report import ReportInput, write_report

    found = run.read_json("evaluation.json")
    if not found:
        raise ConfigError(f"run {run.id} was not evaluated yet: `genstream resume {run.id}`")
    config, info = run.config, run.info()
    data = open_data(config, pinned(run))
    story, state = fitted_model(run)
    rng = np.random.default_rng([config.fit.seed, 4])
    fitted = run.stage("fit")
    written = write_report(
        run.report,
        ReportInput(
            title=config.name,
            story=story,
            state=state,
            data=data_facts(config, data),
            train=_revived(HeldOut, found["train"]),
            test=_revived(HeldOut, found["held_out"]) if found["held_out"] else None,
            check=_revived(PredictiveCheck, found["check"]),
            sample=sample_rows(data.train, 4_000, rng),
            reproducibility={"run": run.id, **run.read_json("repro.json"), **_fit_facts(fitted)},
            notes=[fitted["advice"]] if fitted.get("advice") else [],
            created=datetime.fromisoformat(info.get("finished") or info["created"]),
        ),
    )
    return run.record("report", {"path": str(written)})


def data_facts(config: Config, data: Data) -> dict[str, object]:
    """What a report says of the data."""
    source = config.data.source
    facts: dict[str, object] = {
        "source": f"{source.gigabytes:g} GiB drawn from a known story"
        if isinstance(source, Drawn)
        else ", ".join(config.paths),
        "dataset": config.dataset or "fitted in place",
        "rows fitted": sum(data.train.chunk_rows),
        "columns": data.train.schema.n_features,
    }
    if data.held_out is not None:
        facts["rows held out"] = sum(data.held_out.chunk_rows)
    return facts


def _fit_facts(fitted: dict[str, Any]) -> dict[str, object]:
    if not fitted:
        return {}
    facts: dict[str, object] = {
        "parameters": f"sha256 {fitted['digest']}",
        "peak memory": bytes_text(fitted["peak_rss"]),
        "seconds": round(fitted["seconds"], 1),
    }
    return facts | time_facts(fitted)


def time_facts(fitted: dict[str, Any]) -> dict[str, object]:
    """Where the time of learning went, for a report; nothing where no profile was taken."""
    if "profile" not in fitted:
        return {}
    spent = fitted["profile"]["seconds"].items()
    return {"seconds of all workers": {part: round(seconds, 2) for part, seconds in spent}}


def _revived(kind: type[T], plain: Any) -> T:
    """A result from what its `to_json` gave: None stands for a number that is not finite."""
    from pydantic import TypeAdapter

    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [numbers(item) for item in value]
        return float("nan") if value is None else value

    return TypeAdapter(kind).validate_python(numbers(plain))


# --- all of them ---------------------------------------------------------------------------------


def begin(config_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """A new run of a configuration that there is memory, disk and data for.

    Raises ConfigError or DataError, and makes no run, where there is not.
    """
    from flows.plan import make_plan

    make_plan(load(config_path, overrides)).refuse_if_too_small()
    return Run.create(config_path, overrides)


def ingest(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Bring the source of a run into its dataset, and pin the manifest that is fitted."""
    config = run.config
    if config.dataset is None:
        return {}
    with bars(quiet) as progress:
        return run.record("ingest", ingest_data(config, RowProgress(progress, "ingest")))


def run_stages(run: Run, *, quiet: bool = False) -> Run:
    """All stages of a run that are not done yet, in this process."""
    work: dict[str, Callable[[Run], object]] = {
        "ingest": functools.partial(ingest, quiet=quiet),
        "fit": functools.partial(fit, quiet=quiet),
        "evaluate": functools.partial(evaluate, quiet=quiet),
        "publish": publish,
        "report": report,
    }
    walk(run, work)
    return run


def remaining(run: Run) -> list[str]:
    """Names of the stages of a run that are not recorded yet, in their order."""
    config = run.config
    wanted = {
        "ingest": config.dataset is not None,
        "fit": True,
        "evaluate": True,
        "publish": config.publish is not None,
        "report": config.report,
    }
    return [name for name, due in wanted.items() if due and not run.stage(name)]


def walk(run: Run, work: Mapping[str, Callable[[Run], object]]) -> None:
    """Do the stages that are not done yet in this process, in their order, each by its `work`.

    Raises ConflictError where another process is at it.
    """
    with run.working():
        for name in remaining(run):
            work[name](run)
