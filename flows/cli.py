"""The `genstream` command, verb by verb.

Everything heavy is imported by the verb that needs it, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.command import (
    AsJson,
    ConfigPath,
    Overrides,
    RunRef,
    finish,
    finish_sweep,
    finish_update,
    guarded,
    put,
)
from flows.run import Run
from flows.terminal import table
from genstream.errors import ConfigError, CorruptError, GenstreamError

app = typer.Typer(
    name="genstream",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelRef = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's folder, or folder@version, or a run.")
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="A .csv, .parquet or .zarr; left out, CSV on stdout."),
]
WithProfile = Annotated[
    bool, typer.Option("--profile", help="Say where the time of learning went (on stderr).")
]
IdColumn = Annotated[str | None, typer.Option("--id", help="Column to carry over.")]
Nulls = Annotated[
    list[str] | None,
    typer.Option(
        "--null",
        metavar="TEXT",
        help="A text that means a missing entry; left out, those of the data that were fitted.",
    ),
]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that exists.")]
Unseen = Annotated[
    bool,
    typer.Option("--unseen-as-missing", help="Take levels the model never saw as missing entries."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from genstream import __version__

        typer.echo(f"genstream {__version__}")
        raise typer.Exit


@app.callback()
def genstream(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Generative models learned out of core: fit, resume, score, assign, impute, sample."""


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The file to be fitted.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write.")] = Path(
        "genstream.yaml"
    ),
    as_json: AsJson = False,
) -> None:
    """Write a first configuration for a data file, with its columns filled in."""
    from flows.starter import write_starter

    columns = write_starter(data, output)
    text = f"wrote {output} with {len(columns)} columns\nnext: genstream plan {output}"
    put({"config": str(output), "columns": columns}, text, as_json)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration, and that the data have the columns it names."""
    from flows.config import load
    from flows.plan import check_data

    found = check_data(load(config, overrides or ()))
    text = f"{config} is right: {found['n_columns']} columns, {found['n_files']} file(s)"
    put({"config": str(config), **found}, text, as_json)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say how many rows, chunks, passes, and how much memory and disk a fit will take."""
    from flows.config import load
    from flows.plan import make_plan

    made = make_plan(load(config, overrides or ()))
    put(made.to_json(), made.to_text(), as_json)
    made.refuse_if_too_small()


