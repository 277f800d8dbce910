"""Every verb on a small file of mixed columns with gaps, and what each does with bad input."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from flows import cli
from flows.config import load
from flows.plan import make_plan


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.out)))


Call = Callable[..., Ran]

CONFIG = """\
name: small
data:
  source: rows.csv
  dataset: data/small
  columns: {height: {kind: real, unit: cm}, visits: count, town: categorical, member: binary}
  id: person
model: {n_components: 2}
fit: {n_init: 2, max_steps: 30}
publish: {model: models/small}
report: false
orchestrate: none
"""


def write_rows(path: str, n: int = 600, seed: int = 0, **replaced: dict[int, str]) -> None:
    rng = np.random.default_rng(seed)
    lines = ["person,height,visits,town,member"]
    for i in range(n):
        k = rng.integers(2)
        town = ("Ulm", "Bonn", "Köln, am Rhein")[int(rng.integers(2)) + int(k)]
        row = {
            "person": f"p{i}",
            "height": "" if rng.random() < 0.1 else f"{rng.normal(150 + 30 * k, 3):.2f}",
            "visits": str(rng.poisson(2 + 8 * k)),
            "town": f'"{town}"',
            "member": str(int(rng.random() < 0.2 + 0.6 * k)),
        }
        row |= {name: at[i] for name, at in replaced.items() if i in at}
        lines.append(",".join(row.values()))
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Call:
    """Call `genstream` in a folder with data and a configuration, in this process."""
    monkeypatch.chdir(tmp_path)
    write_rows("rows.csv")
    Path("config.yaml").write_text(CONFIG)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["genstream", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return Ran(code, out.decode(), err.decode())

    return run


@pytest.fixture
def fitted(call: Call) -> Call:
    assert call("fit", "config.yaml").code == 0
    return call


def test_check_and_plan_read_no_more_than_they_must(call: Call) -> None:
    ran = call("check", "config.yaml", "--json")
    assert ran.json == {"config": "config.yaml", "n_columns": 4, "n_files": 1}
    plan = call("plan", "config.yaml", "--json").json
    assert plan["rows"] == 540
    assert plan["exact"] is True
    assert plan["columns"] == 4
    assert plan["memory"] >= plan["least_memory"] > 0
    assert "rows" in call("plan", "config.yaml").out
    assert not Path("data").exists()
    assert not Path("runs").exists()


def test_a_plan_of_packed_text_is_an_estimate(call: Call) -> None:
    write_rows("many.csv", 30_000)
    plan = make_plan(load("config.yaml", ["data.source=many.csv", "data.holdout=null"]))
    assert not plan.exact
    assert plan.rows == pytest.approx(30_000, rel=0.2)
    with gzip.open("many.csv.gz", "wb") as file:
        file.write(Path("many.csv").read_bytes())
    assert not make_plan(load("config.yaml", ["data.source=many.csv.gz"])).exact


def test_a_limit_that_is_too_small_is_refused_with_the_least_that_works(call: Call) -> None:
    ran = call("plan", "config.yaml", "compute.memory_limit=10MB", "compute.workers=4")
    assert ran.code == 2
    assert "compute.workers=1" in ran.err
    least = ran.err.split("compute.memory_limit=")[1].split()[0]
    ran = call("plan", "config.yaml", f"compute.memory_limit={least}", "compute.workers=4")
    assert ran.code == 0
    assert call("fit", "config.yaml", "compute.memory_limit=10MB").code == 2
    assert not Path("runs").exists()
    assert not Path("data").exists()


def test_a_disk_that_is_too_small_is_refused(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.plan._disk_free", lambda _: 1000)
    ran = call("fit", "config.yaml")
    assert ran.code == 6
    assert "data/small" in ran.err
    assert not Path("runs").exists()


def test_ingest_twice_is_ingest_once(call: Call) -> None:
    first = call("ingest", "config.yaml", "--json").json
    assert first["rows"] == 600
    assert first["batches"][0]["status"] == "stored"
    second = call("ingest", "config.yaml", "--json").json
    assert second["rows"] == 600
    assert second["batches"][0]["status"] == "duplicate"
    write_rows("more.csv", 100, seed=1)
    third = call("ingest", "config.yaml", "data.source=[rows.csv, more.csv]").out
    assert "700 rows in data/small" in third


def test_a_fit_says_what_it_found_and_what_to_type_next(call: Call) -> None:
    ran = call("fit", "config.yaml", "report=true")
    assert ran.code == 0
    assert ran.err == ""
    assert "held out  mean log-likelihood" in ran.out
    assert "model     models/small, version 1" in ran.out
    report = next(line.split()[1] for line in ran.out.splitlines() if line.startswith("report"))
    assert Path(report).is_file()
    again = call("fit", "config.yaml", "--json").json
    assert again["status"] == "done"
    assert again["stages"]["publish"] == {"model": "models/small", "version": 2}
    runs = call("runs", "--json").json["runs"]
    assert [run["status"] for run in runs] == ["done", "done"]
    assert "done" in call("runs").out
    assert call("resume", "last").code == 0
    Path(report).unlink()
    assert call("report", runs[1]["run"]).out.strip() == report
    assert Path(report).is_file()


def test_show(fitted: Call) -> None:
    model = fitted("show", "models/small", "--json").json
    assert sum(c["weight"] for c in model["components"]) == pytest.approx(1.0)
    assert set(model["components"][0]) >= {"height", "visits", "town", "member"}
    assert model["versions"][0]["champion"] is True
    assert "2 components over 4 columns" in fitted("show", "models/small@1").out
    dataset = fitted("show", "data/small", "--json").json
    assert dataset["rows"] == 600
    assert dataset["columns"][0]["unit"] == "cm"
    assert "Köln" in fitted("show", "data/small").out
    assert "held out" in fitted("show", "last").out
    assert fitted("show", "nothing").code == 2
    assert fitted("show", "models/small@7").code == 2
    assert fitted("show", "models/small@x").code == 2


def test_samples_are_rows_of_labels(fitted: Call) -> None:
    ran = fitted("sample", "models/small", "-n", 50, "--component")
    assert len(ran.rows) == 50
    assert {row["town"] for row in ran.rows} <= {"Ulm", "Bonn", "Köln, am Rhein"}
    assert {row["member"] for row in ran.rows} <= {"0", "1"}
    assert all(float(row["visits"]).is_integer() for row in ran.rows)
    assert fitted("sample", "models/small", "-n", 50, "--component").out == ran.out
    assert fitted("sample", "models/small", "-n", 50, "--seed", 1, "--component").out != ran.out
    fitted("sample", "last", "-n", 70_000, "-o", "drawn.parquet")
    drawn = pq.read_table("drawn.parquet")
    assert drawn.num_rows == 70_000
    assert drawn.column_names == ["height", "visits", "town", "member"]


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.zarr"])
def test_assignments_in_every_format(fitted: Call, name: str) -> None:
    ran = fitted("assign", "models/small", "rows.csv", "-o", name, "--responsibilities", "--json")
    assert ran.json["rows"] == 600
    if name == "out.csv":
        table = {k: np.array(v) for k, v in pa.csv.read_csv(name).to_pydict().items()}
    elif name == "out.parquet":
        table = {k: np.array(v) for k, v in pq.read_table(name).to_pydict().items()}
    else:
        group = zarr.open_group(name, mode="r")
        table = {key: group[key][:] for key in group.array_keys()}  # type: ignore[index]
    assert list(table["row"]) == list(range(600))
    both = np.stack([table["responsibility_0"], table["responsibility_1"]])
    np.testing.assert_allclose(both.sum(axis=0), 1.0)
    np.testing.assert_array_equal(table["component"], both.argmax(axis=0))
    np.testing.assert_allclose(table["responsibility"], both.max(axis=0))
    assert ran.json["mean_loglik"] == pytest.approx(table["log_prob"].mean())


def test_a_file_and_its_dataset_score_alike(fitted: Call) -> None:
    file = fitted("score", "models/small", "rows.csv", "--id", "person").rows
    stored = fitted("score", "models/small", "data/small", "--id", "person").rows
    assert file == stored
    assert file[0]["person"] == "p0"
    trained = fitted("show", "last", "--json").json["stages"]["evaluate"]
    total = trained["train"]["loglik"] + trained["held_out"]["loglik"]
    assert sum(float(row["log_prob"]) for row in file) == pytest.approx(total, rel=1e-9)


def test_levels_never_seen(fitted: Call) -> None:
    write_rows("new.csv", 20, seed=5, town={7: "Paris"})
    ran = fitted("score", "models/small", "new.csv")
    assert ran.code == 3
    assert "row 7" in ran.err
    assert "'town'" in ran.err
    assert "'Paris'" in ran.err
    ran = fitted("score", "models/small", "new.csv", "-o", "new.parquet")
    assert ran.code == 3
    assert not list(Path().glob("*new.parquet*"))
    ran = fitted("score", "models/small", "new.csv", "--unseen-as-missing")
    assert len(ran.rows) == 20
    # The dataset learns the level; the model of before still does not know it.
    assert fitted("ingest", "config.yaml", "data.source=new.csv").code == 0
    ran = fitted("score", "models/small", "data/small")
    assert ran.code == 3
    assert "row 607" in ran.err
    assert "'Paris'" in ran.err
    ran = fitted("assign", "models/small", "data/small", "--unseen-as-missing")
    assert len(ran.rows) == 620


def test_what_meant_a_missing_entry_in_the_fit_means_it_in_what_is_scored(call: Call) -> None:
    nulls = 'data.null_values=["-999"]'
    write_rows("rows.csv", 300, height={4: "-999"})
    assert call("fit", "config.yaml", nulls).code == 0
    run = call("show", "last", "--json").json["id"]
    for model in ("models/small", "models/small@1", run):
        filled = call("impute", model, "rows.csv", "--id", "person").rows
        assert 100 < float(filled[4]["height"]) < 200
    # An update hands it on.
    write_rows("rows.csv", 200, seed=3)
    assert call("update", "config.yaml", nulls).code == 0
    assert call("show", "models/small", "--json").json["champion"] == 2
    write_rows("new.csv", 20, height={4: "-999", 5: "-1"})
    heights = [float(row["height"]) for row in call("impute", "models/small", "new.csv").rows]
    assert 100 < heights[4] < 200
    assert heights[5] == -1
    # What is said here counts instead.
    ran = call("impute", "models/small", "new.csv", "--null", "-1", "--null", "n/a")
    heights = [float(row["height"]) for row in ran.rows]
    assert heights[4] == -999
    assert 100 < heights[5] < 200
    told = [float(row["log_prob"]) for row in call("score", "models/small", "new.csv").rows]
    assert told[4] > -100 > told[5]


def test_rows_of_which_only_some_have_ids_are_numbered(call: Call) -> None:
    assert call("fit", "config.yaml", "data.id=null").code == 0
    write_rows("more.csv", 50, seed=3)
    assert call("ingest", "config.yaml", "data.source=more.csv").code == 0
    ran = call("score", "models/small", "data/small")
    assert [int(row["row"]) for row in ran.rows] == list(range(650))
    assert call("score", "models/small", "data/small", "-o", "out.parquet").code == 0
    ran = call("score", "models/small", "data/small", "--id", "person")
    assert ran.code == 3
    assert "was ingested without an id, or some of it" in ran.err


def test_an_id_never_replaces_what_is_written(fitted: Call) -> None:
    Path("odd.csv").write_text(Path("rows.csv").read_text().replace("person", "component", 1))
    ran = fitted("assign", "models/small", "odd.csv", "--id", "component")
    assert ran.code == 2
    assert "--id component: a column of what is written is called so" in ran.err
    assert fitted("impute", "models/small", "rows.csv", "--id", "visits").code == 2
    assert fitted("score", "models/small", "odd.csv", "--id", "component").code == 0


def test_a_missing_id_is_told_by_the_row_of_the_file(fitted: Call) -> None:
    write_rows("long.csv", 70_000, person={69_000: ""})
    ran = fitted("score", "models/small", "long.csv", "--id", "person", "-o", "out.csv")
    assert ran.code == 3
    assert "row 69000, column 'person': the id is missing" in ran.err


def test_assignments_take_no_more_memory_under_many_components(
    fitted: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import scoring
    from genstream.story import Story

    whole = fitted("assign", "models/small", "rows.csv", "--responsibilities").rows
    scores = fitted("score", "models/small", "rows.csv").rows
    monkeypatch.setattr(scoring, "HELD", 200)
    rows_at_once = []
    infer = Story.infer

    def watched(self: Story, params: Any, rows: Any) -> Any:
        rows_at_once.append(rows.n_rows)
        return infer(self, params, rows)

    monkeypatch.setattr(Story, "infer", watched)
    for source in ("rows.csv", "data/small"):
        parts = fitted("assign", "models/small", source, "--responsibilities").rows
        assert max(rows_at_once) == 100
        for name in ("component", "responsibility_1", "log_prob"):
            found = [float(row[name]) for row in parts]
            np.testing.assert_allclose(found, [float(row[name]) for row in whole], rtol=1e-9)
    rows_at_once.clear()
    assert fitted("score", "models/small", "rows.csv").rows == scores
    assert rows_at_once == []


def test_a_path_of_a_model_may_have_an_at(fitted: Call) -> None:
    Path("me@work").mkdir()
    Path("models").rename("me@work/models")
    for model in ("me@work/models/small", "me@work/models/small@1"):
        assert len(fitted("sample", model, "-n", "3").rows) == 3
        assert fitted("show", model).code == 0
    ran = fitted("sample", "me@work/models/small@first")
    assert ran.code == 2
    assert "a version is a number" in ran.err


def test_a_first_commit_cut_short_leaves_nothing_in_the_way(call: Call) -> None:
    for folder in ("data/small", "models/small"):
        Path(folder, "manifests").mkdir(parents=True)
    assert call("plan", "config.yaml").code == 0
    ran = call("update", "config.yaml")
    assert ran.code == 2
    assert "no model there yet" in ran.err
    assert call("fit", "config.yaml").code == 0
    assert len(call("sample", "models/small", "-n", "3").rows) == 3


def test_limits_of_columns_are_those_of_the_configuration(call: Call) -> None:
    limits = "data.columns={height: {kind: real, lower: 150, resolution: 0.5}, visits: count}"
    Path("rows.csv").write_text("person,height,visits\n" + "p1,151,2\np2,149,3\n" * 40)
    one = ("config.yaml", "data.dataset=data/two", "data.id=null")
    assert call("ingest", *one, "data.columns={height: real, visits: count}").code == 0
    assert call("fit", *one, limits, "model.n_components=1").code == 0
    height, _ = call("show", "models/small", "--json").json["columns"]
    assert (height["lower"], height["resolution"]) == (150.0, 0.5)


def test_columns_left_out_of_a_table_are_never_looked_at(call: Call) -> None:
    n = 2000
    table = pa.table(
        {
            "x": np.random.default_rng(0).standard_normal(n),
            "at": pa.array(np.arange(n), pa.timestamp("s")),
            "name": [f"n{i}" for i in range(n)],
        }
    )
    pq.write_table(table, "t.parquet")
    with pa.ipc.new_stream("t.arrows", table.schema) as stream:
        stream.write_table(table)
    for source in ("t.parquet", "t.arrows"):
        options = (
            f"data.source={source}",
            f"data.dataset=data/{source}",
            "data.columns={x: real}",
            "data.id=null",
            "model.n_components=1",
        )
        plan = call("plan", "config.yaml", *options, "--json").json
        assert plan["rows"] == 1800
        assert call("fit", "config.yaml", *options).code == 0


def test_outputs_are_not_overwritten_unasked(fitted: Call) -> None:
    Path("out.csv").write_text("precious")
    assert fitted("score", "models/small", "rows.csv", "-o", "out.csv").code == 2
    assert Path("out.csv").read_text() == "precious"
    assert fitted("score", "models/small", "rows.csv", "-o", "out.csv", "--overwrite").code == 0
    assert fitted("sample", "models/small", "-o", "out.txt").code == 2
    assert fitted("sample", "models/small", "-o", "none/out.csv").code == 2
    assert fitted("score", "models/small", "rows.csv", "--json").code == 2
    ran = fitted("score", "models/small", "rows.csv", "-o", "o.zarr", "--id", "person")
    assert ran.code == 2
    assert "text" in ran.err
    assert not list(Path().glob("*o.zarr*"))


def test_an_output_never_replaces_its_input(fitted: Call) -> None:
    before = Path("rows.csv").read_bytes()
    ran = fitted("score", "models/small", "rows.csv", "-o", "rows.csv", "--overwrite")
    assert ran.code == 2
    assert "rows.csv is what is read" in ran.err
    assert Path("rows.csv").read_bytes() == before


def test_rows_of_other_batches_are_told(fitted: Call) -> None:
    write_rows("rows.csv", n=200, seed=9)
    ran = fitted("fit", "config.yaml")
    assert ran.code == 0
    assert "800 rows in data/small, 600 of them of batches brought in before" in ran.out


def test_runs_without_held_out_rows_are_listed(call: Call) -> None:
    write_rows("rows.csv", n=60)
    assert call("fit", "config.yaml", "data.holdout=null").code == 0
    ran = call("runs")
    assert ran.code == 0
    assert "done" in ran.out


def test_a_prefect_server_that_is_not_there(fitted: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    ran = fitted("fit", "config.yaml", "orchestrate=auto")
    assert ran.code == 5
    assert "no Prefect server answers at http://127.0.0.1:9/api" in ran.err


def test_version(call: Call) -> None:
    assert call("--version").out.startswith("genstream 0.")


def test_init_writes_what_can_be_fitted(call: Call) -> None:
    ran = call("init", "rows.csv", "-o", "mine.yaml", "--json")
    assert {c["name"]: c["kind"] for c in ran.json["columns"]} == {
        "height": "real",
        "visits": "count",
        "town": "categorical",
        "member": "binary",
    }
    assert "# person: categorical" in Path("mine.yaml").read_text()
    assert call("init", "rows.csv", "-o", "mine.yaml").code == 2
    assert call("plan", "mine.yaml").code == 0
    assert call("fit", "mine.yaml", "fit.n_init=1", "model.n_components=2").code == 0
    assert call("show", "models/rows").code == 0


def test_init_of_arrays_and_odd_names(call: Call) -> None:
    rng = np.random.default_rng(0)
    np.save("numbers.npy", rng.standard_normal((50, 2)))
    assert call("init", "numbers.npy", "-o", "a.yaml").code == 0
    assert call("fit", "a.yaml", "fit.n_init=1", "model.n_components=1").code == 0
    table = pa.table({'we: "ird", {#}': rng.standard_normal(50), "no": rng.standard_normal(50)})
    pq.write_table(table, "odd.parquet")
    assert call("init", "odd.parquet", "-o", "b.yaml").code == 0
    assert list(load("b.yaml").column_specs() or ()) == ['we: "ird", {#}', "no"]
    assert call("fit", "b.yaml", "fit.n_init=1", "model.n_components=1").code == 0
    table = pa.table({"x": rng.standard_normal(50), "several": [[1, 2]] * 50})
    pq.write_table(table, "nested.parquet")
    assert call("init", "nested.parquet", "-o", "d.yaml").code == 0
    assert "holds list" in Path("d.yaml").read_text()
    assert call("fit", "d.yaml", "fit.n_init=1", "model.n_components=1").code == 0
    table = pa.table({"all": pa.nulls(5, pa.float64())})
    pq.write_table(table, "empty.parquet")
    ran = call("init", "empty.parquet", "-o", "c.yaml")
    assert ran.code == 3
    assert not Path("c.yaml").exists()


def write_bytes(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


def packed(n: int) -> bytes:
    return gzip.compress(Path("rows.csv").read_bytes())[:n]


BAD_DATA: dict[str, tuple[Callable[[], object], list[str], int, str]] = {
    "no such file": (lambda: None, ["data.source=row.csv"], 3, "did you mean 'rows.csv'"),
    "no file matches": (lambda: None, ["data.source=in/*.csv"], 3, "in/*.csv"),
    "an empty file": (lambda: write_bytes("rows.csv", b""), [], 3, "rows.csv"),
    "a header alone": (
        lambda: write_bytes("rows.csv", b"person,height,visits,town,member\n"),
        [],
        3,
        "no rows",
    ),
    "a ragged line": (
        lambda: write_bytes("rows.csv", Path("rows.csv").read_bytes() + b"p9,1\n"),
        [],
        3,
        "rows.csv",
    ),
    "a cut archive": (
        lambda: write_bytes("rows.csv.gz", packed(900)),
        ["data.source=rows.csv.gz"],
        3,
        "rows.csv.gz",
    ),
    "an unknown column": (lambda: None, ["data.columns={hight: real}"], 3, "did you mean 'height'"),
    "a column twice": (
        lambda: write_bytes("rows.csv", b"a,a\n1,2\n"),
        ["data.columns={a: real}", "data.id=null"],
        3,
        "'a'",
    ),
    "text among numbers": (
        lambda: write_rows("rows.csv", height={9: "tall"}),
        [],
        3,
        "row 9, column 'height'",
    ),
    "an infinite number": (
        lambda: write_rows("rows.csv", height={9: "inf"}),
        [],
        3,
        "row 9, column 'height'",
    ),
    "a negative count": (
        lambda: write_rows("rows.csv", visits={9: "-1"}),
        [],
        3,
        "row 9, column 'visits'",
    ),
    "a fractional count": (
        lambda: write_rows("rows.csv", visits={9: "1.5"}),
        [],
        3,
        "row 9, column 'visits'",
    ),
    "neither 0 nor 1": (
        lambda: write_rows("rows.csv", member={9: "2"}),
        [],
        3,
        "row 9, column 'member'",
    ),
    "a level that is not listed": (
        lambda: None,
        ["data.columns.town={kind: categorical, levels: [Ulm, Bonn]}"],
        3,
        "'Köln, am Rhein'",
    ),
    "a gap where none may be": (lambda: None, ["data.missing=forbid"], 3, "column 'height'"),
    "a weight below 0": (
        lambda: write_rows("rows.csv", visits={9: "-1"}),
        ["data.weights=visits", "data.columns={height: real}"],
        3,
        "visits",
    ),
    "no such weights": (lambda: None, ["data.weights=mass"], 3, "'mass'"),
    "no such id": (lambda: None, ["data.id=persons"], 3, "did you mean 'person'"),
    "a folder in place of a file": (lambda: Path("d").mkdir(), ["data.source=d"], 3, "d"),
    "not a parquet file": (
        lambda: write_bytes("x.parquet", b"nothing of the kind"),
        ["data.source=x.parquet"],
        3,
        "x.parquet",
    ),
    "not an npy file": (
        lambda: write_bytes("x.npy", b"\x93NUMPY nothing of the kind"),
        ["data.source=x.npy"],
        3,
        "x.npy",
    ),
    "too few rows for levels": (
        lambda: write_rows("rows.csv", 40, town=dict.fromkeys(range(40), "")),
        [],
        3,
        "'town'",
    ),
    "an unreachable cluster": (
        lambda: None,
        ["compute.scheduler=tcp://127.0.0.1:9"],
        5,
        "tcp://127.0.0.1:9",
    ),
}


def files(folder: str) -> Iterator[Path]:
    return (path for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_get_one_line_and_leave_nothing(
    case: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, overrides, code, words = BAD_DATA[case]
    monkeypatch.setattr("flows.stages.CONNECT_SECONDS", 1)
    prepare()
    ran = call("fit", "config.yaml", *overrides)
    assert ran.code == code, ran.err
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1
    assert ran.out == ""
    if code == 3:
        assert not list(files("data"))
    assert not list(files("models"))
    for run in Path().glob("runs/*/run.json"):
        assert json.loads(run.read_text())["status"] == "failed"
    if code == 3:
        checked = call("check", "config.yaml", *overrides)
        assert checked.code in (0, 3)


def test_other_columns_than_the_dataset_has(fitted: Call) -> None:
    ran = fitted("fit", "config.yaml", "data.columns={height: real}")
    assert ran.code == 2
    assert "data/small" in ran.err
    ran = fitted("fit", "config.yaml", "data.columns.visits=real", "data.source=rows.csv")
    assert ran.code == 2
    assert "'visits'" in ran.err


def test_a_flipped_bit_is_noticed(fitted: Call) -> None:
    (chunk,) = [p for p in files("data/small/segments") if "values" in str(p) and "c" in p.name[:2]]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    ran = fitted("fit", "config.yaml")
    assert ran.code == 7
    assert str(chunk) in ran.err


def test_a_folder_that_cannot_be_written(call: Call) -> None:
    Path("runs").write_text("a file is in the way")
    ran = call("fit", "config.yaml")
    assert ran.code == 6
    assert "runs" in ran.err
