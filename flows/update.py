"""The flow that learns what has arrived: ``python -m flows.update CONFIG``.

A run in which a batch was refused ends Failed, after all else was learned and committed.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import orchestration, showing, updating
from flows.run import Run

orchestration.prepare()

from prefect import flow  # noqa: E402 - Prefect reads its settings when imported
from prefect.artifacts import (  # noqa: E402
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

SHOWN = ("name", "status", "rows", "prequential", "champion", "candidate", "outside", "reason")
"""Columns of the table of batches."""


learn_batches = orchestration.run_task("learn", updating.carry_out)


@flow(name="learn", flow_run_name="{run}")
def learn(run: str) -> dict[str, Any]:
    """Learn what has arrived for the run in folder `run`, show it, fail if a batch was refused.

    Raises RefusedError then, after all else was learned and committed; the run has what was found.
    """
    found = learn_batches(run)
    if found["batches"]:
        create_table_artifact(
            table=[{name: line[name] for name in SHOWN} for line in found["batches"][-100:]],
            key=orchestration.artifact_key(run, "batches"),
            description=f"batches of {found['model']}, scored before they were learned (nats)",
        )
        create_table_artifact(
            table=found["drift"][-100:],
            key=orchestration.artifact_key(run, "drift"),
            description="how each batch differs from the rows fitted",
        )
        create_markdown_artifact(
            markdown=f"```\n{showing.update_text(found)}\n```",
            key=orchestration.artifact_key(run, "update"),
            description="what the update did",
        )
        picture = updating.picture(Run(Path(run)))
        if picture is not None:
            create_image_artifact(
                image_url=f"data:image/png;base64,{base64.b64encode(picture).decode()}",
                key=orchestration.artifact_key(run, "scores"),
                description="mean log-likelihood of the last batches before they were learned",
            )
    updating.refuse(found)
    return found


def _run_name() -> str:
    """Runs of one configuration are told apart by when they began."""
    from prefect.runtime import flow_run

    config = Path(str(flow_run.parameters["config"])).stem
    return f"{config} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


@flow(name="update", flow_run_name=_run_name)
def update(config: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Make a run of a configuration, learn what has arrived, and fail where a batch was refused."""
    return learn(str(updating.begin(config, overrides or ()).path))


if __name__ == "__main__":
    from flows.command import run_update

    run_update(learn)
