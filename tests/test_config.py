"""Configurations: what is accepted, and that every mistake is named where it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.config import Config, Interval, json_schema, load, parse_size, validate
from genstream.errors import ConfigError

SMALL = """\
version: 1
name: nightly
data:
  source: landing/*.parquet
  dataset: data/nightly
  columns: {delay: real, carrier: categorical, n_seats: {kind: count, unit: seat}}
  id: flight_id
  holdout: 0.2
model: {kind: mixture, n_components: 8}
fit: {tolerance: 1e-4, dtype: float32}
compute: {scheduler: threads, workers: 2, memory_limit: 2GiB}
checkpoint: {every: 5min, keep: 2}
publish: {model: models/nightly}
schedule: {cron: "15 2 * * *", timezone: Europe/Berlin, overlap: queue, catch_up: false}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def writer(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return writer


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return [line.replace(f"{path}:", "") for line in str(caught.value).splitlines()]


def test_a_file_becomes_a_configuration(write: Any) -> None:
    config = load(write(SMALL))
    assert config.name == "nightly"
    assert config.paths == ["landing/*.parquet"]
    assert config.compute.memory_limit == 2 * 2**30
    assert config.checkpoint.every == Interval(seconds=300.0)
    assert config.schedule is not None
    assert config.schedule.cron == "15 2 * * *"
    assert config.fit.tolerance == 1e-4
    assert config.holdout == 0.2
    specs = config.column_specs()
    assert specs is not None
    assert list(specs) == ["delay", "carrier", "n_seats"]
    assert specs["n_seats"].unit == "seat"


def test_a_resolved_configuration_reads_back_equal(write: Any) -> None:
    config = load(write(SMALL))
    resolved = load(write(config.to_yaml()))
    assert resolved.dump() == config.dump()
    assert validate(json.loads(json.dumps(config.dump()))).dump() == config.dump()


def test_every_mistake_is_reported_at_once_where_it_stands(write: Any) -> None:
    path = write(
        "name: bad name!\n"
        "data:\n"
        "  source: a.npy\n"
        "  columns: {delay: reel, carrier: {kind: categorical, lvels: [a]}}\n"
        "  holdout: 1.5\n"
        "  colums: 3\n"
        "model: {n_components: 0, covariance: ful}\n"
        'fit: {max_steps: "ten", seed: true, tolerance: .nan}\n'
        "compute: {memory_limit: 2 GiBB, scheduler: thread}\n"
        "checkpoint: {every: fortnightly}\n"
        "publish: models/x\n"
        "schedul: {cron: x}\n"
    )
    lines = problems(path)
    expected = [
        ("1:7", "name", "letters"),
        ("4:20", "data.columns.delay", "did you mean 'real'?"),
        ("4:55", "data.columns.carrier.lvels", "did you mean 'levels'?"),
        ("5:12", "data.holdout", "less than 1"),
        ("6:3", "data.colums", "did you mean 'columns'?"),
        ("7:23", "model.n_components", "got 0"),
        ("7:38", "model.covariance", "did you mean 'full'?"),
        ("8:18", "fit.max_steps", "integer"),
        ("8:31", "fit.seed", "got True"),
        ("8:48", "fit.tolerance", "finite"),
        ("9:25", "compute.memory_limit", "2GiB"),
        ("9:44", "compute.scheduler", "did you mean 'threads'?"),
        ("10:21", "checkpoint.every", "5min"),
        ("11:10", "publish", "keys"),
        ("12:1", "schedul", "did you mean 'schedule'?"),
    ]
    assert len(lines) == len(expected)
    for place, key, words in expected:
        assert any(line.startswith(f"{place}: {key}: ") and words in line for line in lines), (
            place,
            key,
            words,
            lines,
        )


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("", "", "is empty"),
        ("- a\n", "1:1", "expected keys"),
        ("just text\n", "1:1", "expected keys"),
        ("name: a\nname: b\n", "2:1", "duplicate key"),
        ("name: [a\n", "2:1", "not valid YAML"),
        ("data: !!python/object/apply:os.system [ls]\n", "1:", "tags"),
        ("data: !secret x\n", "1:", "tags"),
        ("true: x\n", "1:1", "quote it"),
        ("a: \x00\n", "", "not valid YAML"),
    ],
)
def test_what_is_not_a_configuration(write: Any, text: str, place: str, words: str) -> None:
    (line,) = problems(write(text))
    assert line.removeprefix(str(write(text))).lstrip(": ").startswith(place)
    assert words in line


def test_a_missing_file_suggests_its_neighbour(write: Any, tmp_path: Path) -> None:
    write(SMALL)
    (line,) = problems(tmp_path / "confg.yaml")
    assert "no such configuration" in line
    assert "did you mean" in line


def test_data_given_as_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in problems(tmp_path / "a.bin")[0]
    (tmp_path / "b.bin").write_bytes(b"a" * (1 << 21))
    assert "too many" in problems(tmp_path / "b.bin")[0]
    assert "folder" in problems(tmp_path)[0]


def test_nested_aliases_do_not_expand(write: Any) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "aliases" in problems(write("\n".join(lines)))[0]


def test_overrides_are_yaml_and_come_last(write: Any) -> None:
    config = load(
        write(SMALL),
        [
            "model.n_components=3",
            "compute.memory_limit=500MB",
            "publish=null",
            "data.columns={a: real, b: real}",
            "model.covariance=tied",
            "fit.tolerance=1e-6",
            "data.source=[a.parquet, b.parquet]",
            "data.source.1=c.parquet",
        ],
    )
    assert config.model.n_components == 3
    assert config.compute.memory_limit == 500 * 10**6
    assert config.publish is None
    assert config.model.covariance == "tied"
    assert config.fit.tolerance == 1e-6
    assert config.paths == ["a.parquet", "c.parquet"]


def test_an_override_may_open_a_section(write: Any) -> None:
    path = write("data: {source: a.npy}\nmodel: {n_components: 2}\n")
    assert load(path, ["fit.seed=7"]).fit.seed == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.n_components", "expected key=value"),
        ("=3", "expected key=value"),
        ("model..n=3", "expected key=value"),
        ("model.n_components=ten", "model.n_components: expected a valid integer, got 'ten'"),
        ("model.n_component=3", "did you mean 'n_components'?"),
        ("name.first=3", "name is a value"),
        ("model=[", "not valid YAML"),
        ("model={kind: mixtur, n_components: 2}", "model.kind: expected one of mixture"),
        ("model=null", "model: expected keys"),
    ],
)
def test_a_wrong_override_is_named_by_its_number(write: Any, override: str, words: str) -> None:
    (line,) = problems(write(SMALL), "name=x", override)
    assert line.startswith(f"override 2 ({override})")
    assert words in line


def test_an_unknown_key_of_a_prior_is_named_among_those_there_are(write: Any) -> None:
    allowed = "strength, spread, independence, frequencies, weights; did you mean 'strength'?"
    (line,) = problems(write(SMALL), "model.prior={strenght: 2}")
    assert line.endswith(f"): model.prior.strenght: unknown key; allowed are {allowed}")
    swept = "sweep={over: {model.prior: [weak, {strenght: 2}]}}"
    (line,) = problems(write(SMALL), swept)
    assert line.endswith(
        f"): sweep.over.model.prior.1.strenght: unknown key; allowed are {allowed}"
    )


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ("{strength: -1}", "model.prior.strength: expected greater than 0, got -1"),
        (
            "strong",
            "model.prior: expected weak, null or a mapping such as {strength: 2}, got 'strong'",
        ),
        ("2", "model.prior: expected weak, null or a mapping such as {strength: 2}, got 2"),
    ],
)
def test_a_wrong_prior_is_told_once(write: Any, prior: str, said: str) -> None:
    (line,) = problems(write(SMALL), f"model.prior={prior}")
    assert line.endswith(f"): {said}")


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["data.columns.n_seats={kind: count, lower: 1}"], "data.columns.n_seats.lower", "count"),
        (
            ["data.columns.delay={kind: real, lower: 2, upper: 1}"],
            "data.columns.delay.lower",
            "below upper",
        ),
        (
            ["model.covariance=full", "data.columns={carrier: categorical}"],
            "model.covariance",
            "is of real columns",
        ),
        (["data.id=delay"], "data.id", "also a modelled column"),
        (["data.weights=flight_id"], "data.weights", "already the id"),
        (["data.test=t.npy"], "data.holdout", "either"),
        (["fit.sample_rows=2"], "fit.sample_rows", "8 components"),
        (["fit={forgetting: 0.1, kappa: 0.7}"], "fit.kappa", "beside forgetting"),
        (["fit={forgetting: 0.1, t0: 3}"], "fit.t0", "beside forgetting"),
        (["fit={method: batch, passes: 2}"], "fit.passes", "the method is batch: use max_steps"),
        (["fit={method: incremental, passes: 2}"], "fit.passes", "the method is incremental"),
        (["fit={method: online, max_steps: 9}"], "fit.max_steps", "the method is online"),
        (["fit={method: online, tolerance: 0.1}"], "fit.tolerance", "the method is online"),
        (["data.dataset=null", "data.source=a.csv.gz"], "data.source", "cannot be fitted in place"),
        (["data.source={gigabytes: 1}"], "data.columns", "drawn"),
        (["data.dataset=null", "data.dtype=float32"], "data.dtype", "ingested"),
        (["data.dataset=null"], "data.id", "ingested"),
        (["data.dataset=null", "data.test=t.csv"], "data.test", "in place"),
        (["data.columns.delay={kind: real, levels: [a]}"], "data.columns.delay.levels", "no level"),
        (
            ["data.columns.carrier={kind: categorical, levels: [a, a]}"],
            "data.columns.carrier.levels",
            "twice",
        ),
        (
            ["data.columns.carrier={kind: binary, levels: [a]}"],
            "data.columns.carrier.levels",
            "two",
        ),
    ],
)
def test_contradictions(write: Any, overrides: list[str], key: str, words: str) -> None:
    assert any(
        f": {key}: " in line and words in line for line in problems(write(SMALL), *overrides)
    )


def test_drawn_data(write: Any) -> None:
    path = write(
        "data: {source: {story: mixture, gigabytes: 12}, dataset: data/drawn}\n"
        "model: {n_components: 4}\n"
    )
    config = load(path, ["data.source.gigabytes=0.5"])
    assert config.paths == []
    assert config.data.source.gigabytes == 0.5  # type: ignore[union-attr]
    (line,) = problems(path, "data.source.gigabyte=1")
    assert "did you mean 'gigabytes'?" in line


def test_a_test_file_takes_the_place_of_a_share() -> None:
    values = {"data": {"source": "a.npy", "test": "b.npy"}, "model": {"n_components": 1}}
    assert validate(values).holdout is None
    assert validate(values).dump() == validate(validate(values).dump()).dump()


def test_levels_may_be_numbers() -> None:
    columns = {"month": {"kind": "categorical", "levels": [1, 2, 3]}}
    values = {"data": {"source": "a.parquet", "columns": columns}, "model": {"n_components": 1}}
    specs = validate(values).column_specs()
    assert specs is not None
    assert specs["month"].levels == ["1", "2", "3"]


def test_words_that_look_like_booleans_stay_words(write: Any) -> None:
    path = write("name: no\ndata: {source: a.npy, columns: {on: real}}\nmodel: {n_components: 1}\n")
    config = load(path)
    assert config.name == "no"
    assert list(config.column_specs() or ()) == ["on"]


@given(st.integers(1, 2**50))
def test_sizes_in_bytes(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == size
    assert parse_size(f"{size}KiB") == 1024 * size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1 GB extra", "1PB", True, None, 1.5])
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@given(
    st.one_of(
        st.integers(1, 10**6).map(lambda n: Interval(passes=n)),
        st.integers(1, 10**9).map(lambda n: Interval(seconds=float(n))),
        st.floats(1e-9, 1e20).map(lambda x: Interval(seconds=x)),
    )
)
def test_intervals_read_back(interval: Interval) -> None:
    assert Interval.parse(str(interval)) == interval


@pytest.mark.parametrize("text", ["0s", "0 passes", "5", 5, "5 fortnights", "-1s", None])
def test_intervals_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match=r"expected|longer"):
        Interval.parse(text)


def test_the_schema_for_editors_knows_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False
    assert "full" in json.dumps(schema)


@pytest.mark.parametrize(
    ("schedule", "key", "message"),
    [
        ("{}", "schedule", "say when, with either cron"),
        ("{timezone: UTC}", "schedule", "say when, with either cron"),
        ("{cron: '* * * * *', every: 1h}", "schedule", "not with both"),
        ("{cron: 15}", "schedule.cron", "quote it"),
        ("{cron: '15 2 * *'}", "schedule.cron", "expected five fields"),
        ("{cron: '@daily'}", "schedule.cron", "expected five fields"),
        ("{cron: '0 0 0 1 1 *'}", "schedule.cron", "expected five fields"),
        ("{cron: '61 * * * *'}", "schedule.cron", "the minute is out of range"),
        ("{cron: '0 25 * * *'}", "schedule.cron", "the hour is out of range"),
        ("{cron: '0 0 31 2 *'}", "schedule.cron", "a day that never comes"),
        ("{cron: '0 0 LW * *'}", "schedule.cron", "expected digits"),
        ("{cron: 'H 0 * * *'}", "schedule.cron", "expected digits"),
        ("{every: 30}", "schedule.every", "such as 30s, 15min or 1d"),
        ("{every: 3 passes}", "schedule.every", "such as 30s, 15min or 1d"),
        ("{every: 0.5s}", "schedule.every", "a second or more"),
        ("{every: 1h, timezone: Europe/Berln}", "schedule.timezone", "mean 'Europe/Berlin'?"),
        ("{every: 1h, timezone: 2}", "schedule.timezone", "such as UTC"),
        ("{every: 1h, overlap: skp}", "schedule.overlap", "did you mean 'skip'?"),
        ("{every: 1h, catchup: yes}", "schedule.catchup", "did you mean 'catch_up'?"),
    ],
)
def test_a_schedule_says_when_and_is_right_or_refused(
    write: Any, schedule: str, key: str, message: str
) -> None:
    path = write(f"data: {{source: a.npy}}\nmodel: {{n_components: 2}}\nschedule: {schedule}\n")
    (problem,) = problems(path)
    assert problem.startswith("3:")
    assert f" {key}: " in problem
    assert message in problem
