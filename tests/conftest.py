"""Settings of the whole suite: 8 simulated devices, no silent rank promotion, quick compilation."""

import os
import tempfile
from importlib.metadata import version
from importlib.util import find_spec

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Most of the suite's time is compilation of small programs, which run as well unoptimised.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters compile them in half the time. A flag that XLA does not know ends the process: these are 0.10's,
# and libtpu, which reads the same flags, has its own version.
if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None and "xla_cpu" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

# One file's small programs are another's too, and those of processes that tests start: a session compiles them once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="mha_jax-programs-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of one file serve no other, and would add up to gigabytes."""
    yield
    jax.clear_caches()
