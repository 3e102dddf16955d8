"""What a result rests on beside its config: versions, commit, machine."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorflow-datasets",
    "grain",
    "tokenizers",
)


def versions() -> dict[str, str]:
    """Python and the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of this code, with "-dirty" where files differ from it.

    Outside of a checkout, as in a copy on another machine: what MHA_JAX_COMMIT in the environment says, or None.
    """
    root = Path(__file__).parents[2]
    told = os.environ.get("MHA_JAX_COMMIT") or None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return told  # installed inside of somebody else's repository
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return told
