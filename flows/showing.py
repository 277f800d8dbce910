"""What is shown of a run, a model or a dataset."""

from __future__ import annotations

from typing import Any

from flows.run import Run
from flows.terminal import bytes_text


def summary(run: Run) -> dict[str, Any]:
    """What a run found, as plain values."""
    info = run.info()
    found: dict[str, Any] = {key: info.get(key) for key in ("id", "name", "reason", "stages")}
    return {**found, "status": run.status, "folder": str(run.path)}


def summary_text(run: Run) -> str:
    """What a run found, and what to type next."""
    config = run.config
    ingested, fitted, scores = run.stage("ingest"), run.stage("fit"), run.stage("evaluate")
    published, written = run.stage("publish"), run.stage("report")
    lines = [("run", run.id)]
    if run.status != "done":
        lines.append(("status", f"{run.status} {run.info()['reason']}".strip()))
    if ingested:
        lines.append(("data", f"{ingested['rows']:,} rows in {ingested['path']}"))
    if fitted:
        speed = f"{fitted['rows_per_s']:,.0f} rows/s, {bytes_text(fitted['bytes_read'])} read"
        what = f"{fitted['outcome']} after {fitted['steps']} passes over {fitted['rows']:,} rows"
        peak = bytes_text(fitted["peak_rss"])
        lines.append(("fit", f"{what} in {fitted['seconds']:.1f} s ({speed}), peak memory {peak}"))
        if fitted["advice"]:
            lines.append(("advice", fitted["advice"]))
    if recovered := scores.get("recovery"):
        lines.append(("recovery", _recovered(recovered)))
    if scores:
        lines.append(("train", f"mean log-likelihood {_mean(scores['train'])}"))
        if scores["held_out"]:
            lines.append(("held out", f"mean log-likelihood {_mean(scores['held_out'])}"))
    if published:
        lines.append(("model", f"{published['model']}, version {published['version']}"))
    if written:
        lines.append(("report", written["path"]))
    text = "\n".join(f"{name:<9} {value}" for name, value in lines)
    if not scores:
        return text
    target = published.get("model") or run.id
    source = config.paths[0] if config.paths else config.data.dataset
    following = [
        (f"genstream sample {target} -n 10", "draw rows"),
        (f"genstream assign {target} {source} -o assigned.parquet", "assign rows to components"),
        ("genstream init YOUR_FILE", "fit your own file"),
    ]
    width = max(len(command) for command, _ in following)
    hints = "\n".join(f"  {command:<{width}}   {why}" for command, why in following)
    return f"{text}\n\nnext:\n{hints}"


def _mean(score: dict[str, Any]) -> str:
    mean, error = score["mean_loglik"], score["standard_error"]
    return f"{mean:.4f} ± {error:.4f} nats a row ({score['n_rows']:,} rows)"


def _recovered(found: dict[str, Any]) -> str:
    return (
        f"{found['matched']} of {found['n_components']} components found; at most, means are off "
        f"by {found['mean']:.2g} sd, covariances by {found['covariance']:.2g} of their size, "
        f"weights by {found['weight']:.2g}"
    )
