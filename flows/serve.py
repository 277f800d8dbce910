"""Updates on a schedule: `genstream serve CONFIG...`, one Prefect deployment a configuration.

A firing starts the flow in a process of its own, in the folder that `serve` was started in. While
a run is at work the next firing is skipped or queued, as the configuration says. What was missed
while nothing served, or was cut short, is made up for by one run at the next start, however many
firings it was.

Where `PREFECT_API_URL` names a server, that one keeps the schedules. Elsewhere `serve` starts one
of its own for as long as it lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from flows import orchestration
from flows.config import Config, Schedule, load
from flows.run import STATE, Interrupted
from flows.server import Server, loopback_server
from genstream.errors import ComputeError, ConfigError, ConflictError, StorageError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect import Flow
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.runner import Runner
    from prefect.schedules import Schedule as PrefectSchedule

POLL_SECONDS = 2.0
"""How often the server is asked what is due, and what has ended."""

ALIVE_SECONDS = 60
"""A deployment that was asked for within this time is being served."""

ANCHOR = datetime(2020, 1, 1)  # noqa: DTZ001 - on the clock of the schedule's time zone
"""`every` counts from here, so that a restart does not shift the times of firing."""

CATCH_UP = "catch-up"
"""Tag of a run that makes up for firings that were missed."""

_MARK = "GENSTREAM_SERVED_FROM"
_AT_SHUTDOWN = "Runner is shutting down."

Event = dict[str, Any]


@dataclass(frozen=True)
class Update:
    """A configuration to be served, and how it was named."""

    path: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        """Name of the deployment."""
        return self.config.name

    @property
    def schedule(self) -> Schedule:
        """When it fires."""
        assert self.config.schedule is not None
        return self.config.schedule

    @property
    def when(self) -> str:
        """When it fires, in words."""
        schedule = self.schedule
        often = schedule.cron or f"every {schedule.every}"
        return f"{often} {schedule.timezone}"


def read_updates(paths: Sequence[str], overrides: Sequence[str] = ()) -> list[Update]:
    """The configurations to be served, each with a schedule and a name of its own.

    Raises ConfigError, with every problem, where one has neither or two share a name.
    """
    updates: dict[str, Update] = {}
    problems: list[str] = []
    for path in paths:
        try:
            config = load(path, overrides)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if config.schedule is None:
            problems.append(
                f"{path}: schedule: is missing: say when, schedule: {{cron: '15 2 * * *'}}"
            )
        elif config.name in updates:
            problems.append(
                f"{path}: name: {config.name!r} is also the name of {updates[config.name].path}: "
                "a deployment is known by its name, give each its own"
            )
        else:
            updates[config.name] = Update(path, tuple(overrides), config)
    if problems:
        raise ConfigError("\n".join(problems))
    return list(updates.values())


def serve(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    flow: Flow[..., Any] | None = None,
    tell: Callable[[Event], None],
) -> None:
    """Serve configurations until SIGINT or SIGTERM arrives, which then raises `Interrupted`.

    Parameters
    ----------
    paths
        Files of the configurations, as they are found from the working directory.
    overrides
        `key=value` settings over those of every file.
    flow
        What a firing runs: a Prefect flow of ``(config: str, overrides: list[str])``; left out,
        `flows.update.update`.
    tell
        Called with what happens, as plain values: a `server` and `deployment` as each starts, a
        `run` as each ends.

    Raises
    ------
    ConfigError
        A configuration is wrong, has no schedule, or shares its name with another.
    ConflictError
        The folder, or a deployment of the same name, is served by another process.
    ComputeError
        The server does not come up, or is lost.
    """
    updates = read_updates(paths, overrides)
    if flow is None:
        _refuse_without_model(updates)
    with _alone(), _api() as server:
        tell({"server": os.environ["PREFECT_API_URL"], "own": server is not None})
        if flow is None:
            from flows.update import update

            flow = update
        number = asyncio.run(_Service(updates, flow, server, tell).run())
    raise Interrupted(number)


def _refuse_without_model(updates: list[Update]) -> None:
    """Raise ConfigError for all that have nothing to update yet: better now than at night."""
    from flows.updating import model_of

    problems = []
    for update in updates:
        try:
            model_of(update.config)
        except ConfigError as error:
            problems.append(f"{update.path}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within it no other process serves this folder, and nothing that a dead one started lives."""
    path = STATE / "serve.lock"
    try:
        STATE.mkdir(exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, kill or no kill
        except BlockingIOError:
            file.seek(0)
            raise ConflictError(
                f"process {file.read().strip()} serves this folder already: stop it, or name all "
                "configurations in one call"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        here = str(Path.cwd())
        _end_orphans(here)
        os.environ[_MARK] = here  # what is started from now on carries it
        try:
            yield
        finally:
            del os.environ[_MARK]


def _end_orphans(folder: str) -> None:
    """End what a `serve` of this folder that was killed has left behind."""
    import psutil

    orphans = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == folder and process.pid != os.getpid():
                process.terminate()
                orphans.append(process)
    _, stubborn = psutil.wait_procs(orphans, timeout=5)
    for process in stubborn:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(stubborn, timeout=5)


@contextlib.contextmanager
def _api() -> Iterator[Server | None]:
    """Within it `PREFECT_API_URL` names a server that answers: the user's, or one of our own."""
    orchestration.prepare()
    if orchestration.configured():
        orchestration.reach()
        yield None
        return
    with loopback_server(Path(os.environ["PREFECT_HOME"]) / "serve") as server:
        os.environ["PREFECT_API_URL"] = server.address  # for the processes of runs
        from prefect.settings import PREFECT_API_URL, temporary_settings

        try:
            # For this one, which may have imported Prefect, and so read its settings, before.
            with temporary_settings({PREFECT_API_URL: server.address}):
                yield server
        finally:
            del os.environ["PREFECT_API_URL"]


def prefect_schedule(schedule: Schedule) -> PrefectSchedule:
    """A schedule as Prefect has it."""
    from prefect.schedules import Cron, Interval

    if schedule.cron is not None:
        return Cron(schedule.cron, timezone=schedule.timezone)
    assert schedule.every is not None
    assert schedule.every.seconds is not None
    anchor = ANCHOR.replace(tzinfo=ZoneInfo(schedule.timezone))
    return Interval(
        timedelta(seconds=schedule.every.seconds), anchor_date=anchor, timezone=schedule.timezone
    )


async def next_firing(schedule: Schedule, after: datetime) -> datetime:
    """The first firing later than `after`, by the server's own arithmetic."""
    from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule

    chosen = prefect_schedule(schedule)
    dates: CronSchedule | IntervalSchedule
    if chosen.cron is not None:
        dates = CronSchedule(cron=chosen.cron, timezone=chosen.timezone)
    else:
        assert chosen.interval is not None
        dates = IntervalSchedule(
            interval=chosen.interval, anchor_date=chosen.anchor_date, timezone=chosen.timezone
        )
    begin = after + timedelta(microseconds=1)
    return next(date for date in await dates.get_dates(n=2, start=begin) if date > after)


def told(event: Event) -> str:
    """A line for people about what happened."""
    if "server" in event:
        own = " (its own, which ends with it)" if event["own"] else ""
        return f"Prefect server {event['server']}{own}"
    if "deployment" in event:
        catches_up = ", catching up on what was missed" if event["catch_up"] else ""
        return (
            f"{event['deployment']}: {event['schedule']}, next {event['next']}, overlap "
            f"{event['overlap']}{catches_up}"
        )
    message = f": {event['message']}" if event["message"] else ""
    return f"{event['ended']} {event['name']} {event['state'].lower()}{message}"


class _Service:
    """Deployments of a flow on a server, and the runner that starts what is due."""

    def __init__(
        self,
        updates: list[Update],
        flow: Flow[..., Any],
        server: Server | None,
        tell: Callable[[Event], None],
    ) -> None:
        self._updates, self._flow, self._server, self._tell = updates, flow, server, tell
        self._origin = f"genstream serve in {socket.gethostname()}:{Path.cwd()}"
        self._names: dict[UUID, str] = {}

    async def run(self) -> int:
        """Serve until a signal comes; its number."""
        import httpx
        from prefect.client.orchestration import get_client
        from prefect.runner import Runner

        # A firing is taken up when it is due, not before: its slot would be taken as early.
        runner = Runner(
            name=f"genstream-{os.getpid()}", query_seconds=POLL_SECONDS, prefetch_seconds=1
        )
        loop = asyncio.get_running_loop()
        signalled: asyncio.Future[int] = loop.create_future()

        def stop(number: int) -> None:
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_DFL)  # a second one ends us at once
            if not signalled.done():
                signalled.set_result(number)

        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, stop, each)
        # The runner would exit with 0 on SIGTERM; how we end is said here.
        runner.handle_sigterm = lambda *_: None  # type: ignore[method-assign]
        try:
            async with get_client() as client:
                await self._deploy(client, runner)
                working = asyncio.create_task(runner.start())
                watching = asyncio.create_task(self._watch(client))
                ends: list[asyncio.Future[Any]] = [signalled, working, watching]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                watching.cancel()
                if runner.started:
                    await runner.astop()
                else:
                    working.cancel()
                found = await asyncio.gather(watching, working, return_exceptions=True)
        except httpx.HTTPError as error:
            raise _explained(error) from error
        if signalled.done():
            return signalled.result()
        raise next(_explained(each) for each in found if isinstance(each, Exception))

    async def _deploy(self, client: PrefectClient, runner: Runner) -> None:
        """Register all, which takes its time, then let all begin, just before the runner does."""
        for update in self._updates:
            self._names[await self._register(client, runner, update)] = update.name
        for deployment, update in zip(self._names, self._updates, strict=True):
            self._tell(await self._begin(client, deployment, update))

    async def _register(self, client: PrefectClient, runner: Runner, update: Update) -> UUID:
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
        from prefect.exceptions import ObjectNotFound
        from prefect.types.entrypoint import EntrypointType

        with contextlib.suppress(ObjectNotFound):
            before = await client.read_deployment_by_name(self._full_name(update))
            self._refuse_if_served_elsewhere(before)
            await _free_slots(client, before)
        skip = update.schedule.overlap == "skip"
        return await runner.aadd_flow(
            self._flow,
            name=update.name,
            schedule=prefect_schedule(update.schedule),
            paused=False,
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1,
                collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
                if skip
                else ConcurrencyLimitStrategy.ENQUEUE,
            ),
            parameters={"config": update.path, "overrides": list(update.overrides)},
            description=self._origin,
            tags=["genstream"],
            entrypoint_type=EntrypointType.MODULE_PATH,
        )

    async def _begin(self, client: PrefectClient, deployment: UUID, update: Update) -> Event:
        from prefect.states import Scheduled

        now = datetime.now(UTC)
        await _drop_due(client, deployment, now)
        makes_up = update.schedule.catch_up and await _missed(
            client, deployment, update.schedule, now
        )
        if makes_up:
            # Due before all that is scheduled from here on, so that it gets the slot.
            await client.create_flow_run_from_deployment(
                deployment, state=Scheduled(scheduled_time=now), tags=[CATCH_UP]
            )
        # The server's scheduler comes by in a few seconds and looks ahead only: what is due until
        # then would be lost.
        await client._client.post(
            f"/deployments/{deployment}/schedule", json={"start_time": now.isoformat()}
        )
        following = await next_firing(update.schedule, now)
        return {
            "deployment": self._full_name(update),
            "config": update.path,
            "schedule": update.when,
            "overlap": update.schedule.overlap,
            "next": following.isoformat(timespec="seconds"),
            "catch_up": makes_up,
        }

    def _full_name(self, update: Update) -> str:
        return f"{self._flow.name}/{update.name}"

    def _refuse_if_served_elsewhere(self, deployment: DeploymentResponse) -> None:
        polled = deployment.last_polled
        if deployment.description == self._origin or polled is None:
            return
        if datetime.now(UTC) - polled < timedelta(seconds=ALIVE_SECONDS):
            raise ConflictError(
                f"{deployment.name}: is served already on this server ({deployment.description}): "
                f"stop that and wait {ALIVE_SECONDS} s, or give this configuration another name"
            )

    async def _watch(self, client: PrefectClient) -> None:
        """Tell of each run as it ends. Raises ComputeError when our own server is gone."""
        seen: set[UUID] = set()
        since = datetime.now(UTC)
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if self._server is not None and self._server.ended:
                raise ComputeError(
                    "the Prefect server of this schedule ended: serve again, and look into "
                    f"{os.environ['PREFECT_HOME']}/serve for why"
                )
            ended = await _runs(
                client,
                self._names,
                end_time={"after_": since - timedelta(seconds=60)},
            )
            for run in sorted(ended, key=lambda each: each.end_time or since):
                if run.id not in seen and run.end_time and run.end_time >= since:
                    seen.add(run.id)
                    self._tell(self._ended(run))

    def _ended(self, run: FlowRun) -> Event:
        assert run.state is not None
        assert run.deployment_id is not None
        return {
            "run": run.name,
            "name": self._names[run.deployment_id],
            "state": run.state.name,
            "due": _text(run.expected_start_time),
            "started": _text(run.start_time),
            "ended": _text(run.end_time),
            "catch_up": CATCH_UP in run.tags,
            "message": " ".join((run.state.message or "").split()),
        }


