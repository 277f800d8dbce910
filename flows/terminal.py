"""What a person watching sees: bars on a terminal's stderr, and nothing anywhere else."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from genstream.learn import FitState, StepInfo


@contextlib.contextmanager
def bars(quiet: bool = False) -> Iterator[Progress]:
    """Progress bars on stderr; silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    ) as progress:
        yield progress


class RowProgress:
    """A bar that counts rows; call it with the rows done, and the total where that is known."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task(label, total=None, note="")
        self._start = time.monotonic()

    def __call__(self, done: int, total: int | None = None) -> None:
        """Show that `done` rows are done."""
        rate = done / max(time.monotonic() - self._start, 1e-3)
        self._progress.update(
            self._task, completed=done, total=total, note=f"{done:,} rows, {rate:,.0f}/s"
        )


class FitProgress:
    """One bar for the pass that runs, with what is known of the passes before it.

    `on_rows` is what `Passes` reports to, `on_start` what `warm_start` calls and `on_step` what
    `fit` calls.
    """

    def __init__(self, progress: Progress, max_steps: int, tolerance: float) -> None:
        self._progress = progress
        self._max_steps, self._tolerance = max_steps, tolerance
        self._task: TaskID = progress.add_task("sample", total=None, note="")
        self._objectives: list[float] = []
        self._origin = self._rows = self._pass_rows = 0

    def on_rows(self, done: int, total: int) -> None:
        """Rows of the running pass that are done."""
        self._pass_rows = max(self._pass_rows, total)
        self._progress.update(self._task, completed=done, total=total)

    def on_start(self, start: int, mean_objective: float) -> None:
        """A start on the sample was tried."""
        note = f"on a sample: {mean_objective:.4f}"
        self._progress.update(self._task, description=f"start {start + 1}", note=note)

    def on_step(self, state: FitState, info: StepInfo) -> None:
        """A step is done: the bar starts over, unless it was only part of a pass."""
        if state.origin != self._origin:
            # Another learner: its objectives are not to be compared with those so far.
            self._objectives, self._origin, self._rows = [], state.origin, 0
        if info.n_rows < self._pass_rows:
            self._rows += info.n_rows
            number, done = divmod(self._rows, self._pass_rows)
            note = (
                f"log-likelihood {info.mean_loglik:.4f}, "
                f"{info.n_rows / max(info.seconds, 1e-9):,.0f} rows/s"
            )
            self._progress.update(
                self._task,
                description=f"part of pass {number + 1}",
                completed=done,
                total=self._pass_rows,
                note=note,
            )
            return
        self._objectives.append(info.mean_objective)
        most = self._max_steps - (state.step - state.origin)
        left = expected_steps(self._objectives, self._tolerance, most)
        minutes, seconds = divmod(round(left * info.seconds), 60)
        note = (
            f"log-likelihood {info.mean_loglik:.4f}, {info.n_rows / info.seconds:,.0f} rows/s, "
            f"{'at most' if left == most else 'about'} {left} passes ({minutes}:{seconds:02d}) left"
        )
        self._progress.update(
            self._task, description=f"pass {state.step - state.origin + 1}", completed=0, note=note
        )


class SweepProgress:
    """One bar for the pass that several fits share.

    `on_rows` is what `Passes` reports to, `on_start` what `warm_start` calls, `begin` tells how
    many fits there are and `on_step` is called after a step of each.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("sample", total=None, note="")
        self._running: set[int] = set()
        self._started = 0

    def on_rows(self, done: int, total: int) -> None:
        """Rows of the running pass that are done."""
        self._progress.update(self._task, completed=done, total=total)

    def on_start(self, _start: int, _mean_objective: float) -> None:
        """A start of some fit was tried on the sample."""
        self._started += 1
        self._progress.update(self._task, description=f"start {self._started}", completed=0)

    def begin(self, n_fits: int) -> None:
        """So many fits begin."""
        self._running = set(range(n_fits))

    def on_step(self, i: int, state: FitState, info: StepInfo) -> None:
        """A step of fit `i` is done."""
        if state.outcome.value != "running":
            self._running.discard(i)
        self._progress.update(
            self._task,
            description=f"step {info.step}",
            completed=0,
            note=f"{len(self._running)} candidates still learn",
        )


def expected_steps(objectives: list[float], tolerance: float, at_most: int) -> int:
    """Steps until the gain falls below `tolerance`, if gains shrink at their last ratio."""
    if len(objectives) < 3 or at_most <= 0:
        return max(at_most, 0)
    before, gain = objectives[-2] - objectives[-3], objectives[-1] - objectives[-2]
    if gain <= tolerance:
        return 0
    if before <= 0 or gain >= before or tolerance <= 0:
        return at_most
    return min(at_most, max(1, math.ceil(math.log(tolerance / gain) / math.log(gain / before))))


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text, numbers to the right."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(map(len, [column, *(line[j] for line in cells)])) for j, column in enumerate(columns)
    ]
    right = [
        all(isinstance(row.get(column), int | float | None) for row in rows) for column in columns
    ]

    def line(values: list[str]) -> str:
        return "  ".join(
            value.rjust(width) if to_right else value.ljust(width)
            for value, width, to_right in zip(values, widths, right, strict=True)
        ).rstrip()

    return "\n".join([line(columns), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    # A line break in a name would break the table.
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).splitlines())


def bytes_text(size: float) -> str:
    """A size in binary units, as in `1.4 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
