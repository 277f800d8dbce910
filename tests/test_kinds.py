"""Every kind of model through the command line, verb by verb."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from flows import cli

KINDS: dict[str, dict[str, str]] = {
    "full beside labels": {
        "columns": "{a: real, b: real, c: real, town: categorical, n: count}",
        "model": "{n_components: 2, covariance: full}",
    },
    "limits": {
        "columns": "{a: {kind: real, lower: -1.0}, b: {kind: real, upper: 2}, n: count}",
        "model": "{n_components: 2}",
    },
    "student": {
        "columns": "{a: real, b: real, c: real}",
        "model": "{n_components: 2, tails: student}",
    },
    "counts": {
        "columns": "{n: count, m: count, a: real}",
        "model": "{n_components: 2, counts: {n: negative_binomial, m: zero_inflated}}",
    },
    "blocks": {
        "columns": "{a: real, b: real, c: real, n: count, m: count, town: categorical}",
        "model": "{n_components: 2, blocks: [{columns: [a, b], family: student}, "
        "{columns: [n, m], family: multinomial}]}",
    },
    "factor analysis": {
        "columns": "{a: real, b: real, c: real}",
        "model": "{kind: factors, n_factors: 1}",
    },
    "ppca": {
        "columns": "{a: real, b: real, c: real}",
        "model": "{kind: factors, n_factors: 1, noise: isotropic}",
    },
    "binary factors": {
        "columns": "{p: binary, q: binary, r: binary, s: binary}",
        "model": "{kind: factors, n_factors: 1}",
    },
    "count factors": {
        "columns": "{n: count, m: count, o: count}",
        "model": "{kind: factors, n_factors: 2}",
    },
    "mixture of factors": {
        "columns": "{a: real, b: real, c: real}",
        "model": "{kind: mixture_of_factors, n_components: 2, n_factors: 1, shared_noise: true}",
    },
    "kmeans": {
        "columns": "{a: real, b: real, c: real}",
        "model": "{kind: kmeans, n_components: 2}",
    },
}

CONFIG = """\
name: kind
data: {{source: rows*.csv, dataset: data/kind, columns: {columns}}}
model: {model}
fit: {{n_init: 2, max_steps: 15, tolerance: 1e-3}}
publish: {{model: models/kind}}
report: {report}
orchestrate: none
"""


def write_rows(path: str, n: int = 300, seed: int = 0) -> None:
    """Two kinds of rows, one entry in ten missing."""
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c", "n", "m", "o", "town", "p", "q", "r", "s"]
    lines = [",".join(names)]
    for _ in range(n):
        k, t = rng.integers(2), rng.normal()
        reals = [4 * k + t + 0.5 * rng.normal(), 1 - t + 0.5 * rng.normal(), t + rng.normal()]
        counts = rng.poisson([2 + 6 * k, 3 + 2 * abs(t), 1 + 4 * (1 - k)])
        bits = (rng.random(4) < 1 / (1 + np.exp(-2 * t))).astype(int)
        town = ("Ulm", "Bonn", "Kiel")[int(rng.integers(2) + k)]
        row = [*(f"{x:.3f}" for x in reals), *map(str, counts), town, *map(str, bits)]
        lines.append(",".join("" if rng.random() < 0.1 else cell for cell in row))
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., str]:
    """Call `genstream` in a folder with data, in this process; what it printed."""
    monkeypatch.chdir(tmp_path)
    write_rows("rows.csv")

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["genstream", *map(str, arguments)])
        stopped: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            stopped = stop.code or 0
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        assert stopped == code, err.decode()
        return out.decode() + (err.decode() if code else "")

    return run


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("name", KINDS)
def test_all_verbs(call: Callable[..., str], name: str) -> None:
    kind = KINDS[name]
    Path("c.yaml").write_text(CONFIG.format(**kind, report="true"))
    assert json.loads(call("plan", "c.yaml", "--json"))["rows"] > 0
    fitted = json.loads(call("fit", "c.yaml", "--json"))
    scores = fitted["stages"]["evaluate"]
    bound = name in ("binary factors", "count factors")
    assert scores["bound"] is bound
    assert np.isfinite(scores["held_out"]["mean_loglik"])
    columns = list(YAML(typ="safe").load(kind["columns"]))

    scored = table(call("score", "models/kind", "rows.csv"))
    assert ("log_prob_bound" in scored[0]) is bound
    assigned = table(call("assign", "models/kind", "rows.csv"))
    assert len(assigned) == 300
    assert ("factor_0" in assigned[0]) is ("n_factors" in kind["model"])

    filled = table(call("impute", "models/kind", "rows.csv"))
    given = table(Path("rows.csv").read_text())
    for before, after in zip(given, filled, strict=True):
        for column in columns:
            assert after[column] != ""
            if before[column] and column != "town":
                assert float(after[column]) == float(before[column])
            elif before[column]:
                assert after[column] == before[column]
    drawn = call("impute", "models/kind", "rows.csv", "--draw", "--seed", 3)
    assert drawn == call("impute", "models/kind", "rows.csv", "--draw", "--seed", 3)

    sampled = table(call("sample", "models/kind", "-n", 5))
    assert list(sampled[0]) == columns
    value = {"a": "1.5", "p": "1", "n": "4"}[columns[0]]
    told = table(call("sample", "models/kind", "-n", 5, "--given", f"{columns[0]}={value}"))
    assert {float(row[columns[0]]) for row in told} == {float(value)}

    latent = "factor" if "kind: factors" in kind["model"] else "components"
    assert latent in call("show", "models/kind")
    page = next(Path("runs").glob("*/report.html")).read_text()
    assert ("bound on the log-likelihood" in page) is bound
    assert ("<h2>Factors</h2>" in page) is ("n_factors" in kind["model"])

    write_rows("rows2.csv", seed=1)
    updated = json.loads(call("update", "c.yaml", "--json"))
    assert [batch["status"] for batch in updated["batches"]] == ["learned"]


def test_a_fit_goes_on_from_a_model_and_leaves_what_is_frozen(call: Callable[..., str]) -> None:
    kind = {"columns": "{a: real, b: real}", "model": "{n_components: 2}"}
    Path("c.yaml").write_text(CONFIG.format(**kind, report="false"))
    call("fit", "c.yaml")
    first = json.loads(call("show", "models/kind", "--json"))
    call(
        "fit",
        "c.yaml",
        "model.start=models/kind",
        "model.frozen=[mean]",
        "publish.model=models/second",
        "fit.seed=7",
        "model.prior=null",
    )
    second = json.loads(call("show", "models/second", "--json"))
    means = [
        {row["component"]: row["a"].split()[0] for row in found["components"]}
        for found in (first, second)
    ]
    assert means[0] == means[1]
    assert first["components"] != second["components"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.start=models/none", "no model and no run 'models/none'"),
        ("model.start=models/kind", "2 components of gaussian and 0 factors"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    call: Callable[..., str], override: str, message: str
) -> None:
    kind = {"columns": "{a: real, b: real}", "model": "{n_components: 2}"}
    Path("c.yaml").write_text(CONFIG.format(**kind, report="false"))
    call("fit", "c.yaml")
    assert message in call("fit", "c.yaml", override, "model.n_components=3", code=2)


@pytest.mark.parametrize(
    ("columns", "model", "message"),
    [
        ("{a: real}", "{kind: factors}", "model.n_factors: is required and missing"),
        ("{a: real}", "{kind: mixture}", "model.n_components: is required and missing"),
        (
            "{a: real, b: real}",
            "{kind: factors, n_factors: 2}",
            "model.n_factors: is 2, and must be less than the 2 real columns",
        ),
        (
            "{a: real}",
            "{kind: factors, n_factors: 1, covariance: full}",
            "model.covariance: is of mixture, and the kind is factors: leave it out",
        ),
        (
            "{a: real, n: count}",
            "{kind: factors, n_factors: 1}",
            "factors are of columns of one kind, and data.columns has count and real",
        ),
        (
            "{a: real, n: count}",
            "{kind: kmeans, n_components: 2}",
            "kmeans needs real columns, and 'n' is count",
        ),
        (
            "{a: real}",
            "{n_components: 2, counts: {a: poisson}}",
            "model.counts.a: 'a' is real, not a count column",
        ),
        (
            "{a: real}",
            "{n_components: 2, blocks: [{columns: [a, z], family: full}]}",
            "model.blocks.0: no column 'z' in data.columns",
        ),
        (
            "{a: real}",
            "{n_components: 2, blocks: [{column: [a], family: full}]}",
            "unknown key; allowed are columns, family; did you mean 'columns'?",
        ),
        ("{a: real}", "{kind: mixtur, n_components: 2}", "did you mean 'mixture'?"),
        ("{a: real}", "{n_components: 2, frozen: [mean]}", "model.frozen: name a model"),
        (
            "{a: real}",
            "{n_components: 2, start: m, frozen: [means]}",
            "there is no parameter 'means'; there are weights, mean",
        ),
    ],
)
def test_what_does_not_fit_together_is_said(
    call: Callable[..., str], columns: str, model: str, message: str
) -> None:
    Path("c.yaml").write_text(CONFIG.format(columns=columns, model=model, report="false"))
    assert message in call("fit", "c.yaml", code=2)


@pytest.mark.parametrize("rule", ["hard", "sampled", "truncated"])
def test_other_responsibilities(call: Callable[..., str], rule: str) -> None:
    kind = {"columns": "{a: real, b: real}", "model": "{n_components: 3}"}
    Path("c.yaml").write_text(CONFIG.format(**kind, report="false"))
    found = json.loads(call("fit", "c.yaml", f"fit.responsibility={rule}", "fit.top=2", "--json"))
    assert np.isfinite(found["stages"]["evaluate"]["train"]["mean_loglik"])


def test_bad_values_given_to_sample_are_named(call: Callable[..., str]) -> None:
    columns = "{a: real, n: count, town: categorical}"
    kind = {"columns": columns, "model": "{n_components: 2}"}
    Path("c.yaml").write_text(CONFIG.format(**kind, report="false"))
    call("fit", "c.yaml")
    for text, message in (
        ("n=-3", "error: column 'n': -3 is not possible in a count column"),
        ("a", "expected COLUMN=VALUE"),
        ("z=1", "no column 'z'"),
        ("a=x", "column 'a' cannot be 'x': it takes a number"),
        ("town=Rom", "column 'town' cannot be 'Rom': it takes the levels"),
    ):
        code = 2 if text == "a" else 3
        assert message in call("sample", "models/kind", "--given", text, code=code)
    twice = ("--given", "a=1", "--given", "a=2")
    assert "'a' is given twice" in call("sample", "models/kind", *twice, code=2)
    everything = ("--given", "a=1", "--given", "n=2", "--given", "town=Ulm")
    assert "not of all" in call("sample", "models/kind", *everything, code=2)


def test_labels_that_read_as_positions_are_given_to_sample(call: Callable[..., str]) -> None:
    lines = [f"{j % 2}.0,{10 * (j % 2) + j / 1000}" for j in range(1, 301)]
    Path("rows.csv").write_text("\n".join(["g,a", *lines]) + "\n")
    kind = {"columns": "{g: categorical, a: real}", "model": "{n_components: 2}"}
    Path("c.yaml").write_text(CONFIG.format(**kind, report="false"))
    call("fit", "c.yaml")
    for label, least, most in (("0.0", -1, 2), ("1.0", 9, 12)):
        drawn = table(call("sample", "models/kind", "--given", f"g={label}"))
        assert all(row["g"] == label and least < float(row["a"]) < most for row in drawn)


def test_columns_without_a_name_may_be_left_out(call: Callable[..., str]) -> None:
    lines = [f"{j},{j % 7},{j % 5}" for j in range(100)]
    Path("rows.csv").write_text("\n".join([",a,b", *lines]) + "\n")
    kind = {"columns": "{a: real, b: real}", "model": "{n_components: 2}"}
    Path("c.yaml").write_text(CONFIG.format(**kind, report="false"))
    call("fit", "c.yaml")
    assert len(table(call("score", "models/kind", "rows.csv"))) == 100