def _explained(error: Exception) -> Exception:
    """What a service ended of: a server that is lost is told from all else."""
    import httpx

    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    # The runner gives up with a plain RuntimeError after a few polls that failed.
    if not isinstance(error, httpx.HTTPError) and "error threshold" not in str(error):
        return error
    where = os.environ["PREFECT_API_URL"]
    reason = " ".join(str(error).split())[:200]
    return ComputeError(f"the Prefect server at {where} was lost ({reason}): serve again")


async def _runs(
    client: PrefectClient, deployments: Sequence[UUID] | dict[UUID, str], **criteria: Any
) -> list[FlowRun]:
    """The newest runs of deployments, at most 200, by when they were due."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    chosen = {"deployment_id": {"any_": list(deployments)}, **criteria}
    return await client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(chosen),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=200,
    )


async def _free_slots(client: PrefectClient, deployment: DeploymentResponse) -> None:
    """Mark runs of a `serve` that is no more as Crashed, and free what they held.

    Nothing of the deployment runs when this is called, whatever the server says.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    at_work = {"type": {"any_": [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]}}
    for run in await _runs(client, [deployment.id], state=at_work):
        message = "its process was gone when `genstream serve` began anew"
        await client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    if limit := deployment.global_concurrency_limit:
        # Leases live in the server's memory: one that was restarted cannot free their slots.
        await client._client.patch(f"/v2/concurrency_limits/{limit.id}", json={"active_slots": 0})


