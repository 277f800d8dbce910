"""The flow that evaluates, publishes and reports a fit: ``python -m flows.evaluate RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows import orchestration, showing, stages
from flows.run import Run

orchestration.prepare()

from prefect import flow, task  # noqa: E402 - Prefect reads its settings when imported
from prefect.artifacts import create_markdown_artifact, create_table_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402

score = orchestration.run_task("evaluate", stages.evaluate)
publish = orchestration.run_task("publish", stages.publish)


@task(name="report", cache_policy=NO_CACHE)
def report(run: str) -> str:
    """What `stages.report` does, for the run in folder `run`."""
    return str(stages.report(Run(Path(run)))["path"])


@flow(name="evaluate", flow_run_name="{run}")
def evaluate(run: str) -> dict[str, Any]:
    """Evaluate the fit of a run that is being worked on, publish it and write its report."""
    folder = Run(Path(run))
    scores = score(run)
    publish(run)
    if folder.config.report:
        report(run)
    columns = ("name", "kind", "missing", "distance", "expected_distance")
    checked = folder.read_json("evaluation.json")["check"]["columns"]
    create_table_artifact(
        table=[{name: column[name] for name in columns} for column in checked[:100]],
        key=orchestration.artifact_key(run, "check"),
        description="drawn rows against real rows, column by column",
    )
    create_markdown_artifact(
        markdown=f"```\n{showing.summary_text(folder)}\n```",
        key=orchestration.artifact_key(run, "summary"),
        description="what the run found",
    )
    return scores


def main_flow(run: str) -> None:
    """Evaluate a run that was fitted, again if it was evaluated before."""
    with Run(Path(run)).working():
        evaluate(run)


if __name__ == "__main__":
    from flows.command import run_existing

    run_existing(main_flow)
