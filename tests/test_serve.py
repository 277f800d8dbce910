"""Schedules on a real Prefect server: they fire, overlap, are killed and catch up as promised."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.config import Schedule, validate
from flows.serve import next_firing, read_updates, told
from genstream.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent

STANDIN = """\
import os, sys, time
from pathlib import Path

from flows import orchestration
from flows.command import guarded
from flows.serve import serve

orchestration.prepare()
from prefect import flow


@flow(name="update")
def update(config: str, overrides: list[str] | None = None) -> None:
    "Say that it runs, wait while it is held, say that it is done."
    with open(f"{config}.begun", "a") as file:
        file.write(f"{os.getpid()}\\n")
    while Path(f"{config}.hold").exists():
        time.sleep(0.05)
    with open(f"{config}.done", "a") as file:
        file.write(" ".join(overrides) + "\\n")


def tell(event):
    import json
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    paths = [each for each in sys.argv[1:] if "=" not in each]
    overrides = [each for each in sys.argv[1:] if "=" in each]
    guarded(lambda: serve(paths, overrides, flow=update, tell=tell))
"""

CONFIG = """\
name: {name}
data: {{source: a.npy}}
model: {{n_components: 2}}
schedule: {{every: {every}, overlap: {overlap}}}
"""


class Serving:
    """A process that serves, and what it has told."""

    all: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        self.folder = folder
        # Files: of a pipe no end is seen while a run that is left behind holds it.
        self.out, self.err = (folder / f"{time.monotonic()}.{what}" for what in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(folder.parent / "standin.py"), *arguments],
                cwd=folder,
                env={**kept, **environment, "PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=err,
            )
        self.all.append(self.process)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was told so far; a line that is being written is left for later."""
        return [json.loads(line) for line in self.out.read_text().split("\n")[:-1]]

    def wait_for(
        self, which: Callable[[dict[str, Any]], bool], after: int = 0, seconds: float = 240
    ) -> dict[str, Any]:
        """The first event of a kind, among those told after the first `after`."""
        return until(lambda: next(filter(which, self.events[after:]), None), seconds, self)

    def end(self, number: int) -> tuple[int, str]:
        """Exit code and last words after a signal."""
        self.process.send_signal(number)
        return self.process.wait(120), self.err.read_text()