async def _drop_due(client: PrefectClient, deployment: UUID, now: datetime) -> None:
    """Delete runs that were due or queued before `now`: one is to make up for them all."""
    overdue = {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"before_": now}}
    while due := [
        run
        for run in await _runs(client, [deployment], **overdue)
        if run.auto_scheduled or CATCH_UP in run.tags
    ]:
        await asyncio.gather(*(client.delete_flow_run(run.id) for run in due))


async def _missed(
    client: PrefectClient, deployment: UUID, schedule: Schedule, now: datetime
) -> bool:
    """Whether a firing came before `now` while nothing served, or the last run was cut short."""
    from prefect.client.schemas.objects import StateType

    ended = {"type": {"not_any_": [StateType.SCHEDULED]}}
    known = await _runs(client, [deployment], state=ended)
    never = datetime.min.replace(tzinfo=UTC)
    finished, cut_short = never, never
    last = (await client.read_deployment(deployment)).created or now
    for run in known:
        due = run.expected_start_time or never
        last = max(last, due)
        if run.state_type in (StateType.COMPLETED, StateType.FAILED):
            finished = max(finished, due)
        elif run.state_type is StateType.CRASHED or (
            run.state is not None and run.state.message == _AT_SHUTDOWN
        ):
            cut_short = max(cut_short, due)
    return cut_short > finished or await next_firing(schedule, last) <= now


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds")
