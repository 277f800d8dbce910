"""The benchmark of models that live: what it lands, learns through the command line, and counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import path
from benchmarks.stream import Watched, flights, run
from genstream.models import ModelStore


def test_memory_is_compared_between_the_ends_of_the_commits() -> None:
    mib = 2**20
    # Before the first commit, and while the process still loads, it is small: that does not count.
    seen = [(0.0, 5, 10 * mib), (1.0, 5, 60 * mib)]
    seen += [(2.0 + i, 6 + i, (100 + (i >= 90) * 40) * mib) for i in range(100)]
    watched = Watched(102.0, seen)
    assert watched.n_commits == 100
    assert watched.committing == 100.0
    early, late = watched.tenths()
    assert early == 100.0
    assert late == pytest.approx(100.0 + 40 * 10 / 11)


@pytest.mark.slow
def test_days_are_learned_one_call_each_and_three_models_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert path("flights.csv.zip").exists()
    whole = flights()
    stream = replace(whole, days=dict(list(whole.days.items())[:33]), skip=0)
    run(stream, tmp_path, 1)
    table, told = capsys.readouterr().out.split("\n2013-02 to 2013-02, ")
    (line,) = [line for line in table.splitlines() if line.startswith("| 2013-02")]
    n_rows, *scores = line.strip("| ").split(" | ")[1:]
    assert int(n_rows.replace(",", "")) == 926 + 682
    online, frozen, refit = map(float, scores[:3])
    # The first fit and the refit see nearly the same rows, the model that lives one day more.
    assert abs(refit - frozen) < 0.3
    assert abs(online - frozen) < 0.3
    assert "2 batches: 2 learned" in told
    assert "2 call(s) of the command line" in told
    learned = ModelStore(tmp_path / "models/flights-stream").snapshot().events[-2:]
    assert [event.name for event in learned] == ["2013-02-01.csv", "2013-02-02.csv"]
    assert np.isfinite([event.scores["prequential"] for event in learned]).all()
    # Once more in the same folder: nothing is learned twice, and the table is the same.
    run(stream, tmp_path, 1)
    again = capsys.readouterr().out
    assert line in again
    assert "call(s)" not in again
