"""What is shown of a run, a model or a dataset."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.run import Run
from flows.terminal import bytes_text, table
from genstream.errors import ConfigError

if TYPE_CHECKING:
    from genstream.story import Params, Story

MAX_WAITING = 20
"""Files that are not ready yet, listed as text."""

MAX_ROWS = 50
"""Components, batches and versions shown as text; `--json` has them all."""


def summary(run: Run) -> dict[str, Any]:
    """What a run found, as plain values."""
    info = run.info()
    found: dict[str, Any] = {key: info.get(key) for key in ("id", "name", "reason", "stages")}
    return {**found, "status": run.status, "folder": str(run.path)}


def summary_text(run: Run) -> str:
    """What a run found, and what to type next."""
    if run.kind == "sweep":
        return sweep_text(run)
    if run.stage("update"):
        return f"run       {run.id}\n{update_text(run.stage('update'))}"
    config = run.config
    ingested, fitted, scores = run.stage("ingest"), run.stage("fit"), run.stage("evaluate")
    lines = _first_lines(run)
    if ingested:
        before = ingested.get("rows_before", 0)
        beside = f", {before:,} of them of batches brought in before" if before else ""
        lines.append(("data", f"{ingested['rows']:,} rows in {ingested['path']}{beside}"))
    if fitted:
        speed = f"passes at {fitted['rows_per_s']:,.0f} rows/s"
        read = f"{bytes_text(fitted['bytes_read'])} read"
        passes = fitted.get("passes", fitted["steps"])
        what = f"{fitted['outcome']} after {passes:g} passes over {fitted['rows']:,} rows"
        peak = bytes_text(fitted["peak_rss"])
        took = f"{fitted['seconds']:.1f} s with the start ({speed}, {read})"
        lines.append(("fit", f"{what} in {took}, peak memory {peak}"))
        if fitted["advice"]:
            lines.append(("advice", fitted["advice"]))
    if recovered := scores.get("recovery"):
        lines.append(("recovery", _recovered(recovered)))
    if scores:
        what = "bound on the log-likelihood" if scores.get("bound") else "log-likelihood"
        lines.append(("train", f"mean {what} {_mean(scores['train'])}"))
        if scores["held_out"]:
            lines.append(("held out", f"mean {what} {_mean(scores['held_out'])}"))
    text = _aligned([*lines, *_last_lines(run)])
    if not scores:
        return text
    target = shlex.quote(run.stage("publish").get("model") or run.id)
    source = shlex.quote(str(config.paths[0] if config.paths else config.dataset))
    following = [
        (f"genstream sample {target} -n 10", "draw rows"),
        (f"genstream assign {target} {source} -o assigned.parquet", "assign rows to components"),
        ("genstream init YOUR_FILE", "fit your own file"),
    ]
    width = max(len(command) for command, _ in following)
    hints = "\n".join(f"  {command:<{width}}   {why}" for command, why in following)
    return f"{text}\n\nnext:\n{hints}"


def _first_lines(run: Run) -> list[tuple[str, str]]:
    """Which run it is, and how it ended if not well."""
    lines = [("run", run.id)]
    if run.status in ("failed", "interrupted"):
        lines.append(("status", f"{run.status} {run.info()['reason']}".strip()))
    return lines


def _last_lines(run: Run) -> list[tuple[str, str]]:
    """What a run published, and its report."""
    published, written = run.stage("publish"), run.stage("report")
    lines = []
    # A sweep of which no candidate could be fitted has published none.
    if published.get("model"):
        lines.append(("model", f"{published['model']}, version {published['version']}"))
    if written:
        lines.append(("report", written["path"]))
    return lines


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<9} {value}" for name, value in lines)


def update_text(found: dict[str, Any]) -> str:
    """What an update did: a line a batch, and what was left for the next."""
    lines = []
    if found["batches"]:
        columns = ["name", "rows", "status", "prequential", "champion", "candidate", "version"]
        lines.append(table(found["batches"][-MAX_ROWS:], columns))
        for batch in found["batches"][-MAX_ROWS:]:
            if batch["status"].endswith("before"):
                continue
            told = [batch["reason"]] if batch["reason"] else []
            prefix = f"{batch['name']}: "
            lines += [prefix + line.removeprefix(prefix) for line in (*told, *batch["flags"])]
    else:
        lines.append("nothing new")
    waiting = found["waiting"]
    lines += [f"{one['name']}: waits: {one['why']}" for one in waiting[:MAX_WAITING]]
    if len(waiting) > MAX_WAITING:
        lines.append(f"... {len(waiting) - MAX_WAITING:,} more wait")
    lines.append(f"model     {found['model']}, version {found['version']} in use")
    if found.get("report"):
        lines.append(f"report    {found['report']}")
    return "\n".join(lines)


def run_row(run: Run) -> dict[str, Any]:
    """A run of a fit as a line of a table: what it is, how good, and what it took."""
    info, model = run.info(), run.config.model
    fitted, scores = run.stage("fit"), run.stage("evaluate")
    test, train = scores.get("held_out") or {}, scores.get("train") or {}
    found = scores.get("criteria") or {}
    return {
        "run": run.id,
        "kind": model.kind,
        "n_components": model.n_components,
        "n_parameters": found.get("n_parameters"),
        "held_out": test.get("mean_loglik"),
        "standard_error": test.get("standard_error"),
        "train": train.get("mean_loglik"),
        "bic": found.get("bic"),
        "aic": found.get("aic"),
        "icl": found.get("icl"),
        "outcome": fitted.get("outcome"),
        "steps": fitted.get("steps"),
        "passes": fitted.get("passes"),
        "seconds": fitted.get("seconds"),
        "status": run.status,
        "reason": info["reason"],
    }


SCORES = ("held_out", "standard_error", "bic", "aic", "icl", "steps", "passes", "seconds")
"""Columns of a table of runs that are compared."""


def candidate_rows(run: Run) -> list[dict[str, Any]]:
    """A line a candidate of a sweep: what sets it apart, its scores, and what it took."""
    return [{"candidate": each.info()["label"], **run_row(each)} for each in run.candidates]


def sweep_summary(run: Run) -> dict[str, Any]:
    """What a sweep found, as plain values."""
    return {**summary(run), "candidates": candidate_rows(run)}


def sweep_text(run: Run) -> str:
    """What a sweep found: a line a candidate, the best one, and what sharing saved."""
    found = sweep_summary(run)
    fitted, scores = run.stage("fit"), run.stage("evaluate")
    rows = [
        {**row, "": "*" if row["run"] == scores.get("best") else ""} for row in found["candidates"]
    ]
    lines = _first_lines(run)
    if fitted:
        saved = fitted["bytes_alone"] / max(fitted["bytes_read"], 1)
        what = (
            f"{fitted['candidates']} candidates in {fitted['passes']:g} passes over "
            f"{fitted['rows']:,} rows in {fitted['seconds']:.1f} s, peak memory "
            f"{bytes_text(fitted['peak_rss'])}"
        )
        read = f"{bytes_text(fitted['bytes_read'])}, 1/{saved:.1f} of one by one"
        lines += [("fit", what), ("read", read)]
    if scores.get("best"):
        lines.append(("best", f"{scores['best']} (*), by {scores['by']}"))
    lines += _last_lines(run)
    shown = table(rows, ["", "candidate", *SCORES, "outcome"]) + "\n\n" if rows else ""
    lines += [
        ("failed", f"{r['candidate']}: {r['reason']}") for r in rows if r["status"] == "failed"
    ]
    return shown + _aligned(lines)


def compare(references: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Runs side by side; a sweep stands for its candidates.

    Raises ConfigError where a run is none of a fit.
    """
    runs: list[Run] = []
    for reference in references:
        run = Run.find(reference)
        if run.kind == "update":
            raise ConfigError(f"run {run.id} is an update: only fits are compared")
        runs += run.candidates if run.kind == "sweep" else [run]
    rows = [run_row(run) for run in runs]
    told = {json.dumps(run.read_json("repro.json").get("held_out"), sort_keys=True) for run in runs}
    same = len(told) == 1
    text = table(rows, ["run", "kind", "n_components", *SCORES, "status"])
    if not same:
        text += "\n\nnote: these runs held different rows out: only those of one data set compare"
    return {"runs": rows, "same_held_out": same}, text