@app.command()
def ingest(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Bring the source of a configuration into its dataset; what is there already is left."""
    from flows.config import load
    from flows.data import ingest_data
    from flows.terminal import RowProgress, bars

    with bars(as_json) as progress:
        report = ingest_data(load(config, overrides or ()), RowProgress(progress, "ingest"))
    batches = report["batches"]
    text = (
        table(batches, ["name", "rows", "status"])
        + f"\n{report['rows']:,} rows in {report['path']}"
    )
    put(report, text, as_json)


@app.command()
def fit(
    config: ConfigPath,
    overrides: Overrides = None,
    profile: WithProfile = False,
    as_json: AsJson = False,
) -> None:
    """Ingest, fit, evaluate, publish and report, as a configuration says."""
    from flows.stages import begin

    _carry_out(begin(config, overrides or ()), as_json, profile)


@app.command()
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    profile: WithProfile = False,
    as_json: AsJson = False,
) -> None:
    """Fit many models in shared passes, compare them, and publish the best."""
    from flows.sweeping import begin

    _carry_out(begin(config, overrides or ()), as_json, profile)


@app.command()
def update(
    config: ConfigPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-] [KEY=VALUE]...",
            help="- reads one batch from standard input; settings over those of the file.",
        ),
    ] = None,
    batch_id: Annotated[
        str | None,
        typer.Option("--id", help="What the batch on standard input is known by, once and only."),
    ] = None,
    retry: Annotated[
        str | None,
        typer.Option(metavar="BATCH", help="Try a refused or rolled back batch again."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Learn the batches that are new, each exactly once, and publish what is not worse."""
    from flows import updating

    settings = [text for text in overrides or () if text != "-"]
    stdin = len(settings) < len(overrides or ())
    if batch_id is not None and not batch_id.strip():
        raise ConfigError("--id is empty: name the batch, or leave the option out")
    if batch_id is not None and not stdin:
        raise ConfigError("--id names the batch on standard input: say - after the configuration")
    if retry is not None and stdin:
        raise ConfigError("--retry names a batch that came before: leave - out")
    run = updating.begin(config, settings, retry=retry, batch_id=batch_id, stdin=stdin)
    _carry_out(run, as_json)


@app.command()
def serve(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...",
            help="Configurations with a schedule; settings over those of every file.",
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what happens as JSON, one line each.")
    ] = False,
) -> None:
    """Update models on the schedules of their configurations, until interrupted."""
    import sys

    from flows.serve import serve as serve_updates
    from flows.serve import told

    out = sys.stdout

    def tell(event: dict[str, object]) -> None:
        print(json.dumps(event) if as_json else told(event), file=out, flush=True)

    overrides = [each for each in configs if "=" in each and not Path(each).exists()]
    with contextlib.redirect_stdout(sys.stderr):  # what Prefect prints of a lost server
        serve_updates([each for each in configs if each not in overrides], overrides, tell=tell)


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder.")],
    version: Annotated[
        int | None, typer.Argument(metavar="[VERSION]", help="Left out: the one before.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make another version of a model the one in use; batches learned since no longer count."""
    from genstream.models import ModelStore

    store = ModelStore(model)
    before = store.champion
    champion = store.rollback(version)
    gone = [e.name for e in store.snapshot().batches.values() if e.status == "rolled_back"]
    text = f"{model}: version {champion} is in use, and was {before}"
    if gone:
        text += (
            f"\n{len(gone)} batch(es) no longer count, {', '.join(gone[-5:])} the last: "
            "`genstream update CONFIG --retry BATCH` learns one again"
        )
    put(
        {"model": model, "champion": champion, "before": before, "rolled_back": gone}, text, as_json
    )


@app.command()
def fsck(
    folder: Annotated[str, typer.Argument(metavar="MODEL|DATASET")], as_json: AsJson = False
) -> None:
    """Compare every stored byte of a model or dataset with its digest."""
    from genstream.store import fsck as examine

    problems = examine(folder)
    if problems:
        raise CorruptError("\n".join(problems))
    put({"folder": folder, "problems": []}, f"{folder}: every byte is as committed", as_json)


@app.command()
def gc(
    folder: Annotated[str, typer.Argument(metavar="MODEL|DATASET")],
    older_than: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="Younger files stay.")
    ] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Delete stored files that nothing in use names."""
    from genstream.store import gc as collect

    deleted = collect(folder, older_than=3600.0 * older_than)
    put({"folder": folder, "deleted": deleted}, f"{folder}: {deleted} file(s) deleted", as_json)


@app.command()
def resume(
    run: RunRef,
    profile: WithProfile = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Though begun on another machine, which is gone.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was interrupted, to the same bits as if it had not been."""
    found = Run.find(run)
    if profile and found.kind == "update":
        raise ConfigError(f"run {found.id} is an update: a profile is taken of fits and sweeps")
    if profile and found.stage("fit"):
        raise ConfigError(f"run {found.id} has learned already: leave --profile out")
    if take_over:
        found.take_over()
    if profile:
        found.refuse_if_held()
    _carry_out(found, as_json, profile)


def _carry_out(run: Run, as_json: bool, profile: bool = False) -> None:
    """What is left to do of a run, and where the time of it went if that is wanted or was."""
    if profile:
        run.update(profile=True)
    # The run of an update that finds nothing is gone when that ends.
    is_update = run.kind == "update"
    try:
        _go_through(run, as_json)
    finally:
        # Whatever went wrong before says more than a run that cannot be read.
        with contextlib.suppress(GenstreamError):
            spent = None if is_update else run.stage("fit").get("profile")
            if spent is not None:
                from genstream.profile import profile_text

                typer.echo(f"\n{profile_text(spent)}", err=True)


def _go_through(run: Run, as_json: bool) -> None:
    """The stages of a run that are left, through Prefect where the configuration says."""
    from flows import orchestration, stages

    mode = run.config.orchestrate
    with_prefect = mode == "prefect" or (mode == "auto" and orchestration.configured())
    if with_prefect:
        orchestration.reach()
    if run.kind == "update":
        _update(run, with_prefect, as_json)
        return
    if run.kind == "sweep":
        _sweep(run, with_prefect, as_json)
        return
    if with_prefect:
        from flows.pipeline import pipeline

        pipeline(str(run.path))
    else:
        stages.run_stages(run, quiet=as_json)
    finish(run, as_json)


def _sweep(run: Run, with_prefect: bool, as_json: bool) -> None:
    from flows import sweeping

    if with_prefect:
        from flows.experiment import experiment

        finish_sweep(run, experiment, as_json)
    else:
        finish_sweep(run, lambda _: sweeping.carry_out(run, quiet=as_json), as_json)


def _update(run: Run, with_prefect: bool, as_json: bool) -> None:
    from flows import updating

    if with_prefect:
        from flows.update import learn

        finish_update(run, learn, as_json)
    else:
        finish_update(run, lambda _: updating.carry_out(run), as_json)


@app.command()
def score(
    model: ModelRef,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, pattern or dataset.")],
    output: Output = None,
    overwrite: Overwrite = False,
    unseen_as_missing: Unseen = False,
    id_column: IdColumn = None,
    null: Nulls = None,
    as_json: AsJson = False,
) -> None:
    """Log-likelihood of every row under a model, in nats."""
    _walk("score", model, data, output, overwrite, unseen_as_missing, id_column, null, as_json)


@app.command()
def assign(
    model: ModelRef,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, pattern or dataset.")],
    output: Output = None,
    overwrite: Overwrite = False,
    unseen_as_missing: Unseen = False,
    id_column: IdColumn = None,
    null: Nulls = None,
    responsibilities: Annotated[bool, typer.Option(help="One column a component too.")] = False,
    as_json: AsJson = False,
) -> None:
    """The likeliest component of every row, and its responsibility."""
    verb = "assign-all" if responsibilities else "assign"
    _walk(verb, model, data, output, overwrite, unseen_as_missing, id_column, null, as_json)


def _walk(
    verb: str,
    model: str,
    data: str,
    output: Path | None,
    overwrite: bool,
    unseen_as_missing: bool,
    id_column: str | None,
    null: list[str] | None,
    as_json: bool,
) -> None:
    from flows.scoring import Verb, score_rows
    from flows.terminal import RowProgress, bars

    if output is None and as_json:
        raise ConfigError("--json describes an output file: name one with -o")
    with bars(as_json or output is None) as progress:
        result = score_rows(
            Verb(verb),
            model,
            data,
            output,
            overwrite=overwrite,
            unseen_as_missing=unseen_as_missing,
            id_column=id_column,
            null_values=null,
            on_progress=RowProgress(progress, verb),
        )
    if output is not None:
        what = "bound on the log-likelihood" if result["bound"] else "log-likelihood"
        text = f"{result['rows']:,} rows, mean {what} {result['mean_loglik']:.6g}: {output}"
        put(result, text, as_json)


@app.command()
def impute(
    model: ModelRef,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, pattern or dataset.")],
    output: Output = None,
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw what is missing, in place of its mean.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    overwrite: Overwrite = False,
    unseen_as_missing: Unseen = False,
    id_column: IdColumn = None,
    null: Nulls = None,
    as_json: AsJson = False,
) -> None:
    """Fill the gaps of every row by what a model makes of the rest of it."""
    from flows.scoring import impute_rows
    from flows.terminal import RowProgress, bars

    if output is None and as_json:
        raise ConfigError("--json describes an output file: name one with -o")
    with bars(as_json or output is None) as progress:
        result = impute_rows(
            model,
            data,
            output,
            draw=draw,
            seed=seed,
            overwrite=overwrite,
            unseen_as_missing=unseen_as_missing,
            id_column=id_column,
            null_values=null,
            on_progress=RowProgress(progress, "impute"),
        )
    if output is not None:
        text = f"{result['rows']:,} rows, {result['filled']:,} gaps filled: {output}"
        put(result, text, as_json)


@app.command()
def sample(
    model: ModelRef,
    n_rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to draw.")] = 10,
    output: Output = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    component: Annotated[bool, typer.Option(help="Say which component drew each row.")] = False,
    given: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Draw the other columns given this one."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Draw rows that a model dreams up."""
    from flows.scoring import sample_rows

    if output is None and as_json:
        raise ConfigError("--json describes an output file: name one with -o")
    values = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--given {text}: expected COLUMN=VALUE")
        if name in values:
            raise ConfigError(f"--given {text}: {name!r} is given twice")
        values[name] = value
    result = sample_rows(
        model,
        n_rows,
        output,
        given=values,
        seed=seed,
        with_component=component,
        overwrite=overwrite,
    )
    if output is not None:
        put(result, f"{n_rows:,} rows: {output}", as_json)


@app.command()
def runs(as_json: AsJson = False) -> None:
    """List the runs of this folder, newest first."""
    lines = []
    for run in reversed(Run.all()):
        info = run.info()
        stages = info.get("stages", {})
        lines.append(
            {
                "run": run.id,
                "kind": run.kind,
                "status": run.status,
                "steps": stages.get("fit", {}).get("steps"),
                "held-out": (stages.get("evaluate", {}).get("held_out") or {}).get("mean_loglik"),
                "reason": info["reason"] or _refused(stages.get("update", {})),
            }
        )
    text = (
        table(lines, ["run", "kind", "status", "steps", "held-out", "reason"])
        if lines
        else "no runs"
    )
    put({"runs": lines}, text, as_json)


def _refused(found: dict[str, Any]) -> str:
    return f"{found['refused']} batch(es) refused" if found.get("refused") else ""


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="MODEL|RUN|DATASET")], as_json: AsJson = False
) -> None:
    """Show a model's components and versions, a run, or what a dataset holds."""
    from flows.showing import show_anything

    result, text = show_anything(what)
    put(result, text, as_json)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="Runs of fits; a sweep is its candidates."),
    ],
    as_json: AsJson = False,
) -> None:
    """Runs side by side: what was fitted, how good it is, and what it took."""
    from flows.showing import compare as compare_runs

    put(*compare_runs(runs), as_json)


@app.command()
def report(run: RunRef, as_json: AsJson = False) -> None:
    """Write the report of a run again."""
    from flows import stages, sweeping, updating

    found = Run.find(run)
    write = {"update": updating.report, "sweep": sweeping.report, "fit": stages.report}
    written = write[found.kind](found)
    put(written, written["path"], as_json)


@app.command()
def schema(as_json: AsJson = False) -> None:  # noqa: ARG001 - it is JSON either way
    """Print the JSON schema of configurations, for editors."""
    from flows.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at what genstream finds on this machine."""
    from flows.doctor import examine

    found = examine()
    text = "\n".join(f"{name:<16} {value}" for name, value in found.items())
    put(found, text, as_json)


def main() -> None:
    """Run the command line and exit with its code."""
    guarded(app)


if __name__ == "__main__":
    main()
