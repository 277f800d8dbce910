"""What this machine offers: versions, cores, memory, disk, and whether Prefect answers."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from flows.terminal import bytes_text
from genstream import compiled

_PACKAGES = ("numpy", "scipy", "dask", "zarr", "xarray", "pyarrow", "scikit-learn", "prefect")


def examine() -> dict[str, str]:
    """What was found, by name."""
    import numpy as np  # noqa: F401 - loads the BLAS that is looked at
    import psutil
    import threadpoolctl

    found = {"genstream": _version("genstream"), "python": platform.python_version()}
    found |= {name: _version(name) for name in _PACKAGES}
    found["numba"] = _version("numba")
    if not compiled.compiled_available():
        found["numba"] += " (not used: NumPy does what it would)"
    found["system"] = f"{platform.system()} {platform.machine()}"
    if platform.system() not in ("Linux", "Darwin"):
        found["system"] += " (not promised to work: Linux and macOS are)"
    found["cores"] = (
        f"{len(psutil.Process().cpu_affinity())} of {os.cpu_count()} usable"
        if hasattr(psutil.Process, "cpu_affinity")
        else str(os.cpu_count())
    )
    found["blas"] = ", ".join(
        f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} thread(s)"
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    )
    memory = psutil.virtual_memory()
    found["memory"] = f"{bytes_text(memory.available)} of {bytes_text(memory.total)} free"
    disk = shutil.disk_usage(Path.cwd())
    found["disk"] = f"{bytes_text(disk.free)} of {bytes_text(disk.total)} free here"
    found["writable"] = "yes" if os.access(Path.cwd(), os.W_OK) else "no: runs cannot be kept here"
    found["prefect server"] = _prefect()
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _prefect() -> str:
    url = os.environ.get("PREFECT_API_URL", "")
    if not url:
        return "none configured (PREFECT_API_URL): flows use the embedded one"
    if not url.startswith(("http://", "https://")):
        return f"{url} is not an http address"
    try:
        with urlopen(f"{url.rstrip('/')}/health", timeout=5) as reply:  # noqa: S310 - checked above
            return f"{url} answers" if reply.status == 200 else f"{url} answers {reply.status}"
    except (URLError, OSError, ValueError) as error:
        return f"{url} does not answer: {getattr(error, 'reason', error)}"
