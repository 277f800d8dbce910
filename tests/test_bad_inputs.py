"""Every bad input of the table gets one line, its exit code, and leaves nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bad_inputs import CASES, Case, run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_explained_in_one_line(case: Case, tmp_path: Path) -> None:
    command = case.make(tmp_path)
    found = run(tmp_path, command)
    assert found.exit_code == case.exit_code, found.lines
    assert sum(line.startswith("error: ") for line in found.lines) == 1
    said = " ".join(found.lines)
    for word in case.says:
        assert word in said
    assert "Traceback" not in said
    # What a failed command leaves is the record of its run, never data or a model.
    kept = [name for name in found.left if not name.startswith(("runs/", ".genstream/"))]
    assert kept == []


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
