"""The `genstream` command: results on stdout, all else on stderr, an exit code for every outcome.

Exit codes: 0 done, 1 finished with failed cells or quarantined batches, 2 configuration, 3 data,
4 conflict with another writer, 5 compute lost, 6 storage, 7 corrupt, 70 a bug, 130 and 143
interrupted. Everything heavy is imported by the verb that needs it, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.run import STATE, Interrupted, Run, interruptible
from flows.terminal import table
from genstream.errors import ConfigError, GenstreamError, StorageError

app = typer.Typer(
    name="genstream",
    help="Latent-variable models learned out of core: fit, resume, score, assign, sample.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over those of the file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ModelRef = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's folder, or folder@version, or a run.")
]
RunRef = Annotated[
    str, typer.Argument(metavar="RUN", help="A run: its id, a part of it, its folder, or `last`.")
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="A .csv, .parquet or .zarr; left out, CSV on stdout."),
]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that exists.")]
Unseen = Annotated[
    bool,
    typer.Option("--unseen-as-missing", help="Take levels the model never saw as missing entries."),
]


def _show(result: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(result, indent=2) if as_json else text)


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
    _show({"config": str(output), "columns": columns}, text, as_json)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration, and that the data have the columns it names."""
    from flows.config import load
    from flows.plan import check_data

    found = check_data(load(config, overrides or ()))
    text = f"{config} is right: {found['n_columns']} columns, {found['n_files']} file(s)"
    _show({"config": str(config), **found}, text, as_json)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say how many rows, chunks, passes, and how much memory and disk a fit will take."""
    from flows.config import load
    from flows.plan import make_plan

    made = make_plan(load(config, overrides or ()))
    _show(made.to_json(), made.to_text(), as_json)
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
    _show(report, text, as_json)


@app.command()
def fit(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Ingest, fit, evaluate, publish and report, as a configuration says."""
    from flows.stages import begin, run_stages

    _finish(run_stages(begin(config, overrides or ()), quiet=as_json), as_json)


@app.command()
def resume(run: RunRef, as_json: AsJson = False) -> None:
    """Go on with a run that was interrupted, to the same bits as if it had not been."""
    from flows.stages import run_stages

    _finish(run_stages(Run.find(run), quiet=as_json), as_json)


def _finish(run: Run, as_json: bool) -> None:
    from flows.showing import summary, summary_text

    _show(summary(run), summary_text(run), as_json)


@app.command()
def score(
    model: ModelRef,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, pattern or dataset.")],
    output: Output = None,
    overwrite: Overwrite = False,
    unseen_as_missing: Unseen = False,
    id_column: Annotated[str | None, typer.Option("--id", help="Column to carry over.")] = None,
    as_json: AsJson = False,
) -> None:
    """Log-likelihood of every row under a model, in nats."""
    _walk("score", model, data, output, overwrite, unseen_as_missing, id_column, as_json)


@app.command()
def assign(
    model: ModelRef,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, pattern or dataset.")],
    output: Output = None,
    overwrite: Overwrite = False,
    unseen_as_missing: Unseen = False,
    id_column: Annotated[str | None, typer.Option("--id", help="Column to carry over.")] = None,
    responsibilities: Annotated[bool, typer.Option(help="One column a component too.")] = False,
    as_json: AsJson = False,
) -> None:
    """The likeliest component of every row, and its responsibility."""
    verb = "assign-all" if responsibilities else "assign"
    _walk(verb, model, data, output, overwrite, unseen_as_missing, id_column, as_json)


def _walk(
    verb: str,
    model: str,
    data: str,
    output: Path | None,
    overwrite: bool,
    unseen_as_missing: bool,
    id_column: str | None,
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
            on_progress=RowProgress(progress, verb),
        )
    if output is not None:
        text = f"{result['rows']:,} rows, mean log-likelihood {result['mean_loglik']:.6g}: {output}"
        _show(result, text, as_json)


@app.command()
def sample(
    model: ModelRef,
    n_rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to draw.")] = 10,
    output: Output = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    component: Annotated[bool, typer.Option(help="Say which component drew each row.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Draw rows that a model dreams up."""
    from flows.scoring import sample_rows

    if output is None and as_json:
        raise ConfigError("--json describes an output file: name one with -o")
    result = sample_rows(
        model, n_rows, output, seed=seed, with_component=component, overwrite=overwrite
    )
    if output is not None:
        _show(result, f"{n_rows:,} rows: {output}", as_json)


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
                "status": run.status,
                "steps": stages.get("fit", {}).get("steps"),
                "held-out": stages.get("evaluate", {}).get("held_out", {}).get("mean_loglik"),
                "reason": info["reason"],
            }
        )
    text = table(lines, ["run", "status", "steps", "held-out", "reason"]) if lines else "no runs"
    _show({"runs": lines}, text, as_json)


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="MODEL|RUN|DATASET")], as_json: AsJson = False
) -> None:
    """Show a model's components and versions, a run, or what a dataset holds."""
    from flows.showing import show_anything

    result, text = show_anything(what)
    _show(result, text, as_json)


@app.command()
def report(run: RunRef, as_json: AsJson = False) -> None:
    """Write the report of a run again."""
    from flows import stages

    written = stages.report(Run.find(run))
    _show(written, written["path"], as_json)


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
    _show(found, text, as_json)


def main() -> None:
    """Run the command line and exit with its code."""
    guarded(app)


def guarded(command: Callable[[], object]) -> None:
    """Call `command`; exit with the code of whatever error it raises, after one line about it."""
    wants_json = "--json" in sys.argv[1:]
    try:
        with interruptible():
            command()
    except (Interrupted, KeyboardInterrupt) as error:
        code = error.exit_code if isinstance(error, Interrupted) else 130
        message = (str(error) or "interrupted") + _how_to_go_on()
    except Exception as error:  # noqa: BLE001 - the last place where an error can be explained
        code, message = explain(error)
    else:
        return
    if wants_json:
        typer.echo(json.dumps({"error": message, "exit_code": code}))
    else:
        typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def _how_to_go_on() -> str:
    with contextlib.suppress(GenstreamError, OSError, KeyError):
        runs = Run.all()
        mine = runs and runs[-1].info()["process"]["pid"] == os.getpid()
        if mine and runs[-1].status in ("interrupted", "running"):
            return f": `genstream resume {runs[-1].id}` goes on"
    return ""


def run_config(flow: Callable[[str], object]) -> None:
    """The command line of a flow's module: make a run of a configuration and call the flow."""

    def command(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
        from flows.stages import begin

        run = begin(config, overrides or ())
        flow(str(run.path))
        _finish(run, as_json)

    _single(command)


def run_existing(flow: Callable[[str], object]) -> None:
    """The command line of a flow's module that takes a run which is there already."""

    def command(run: RunRef, as_json: AsJson = False) -> None:
        found = Run.find(run)
        flow(str(found.path))
        _finish(found, as_json)

    _single(command)


def _single(command: Callable[..., None]) -> None:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command()(command)
    guarded(alone)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error; the traceback of a bug is written to a file."""
    if isinstance(error, GenstreamError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return StorageError.exit_code, f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return 5, "out of memory: set compute.memory_limit, or use fewer compute.workers"
    text = "".join(traceback.format_exception(error))
    name = f"crash-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    path = STATE / name
    try:
        STATE.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        path = Path(tempfile.gettempdir()) / name
        path.write_text(text, encoding="utf-8")
    first = " ".join(f"{type(error).__name__}: {error}".split())
    return 70, f"a bug in genstream ({first[:200]}); the traceback is in {path}"


if __name__ == "__main__":
    main()
