"""The machine and the versions that a time belongs to."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import jax

from mha_jax.sweeps.provenance import commit, versions


def processor() -> str:
    """The CPU's own name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Processor, cores this process may use, accelerator, system, versions and commit."""
    found = versions()
    if importlib.util.find_spec("torch") is not None:
        found["torch"] = importlib.metadata.version("torch")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": found,
        "commit": commit(),
    }
