"""The whole job as one flow: ingest, fit, evaluate. ``python -m flows.pipeline CONFIG``.

It always runs through Prefect: on the server that `PREFECT_API_URL` names, or on an embedded one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows import orchestration, showing, stages
from flows.evaluate import evaluate
from flows.fit import fit
from flows.ingest import ingest
from flows.run import Run

orchestration.prepare()

from prefect import flow  # noqa: E402 - Prefect reads its settings when imported


@flow(name="pipeline", flow_run_name="{run}")
def pipeline(run: str) -> dict[str, Any]:
    """The stages of the run in folder `run` that are not done yet."""
    folder = Run(Path(run))
    with folder.working():
        left = stages.remaining(folder)
        if "ingest" in left:
            ingest(run)
        if "fit" in left:
            fit(run)
        if {"evaluate", "publish", "report"} & set(left):
            evaluate(run)
    return showing.summary(folder)


if __name__ == "__main__":
    from flows.command import run_config

    run_config(pipeline)
