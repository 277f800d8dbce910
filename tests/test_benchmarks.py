"""The benchmarks' own machinery: what is measured in turns, compared, and written down."""

from __future__ import annotations

import getpass
import importlib
import json
import math
import platform
import re
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("psutil")

import psutil

import benchmarks.__main__ as entry
from benchmarks import kills, measure, memory, peers, roofline, speed
from benchmarks.contestants import CONTESTANTS, Task
from benchmarks.measure import Bar, Benchmark, Options, Table

ROOT = Path(__file__).resolve().parent.parent
RATES = roofline.Rates({"float64": 1e9, "float32": 2e9}, {"float64": 1e8, "float32": 1e8}, 1e9)


def cells(grid: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line under its head."""
    lines = [line for line in grid.splitlines() if line.startswith("|")]
    return [re.split(r"\s*(?<!\\)\|\s*", line)[1:-1] for line in lines[:1] + lines[2:]]


def test_medians_and_ratios_are_those_of_known_numbers():
    assert measure.median([3.0, 1.0, 2.0]) == 2.0
    assert math.isnan(measure.median([]))
    assert measure.ratio([30.0, 10.0, 20.0], [0.5, 4.0, 0.4]) == 40.0
    assert math.isnan(measure.ratio([], [1.0]))
    assert math.isnan(measure.ratio([1.0], []))


def test_turns_alternate_and_who_would_pass_the_budget_stops(monkeypatch):
    clock = [0.0]
    order: list[str] = []

    def turn(name: str, seconds: float) -> float:
        order.append(name)
        clock[0] += seconds
        return seconds

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    found = measure.alternate(
        {"quick": lambda: turn("quick", 1.0), "slow": lambda: turn("slow", 40.0)}, 3, budget=100.0
    )
    assert found == {"quick": [1.0] * 3, "slow": [40.0] * 2}
    assert order == ["quick", "slow", "quick", "slow", "quick"]
    alone = measure.alternate({"slow": lambda: turn("slow", 400.0)}, 3, budget=100.0)
    assert alone == {"slow": [400.0]}


def test_documents_are_well_formed():
    bars = [Bar("faster | better", 2.0, 2.5), Bar("longer", 1.2, 1.3, True), Bar("?", 1, math.nan)]
    rows = [{"who": "a|b", "s": 0.01234, "n": 1_000_000}, {"who": "c", "note": "absent"}]
    table = Table("one", "A title", rows, ["a remark"], bars)
    facts = {"cores": 2, "share": math.inf}
    text = measure.markdown([table], facts, ["as told"])
    grids = [part for part in text.split("\n\n") if part.startswith("|")]
    met, machine, found = map(cells, grids)
    assert [row[-1] for row in met] == ["met", "yes", "no", "not measured"]
    assert [row[1] for row in met[1:]] == [">= 2", "<= 1.2", ">= 1"]
    assert machine[1] == ["cores", "2"]
    assert found[0] == ["who", "s", "n", "note"]
    assert found[1] == ["a\\|b", "0.0123", "1,000,000", "–"]
    assert found[2] == ["c", "–", "–", "absent"]
    read = json.loads(measure.as_json([table], facts), parse_constant=pytest.fail)
    assert read["machine"] == {"cores": 2, "share": None}
    assert [bar["met"] for bar in read["tables"][0]["bars"]] == [True, False, False]
    assert read["tables"][0]["bars"][2]["found"] is None
    assert read["tables"][0]["rows"] == rows


def test_facts_of_the_machine_name_no_host_and_nobody():
    facts = measure.machine()
    assert facts["cores"] >= 1
    assert facts["numpy"] == np.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["date"])
    told = json.dumps(facts)
    names = {platform.node(), getpass.getuser(), str(Path.home()), str(ROOT)} - {""}
    assert not [name for name in names if name in told.split()]
    assert not [name for name in names if len(name) > 4 and name in told]


def test_the_work_of_an_iteration_is_counted():
    n, d, k = 1000, 4, 3
    full = peers.Work.of(Task("gaussian", "full", k), n, d)
    assert full == peers.Work(4 * n * k * (10 + 4 + 1), n * k, n * d)
    # 0.18 s of products and 0.03 ms of exponentials; the same at twice the rate.
    assert full.seconds(RATES, "float64") == pytest.approx(180e3 / 1e9 + 3e3 / 1e8)
    assert full.seconds(RATES, "float32") == pytest.approx(180e3 / 2e9 + 3e3 / 1e8)
    kmeans = peers.Work.of(Task("kmeans", "", 1), n, d)
    assert kmeans.exps == 0
    # What is read takes longer than what is computed.
    assert kmeans.seconds(RATES, "float64") == pytest.approx(n * d * 8 / 1e9)


def test_differences_are_those_of_known_outcomes():
    scale = np.array([1.0, 10.0])
    ours = {"mean": np.zeros((2, 2))}
    theirs = {"mean": np.array([[0.0, 1.0], [0.05, 0.0]])}
    assert peers.gap(scale, theirs, ours) == pytest.approx(0.1)
    turned = np.array([[math.cos(0.3)], [math.sin(0.3)]])
    found = peers.gap(scale, {"axes": -5 * turned}, {"axes": np.array([[2.0], [0.0]])})
    assert found == pytest.approx(math.sin(0.3))
    assert math.isnan(peers.gap(scale, {}, ours))


@pytest.fixture
def tiny(monkeypatch):
    """Rates without measuring them."""
    monkeypatch.setattr(roofline, "rates", lambda options: RATES)


def test_contestants_agree_and_who_is_absent_has_a_row(tiny, tmp_path):
    case = peers.Case(
        "tiny",
        Task("gaussian", "full", 3, iterations=2),
        peers.overlapping(4, 4),
        600,
        ("scikit-learn", "pomegranate float32"),
        {"scikit-learn": (0.0, None), "pomegranate float32": (None, 1.0)},
    )
    options = Options(rounds=2, threads=1, peers=tmp_path / "python")
    table = peers.compare("tiny", case, options)
    rows = {row["contestant"]: row for row in table.rows}
    assert list(rows) == [*peers.OURS, "scikit-learn", "pomegranate float32"]
    theirs, ours = rows["scikit-learn"], rows["genstream float64"]
    assert theirs["differs by"] < 1e-8
    assert rows["genstream float32"]["differs by"] < 1e-3
    assert ours["rounds"] == theirs["rounds"] == 2
    expected = theirs["s an iteration"] / ours["s an iteration"]
    assert theirs["float64 is times as fast"] == pytest.approx(expected)
    absent = rows["pomegranate float32"]
    assert absent["s an iteration"] == peers.ABSENT
    assert absent["rounds"] == 0
    assert [bar.met for bar in table.bars] == [True, False]
    assert math.isnan(table.bars[1].found)
    assert "not installed" in measure.section(table)


def test_what_a_peer_lacks_or_why_it_fails_is_told(tiny, tmp_path):
    options = Options(rounds=1, threads=1, peers=Path(sys.executable))
    task = Task("gaussian", "full", 50, iterations=1)
    x, start = peers.overlapping(4, 4)(task, 100)
    task.write(tmp_path, x, start)
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(peers.Failed, match="torch not installed: make peers"):
            peers.Player("pomegranate float32", tmp_path, options)
    task.write(tmp_path, x[:20], start)
    with pytest.raises(peers.Failed, match=r"failed: ValueError: .*n_samples"):
        peers.Player("scikit-learn", tmp_path, options)


def contestant(folder: Path, answers: str) -> Path:
    """An interpreter that starts a process, keeps its number in `child`, and answers so."""
    python = folder / "python"
    lines = ["#!/bin/sh", "sleep 300 &", f"echo $! > '{folder}/child'", answers]
    python.write_text("\n".join(lines) + "\n")
    python.chmod(0o755)
    return python


def ended(number: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time."""
    for _ in range(int(seconds * 20)):
        try:
            if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param("wait", id="never ready"),
        pytest.param("exit 0", id="ends and leaves a process"),
        pytest.param("echo '{\"ready\": true}'; wait", id="never done"),
        pytest.param(
            "echo '{\"ready\": true}'; read l; echo '{\"seconds\": 1.0}'; wait", id="never found"
        ),
    ],
)
def test_who_hangs_has_a_row_and_leaves_nothing_behind(answers, tiny, monkeypatch, tmp_path):
    python = contestant(tmp_path, answers)
    peer = "pomegranate float32"

    def player(name: str, folder: Path, options: Options) -> peers.Player:
        impatient = replace(options, patience=1.0)
        return alike(name, folder, impatient if name == peer else options)

    alike = peers.Player
    monkeypatch.setattr(peers, "Player", player)
    task = Task("gaussian", "full", 2, iterations=1)
    case = peers.Case("tiny", task, peers.overlapping(4, 4), 200, (peer,))
    table = peers.compare("tiny", case, Options(rounds=1, threads=1, peers=python))
    rows = {row["contestant"]: row for row in table.rows}
    assert rows[peer]["s an iteration"] == "failed: ended or took too long"
    assert isinstance(rows["genstream float64"]["s an iteration"], float)
    assert ended(int((tmp_path / "child").read_text()))


