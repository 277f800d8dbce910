"""A schedule through seven firings and all that can befall it, on a real Prefect server.

    python -m benchmarks.schedule [--every 30] [--rows 100000]

`genstream serve` keeps the schedule of a small model while batches land. One update is held up
(SIGSTOP) beyond the next firing, one is killed amid its work (SIGKILL), and `serve` is down for
more than one firing. Prints a table of the firings, then compares the model's ledger and its
parameters with those of the same batches learned by plain `genstream update` calls, undisturbed.
Exits with 1 where a batch was lost or counted twice, or a bit differs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.measure import parser
from flows.terminal import table
from genstream.models import ModelStore

CONFIG = """\
name: nightly
data: {{source: landing/*.csv, columns: {{a: real, b: real}}, dataset: data/nightly}}
model: {{n_components: 2}}
fit: {{n_init: 1, max_steps: 30}}
publish: {{model: models/nightly}}
schedule: {{every: {every}s, overlap: skip}}
report: false
"""
MODEL = "models/nightly"
BATCHES = 7


def command(*arguments: str) -> list[str]:
    """A call of the command line, whatever lies in the working directory."""
    code = "import sys; from flows.cli import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code, *arguments]


def land(folder: Path, number: int, rows: int) -> None:
    """Put batch `number` into the landing folder, whole."""
    rng = np.random.default_rng(number)
    values = rng.standard_normal((rows, 2)) + 6.0 * rng.integers(0, 2, (rows, 1))
    path = folder / "landing" / f"batch-{number}.csv"
    temporary = folder / path.name
    np.savetxt(temporary, values, delimiter=",", header="a,b", comments="", fmt="%.6f")
    temporary.rename(path)


def prepare(folder: Path, every: int, rows: int) -> None:
    """A folder with a configuration and a model fitted to a first batch, which then goes."""
    (folder / "landing").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(every=every))
    land(folder, 0, rows)
    subprocess.run(
        command("fit", "config.yaml", "--json"), cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    (folder / "landing" / "batch-0.csv").unlink()


class Serving:
    """A running `genstream serve`, and what it tells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            command("serve", "config.yaml", "--json"), cwd=folder, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.events.extend(json.loads(line) for line in self.process.stdout)

    def wait_for(self, what: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
        """The next event of a kind."""
        seen, deadline = len(self.events), time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := next(filter(what, self.events[seen:]), None):
                return found
            time.sleep(0.02)
        raise SystemExit(f"what was waited for did not come: {self.events}")

    def update_at_work(self, seconds: float) -> psutil.Process:
        """The process of an update that has begun to learn."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for path in (self.folder / "runs").glob("*/run.json"):
                info = json.loads(path.read_text())
                if info["status"] == "running" and psutil.pid_exists(info["process"]["pid"]):
                    return psutil.Process(info["process"]["pid"])
            time.sleep(0.02)
        raise SystemExit("no update began")

    def artifacts(self) -> dict[str, str]:
        """What the server shows of the runs: the kind of each artifact, by its key."""
        (server,) = {event["server"] for event in self.events if "server" in event}
        found = httpx.post(f"{server}/artifacts/filter", json={}, timeout=30).json()
        return {artifact["key"]: artifact["type"] for artifact in found}

    def end(self) -> list[dict[str, Any]]:
        """Stop it, see that nothing stays, and give the runs it told of."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        # Python's tracker of resources notices that its owner is gone, and ends a moment later.
        _, left = psutil.wait_procs(started, timeout=10)
        if code != 143 or left:
            raise SystemExit(f"serve ended with {code} and left {left}")
        return [event for event in self.events if "run" in event]


def run_ended(*states: str, catch_up: bool = False) -> Callable[[dict[str, Any]], bool]:
    """Whether an event is the end of a run in one of some states."""
    return lambda event: event.get("state") in states and event["catch_up"] == catch_up


def seven_firings(
    folder: Path, every: int, rows: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Serve the folder through an overlap, a kill and a downtime; the runs and their artifacts."""
    wait = 3.0 * every + 60.0
    serving = Serving(folder)
    serving.wait_for(lambda event: "deployment" in event, 180)
    land(folder, 1, rows)
    serving.wait_for(run_ended("Completed"), wait)

    land(folder, 2, rows)
    update = serving.update_at_work(wait)
    update.suspend()
    skipped = serving.wait_for(run_ended("Cancelled"), wait)
    update.resume()
    serving.wait_for(run_ended("Completed"), wait)

    land(folder, 3, rows)
    update = serving.update_at_work(wait)
    time.sleep(0.1)
    update.kill()
    killed = serving.wait_for(run_ended("Crashed"), wait)
    land(folder, 4, rows)
    while "batch-4.csv" not in learned(folder):
        serving.wait_for(run_ended("Completed"), wait)
    runs = serving.end()

    land(folder, 5, rows)
    time.sleep(1.2 * every)
    serving = Serving(folder)
    serving.wait_for(run_ended("Completed", catch_up=True), 180 + wait)
    for number in range(6, BATCHES + 1):
        land(folder, number, rows)
        while f"batch-{number}.csv" not in learned(folder):  # a run may have looked just before
            serving.wait_for(run_ended("Completed"), wait)
    shown = serving.artifacts()
    runs += serving.end()
    notes = {skipped["due"]: "while the one before was held up", killed["due"]: "by SIGKILL"}
    return [{**run, "note": notes.get(run["due"], "")} for run in runs], shown


def ledger(folder: Path) -> list[dict[str, Any]]:
    """The batches that the model knows: the one that was fitted, and those since."""
    shown = subprocess.run(
        command("show", MODEL, "--json"), cwd=folder, check=True, capture_output=True, text=True
    )
    found: list[dict[str, Any]] = json.loads(shown.stdout)["batches"]
    return found


def learned(folder: Path) -> list[str]:
    """Names of the batches learned so far."""
    events = ModelStore(folder / MODEL).snapshot().batches.values()
    return [event.name for event in events if event.status == "learned"]


def digest(folder: Path) -> str:
    """Digest of the parameters in use."""
    return str(ModelStore(folder / MODEL).snapshot().version().record["digest"])


def main() -> None:
    """Serve through everything, then compare with an undisturbed model."""
    options = parser(__doc__)
    options.add_argument("--every", type=int, default=30, help="seconds between firings")
    options.add_argument("--rows", type=int, default=100_000, help="rows of a batch")
    chosen = options.parse_args()
    os.environ.pop("PREFECT_API_URL", None)
    with tempfile.TemporaryDirectory() as top:
        served, calm = Path(top) / "served", Path(top) / "undisturbed"
        for folder in (served, calm):
            prepare(folder, chosen.every, chosen.rows)
        runs, artifacts = seven_firings(served, chosen.every, chosen.rows)
        for number in range(1, BATCHES + 1):
            land(calm, number, chosen.rows)
            subprocess.run(
                command("update", "config.yaml", "orchestrate=none", "--json"),
                cwd=calm,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        batches = ledger(served)
        for run in runs:
            run["learned"] = ", ".join(
                batch["name"]
                for batch in batches
                if run["started"] and run["started"][:19] <= batch["time"][:19] <= run["ended"][:19]
            )
            run["due"] = run["due"][11:19] + (" (catch-up)" if run["catch_up"] else "")
        print(table(runs, ["due", "state", "learned", "note"]))
        names = [batch["name"] for batch in batches if batch["status"] == "learned"]
        once = sorted(names) == [f"batch-{number}.csv" for number in range(BATCHES + 1)]
        rows = sum(batch["n_rows"] for batch in batches if batch["status"] == "learned")
        same = digest(served) == digest(calm)
        print(f"{len(names)} batches, {rows:,} rows learned; each once: {'yes' if once else 'NO'}")
        print(f"parameters as undisturbed, to the bit: {'yes' if same else 'NO'}")
        told = ", ".join(f"{key} ({kind})" for key, kind in sorted(artifacts.items()))
        print(f"artifacts on the server: {told}")
    complete = {"table", "markdown", "image"} <= set(artifacts.values())
    sys.exit(0 if once and same and complete and rows == (BATCHES + 1) * chosen.rows else 1)


if __name__ == "__main__":
    main()
