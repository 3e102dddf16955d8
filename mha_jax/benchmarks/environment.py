"""The machine and the versions that a time belongs to."""

import importlib.metadata
import importlib.util
import platform
from typing import Any

import jax

from mha_jax.cores import num_cores, processor
from mha_jax.sweeps.provenance import commit, versions


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
