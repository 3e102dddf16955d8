"""The machine and the versions that a time belongs to."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import jax

from mha_jax.cores import num_cores
from mha_jax.sweeps.provenance import commit, versions


def processor() -> str:
    """The CPU's own name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def torch_device() -> str | None:
    """Where PyTorch stands beside JAX: "cpu" or "cuda"; None where it is not installed or has no such device."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    wanted = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    return None if wanted == "cuda" and not torch.cuda.is_available() else wanted


def environment() -> dict[str, Any]:
    """Processor, cores this process may use, accelerator, system, versions and commit."""
    found = versions()
    if importlib.util.find_spec("torch") is not None:
        found["torch"] = importlib.metadata.version("torch")
    return {
        "processor": processor(),
        "cores": num_cores(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": found,
        "commit": commit(),
    }
