"""The flow that carries a sweep out: ``python -m flows.experiment CONFIG``.

Many models are fitted in shared passes and compared, and the best is published. A run in which a
candidate failed ends with exit code 1, after all others were fitted and compared.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import orchestration, showing, stages, sweeping
from flows.ingest import ingest
from flows.run import Run

orchestration.prepare()

from prefect import flow  # noqa: E402 - Prefect reads its settings when imported
from prefect.artifacts import (  # noqa: E402
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

SHOWN = ("candidate", *showing.SCORES, "outcome", "status")
"""Columns of the table of candidates."""


fit_candidates = orchestration.run_task("fit-candidates", sweeping.fit)
compare = orchestration.run_task("compare", sweeping.evaluate)
publish = orchestration.run_task("publish", sweeping.publish)
report = orchestration.run_task("report", sweeping.report)


@flow(name="experiment", flow_run_name="{run}")
def experiment(run: str) -> dict[str, Any]:
    """The stages of the sweep in folder `run` that are not done yet, and what they found."""
    folder = Run(Path(run))
    work: dict[str, Callable[[str], object]] = {
        "ingest": ingest,
        "fit": fit_candidates,
        "evaluate": compare,
        "publish": publish,
        "report": report,
    }
    with folder.working():
        for name in stages.remaining(folder):
            work[name](run)
    found = showing.sweep_summary(folder)
    create_table_artifact(
        table=[{name: row[name] for name in SHOWN} for row in found["candidates"][-100:]],
        key=orchestration.artifact_key(run, "candidates"),
        description=f"the best is {folder.stage('evaluate')['best']}",
    )
    create_markdown_artifact(
        markdown=f"```\n{showing.sweep_text(folder)}\n```",
        key=orchestration.artifact_key(run, "summary"),
        description="what the sweep found",
    )
    picture = sweeping.picture(folder)
    if picture is not None:
        create_image_artifact(
            image_url=f"data:image/png;base64,{base64.b64encode(picture).decode()}",
            key=orchestration.artifact_key(run, "criterion"),
            description="the criterion of the sweep along what it is over",
        )
    return found


if __name__ == "__main__":
    from flows.command import run_sweep

    run_sweep(experiment)
