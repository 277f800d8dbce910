"""Every story can do all that a story must be able to do: the table of `benchmarks.matrix`."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import matrix


@pytest.mark.parametrize("name", matrix.CASES)
def test_every_cell_is_green(name: str) -> None:
    for what, cell in matrix.CELLS.items():
        if what != "estimator":  # these have tests of their own
            cell(matrix.CASES[name])


def test_a_cell_that_is_not_green_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: matrix.Case) -> None:
        np.testing.assert_allclose(1.0, 2.0)

    monkeypatch.setattr(matrix, "CELLS", {"gaps": matrix.gaps, "weights": fails})
    monkeypatch.setattr("sys.argv", ["matrix", "--only", "k-means"])
    with pytest.raises(SystemExit):
        matrix.main()
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "1 cells are not green" in printed
