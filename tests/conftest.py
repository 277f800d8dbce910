"""Set-up shared by all tests: one BLAS thread, a silent Prefect, example data, absent packages."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

# A machine that others share is slow now and then: examples are judged by what they show.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

# Before numpy, or its BLAS has already made its threads: repeatable bits need one thread.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
# Before prefect, which reads its settings once.
os.environ.update(
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_LEVEL="WARNING",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="180",
)
os.environ.pop("PREFECT_API_URL", None)
os.environ.setdefault("MPLBACKEND", "agg")


class Without:
    """A finder of the import system that has never heard of some packages."""

    def __init__(self, finder: Any, packages: Collection[str]) -> None:
        self.finder = finder
        self.packages = frozenset(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # None, as for a package that is not there: those who only ask whether it is must hear no.
        if fullname.partition(".")[0] in self.packages:
            return None
        found: ModuleSpec | None = self.finder.find_spec(fullname, path, target)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="run as if PACKAGE were not installed (may be given several times)",
    )


def pytest_configure(config: pytest.Config) -> None:
    absent = config.getoption("--without")
    if loaded := sorted(name for name in absent if name in sys.modules):
        raise pytest.UsageError(f"--without comes too late for {', '.join(loaded)}")
    if absent:
        # Every finder: pytest has one of its own, which finds packages that carry a plugin.
        sys.meta_path[:] = [Without(finder, absent) for finder in sys.meta_path]
    if found := [name for name in absent if importlib.util.find_spec(name)]:
        raise pytest.UsageError(f"--without had no effect on {', '.join(found)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what needs the Prefect server in one process, so that only one server starts."""
    for item in items:
        if item.get_closest_marker("flows"):
            item.add_marker(pytest.mark.xdist_group("flows"))


@pytest.fixture(scope="session")
def example_data() -> Callable[[str], Path]:
    """Path of a file of `make data`; skips the test where it was never fetched."""
    data = pytest.importorskip("benchmarks.data")

    def find(name: str) -> Path:
        try:
            found: Path = data.path(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        return found

    return find


@pytest.fixture(scope="session")
def prefect_harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One temporary Prefect server for all tests marked `flows`: it takes about 20 s to start."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness(server_startup_timeout=180):
            yield