def _mean(score: dict[str, Any]) -> str:
    mean, error = score["mean_loglik"], score["standard_error"]
    return f"{mean:.4f} ± {error:.4f} nats a row ({score['n_rows']:,} rows)"


def _recovered(found: dict[str, Any]) -> str:
    return (
        f"{found['matched']} of {found['n_components']} components found; at most, means are off "
        f"by {found['mean']:.2g} sd, covariances by {found['covariance']:.2g} of their size, "
        f"weights by {found['weight']:.2g}"
    )


def show_anything(what: str) -> tuple[dict[str, Any], str]:
    """A model, a dataset or a run, as plain values and as text.

    Raises ConfigError where `what` is none of them.
    """
    from flows.scoring import folder_and_version

    folder, _ = folder_and_version(what)
    if (Path(folder) / "manifests").is_dir():
        kind = _kind(Path(folder))
        return _dataset(folder) if kind == "dataset" else _model(what)
    try:
        run = Run.find(what)
    except ConfigError:
        raise ConfigError(
            f"{what!r} is no folder of a model or dataset, and no run: `genstream runs` lists runs"
        ) from None
    return sweep_summary(run) if run.kind == "sweep" else summary(run), summary_text(run)


def _kind(folder: Path) -> str:
    """What a folder with manifests holds, as they say."""
    newest = max((folder / "manifests").glob("*.json"), default=None)
    if newest is None:
        raise ConfigError(f"{folder}: nothing was committed there yet")
    try:
        return str(json.loads(newest.read_bytes())["manifest"]["kind"])
    except (ValueError, KeyError, TypeError):
        return "model"  # whatever opens it will say how it is damaged


