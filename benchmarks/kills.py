"""Kill the quickstart fit at random moments, resume it, and compare the parameters to the bit.

    python -m benchmarks.kills [--kills 10] [--seed 0]

Each round starts the fit in a fresh folder, sends SIGKILL to the process after a random part of the
time an undisturbed fit takes, and resumes. A kill that comes before the run folder exists leaves
nothing to resume, so that the fit is started again. Exits with 1 where a digest differs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import path
from benchmarks.measure import parser

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def command(verb: str, *arguments: str) -> list[str]:
    """A call of the command line in a process of its own."""
    code = "import sys; from flows.cli import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code, verb, *arguments, "--json"]


def run(folder: Path, verb: str, *arguments: str) -> dict[str, Any]:
    """What a verb prints as JSON.

    Raises
    ------
    SystemExit
        Where it does not end well; the message says why.
    """
    done = subprocess.run(
        command(verb, *arguments), cwd=folder, check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(
            f"{verb} ended with {done.returncode}: {_wrong(done.stderr or done.stdout)}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _wrong(said: str) -> str:
    """The error that a verb has told as a line of JSON, or else all it has said."""
    for line in reversed(said.splitlines()):
        if line.startswith('{"error": '):
            return str(json.loads(line)["error"])
    return said.strip() or "nothing was said"


def main() -> None:
    """Kill, resume, compare."""
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    overrides = [
        str(CONFIG),
        f"data.source={path('flights.csv.zip')}",
        "fit.tolerance=1.0e-6",
        "checkpoint.every=1 pass",
        "orchestrate=none",
    ]
    rng = np.random.default_rng(chosen.seed)
    with tempfile.TemporaryDirectory() as top:
        calm = Path(top) / "undisturbed"
        calm.mkdir()
        begin = time.monotonic()
        expected = run(calm, "fit", *overrides)["stages"]["fit"]["digest"]
        seconds = time.monotonic() - begin
        print(f"undisturbed: {seconds:.1f} s, parameters {expected[:16]}")
        equal = 0
        for i in range(chosen.kills):
            folder = Path(top) / f"kill-{i}"
            folder.mkdir()
            moment = float(rng.uniform(0.05, 1.0)) * seconds
            with subprocess.Popen(
                command("fit", *overrides),
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            ) as process:
                try:
                    process.wait(moment)
                    how = "had ended"
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    how = "killed"
            begun = any((folder / "runs").glob("*/run.json"))
            again = run(folder, "resume", "last") if begun else run(folder, "fit", *overrides)
            found = again["stages"]["fit"]["digest"]
            equal += found == expected
            verb = "resumed" if begun else "started again"
            print(f"{how} after {moment:4.1f} s, {verb}: {found[:16]}")
    print(f"{equal} of {chosen.kills} ended in the same bits")
    sys.exit(0 if equal == chosen.kills else 1)


if __name__ == "__main__":
    main()
