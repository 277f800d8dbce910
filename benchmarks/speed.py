"""Seconds per EM iteration beside scikit-learn: same data, same start, same steps, one run.

    python -m benchmarks.speed [--rows N] [--components K] [--steps S] [--rounds R] [--quick]

The comparison `gmm-power` of `benchmarks.peers` with scikit-learn alone, in sizes of one's own.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.measure import ROUNDS, Options, count, parser, say
from benchmarks.peers import CASES, compare


def main() -> None:
    """Read the options and compare."""
    case = CASES["gmm-power"]
    options = parser(__doc__)
    options.add_argument("--rows", type=count, default=case.n_rows)
    options.add_argument("--components", type=count, default=case.task.n_components)
    options.add_argument("--steps", type=count, default=case.task.iterations)
    options.add_argument("--rounds", type=count, default=ROUNDS)
    options.add_argument("--quick", action="store_true", help="few rows: to see that all runs")
    chosen = options.parse_args()
    task = replace(case.task, n_components=chosen.components, iterations=chosen.steps)
    title = f"Gaussian mixture, full, household power, K = {chosen.components}"
    case = replace(case, title=title, task=task, n_rows=chosen.rows, peers=("scikit-learn",))
    shown = replace(case, bars={})
    say(compare("gmm-power", shown, Options(rounds=chosen.rounds, quick=chosen.quick)))


if __name__ == "__main__":
    main()