def _dataset(folder: str) -> tuple[dict[str, Any], str]:
    from genstream.store import Dataset

    dataset = Dataset.open(folder)
    columns = dataset.schema.to_json()
    batches = [
        {"name": b.name, "rows": b.n_rows, "time": b.time, "status": b.status, "id": b.id}
        for b in dataset.batches
    ]
    found = {
        "dataset": folder,
        "rows": dataset.n_rows,
        "dtype": dataset.dtype,
        "columns": columns,
        "batches": batches,
    }
    lines = [
        {"column": c["name"], "kind": c["kind"], "unit": c["unit"], "levels": _listed(c["levels"])}
        for c in columns
    ]
    head = f"{folder}: {dataset.n_rows:,} rows in {len(batches)} batch(es), {dataset.dtype}"
    shown = table(lines, ["column", "kind", "unit", "levels"])
    listed = table(batches[-MAX_ROWS:], ["name", "rows", "time", "status"])
    return found, f"{head}\n\n{shown}\n\n{listed}"


def _listed(levels: list[str], most: int = 12) -> str:
    rest = f" and {len(levels) - most} more" if len(levels) > most else ""
    return ", ".join(levels[:most]) + rest


def _model(reference: str) -> tuple[dict[str, Any], str]:
    from flows.scoring import folder_and_version, load_model
    from genstream.models import ModelStore

    story, params = load_model(reference)
    there = ModelStore(folder_and_version(reference)[0]).snapshot()
    versions = [
        {
            "version": version.number,
            "champion": version.number == there.champion,
            "time": version.time,
            "held_out": ((version.record.get("held_out") or {}).get("mean_loglik")),
            "rows": version.record.get("rows"),
            "learned": (version.record.get("batch") or {}).get("name") or version.record.get("run"),
        }
        for version in there.versions
    ]
    batches = [event.to_json() for event in there.batches.values()]
    components = component_rows(story, params)
    found = {
        "model": reference,
        "n_components": story.n_components,
        "n_parameters": story.n_parameters,
        "columns": story.schema.to_json(),
        "components": components,
        "champion": there.champion,
        "versions": versions,
        "batches": batches,
        "warnings": story.warnings(params),
    }
    head = (
        f"{reference}: {_latent(story)} over {story.schema.n_features} columns, "
        f"{story.n_parameters} parameters"
    )
    names = list(components[0])[:10]
    shown = table(components[:MAX_ROWS], names)
    left_out = [
        f"... {len(components) - MAX_ROWS} more components" if len(components) > MAX_ROWS else "",
        f"... {len(components[0]) - 10} more columns" if len(components[0]) > 10 else "",
    ]
    for version in versions:
        version["in use"] = "*" if version["champion"] else ""
    names = ["version", "in use", "time", "held_out", "rows", "learned"]
    listed = table(versions[-MAX_ROWS:], names)
    parts = [head, "\n".join(filter(None, [shown, *left_out])), listed]
    if batches:
        counts = Counter(batch["status"].replace("_", " ") for batch in batches)
        told = ", ".join(f"{n} {status}" for status, n in counts.items())
        lines = [{**b, "reason": b["reason"][:70]} for b in batches[-MAX_ROWS:]]
        rows = table(lines, ["name", "n_rows", "status", "version", "time", "reason"])
        parts.append(f"{len(batches)} batches: {told}\n{rows}")
    for version in versions:
        del version["in use"]
    return found, "\n\n".join([*parts, *story.warnings(params)])


def _latent(story: Story) -> str:
    """The latent of a row in words: how many components, how many factors."""
    parts = [
        f"{n} {what}{'s' if n > 1 else ''}"
        for n, what in ((story.n_components, "component"), (story.n_factors, "factor"))
        if n
    ]
    return " and ".join(parts)


def component_rows(story: Story, params: Params) -> list[dict[str, Any]]:
    """A line a component, heaviest first: weight, and what it is like in every column.

    That is mean ± standard deviation of a real column, the rate of a count, the probability of 1
    of a binary column, and the likeliest level of a categorical one with its probability.
    """
    from genstream.report import Portrait

    portrait = Portrait.of(story, params)
    lines = []
    for k in portrait.heaviest:
        line: dict[str, Any] = {"component": int(k), "weight": float(params.weights[k])}
        for j, column in enumerate(story.schema.columns):
            if j in portrait.levels:
                label, share = portrait.top_levels(int(k), j, 1)[0]
                line[column.name] = f"{label} {share:.0%}"
            elif column.kind == "count":
                line[column.name] = f"{portrait.mean[k, j]:.4g}"
            else:
                line[column.name] = f"{portrait.mean[k, j]:.4g} ± {portrait.sd[k, j]:.3g}"
        lines.append(line)
    return lines