def until(found: Callable[[], Any], seconds: float = 240, serving: Serving | None = None) -> Any:
    """What `found` gives once that is something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := found():
            return result
        if serving is not None and serving.process.poll() is not None:
            pytest.fail(f"serve ended early: {serving.err.read_text()}")
        time.sleep(0.05)
    told_so_far = serving.events if serving is not None else ""
    pytest.fail(f"nothing within {seconds} s: {told_so_far}")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def held_run(serving: Serving, config: str) -> psutil.Process:
    """A run that is at work, and stays so until its hold is taken away."""
    folder = serving.folder
    (folder / f"{config}.hold").touch()
    begun = folder / f"{config}.begun"
    count = len(lines(begun))
    until(lambda: len(lines(begun)) > count, serving=serving)
    return psutil.Process(int(lines(begun)[-1]))


def descendants(folder: Path) -> dict[int, str]:
    """Processes that a `serve` of the folder has started and that live: command line by id."""
    found = {}
    for process in psutil.process_iter():
        try:
            marked = process.environ().get("GENSTREAM_SERVED_FROM") == str(folder)
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
        except psutil.Error:
            continue
    return found


def ended(name: str, state: str, *, catch_up: bool = False) -> Callable[[dict[str, Any]], bool]:
    def matches(event: dict[str, Any]) -> bool:
        return (event.get("name"), event.get("state"), event.get("catch_up")) == (
            name,
            state,
            catch_up,
        )

    return matches


def write_config(folder: Path, name: str, every: str = "5s", overlap: str = "skip") -> str:
    (folder / f"{name}.yaml").write_text(CONFIG.format(name=name, every=every, overlap=overlap))
    return f"{name}.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "standin.py").write_text(STANDIN)
    folder = tmp_path / "work"
    # A folder of one's own that has the name of our package must not get in the way.
    (folder / "flows").mkdir(parents=True)
    (folder / "flows" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    yield folder
    while Serving.all:
        process = Serving.all.pop()
        process.kill()
        process.wait()
    for pid in descendants(folder):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.flows
@pytest.mark.crash
@pytest.mark.timeout(900)  # under a minute, where nothing else runs
def test_a_schedule_fires_skips_and_recovers_on_a_server_of_its_own(folder: Path) -> None:
    skip = write_config(folder, "skipping")
    hold, begun, done = (folder / f"{skip}.{what}" for what in ("hold", "begun", "done"))
    serving = Serving(folder, skip, "model.n_components=3")

    # It says what it serves, and the schedule fires.
    assert serving.wait_for(lambda event: "server" in event)["own"]
    deployed = serving.wait_for(lambda event: "deployment" in event)
    assert deployed["deployment"] == "update/skipping"
    assert (deployed["schedule"], deployed["overlap"]) == ("every 5s UTC", "skip")
    serving.wait_for(ended("skipping", "Completed"))
    assert lines(done)[0] == "model.n_components=3"

    # While a run is at work the next firing is skipped.
    so_far = len(serving.events)
    at_work = held_run(serving, skip)
    skipped = serving.wait_for(ended("skipping", "Cancelled"), after=so_far)
    assert "concurrency limit" in skipped["message"]
    assert at_work.is_running()
    assert len(lines(begun)) == len(lines(done)) + 1

    # A run that is killed is told of, and the next firing does the work.
    so_far, before = len(serving.events), len(lines(done))
    at_work.kill()
    crashed = serving.wait_for(ended("skipping", "Crashed"), after=so_far)
    assert "-9" in crashed["message"]
    hold.unlink()
    serving.wait_for(ended("skipping", "Completed"), after=so_far)
    assert len(lines(done)) > before

    # Told to end amid a run, it ends the run, the server and itself.
    held_run(serving, skip)
    assert len(descendants(folder)) >= 2
    code, words = serving.end(signal.SIGTERM)
    assert (code, words) == (143, "error: interrupted by SIGTERM\n")
    # Python's tracker of resources notices that its owner is gone, and ends a moment later.
    until(lambda: not descendants(folder), seconds=30)


@pytest.mark.flows
@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_service_queues_and_is_alone_and_catches_up_after_a_kill(folder: Path) -> None:
    queue = write_config(folder, "queueing", overlap="queue")
    hold, begun, done = (folder / f"{queue}.{what}" for what in ("hold", "begun", "done"))
    hold.touch()
    serving = Serving(folder, queue)

    # Firings wait for their turn.
    until(lambda: lines(begun), serving=serving)
    time.sleep(12)
    assert (len(lines(begun)), lines(done)) == (1, [])
    hold.unlink()
    until(lambda: len(lines(done)) > 2, serving=serving)
    assert not list(filter(ended("queueing", "Cancelled"), serving.events))

    # Another `serve` of this folder, and one elsewhere of the same name, are refused.
    second = Serving(folder, queue)
    assert second.process.wait(120) == 4
    assert f"process {serving.process.pid} serves this folder already" in second.err.read_text()
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    other = write_config(elsewhere, "queueing")
    third = Serving(elsewhere, other, PREFECT_API_URL=serving.events[0]["server"])
    assert third.process.wait(120) == 4
    assert "is served already on this server" in third.err.read_text()

    # Killed amid a run it leaves the run alone behind, which the next `serve` ends and makes up
    # for, with all the firings that were missed, by one run.
    orphan = held_run(serving, queue)
    code, _ = serving.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    until(lambda: not any("flows.server" in line for line in descendants(folder).values()))
    assert orphan.is_running()
    left = set(descendants(folder))
    again = Serving(folder, write_config(folder, "queueing", every="10s", overlap="queue"))
    deployed = again.wait_for(lambda event: "deployment" in event)
    assert deployed["catch_up"]
    assert not left & set(descendants(folder))
    hold.unlink()
    again.wait_for(ended("queueing", "Completed", catch_up=True))
    again.wait_for(ended("queueing", "Completed"))
    made_up = [event for event in again.events if event.get("run") and event["catch_up"]]
    assert len(made_up) == 1
    due = {event["due"] for event in again.events if event.get("run") and not event["catch_up"]}
    assert min(due) >= made_up[0]["due"]
    assert again.end(signal.SIGINT)[0] == 130
    until(lambda: not descendants(folder), seconds=30)


BASE = {"data": {"source": "a.npy"}, "model": {"n_components": 2}}


def schedule(**values: Any) -> Schedule:
    found = validate({**BASE, "schedule": values}).schedule
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("values", "after", "expected"),
    [
        # The clock of the time zone counts: 02:15 in Berlin is 00:15 or 01:15 in UTC.
        ({"cron": "15 2 * * *", "timezone": "Europe/Berlin"}, "2026-07-01 00:00", "01 00:15"),
        ({"cron": "15 2 * * *", "timezone": "Europe/Berlin"}, "2026-12-01 00:00", "01 01:15"),
        # In the night of 29 March 2026 there is no 02:15.
        ({"cron": "15 2 * * *", "timezone": "Europe/Berlin"}, "2026-03-29 06:00", "30 00:15"),
        ({"cron": "15 2 * * *"}, "2026-01-01 02:15", "02 02:15"),
        ({"cron": "0 0 * * SUN"}, "2026-01-01 00:00", "04 00:00"),
        # Intervals hold still, whenever `serve` starts: they count from a midnight.
        ({"every": "6h"}, "2026-01-01 00:00", "01 06:00"),
        ({"every": "15min"}, "2026-01-01 00:07", "01 00:15"),
        # Elapsed time is counted, not the clock: in summer it shows an hour later.
        ({"every": "1d", "timezone": "Europe/Berlin"}, "2026-07-01 00:00", "01 23:00"),
        ({"every": "1d", "timezone": "Europe/Berlin"}, "2026-12-01 00:00", "01 23:00"),
    ],
)
def test_firings_are_where_the_schedule_says(
    values: dict[str, Any], after: str, expected: str
) -> None:
    moment = datetime.fromisoformat(after).replace(tzinfo=UTC)
    found = asyncio.run(next_firing(schedule(**values), moment)).astimezone(UTC)
    assert f"{found:%d %H:%M}" == expected


@settings(max_examples=50, deadline=None)
@given(
    values=st.one_of(
        st.builds(
            lambda minute, hour: {"cron": f"{minute} {hour} * * *"},
            st.integers(0, 59),
            st.integers(0, 23),
        ),
        st.builds(lambda n: {"every": f"{n}s"}, st.integers(1, 10**6)),
    ),
    zone=st.sampled_from(["UTC", "America/New_York", "Asia/Kolkata", "Pacific/Chatham"]),
    after=st.integers(0, 10**9).map(lambda n: datetime.fromtimestamp(1.7e9 + n / 10, UTC)),
)
def test_every_firing_follows_the_one_before(
    values: dict[str, Any], zone: str, after: datetime
) -> None:
    chosen = schedule(**values, timezone=zone)
    first = asyncio.run(next_firing(chosen, after))
    assert first > after
    between = after + (first - after) / 2
    assert asyncio.run(next_firing(chosen, between)) == first
    longest = timedelta(hours=26) if chosen.cron else timedelta(seconds=chosen.every.seconds)  # type: ignore[union-attr, arg-type]
    assert first - after <= longest + timedelta(hours=1)


def test_only_configurations_with_a_schedule_and_a_name_of_their_own_are_served(
    tmp_path: Path,
) -> None:
    a, b = (str(tmp_path / write_config(tmp_path, name)) for name in ("a", "b"))
    assert [update.name for update in read_updates([a, b])] == ["a", "b"]
    (tmp_path / "plain.yaml").write_text("data: {source: a.npy}\nmodel: {n_components: 2}\n")
    with pytest.raises(ConfigError) as caught:
        read_updates([a, str(tmp_path / "plain.yaml"), str(tmp_path / "none.yaml"), a])
    missing, absent, twice = str(caught.value).splitlines()
    assert "plain.yaml: schedule: is missing" in missing
    assert "no such configuration" in absent
    assert f"'a' is also the name of {a}" in twice
    with pytest.raises(ConfigError, match="overlap"):
        read_updates([a], ["schedule.overlap=skp"])


def test_what_happens_is_told_in_words() -> None:
    address = "http://127.0.0.1:4200/api"
    assert told({"server": address, "own": False}) == f"Prefect server {address}"
    event = {
        "deployment": "update/nightly",
        "schedule": "15 2 * * * UTC",
        "overlap": "skip",
        "next": "2026-11-26T02:15:00+00:00",
        "catch_up": True,
    }
    assert told(event) == (
        "update/nightly: 15 2 * * * UTC, next 2026-11-26T02:15:00+00:00, overlap skip, catching up "
        "on what was missed"
    )
    run = {"run": "x", "name": "nightly", "ended": "2026-11-26T02:16:00+00:00", "state": "Failed"}
    assert told({**run, "message": "late"}) == "2026-11-26T02:16:00+00:00 nightly failed: late"


def test_the_command_refuses_before_anything_starts(tmp_path: Path) -> None:
    write_config(tmp_path, "a")
    (tmp_path / "plain.yaml").write_text("data: {source: a.npy}\nmodel: {n_components: 2}\n")

    def said(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "flows.cli", "serve", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert (ran.returncode, ran.stdout) == (2, "")
        return ran.stderr

    assert "schedule: is missing" in said("plain.yaml")
    # An override is for all; a model must be there to be updated.
    assert "a.yaml: publish.model is not set" in said("a.yaml", "schedule.overlap=queue")
    assert "no model there yet" in said("a.yaml", "publish={model: models/none}")
    assert not (tmp_path / ".genstream").exists()
