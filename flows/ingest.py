"""The flow that brings a source into its dataset: ``python -m flows.ingest CONFIG``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows import orchestration, stages
from flows.run import Run

orchestration.prepare()

from prefect import flow  # noqa: E402 - Prefect reads its settings when imported
from prefect.artifacts import create_table_artifact  # noqa: E402

ingest_batches = orchestration.run_task("ingest", stages.ingest)


@flow(name="ingest", flow_run_name="{run}")
def ingest(run: str) -> dict[str, Any]:
    """Ingest the data of a run that is being worked on, and show its batches."""
    found = ingest_batches(run)
    if found:
        create_table_artifact(
            table=found["batches"][-100:],
            key=orchestration.artifact_key(run, "batches"),
            description=f"{found['rows']:,} rows in {found['path']}",
        )
    return found


def main_flow(run: str) -> None:
    """Ingest only."""
    folder = Run(Path(run))
    with folder.working():
        ingest(run)


if __name__ == "__main__":
    from flows.command import run_config

    run_config(main_flow)
