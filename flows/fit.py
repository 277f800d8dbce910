"""The flow that fits the model of a run: ``python -m flows.fit CONFIG``."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows import orchestration, stages
from flows.run import Run
from flows.terminal import expected_steps

orchestration.prepare()

from prefect import flow, task  # noqa: E402 - Prefect reads its settings when imported
from prefect.artifacts import (  # noqa: E402
    create_image_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE  # noqa: E402

if TYPE_CHECKING:
    from genstream.learn import FitState, StepInfo

UPDATE_SECONDS = 2.0
"""A progress artifact costs a request, so that it is updated no more often than this."""


class ProgressArtifact:
    """Shows in Prefect how far a fit is, by the passes it is expected to need."""

    def __init__(self, run: Run) -> None:
        options = run.config.fit
        self._max_steps, self._tolerance = options.max_steps, options.tolerance
        self._objectives: list[float] = []
        self._updated = 0.0
        artifact = create_progress_artifact(
            progress=0.0,
            key=orchestration.artifact_key(str(run.path), "progress"),
            description=f"fit of {run.id}",
        )
        assert isinstance(artifact, UUID)
        self._artifact = artifact

    def __call__(self, state: FitState, info: StepInfo) -> None:
        """Update the artifact after a step."""
        self._objectives.append(info.mean_objective)
        if time.monotonic() - self._updated >= UPDATE_SECONDS:
            left = expected_steps(self._objectives, self._tolerance, self._max_steps - state.step)
            self._update(100.0 * state.step / (state.step + left))

    def close(self) -> None:
        """The fit has ended."""
        self._update(100.0)

    def _update(self, progress: float) -> None:
        update_progress_artifact(artifact_id=self._artifact, progress=progress)
        self._updated = time.monotonic()


@task(name="fit", cache_policy=NO_CACHE)
def fit_model(run: str) -> dict[str, Any]:
    """What `stages.fit` does, for the run in folder `run`, with its progress shown."""
    folder = Run(Path(run))
    progress = ProgressArtifact(folder)
    found = stages.fit(folder, on_step=(progress,))
    progress.close()
    return found


@flow(name="fit", flow_run_name="{run}")
def fit(run: str) -> dict[str, Any]:
    """Fit the model of a run that is being worked on, and show its trace."""
    found = fit_model(run)
    metrics = Run(Path(run)).metrics()
    columns = ("step", "mean_loglik", "mean_objective", "seconds", "rows_per_s")
    create_table_artifact(
        table=[{name: line[name] for name in columns} for line in metrics[-100:]],
        key=orchestration.artifact_key(run, "trace"),
        description=f"{found['outcome']} after {found['passes']:g} passes",
    )
    create_image_artifact(
        image_url=trace_figure([line["mean_loglik"] for line in metrics]),
        key=orchestration.artifact_key(run, "trace-figure"),
        description="mean log-likelihood of the rows fitted, pass by pass (nats)",
    )
    return found


def trace_figure(mean_loglik: list[float]) -> str:
    """A small plot of the trace, as a data URL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(mean_loglik) + 1), mean_loglik)
    axes.set(xlabel="pass", ylabel="mean log-likelihood (nats)")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def main_flow(run: str) -> None:
    """Ingest where there is something to, then fit."""
    from flows.ingest import ingest

    folder = Run(Path(run))
    with folder.working():
        if folder.config.dataset is not None:
            ingest(run)
        fit(run)


if __name__ == "__main__":
    from flows.command import run_config

    run_config(main_flow)
