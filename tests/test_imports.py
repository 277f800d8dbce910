"""What `import genstream` costs, and what it leaves alone."""

import json
import subprocess
import sys

import pytest


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )


def seconds(statement: str) -> float:
    """Time of one statement in a fresh interpreter, interpreter start excluded."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(run(code).stdout)


@pytest.mark.parametrize("statement", ["import genstream", "from genstream import *"])
def test_import_leaves_heavy_packages_alone(statement):
    """Only what draws, orchestrates or spreads the work needs them, not the public names."""
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run(code).stdout))
    assert "genstream" in loaded
    assert not loaded & {"prefect", "matplotlib", "distributed", "flows"}


def test_import_is_silent():
    done = run("import genstream", "-W", "error")
    assert (done.stdout, done.stderr) == ("", "")


def test_import_time():
    """Under 1.5 times what importing the array libraries costs on the same machine.

    The fastest of a few interleaved runs stands for each, since a busy machine only ever adds;
    more runs are made before giving up.
    """
    ours, theirs = [], []
    for _ in range(12):
        theirs.append(seconds("import dask.array, zarr, xarray"))
        ours.append(seconds("import genstream"))
        if len(ours) >= 3 and min(ours) < 1.5 * min(theirs):
            break
    assert min(ours) < 1.5 * min(theirs), f"{min(ours):.2f} s against {min(theirs):.2f} s"


def test_every_public_name_is_there():
    import genstream

    missing = [name for name in genstream.__all__ if not hasattr(genstream, name)]
    assert not missing


def test_console_script_tells_its_version():
    from importlib.metadata import entry_points, version

    (script,) = entry_points(group="console_scripts", name="genstream")
    assert script.value == "flows.cli:main"
    assert version("genstream")