def test_a_contestant_at_work_ends_with_who_started_it(tmp_path):
    task = Task("gaussian", "full", 20, iterations=1_000_000)
    task.write(tmp_path, *peers.overlapping(4, 4)(task, 2000))
    code = f"""
import os, pathlib, signal, time
from benchmarks import measure, peers
peers.Player._answer = lambda self: {{}}
player = peers.Player("scikit-learn", pathlib.Path({str(tmp_path)!r}), measure.Options(threads=1))
print(player._process.pid, flush=True)
time.sleep(2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL
    assert ended(int(done.stdout), 30.0)


@pytest.mark.parametrize("name", peers.CASES)
def test_who_takes_part_in_a_case_can(name):
    case = peers.CASES[name]
    x, start = case.draw(case.task, 200) if case.draw is not peers.power else (np.ones((1, 6)), {})
    assert np.isfinite(x).all()
    assert set(case.bars) <= set(case.peers)
    for peer in (*peers.OURS, *case.peers):
        assert case.task.kind in CONTESTANTS[peer][0].kinds
    if start and case.task.model not in ("ppca", "fa"):
        assert len(start["mean"]) == len(start["weights"]) == case.task.n_components


def test_every_benchmark_has_a_name_and_every_script_is_listed():
    listed = entry.listing()
    assert all(f"  {name} " in listed for name in [*peers.CASES, "roofline", "gaps", "matrix"])
    picked, scripts = entry.chosen(["peers", "stream flights", "gaps"])
    assert list(picked) == [*peers.CASES, "gaps"]
    assert scripts == ["stream flights"]
    assert entry.chosen([])[1] == list(entry.SCRIPTS)
    with pytest.raises(SystemExit, match="no benchmark 'nothing'"):
        entry.chosen(["nothing"])
    assert set(entry.SCRIPTS) < set(entry.scripts())
    assert entry.chosen(["speed --rows 10"]) == ({}, ["speed --rows 10"])
    assert "peers" not in entry.scripts()
    assert "data" not in entry.scripts()


def test_a_run_writes_what_it_found(monkeypatch, tmp_path, capsys):
    table = Table("one", "A title", [{"what": "x", "s": 1.5}], bars=[Bar("fast", 1.0, 2.0)])
    seen: list[Options] = []

    def run(options: Options) -> Table:
        seen.append(options)
        return table

    monkeypatch.setattr(entry, "SUITE", ("peers",))
    monkeypatch.setattr(peers, "BENCHMARKS", {"one": Benchmark("a benchmark", run)})
    monkeypatch.setattr(measure, "peer_versions", lambda python: {})
    json_file, text_file = tmp_path / "found.json", tmp_path / "found.md"
    arguments = ["run", "one", "--rounds", "7", "--quick"]
    arguments += ["--json", str(json_file), "--markdown", str(text_file)]
    assert entry.main(arguments) == 0
    assert (seen[0].rounds, seen[0].quick) == (7, True)
    assert json.loads(json_file.read_text())["tables"][0]["rows"] == table.rows
    assert "quick run" in text_file.read_text()
    printed = capsys.readouterr().out
    assert "A title: a quick run on fewer rows" in printed
    assert "| fast |" not in printed
    assert entry.main(["run", "one"]) == 0
    assert "| fast | >= 1 | 2.00 | yes |" in capsys.readouterr().out


def test_what_a_run_has_measured_is_kept_where_the_next_benchmark_fails(monkeypatch, tmp_path):
    table = Table("one", "A title", [{"what": "x", "s": 1.5}])
    seen: list[str] = []
    json_file, text_file = tmp_path / "found.json", tmp_path / "found.md"

    def fails(options: Options) -> Table:
        seen.extend(file.read_text() for file in (json_file, text_file))
        raise KeyboardInterrupt

    every = {
        "one": Benchmark("a benchmark", lambda options: table),
        "two": Benchmark("another", fails),
    }
    monkeypatch.setattr(entry, "SUITE", ("peers",))
    monkeypatch.setattr(peers, "BENCHMARKS", every)
    monkeypatch.setattr(measure, "peer_versions", lambda python: {})
    with pytest.raises(KeyboardInterrupt):
        entry.main(["run", "peers", "--json", str(json_file), "--markdown", str(text_file)])
    assert seen == [json_file.read_text(), text_file.read_text()]
    assert json.loads(seen[0])["tables"][0]["rows"] == table.rows
    assert "A title" in seen[1]
    assert {file.name for file in tmp_path.iterdir()} == {"found.json", "found.md"}


def test_a_size_that_fails_has_a_row_and_the_others_are_kept(monkeypatch):
    row = {"data": "1 GiB", "limit, MiB": 500, "peak, MiB": 400}

    def fitted(gigabytes: float) -> dict[str, object]:
        if gigabytes == 4:
            raise SystemExit("fit ended with -9: out of memory\nand more")
        if gigabytes == 12:
            raise SystemExit(
                "fit ended with 1: Traceback (most recent call last):\n  File\nOSError: no"
            )
        return row

    monkeypatch.setattr(memory, "fitted", fitted)
    table = memory.measure([1.0, 4.0, 12.0])
    assert table.rows[0] == row
    assert [one["peak, MiB"] for one in table.rows[1:]] == [
        "failed: fit ended with -9: out of memory",
        "failed: fit ended with 1: OSError: no",
    ]
    assert [bar.met for bar in table.bars] == [True, True, False]
    assert table.bars[-1].found == 2
    assert "out of memory" in measure.section(table)
    monkeypatch.setattr(entry, "SUITE", ("memory",))
    monkeypatch.setattr(measure, "peer_versions", lambda python: {})
    assert entry.main(["run", "memory"]) == 1
    monkeypatch.setattr(memory, "fitted", lambda gigabytes: row)
    assert [bar.met for bar in memory.measure([1.0, 4.0]).bars] == [True, True]
    assert entry.main(["run", "memory"]) == 0


def test_a_verb_that_fails_is_told_by_its_error(tmp_path):
    with pytest.raises(SystemExit, match=r"plan ended with 2: [^{]*nothing\.yaml"):
        kills.run(tmp_path, "plan", "nothing.yaml")


def test_a_file_is_replaced_whole_or_stays_as_it_was(monkeypatch, tmp_path):
    file = tmp_path / "found.json"
    file.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        measure.put(file, "\udc00")
    assert file.read_text() == "before"
    link = tmp_path / "link"
    link.symlink_to(file)
    measure.put(link, "after")
    assert file.read_text() == "after"
    assert link.is_symlink()
    assert {one.name for one in tmp_path.iterdir()} == {"found.json", "link"}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--threads", "0", "a whole number from 1 on, not '0'"),
        ("--threads", "two", "a whole number from 1 on, not 'two'"),
        ("--rounds", "-1", "a whole number from 1 on, not '-1'"),
        ("--rounds", "1.5", "a whole number from 1 on, not '1.5'"),
        ("--budget", "0", "a finite number above 0, not '0'"),
        ("--budget", "inf", "a finite number above 0, not 'inf'"),
        ("--budget", "nan", "a finite number above 0, not 'nan'"),
        ("--peers", "none", "there is no interpreter 'none'"),
        ("--peers", "folder", "there is no interpreter 'folder'"),
        ("--json", "folder", "'folder' is a folder, not a file"),
        ("--json", "none/found.json", "there is no folder 'none'"),
        ("--markdown", "folder", "'folder' is a folder, not a file"),
        ("--markdown", "none/found.md", "there is no folder 'none'"),
    ],
)
def test_options_that_cannot_be_are_told_before_anything_is_measured(
    option, value, says, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(entry, "run", lambda *arguments: pytest.fail("something was measured"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as ended:
        entry.main(["run", "roofline", f"{option}={value}"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"python -m benchmarks run: error: argument {option}: {says}"


def test_an_interpreter_that_was_typed_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").symlink_to(sys.executable)
    assert measure.interpreter("python") == tmp_path / "python"


def test_usage_says_how_a_benchmark_is_called():
    assert measure.parser(entry.__doc__).prog == "python -m benchmarks"
    assert measure.parser(speed.__doc__).prog == "python -m benchmarks.speed"


def test_a_quick_run_has_few_rows_and_never_more_than_there_are():
    assert Options(quick=True).rows(1_659_917) == 10_000
    assert Options(quick=True).rows(100_000) == 5000
    assert Options(quick=True).rows(10_000) == 2000
    assert Options(quick=True).rows(300) == 300
    assert Options().rows(1_000_000) == 1_000_000


def test_a_quick_run_of_a_script_that_knows_of_it_is_quick(monkeypatch):
    called: list[list[str]] = []

    class Done:
        returncode = 0

    def call(command: list[str], **options: object) -> Done:
        called.append(command[2:])
        return Done()

    monkeypatch.setattr(measure, "machine", dict)
    monkeypatch.setattr(measure, "peer_versions", lambda python: {})
    monkeypatch.setattr(entry.subprocess, "run", call)
    assert entry.main(["run", "speed --steps 1", "races", "--quick"]) == 0
    assert entry.main(["run", "speed"]) == 0
    assert called == [
        ["benchmarks.speed", "--steps", "1", "--quick"],
        ["benchmarks.races"],
        ["benchmarks.speed"],
    ]
    seen: list[Options] = []
    monkeypatch.setattr(
        speed, "compare", lambda name, case, options: seen.append(options) or Table(name, "", [])
    )
    for arguments in (["--quick"], []):
        monkeypatch.setattr(sys, "argv", ["speed", *arguments])
        speed.main()
    assert [options.quick for options in seen] == [True, False]


def test_peers_are_pinned_once():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = extra["project"]["optional-dependencies"]["peers"]
    pinned = (ROOT / "requirements" / "peers.txt").read_text().splitlines()
    assert all("==" in one for one in wanted)
    assert set(wanted) <= set(pinned)
