"""Where the time of a fit went: laps of every thread at work, added up by what it did.

    with Profile() as found:
        fit(...)
    print(found.to_text())

A thread that takes part marks the end of whatever it just did (`mark`), so that the laps of a
thread leave no gap between them. Threads that take part in no profile pay a look-up a mark. What
is left of `wall x workers` is the time in which workers had nothing to do: they waited for the last
of them to end a pass, or for work that one thread does alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from genstream.errors import ConfigError

# What marks may say, in the order in which it happens, and what each means.
PARTS = {
    "read": "waiting for storage and copying bytes",
    "decode": "checking and unpacking what was read",
    "prepare": "parameters made ready for a pass",
    "features": "features of blocks of rows",
    "sweep": "features to statistics in one loop, where components are few",
    "score": "log-densities",
    "softmax": "responsibilities",
    "lists": "which components matter to which rows, where there are many",
    "gather": "sufficient statistics",
    "m_step": "parameters from statistics",
    "merge": "statistics of chunks added up",
    "cluster": "passes on a cluster, which is not looked into",
    "other": "all else that was done",
    "wait": "workers with nothing to do",
}

_thread = threading.local()


class _Laps:
    """The laps of one thread."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.seconds: dict[str, float] = {}
        self.cursor = time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.cursor
        self.cursor = now


class Profile:
    """The time of all workers, by what they did, while it is entered.

    `wall` are the seconds that it was entered, `workers` the most threads that worked at a time,
    and `seconds` those of each of `PARTS` that took any: they sum to `wall * workers`. `ahead` are
    seconds spent reading beside that, by threads that read chunks before they are wanted.

    Raises ConfigError where a thread enters one while it is in another.
    """

    def __init__(self) -> None:
        self.wall = 0.0
        self.workers = 1
        self.ahead = 0.0
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if current() is not None:
            raise ConfigError("a profile is being taken in this thread already")
        self._begin = time.perf_counter()
        _thread.laps = _Laps(self)
        return self

    def __exit__(self, *_: object) -> None:
        mark("other")
        self._add(_thread.laps)
        _thread.laps = None
        self.wall = time.perf_counter() - self._begin
        idle = self.wall * self.workers - sum(self.seconds.values())
        self.seconds["wait"] = max(0.0, idle)

    def _add(self, laps: _Laps) -> None:
        with self._lock:
            for part, seconds in laps.seconds.items():
                self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def read_ahead(self, seconds: float) -> None:
        """Note time of a thread that reads what a worker will want next."""
        with self._lock:
            self.ahead += seconds

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Within it this thread, which was started to work, takes part."""
        laps = _thread.laps = _Laps(self)
        try:
            yield
        finally:
            laps.mark("other")
            _thread.laps = None
            self._add(laps)

    @contextmanager
    def handed_over(self, workers: int) -> Iterator[None]:
        """Within it other threads do the work, and this one waits for them."""
        mark("other")
        with self._lock:
            self.workers = max(self.workers, workers)
        try:
            yield
        finally:
            _thread.laps.cursor = time.perf_counter()

    def to_json(self) -> dict[str, Any]:
        """Plain values: `wall`, `workers`, `ahead` and the `seconds` of each part."""
        return {
            "wall": self.wall,
            "workers": self.workers,
            "ahead": self.ahead,
            "seconds": {part: self.seconds[part] for part in PARTS if part in self.seconds},
        }

    def to_text(self) -> str:
        """A line a part: seconds, share of all workers' time, and what the part is."""
        return profile_text(self.to_json())


def profile_text(found: dict[str, Any]) -> str:
    """What `Profile.to_json` gave, as a table."""
    whole = max(found["wall"] * found["workers"], 1e-9)
    lines = [
        f"{part:8} {seconds:9.2f} s {100 * seconds / whole:5.1f} %  {PARTS[part]}"
        for part, seconds in found["seconds"].items()
    ]
    lines.append(f"{'in all':8} {whole:9.2f} s 100.0 %  {found['wall']:.2f} s x {found['workers']}")
    if found["ahead"]:
        lines.append(f"{'beside':8} {found['ahead']:9.2f} s          reading ahead meanwhile")
    return "\n".join(lines)


def current() -> Profile | None:
    """The profile that this thread takes part in."""
    laps: _Laps | None = getattr(_thread, "laps", None)
    return None if laps is None else laps.profile


def mark(part: str) -> None:
    """Say what this thread has done since its last mark: one of `PARTS`."""
    laps: _Laps | None = getattr(_thread, "laps", None)
    if laps is not None:
        laps.mark(part)
